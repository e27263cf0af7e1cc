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

// Where a block's numbers of one array go: [keys][width]. What puts them there returns the largest of their sizes in some
// lane, as bits, which of infinities and NaN are larger than any number's: what is not as `bounded` leaves it is seen to
// afterwards, and rarely (`bound_block`).
template <class A> struct BiasBlock {
    A *bias;
    int width;
};
template <class A> TW_INLINE ivec<A> size_of(vec<A> x) { return (ivec<A>)x & ~((ivec<A>)splat(A(-0.0))); }
template <class A> TW_INLINE ivec<A> larger_size(ivec<A> a, ivec<A> b) { return a > b ? a : b; }
template <class A> TW_INLINE void put(const BiasBlock<A> &block, int64_t at, vec<A> x, ivec<A> &size) {
    size = larger_size<A>(size, size_of<A>(x));
    store(block.bias + at, x);
}

// W rows' biases for n keys, where each row's keys stand beside each other, in the lanes from `first`: W by W numbers at a
// time, through a transposition in registers.
template <class A, class T> static ivec<A> put_rows(const T *const *rows, int n, int first, BiasBlock<A> block) {
    constexpr int W = lanes<A>;
    ivec<A> size = {};
    vec<A> x[W];
    int j = 0;
    for (; j + W <= n; j += W) {
        TW_UNROLL(int l = 0; l < W; ++l) x[l] = widen(rows[l] + j);
        transpose<A>(x);
        TW_UNROLL(int i = 0; i < W; ++i) put(block, (j + i) * block.width + first, x[i], size);
    }
    if (j == n) return size;
    TW_UNROLL(int l = 0; l < W; ++l) x[l] = widen_first(rows[l] + j, n - j);
    transpose<A>(x);
    TW_UNROLL(int i = 0; i < W; ++i)
        if (j + i < n) put(block, (j + i) * block.width + first, x[i], size);
    return size;
}

// The same where the lanes stand beside each other, `stride` numbers from key to key.
template <class A, class T>
static ivec<A> put_keys(const T *row, int64_t stride, int n, int first, BiasBlock<A> block) {
    ivec<A> size = {};
    for (int j = 0; j < n; ++j, row += stride) put(block, j * block.width + first, widen(row), size);
    return size;
}

// The same where all lanes read one row.
template <class A, class T> static ivec<A> put_row(const T *row, int n, int first, BiasBlock<A> block) {
    constexpr int W = lanes<A>;
    ivec<A> size = {};
    for (int j = 0; j < n; j += W) {
        A numbers[W];
        store(numbers, j + W <= n ? widen(row + j) : widen_first(row + j, n - j));
        for (int i = 0; i < W && j + i < n; ++i) put(block, (j + i) * block.width + first, splat(numbers[i]), size);
    }
    return size;
}

// The same in one lane, number after number.
template <class A>
static ivec<A> put_numbers(const void *data, int32_t dtype, int64_t row, int64_t stride, int n, int lane,
                           BiasBlock<A> block) {
    ivec<A> size = {};
    for (int j = 0; j < n; ++j) {
        const A x = bias_at<A>(data, dtype, row + j * stride);
        block.bias[j * block.width + lane] = x;
        size = larger_size<A>(size, size_of<A>(splat(x)));
    }
    return size;
}

// Adds every bias of row (b, h, i) for n keys from `key` to bias[0], bias[1], ...
template <class A>
TW_INLINE void add_biases(const tw_problem &p, int64_t b, int64_t h, int64_t i, int64_t key, int n, A *bias) {
    const auto add = [&](const void *data, int32_t dtype, int64_t row, int64_t stride) {
        for (int j = 0; j < n; ++j) bias[j] += bounded<A>(bias_at<A>(data, dtype, row + j * stride));
    };
    for (int t = 0; t < p.bias_count; ++t) {
        const tw_bias &own = p.bias[t];
        const int64_t row = b * own.stride_b + h * own.stride_h + i * own.stride_i + key * own.stride_j;
        add(own.data, own.dtype, row, own.stride_j);
    }
    if (p.table.data) {
        const int64_t row = b * p.table.stride_b + h * p.table.stride_h + key - i + p.q_len - 1;
        add(p.table.data, sizeof(A) == 4 ? TW_FLOAT32 : TW_FLOAT64, row, 1);
    }
}

