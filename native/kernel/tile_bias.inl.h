// Biases of a block of keys, added up in log2 units and laid out as the scores are: bias[key][lane].

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

// Adds `n` keys of one lane's bias row; `row` is the element of the first key.
template <class A>
TW_INLINE void add_bias_row(const void *data, int32_t dtype, int64_t row, int64_t stride, int n, int width, A *column) {
    if (dtype == (sizeof(A) == 4 ? TW_FLOAT32 : TW_FLOAT64) && stride == 1) {
        const A *own = static_cast<const A *>(data) + row;
        for (int j = 0; j < n; ++j) column[j * width] += in_log2<A>(own[j]);
        return;
    }
    for (int j = 0; j < n; ++j) column[j * width] += in_log2<A>(bias_at<A>(data, dtype, row + j * stride));
}

// Adds every bias of row (b, h, i) for n keys from `key` to column[0], column[width], ...
template <class A>
TW_INLINE void add_biases(const tw_problem &p, int64_t b, int64_t h, int64_t i, int64_t key, int n, int width,
                          A *column) {
    for (int t = 0; t < p.bias_count; ++t) {
        const tw_bias &own = p.bias[t];
        const int64_t row = b * own.stride_b + h * own.stride_h + i * own.stride_i + key * own.stride_j;
        add_bias_row(own.data, own.dtype, row, own.stride_j, n, width, column);
    }
    if (p.table.data) {
        const int64_t row = b * p.table.stride_b + h * p.table.stride_h + key - i + p.q_len - 1;
        add_bias_row(p.table.data, sizeof(A) == 4 ? TW_FLOAT32 : TW_FLOAT64, row, 1, n, width, column);
    }
}

// Adds W rows' biases for n keys to W lanes of bias[key][width], where each row's keys stand beside each other: W by W
// numbers at a time, through a transposition in registers.
template <class A, class T> static void add_rows(const T *const *rows, int n, int width, A *bias) {
    constexpr int W = lanes<A>;
    for (int j = 0; j < n; j += W) {
        vec<A> x[W];
        TW_UNROLL(int l = 0; l < W; ++l) x[l] = j + W <= n ? widen(rows[l] + j) : widen_first(rows[l] + j, n - j);
        transpose<A>(x);
        TW_UNROLL(int i = 0; i < W; ++i)
            if (j + i < n) {
                A *const to = bias + (j + i) * width;
                store(to, load(to) + in_log2<A>(x[i]));
            }
    }
}

// The same where the lanes stand beside each other, `stride` numbers from key to key.
template <class A, class T> static void add_keys(const T *row, int64_t stride, int n, int width, A *bias) {
    for (int j = 0; j < n; ++j, row += stride, bias += width) store(bias, load(bias) + in_log2<A>(widen(row)));
}

// The same where all lanes read one row.
template <class A, class T> static void add_row(const T *row, int n, int width, A *bias) {
    constexpr int W = lanes<A>;
    for (int j = 0; j < n; j += W) {
        A numbers[W];
        store(numbers, j + W <= n ? widen(row + j) : widen_first(row + j, n - j));
        for (int i = 0; i < W && j + i < n; ++i) {
            A *const to = bias + (j + i) * width;
            store(to, load(to) + splat(in_log2<A>(numbers[i])));
        }
    }
}

