// The backward pass of one tile and one block of 64 keys: probabilities made again from lse, gradients of the scores,
// and their sums into d_q, d_k, d_v and the biases (Dao et al., FlashAttention, 2022). With x the scores in log2 units:
//   p = 2^(x - lse)     ds = p (d_out . v + pull),  pull = d_lse - d_out . out     raw = ds times the softcap's slope
//   d_v += p d_out      d_k += raw q                                               d_q += raw k
// Scores, p, ds and d_q have queries in lanes, as forward. In d_k and d_v the lanes hold the head axis and the
// tile's rows are added one after another. Every sum runs in the order of keys or of rows, whatever the segments.

// What does not change during a segment. A tile keeps lse in `shift`, pull in `sum`, and d_q in `out`.
template <class A> struct Slopes {
    const tw_problem *problem;
    const tw_gradients *gradients;
    int64_t b, kv_head, first, last; // the segment's first and last key
    const A *k, *v;                  // from the segment's first key
    int64_t k_stride, v_stride, head_width, value_width; // the widths: D and Dv in whole vectors
    A *wide_k, *wide_v;              // the same, where the elements must be widened
    A *d_k, *d_v;                    // [keys][width]
    A *q_rows, *d_out_rows;          // [rows][width]: the tile's rows
    A *p, *ds, *raw, *bias;          // [block_keys + TW_GROUP_KEYS][tile width]; raw is ds where there is no softcap
    uint8_t *blocks;                 // what is known of each block of keys
    void (*meet)(Slopes &, int64_t key, int n); // when a block is first seen: reads it and clears its gradients
    bool facts, biased, general, scores_wanted;
};
enum { BLOCK_UNMET, BLOCK_FINITE, BLOCK_NOT_FINITE };

template <class A> static bool finite_rows(const A *numbers, int64_t stride, int64_t rows, int64_t columns) {
    vec<A> doubt = {}; // x - x is 0 for finite numbers, else NaN
    for (int64_t r = 0; r < rows; ++r, numbers += stride) {
        int64_t d = 0;
        for (; d + lanes<A> <= columns; d += lanes<A>) doubt += load(numbers + d) - load(numbers + d);
        if (d == columns) continue;
        const vec<A> rest = widen_first(numbers + d, int(columns - d));
        doubt += rest - rest;
    }
    return lane_bits(doubt != doubt) == 0;
}

template <class T, class A> static void meet_block(Slopes<A> &s, int64_t key, int n) {
    const tw_problem &p = *s.problem;
    const int64_t at = key - s.first;
    if constexpr (sizeof(T) != sizeof(A))
        for (int j = 0; j < n; ++j) {
            const T *k = tensor_row<const T>(p.k, s.b, s.kv_head, key + j);
            const T *v = tensor_row<const T>(p.v, s.b, s.kv_head, key + j);
            widen_row(k, p.head_dim, s.wide_k + (at + j) * s.k_stride);
            widen_row(v, p.value_dim, s.wide_v + (at + j) * s.v_stride);
        }
    const bool finite = finite_rows(s.k + at * s.k_stride, s.k_stride, n, p.head_dim) &&
                        finite_rows(s.v + at * s.v_stride, s.v_stride, n, p.value_dim);
    s.blocks[at / block_keys] = finite ? BLOCK_FINITE : BLOCK_NOT_FINITE;
    __builtin_memset(s.d_k + at * s.head_width, 0, size_t(block_keys * s.head_width) * sizeof(A));
    __builtin_memset(s.d_v + at * s.value_width, 0, size_t(block_keys * s.value_width) * sizeof(A));
}

