// Biases of a block of keys, added up and laid out as the scores are: bias[key][lane]. They are multiplied by log2(e) where
// they are added to scores, in one rounding with it.

TW_INLINE float half_to_float(uint16_t h) {
    // The exponent is rebased by a multiplication, which also makes denormals right.
    uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = uint32_t(h & 0x7FFFu) << 13;
    if (rest >= 0x0F800000u) rest |= 0x7F800000u; // infinity and NaN
    union {
        uint32_t bits;
        float value;
    } number = {rest};
    if (rest < 0x7F800000u) number.value *= 5.192296858534828e33f; // 2^112
    number.bits |= sign;
    return number.value;
}

TW_INLINE float bfloat_to_float(uint16_t b) {
    union {
        uint32_t bits;
        float value;
    } number = {uint32_t(b) << 16};
    return number.value;
}

template <class A> TW_INLINE A bias_at(const void *data, int32_t dtype, int64_t at) {
    switch (dtype) {
    case TW_FLOAT32: return A(static_cast<const float *>(data)[at]);
    case TW_FLOAT64: return A(static_cast<const double *>(data)[at]);
    case TW_FLOAT16: return A(half_to_float(static_cast<const uint16_t *>(data)[at]));
    default: return A(bfloat_to_float(static_cast<const uint16_t *>(data)[at]));
    }
}

// The numbers of a lane's row from `key` on.
template <class T, class M>
TW_INLINE const T *bias_row(const tw_bias &own, int64_t b, const Tile<M> &tile, int lane, int64_t key) {
    return static_cast<const T *>(own.data) + b * own.stride_b + tile.h[lane] * own.stride_h +
           tile.i[lane] * own.stride_i + key * own.stride_j;
}

// A block's sum of biases as it is made: the first array is written, the others are added to what is there. What adds to it
// returns the least of its numbers in some lane, or 0.
template <class A> struct BiasSum {
    A *bias; // [keys][width]
    int width;
    bool adds;
};
template <class A> TW_INLINE vec<A> smaller(vec<A> a, vec<A> b) { return b < a ? b : a; }
template <class A> TW_INLINE void put(const BiasSum<A> &sum, int64_t at, vec<A> x, vec<A> &least) {
    least = smaller<A>(least, x);
    store(sum.bias + at, sum.adds ? load(sum.bias + at) + x : x);
}

// W rows' biases for n keys, where each row's keys stand beside each other, in the lanes from `first`: W by W numbers at a
// time, through a transposition in registers.
template <class A, class T> static vec<A> put_rows(const T *const *rows, int n, int first, BiasSum<A> sum) {
    constexpr int W = lanes<A>;
    vec<A> least = {};
    for (int j = 0; j < n; j += W) {
        vec<A> x[W];
        TW_UNROLL(int l = 0; l < W; ++l) x[l] = j + W <= n ? widen(rows[l] + j) : widen_first(rows[l] + j, n - j);
        transpose<A>(x);
        TW_UNROLL(int i = 0; i < W; ++i)
            if (j + i < n) put(sum, (j + i) * sum.width + first, bounded<A>(x[i]), least);
    }
    return least;
}

// The same where the lanes stand beside each other, `stride` numbers from key to key.
template <class A, class T> static vec<A> put_keys(const T *row, int64_t stride, int n, int first, BiasSum<A> sum) {
    vec<A> least = {};
    for (int j = 0; j < n; ++j, row += stride) put(sum, j * sum.width + first, bounded<A>(widen(row)), least);
    return least;
}

// The same where all lanes read one row.
template <class A, class T> static vec<A> put_row(const T *row, int n, int first, BiasSum<A> sum) {
    constexpr int W = lanes<A>;
    vec<A> least = {};
    for (int j = 0; j < n; j += W) {
        A numbers[W];
        store(numbers, bounded<A>(j + W <= n ? widen(row + j) : widen_first(row + j, n - j)));
        for (int i = 0; i < W && j + i < n; ++i) put(sum, (j + i) * sum.width + first, splat(numbers[i]), least);
    }
    return least;
}

// The same in one lane, number after number.
template <class A>
static vec<A> put_numbers(const void *data, int32_t dtype, int64_t row, int64_t stride, int n, int lane,
                          BiasSum<A> sum) {
    A least = 0;
    for (int j = 0; j < n; ++j) {
        const A x = bounded<A>(bias_at<A>(data, dtype, row + j * stride));
        A &to = sum.bias[j * sum.width + lane];
        to = sum.adds ? to + x : x;
        least = x < least ? x : least;
    }
    return splat(least);
}

// Adds every bias of row (b, h, i) for n keys from `key` to bias[0], bias[1], ...
template <class A>
TW_INLINE void add_biases(const tw_problem &p, int64_t b, int64_t h, int64_t i, int64_t key, int n, A *bias) {
    const BiasSum<A> sum = {bias, 1, true};
    for (int t = 0; t < p.bias_count; ++t) {
        const tw_bias &own = p.bias[t];
        const int64_t row = b * own.stride_b + h * own.stride_h + i * own.stride_i + key * own.stride_j;
        put_numbers<A>(own.data, own.dtype, row, own.stride_j, n, 0, sum);
    }
    if (p.table.data) {
        const int64_t row = b * p.table.stride_b + h * p.table.stride_h + key - i + p.q_len - 1;
        put_numbers<A>(p.table.data, sizeof(A) == 4 ? TW_FLOAT32 : TW_FLOAT64, row, 1, n, 0, sum);
    }
}