// Adds one bias, of type T, to all lanes.
template <class T, class M>
static void add_bias(const tw_bias &own, int64_t b, const Tile<M> &tile, int64_t key, int n, sum_of<M> *bias) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    for (int first = 0; first < tile.width; first += W) {
        const T *rows[W];
        bool beside = true, same = true; // whether the lanes' rows stand beside each other, or are one
        for (int l = 0; l < W; ++l) {
            const int64_t h = tile.h[first + l], i = tile.i[first + l];
            rows[l] = static_cast<const T *>(own.data) + b * own.stride_b + h * own.stride_h + i * own.stride_i +
                      key * own.stride_j;
            beside = beside && rows[l] == rows[0] + l;
            same = same && rows[l] == rows[0];
        }
        if (own.stride_j == 1 && same)
            add_row<A>(rows[0], n, tile.width, bias + first);
        else if (own.stride_j == 1) {
            for (int l = 0; l < W; ++l) // most often the tile's next block is the next in memory
                for (int j = 0; j < n; j += int(64 / sizeof(T))) __builtin_prefetch(rows[l] + block_keys + j, 0, 2);
            add_rows<A>(rows, n, tile.width, bias + first);
        } else if (beside)
            add_keys<A>(rows[0], own.stride_j, n, tile.width, bias + first);
        else
            for (int l = 0; l < W; ++l)
                add_bias_row(rows[l], own.dtype, 0, own.stride_j, n, tile.width, bias + first + l);
    }
}

// Adds the table: lanes of consecutive queries read consecutive numbers of it, the last query first.
template <class M>
static void add_table(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n, sum_of<M> *bias) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
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
            add_rows<A>(rows, n, tile.width, bias + first);
            continue;
        }
        for (int j = 0; j < n; ++j) {
            A *const to = bias + first + j * tile.width;
            store(to, load(to) + in_log2<A>(reversed<A>(load(rows[W - 1] + j), first_indices<W>{})));
        }
    }
}

template <class M>
static void gather_bias(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n, sum_of<M> *bias) {
    using A = sum_of<M>;
    __builtin_memset(bias, 0, size_t(n) * size_t(tile.width) * sizeof(A));
    for (int t = 0; t < p.bias_count; ++t) {
        const tw_bias &own = p.bias[t];
        if (own.dtype == (sizeof(A) == 4 ? TW_FLOAT32 : TW_FLOAT64)) {
            add_bias<A>(own, b, tile, key, n, bias);
            continue;
        }
        if constexpr (sizeof(A) == 4) {
            if (own.dtype == TW_BFLOAT16) {
                add_bias<bfloat>(own, b, tile, key, n, bias);
                continue;
            }
            if (own.dtype == TW_FLOAT16) {
                add_bias<half>(own, b, tile, key, n, bias);
                continue;
            }
        }
        for (int l = 0; l < tile.width; ++l) {
            const int64_t row =
                b * own.stride_b + tile.h[l] * own.stride_h + tile.i[l] * own.stride_i + key * own.stride_j;
            add_bias_row(own.data, own.dtype, row, own.stride_j, n, tile.width, bias + l);
        }
    }
    if (p.table.data) add_table(p, b, tile, key, n, bias);
}

// A bias of -inf bars its pair as a mask does, whatever the key holds: takes such lanes out of the words of n keys, and
// says whether there are any.
template <class A> TW_INLINE bool bar_by_bias(const A *bias, int n, int width, uint64_t *words) {
    vec<A> least = {};
    for (int at = 0; at < n * width; at += lanes<A>) {
        const vec<A> x = load(bias + at);
        least = x < least ? x : least;
    }
    if (!lane_bits(least == -A(__builtin_inf()))) return false;
    uint64_t any = 0;
    for (int j = 0; j < n; ++j)
        for (int l = 0; l < width; l += lanes<A>) {
            const uint64_t barred = lane_bits(load(bias + j * width + l) == -A(__builtin_inf())) << l;
            any |= barred;
            words[j] &= ~barred;
        }
    return any != 0;
}

// keep[key]: the lanes whose pair with that key survives dropout.
template <class M>
static void draw_dropout(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n, uint64_t *keep) {
    uint64_t numbers[most_lanes], step = 0;
    for (int l = 0; l < tile.width; ++l) numbers[l] = pair_number(p, b, tile.h[l], tile.i[l], key, &step);
    keep_pairs(p.dropout, numbers, tile.width, step, n, keep);
}