// The group of NK keys from `key`: p, ds and raw at place `at` of the block. words, keep: of the group, or NULL.
template <class A, int NZ, ScorePath PATH>
TW_INLINE void slope_group(const Slopes<A> &s, const Tile<A> &tile, const A *d_out, int64_t key, int64_t at,
                           const uint64_t *words, const uint64_t *keep) {
    constexpr int W = lanes<A>, width = NZ * W, NK = TW_GROUP_KEYS;
    const tw_problem &problem = *s.problem;
    // A ragged last group repeats the last key; its words bar every lane from the repetitions.
    int64_t row[NK];
    TW_UNROLL for (int n = 0; n < NK; ++n) row[n] = (key + n < s.last ? key + n : s.last) - s.first;
    const bool masked = PATH == MASKED || (PATH == GENERAL && words);

    const A *own[NK];
    TW_UNROLL for (int n = 0; n < NK; ++n) own[n] = s.k + row[n] * s.k_stride;
    vec<A> x[NK][NZ] = {};
    const A *q = tile.query;
    for (int64_t d = 0; d < problem.head_dim; ++d, q += width) {
        vec<A> query[NZ];
        TW_UNROLL for (int z = 0; z < NZ; ++z) query[z] = load(q + z * W);
        TW_UNROLL for (int n = 0; n < NK; ++n) {
            const vec<A> number = splat(own[n][d]);
            TW_UNROLL for (int z = 0; z < NZ; ++z) x[n][z] += number * query[z];
        }
    }
    // With dropout, s.p takes what is kept and s.ds the probabilities themselves, until they are overwritten.
    A *p = s.p + at * width, *ds = s.ds + at * width, *raw = s.raw + at * width;
    A *whole = PATH == GENERAL && keep ? ds : p;
    const bool capped = PATH == GENERAL && problem.softcap > 0;
    const A cap = A(problem.softcap * 1.4426950408889634074), twice_inverse = A(2 / problem.softcap);
    const A inverse_keep = A(problem.dropout.inverse_keep);
    TW_UNROLL for (int n = 0; n < NK; ++n) TW_UNROLL for (int z = 0; z < NZ; ++z) {
        const int place = n * width + z * W;
        if constexpr (PATH == GENERAL) {
            if (capped) {
                const vec<A> t = tanh_of_log2<A>(x[n][z] * twice_inverse);
                x[n][z] = cap * t;
                store(raw + place, A(1) - t * t);
            }
            if (s.biased) x[n][z] += load(s.bias + at * width + place);
        }
        vec<A> weight = exp2<A>(x[n][z] - load(tile.shift + z * W));
        if (masked) weight = select<A>(words[n] >> (z * W), weight, vec<A>{});
        store(whole + place, weight);
        if (PATH == GENERAL && keep) store(p + place, select<A>(keep[n] >> (z * W), weight * inverse_keep, vec<A>{}));
    }
    if (!s.scores_wanted) return;

    TW_UNROLL for (int n = 0; n < NK; ++n) own[n] = s.v + row[n] * s.v_stride;
    TW_UNROLL for (int n = 0; n < NK; ++n) TW_UNROLL for (int z = 0; z < NZ; ++z) x[n][z] = vec<A>{};
    for (int64_t e = 0; e < problem.value_dim; ++e, d_out += width) {
        vec<A> gradient[NZ];
        TW_UNROLL for (int z = 0; z < NZ; ++z) gradient[z] = load(d_out + z * W);
        TW_UNROLL for (int n = 0; n < NK; ++n) {
            const vec<A> number = splat(own[n][e]);
            TW_UNROLL for (int z = 0; z < NZ; ++z) x[n][z] += number * gradient[z];
        }
    }
    TW_UNROLL for (int n = 0; n < NK; ++n) TW_UNROLL for (int z = 0; z < NZ; ++z) {
        const int place = n * width + z * W;
        if (PATH == GENERAL && keep) x[n][z] = select<A>(keep[n] >> (z * W), x[n][z] * inverse_keep, vec<A>{});
        vec<A> slope = load(whole + place) * (x[n][z] + load(tile.sum + z * W));
        if (masked) slope = select<A>(words[n] >> (z * W), slope, vec<A>{});
        store(ds + place, slope);
        if (capped) {
            slope *= load(raw + place);
            if (masked) slope = select<A>(words[n] >> (z * W), slope, vec<A>{});
            store(raw + place, slope);
        }
    }
}

template <class A, int NC>
TW_INLINE void row_block(const A *weights, int width, const A *rows, int64_t stride, int count, A *out) {
    constexpr int W = lanes<A>, NK = TW_GROUP_KEYS;
    vec<A> acc[NK][NC];
    TW_UNROLL for (int n = 0; n < NK; ++n) TW_UNROLL for (int c = 0; c < NC; ++c)
        acc[n][c] = load(out + n * stride + c * W);
    for (int l = 0; l < count; ++l, rows += stride) {
        vec<A> row[NC];
        TW_UNROLL for (int c = 0; c < NC; ++c) row[c] = load(rows + c * W);
        TW_UNROLL for (int n = 0; n < NK; ++n) {
            const vec<A> weight = splat(weights[n * width + l]);
            TW_UNROLL for (int c = 0; c < NC; ++c) acc[n][c] += weight * row[c];
        }
    }
    TW_UNROLL for (int n = 0; n < NK; ++n) TW_UNROLL for (int c = 0; c < NC; ++c)
        store(out + n * stride + c * W, acc[n][c]);
}

// out [keys][columns] += weights [keys][width] times the first `count` rows [count][columns]; keys: whole groups.
template <class A>
static __attribute__((noinline)) void
add_rows(const A *weights, int width, const A *rows, int count, int64_t keys, int64_t columns, A *out) {
    constexpr int W = lanes<A>, NC = TW_TILE_VECTORS;
    for (int64_t j = 0; j < keys; j += TW_GROUP_KEYS) {
        int64_t d = 0;
        for (; d + NC * W <= columns; d += NC * W) row_block<A, NC>(weights, width, rows + d, columns, count, out + d);
        for (; d < columns; d += W) row_block<A, 1>(weights, width, rows + d, columns, count, out + d);
        weights += TW_GROUP_KEYS * width;
        out += TW_GROUP_KEYS * columns;
    }
}

// The same for pairs that are visible alone, where something is not finite.
template <class A>
TW_RARE void add_rows_carefully(const A *weights, int width, const A *rows, int count, int64_t keys, int64_t columns,
                                const uint64_t *words, A *out) {
    for (int64_t j = 0; j < keys; ++j)
        for (int l = 0; l < count; ++l)
            if (words[j] >> l & 1)
                for (int64_t d = 0; d < columns; ++d)
                    out[j * columns + d] += weights[j * width + l] * rows[l * columns + d];
}