// One bias, of type T, in all lanes.
template <class T, class M>
static vec<sum_of<M>> put_bias(const tw_bias &own, int64_t b, const Tile<M> &tile, int64_t key, int n,
                               BiasSum<sum_of<M>> sum) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    vec<A> least = {};
    for (int first = 0; first < tile.width; first += W) {
        const T *rows[W];
        bool beside = true, same = true; // whether the lanes' rows stand beside each other, or are one
        for (int l = 0; l < W; ++l) {
            rows[l] = bias_row<T>(own, b, tile, first + l, key);
            beside = beside && rows[l] == rows[0] + l;
            same = same && rows[l] == rows[0];
        }
        if (own.stride_j == 1 && same)
            least = smaller<A>(least, put_row<A>(rows[0], n, first, sum));
        else if (own.stride_j == 1)
            least = smaller<A>(least, put_rows<A>(rows, n, first, sum));
        else if (beside)
            least = smaller<A>(least, put_keys<A>(rows[0], own.stride_j, n, first, sum));
        else
            for (int l = 0; l < W; ++l)
                least = smaller<A>(least, put_numbers<A>(rows[l], own.dtype, 0, own.stride_j, n, first + l, sum));
    }
    return least;
}

// The table: lanes of consecutive queries read consecutive numbers of it, the last query first.
template <class M>
static vec<sum_of<M>> put_table(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n,
                                BiasSum<sum_of<M>> sum) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    vec<A> least = {};
    for (int first = 0; first < tile.width; first += W) {
        const A *rows[W];
        bool beside = true;
        for (int l = 0; l < W; ++l) {
            const int64_t h = tile.h[first + l], i = tile.i[first + l];
            rows[l] = static_cast<const A *>(p.table.data) + b * p.table.stride_b + h * p.table.stride_h + key - i +
                      p.q_len - 1;
            beside = beside && rows[l] == rows[0] - l;
        }
        if (!beside) {
            least = smaller<A>(least, put_rows<A>(rows, n, first, sum));
            continue;
        }
        for (int j = 0; j < n; ++j)
            put(sum, j * sum.width + first, bounded<A>(reversed<A>(load(rows[W - 1] + j), first_indices<W>{})), least);
    }
    return least;
}

// The sum of all biases and the table for n keys. Returns whether -inf is among them.
template <class M>
static bool gather_bias(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n, sum_of<M> *bias) {
    using A = sum_of<M>;
    BiasSum<A> sum = {bias, tile.width, false};
    vec<A> least = {};
    const auto note = [&](vec<A> x) { least = smaller<A>(least, x); };
    for (int t = 0; t < p.bias_count; ++t, sum.adds = true) {
        const tw_bias &own = p.bias[t];
        if (own.dtype == (sizeof(A) == 4 ? TW_FLOAT32 : TW_FLOAT64)) {
            note(put_bias<A>(own, b, tile, key, n, sum));
            continue;
        }
        if constexpr (sizeof(A) == 4) {
            if (own.dtype == TW_BFLOAT16) {
                note(put_bias<bfloat>(own, b, tile, key, n, sum));
                continue;
            }
            if (own.dtype == TW_FLOAT16) {
                note(put_bias<half>(own, b, tile, key, n, sum));
                continue;
            }
        }
        for (int l = 0; l < tile.width; ++l) {
            const int64_t row =
                b * own.stride_b + tile.h[l] * own.stride_h + tile.i[l] * own.stride_i + key * own.stride_j;
            note(put_numbers<A>(own.data, own.dtype, row, own.stride_j, n, l, sum));
        }
    }
    if (p.table.data) note(put_table(p, b, tile, key, n, sum));
    return lane_bits(least == -A(__builtin_inf())) != 0;
}

// Asks for what gather_bias will read of the tile's next block, a share of its rows at each of `turns` turns: most often it
// is the next in memory. All at once they would wait for one another.
template <class M>
TW_INLINE void ask_for_bias(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t next_key, int turn,
                            int turns) {
    for (int t = 0; t < p.bias_count; ++t) {
        const tw_bias &own = p.bias[t];
        if (own.stride_j != 1 || own.stride_i == 0) continue;
        const int64_t bytes = own.dtype == TW_FLOAT64 ? 8 : own.dtype == TW_FLOAT32 ? 4 : 2;
        for (int l = tile.width * turn / turns; l < tile.width * (turn + 1) / turns; ++l) {
            const int64_t at_row = b * own.stride_b + tile.h[l] * own.stride_h + tile.i[l] * own.stride_i + next_key;
            const char *row = static_cast<const char *>(own.data) + bytes * at_row;
            for (int64_t at = 0; at < block_keys * bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
        }
    }
}

// A bias of -inf bars its pair as a mask does, whatever the key holds: takes such lanes out of the words of n keys.
template <class A> static void bar_by_bias(const A *bias, int n, int width, uint64_t *words) {
    for (int j = 0; j < n; ++j)
        for (int l = 0; l < width; l += lanes<A>)
            words[j] &= ~(lane_bits(load(bias + j * width + l) == -A(__builtin_inf())) << l);
}

// keep[key]: the lanes whose pair with that key survives dropout.
template <class M>
static void draw_dropout(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n, uint64_t *keep) {
    uint64_t numbers[most_lanes], step = 0;
    for (int l = 0; l < tile.width; ++l) numbers[l] = pair_number(p, b, tile.h[l], tile.i[l], key, &step);
    keep_pairs(p.dropout, numbers, tile.width, step, n, keep);
}