// One bias, of type T, in all lanes.
template <class T, class M>
static ivec<sum_of<M>> put_bias(const tw_bias &own, int64_t b, const Tile<M> &tile, int64_t key, int n,
                                BiasBlock<sum_of<M>> block) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    ivec<A> size = {};
    const auto note = [&](ivec<A> own) { size = larger_size<A>(size, own); };
    for (int first = 0; first < tile.width; first += W) {
        const T *rows[W];
        bool beside = true, same = true; // whether the lanes' rows stand beside each other, or are one
        for (int l = 0; l < W; ++l) {
            rows[l] = bias_row<T>(own, b, tile, first + l, key);
            beside = beside && rows[l] == rows[0] + l;
            same = same && rows[l] == rows[0];
        }
        if (own.stride_j == 1 && same)
            note(put_row<A>(rows[0], n, first, block));
        else if (own.stride_j == 1)
            note(put_rows<A>(rows, n, first, block));
        else if (beside)
            note(put_keys<A>(rows[0], own.stride_j, n, first, block));
        else
            for (int l = 0; l < W; ++l) note(put_numbers<A>(rows[l], own.dtype, 0, own.stride_j, n, first + l, block));
    }
    return size;
}

// One bias, of whatever type.
template <class M>
static ivec<sum_of<M>> put_array(const tw_bias &own, int64_t b, const Tile<M> &tile, int64_t key, int n,
                                 BiasBlock<sum_of<M>> block) {
    using A = sum_of<M>;
    if (own.dtype == (sizeof(A) == 4 ? TW_FLOAT32 : TW_FLOAT64)) return put_bias<A>(own, b, tile, key, n, block);
    if constexpr (sizeof(A) == 4) {
        if (own.dtype == TW_BFLOAT16) return put_bias<bfloat>(own, b, tile, key, n, block);
        if (own.dtype == TW_FLOAT16) return put_bias<half>(own, b, tile, key, n, block);
    }
    ivec<A> size = {};
    for (int l = 0; l < tile.width; ++l) {
        const int64_t row = b * own.stride_b + tile.h[l] * own.stride_h + tile.i[l] * own.stride_i + key * own.stride_j;
        size = larger_size<A>(size, put_numbers<A>(own.data, own.dtype, row, own.stride_j, n, l, block));
    }
    return size;
}

// The table: lanes of consecutive queries read consecutive numbers of it, the last query first.
template <class M>
static ivec<sum_of<M>> put_table(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n,
                                 BiasBlock<sum_of<M>> block) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    ivec<A> size = {};
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
            size = larger_size<A>(size, put_rows<A>(rows, n, first, block));
            continue;
        }
        for (int j = 0; j < n; ++j)
            put(block, j * block.width + first, reversed<A>(load(rows[W - 1] + j), first_indices<W>{}), size);
    }
    return size;
}

// Makes the numbers of a block what they are in scores (`bounded`). Returns whether -inf is among them.
template <class A> TW_RARE bool bound_block(BiasBlock<A> block, int n) {
    ivec<A> barring = {};
    for (int64_t at = 0; at < int64_t(n) * block.width; at += lanes<A>) {
        const vec<A> x = bounded<A>(load(block.bias + at));
        barring |= x == -A(__builtin_inf());
        store(block.bias + at, x);
    }
    return lane_bits(barring) != 0;
}

// The sum of all biases and the table for n keys. Returns whether -inf is among them.
template <class M>
static bool gather_bias(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n, sum_of<M> *bias) {
    using A = sum_of<M>;
    const int arrays = p.bias_count + (p.table.data != nullptr);
    A another[TW_TILE_VECTORS * lanes<A> * block_keys];
    bool bars = false;
    for (int t = 0; t < arrays; ++t) {
        const BiasBlock<A> block = {t ? another : bias, tile.width};
        const ivec<A> size =
            t < p.bias_count ? put_array(p.bias[t], b, tile, key, n, block) : put_table(p, b, tile, key, n, block);
        if (lane_bits(size > (ivec<A>)splat(most_bias<A>))) bars |= bound_block(block, n);
        for (int64_t at = 0; t && at < int64_t(n) * tile.width; at += lanes<A>)
            store(bias + at, load(bias + at) + load(another + at));
    }
    return bars;
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