template <class A>
TW_RARE void add_keys_carefully(const A *weights, int width, const A *k, int64_t stride, int64_t keys, int64_t columns,
                                const uint64_t *words, A *out) {
    for (int64_t j = 0; j < keys; ++j)
        for (int l = 0; l < width; ++l)
            if (words[j] >> l & 1)
                for (int64_t d = 0; d < columns; ++d)
                    out[d * width + l] += weights[j * width + l] * k[j * stride + d];
}

// Sums the places [begin, end) of the block at `key`, of which n keys exist. end is a whole group.
template <class A, int NZ>
static void add_run(const Slopes<A> &s, const Tile<A> &tile, int64_t key, int n, int begin, int end,
                    const uint64_t *words) {
    constexpr int width = NZ * lanes<A>;
    if (begin >= end) return;
    const tw_problem &p = *s.problem;
    const tw_gradients &g = *s.gradients;
    const int64_t at = key - s.first + begin, groups = end - begin, keys = (end < n ? end : n) - begin;
    const A *weights = s.p + begin * width, *ds = s.ds + begin * width, *raw = s.raw + begin * width;
    const A *k = s.k + at * s.k_stride;
    A *d_k = s.d_k + at * s.head_width, *d_v = s.d_v + at * s.value_width;
    const bool careful = tile.masked || s.blocks[at / block_keys] == BLOCK_NOT_FINITE;
    if (careful) {
        words += begin;
        if (g.d_q.data) add_keys_carefully(raw, width, k, s.k_stride, keys, p.head_dim, words, tile.out);
        if (g.d_k.data) add_rows_carefully(raw, width, s.q_rows, tile.rows, keys, s.head_width, words, d_k);
        if (g.d_v.data) add_rows_carefully(weights, width, s.d_out_rows, tile.rows, keys, s.value_width, words, d_v);
    } else {
        if (g.d_q.data) add_values<A, NZ, false>(raw, k, s.k_stride, keys, p.head_dim, tile.out);
        if (g.d_k.data) add_rows(raw, width, s.q_rows, tile.rows, groups, s.head_width, d_k);
        if (g.d_v.data) add_rows(weights, width, s.d_out_rows, tile.rows, groups, s.value_width, d_v);
    }
    for (int t = 0; t < g.gather_count; ++t) {
        const tw_gather &own = g.gather[t];
        for (int l = 0; l < tile.rows; ++l) {
            A *to = static_cast<A *>(own.data) + s.b * own.stride_b + tile.h[l] * own.stride_h +
                    tile.i[l] * own.stride_i + (key + begin) * own.stride_j;
            for (int64_t j = 0; j < keys; ++j) to[j * own.stride_j] += ds[j * width + l];
        }
    }
}

// One block of 64 keys (n <= 64 of them exist).
template <class A, int NZ> static void slope_block(Slopes<A> &s, Tile<A> &tile, const A *d_out, int64_t key, int n) {
    constexpr int W = lanes<A>, width = NZ * W, NK = TW_GROUP_KEYS;
    const tw_problem &p = *s.problem;
    uint64_t words[block_keys], keep[block_keys];
    if (s.facts && look(p, s.b, tile, key, n, words) == SEES_NOTHING) return;
    const uint64_t every_lane = first_bits(width);
    if (!s.facts)
        for (int j = 0; j < block_keys; ++j) words[j] = j < n ? every_lane : 0;
    if (s.blocks[(key - s.first) / block_keys] == BLOCK_UNMET) s.meet(s, key, n);
    if (s.biased) {
        gather_bias(p, s.b, tile, key, n, s.bias);
        for (int j = 0; j < n; ++j)
            for (int z = 0; z < NZ; ++z) {
                const uint64_t barred = lane_bits(load(s.bias + j * width + z * W) == -A(__builtin_inf()));
                words[j] &= ~(barred << (z * W));
            }
    }
    if (p.dropout.enabled) draw_dropout(p, s.b, tile, key, n, keep);
    int run = 0;
    for (int g = 0; g < n; g += NK) {
        uint64_t some = 0, all = every_lane;
        for (int j = g; j < g + NK; ++j) some |= words[j], all &= words[j];
        if (!some) {
            add_run<A, NZ>(s, tile, key, n, run, g, words);
            run = g + NK;
            continue;
        }
        const uint64_t *own = all != every_lane ? words + g : nullptr;
        if (s.general)
            slope_group<A, NZ, GENERAL>(s, tile, d_out, key + g, g, own, p.dropout.enabled ? keep + g : nullptr);
        else if (own)
            slope_group<A, NZ, MASKED>(s, tile, d_out, key + g, g, own, nullptr);
        else
            slope_group<A, NZ, PLAIN>(s, tile, d_out, key + g, g, nullptr, nullptr);
    }
    add_run<A, NZ>(s, tile, key, n, run, (n + NK - 1) / NK * NK, words);
}
