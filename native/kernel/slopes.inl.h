// The backward pass of one tile and one block of 64 keys: probabilities made again from lse, gradients of the scores,
// and their sums into d_q, d_k, d_v (and the biases: bias_slopes.inl.h) (Dao et al., FlashAttention, 2022). With x the
// scores in their units (units.inl.h):
//   p = 2^(x - lse)     ds = p (d_out . v + pull),  pull = d_lse - d_out . out     raw = ds times the softcap's slope
//   d_v += p d_out      d_k += raw q                                               d_q += raw k
// Scores, p, ds and d_q have queries in lanes, as forward. In d_k and d_v the lanes hold the head axis and the
// tile's rows are added one after another. Every sum runs in the order of keys or of rows, whatever the segments.

// Tiles of queries that pass over a segment together, a block at a time. What four of them add to the gradients to a block's
// keys and values, tile registers add at once: where there are more numbers than the first-level cache holds, reading and
// writing these takes as long as multiplying. A slot is what is kept of a block with one of the tiles until then.
template <class M> constexpr int tiles_together = M::tiled ? 4 : 1;

// Places for the scores of a block of keys with a tile, spare ones included.
template <class M> constexpr int64_t score_places = int64_t(block_keys + TW_GROUP_KEYS) * tile_rows<sum_of<M>>;

// The lanes that see each key of a block, and those that dropout keeps (more: amx_slopes.inl.h).
template <class M> struct SlopeWork {
    uint64_t words[1][block_keys], keep[block_keys];
    static constexpr int slot = 0;
};

// What passes over a block are for: the gradients, or, of far rows (far_rows.inl.h), first the largest score and then the
// sums of p and of p times its gradient.
enum Pass { PEAKS, SUMS, RESULTS };
template <class A> struct FarRows {
    A lse[most_lanes], peak[most_lanes], rest[most_lanes], sum[most_lanes], pull[most_lanes];
};
// Of the lanes from `lane`, those of a word; rest: scores less x, which is rounded.
template <class A> TW_INLINE void note_peak(FarRows<A> &found, int lane, uint64_t seen, vec<A> x, vec<A> rest) {
    const vec<A> peak = load(found.peak + lane), own = select<A>(seen, x, splat<A>(-A(__builtin_inf())));
    const vec<A> least = own > peak ? rest : load(found.rest + lane);
    store(found.peak + lane, own > peak ? own : peak);
    store(found.rest + lane, (own == peak) & (rest > least) ? rest : least);
}

// What does not change during a segment. A tile keeps lse in `shift`, pull in `sum`, d_q in `out`, and in `limit` what the
// probabilities of far rows are multiplied by. Units stand along the head axis where that is summed over; across keys or
// across rows where those are.
template <class M> struct Slopes {
    using A = sum_of<M>;
    using U = unit_of<M>;
    const tw_problem *problem;
    const tw_gradients *gradients;
    int64_t b, kv_head, first, last; // the segment's first and last key
    const U *k, *v;                  // [keys][units of D, Dv], from the segment's first key
    const U *k_across;               // [units of keys][D]
    int64_t k_stride, v_stride, across_stride, head_width, value_width; // the widths: D and Dv in whole vectors
    U *copy_k, *copy_v, *copy_across;                                   // the same, where they cannot be read in place
    A *d_k, *d_v;                                                       // [keys][width]
    U *q_rows, *d_out_rows;                     // [tiles together][units of rows][width]: the tiles' rows
    U *p, *raw;                                 // [tiles together][block_keys + TW_GROUP_KEYS][units of rows]
    U *raw_across;                              // [units of as many keys][rows]
    A *ds, *bias;                               // [block_keys + TW_GROUP_KEYS][rows]; ds where it is gathered
    A *cap_slopes;                              // [TW_GROUP_KEYS][rows]: the softcap's
    A factor;                                   // of the products (units.inl.h)
    uint8_t *blocks;                            // what is known of each block of keys
    void (*meet)(Slopes &, int64_t key, int n); // when a block is first seen: reads it and clears its gradients
    FarRows<A> *found;                          // of passes that look for it alone
    bool copied, facts, biased, general, scores_wanted;
    SlopeWork<M> work;
};
// Probabilities below this power of two are 0 here: their products with gradients, keys and queries would be denormal
// numbers, which take the processor a hundred times as long, and vanish beside those of the row's other keys.
template <class A> constexpr A faintest = exp_numbers<A>::smallest * A(0.8);

// Not finite: or, in parts, strange (amx_parts.inl.h).
enum { BLOCK_UNMET, BLOCK_FINITE, BLOCK_NOT_FINITE };

template <class M>
static void gather_slopes(const Slopes<M> &s, const Tile<M> &tile, int64_t key, int64_t keys, const sum_of<M> *ds);
template <class M> static void fetch_gathered(const Slopes<M> &s, const Tile<M> &tile, int64_t key, int n);

// In tile registers (amx_slopes.inl.h).
template <Pass PASS, class M>
static void slopes_in_tiles(Slopes<M> &s, Tile<M> &tile, const unit_of<M> *d_out, int64_t key, int n);
#if defined(__AMX_BF16__)
template <> struct SlopeWork<Tiles>;
template <class T> struct SlopeWork<Parts<T>>;
#endif

// A score less the reference of the lanes from `lane` of a tile with far rows: exactly 0 for the largest score of such a row.
template <class A, class Lanes>
TW_INLINE vec<A> less_far_reference(vec<A> x, vec<A> by, const A *bias, const Lanes &tile, int lane) {
    const vec<A> shift = load(tile.shift + lane), y = less_reference<A>(x, by, bias, shift) - load(tile.rest + lane);
    return coarse_lanes<A>(shift) ? whole_score<A>(x, by, bias) - shift : y;
}

// The probability of a lane's sink, of far rows to be multiplied by `limit` as the others are.
template <class A, class Lanes> TW_INLINE A sink_share(const tw_problem &p, const Lanes &tile, int lane) {
    return power_of_two_of(sink_less<A>(p, tile.h[lane], tile.shift[lane]) - tile.rest[lane]);
}

template <class T, class M> static void meet_block(Slopes<M> &s, int64_t key, int n) {
    const tw_problem &p = *s.problem;
    const int64_t at = key - s.first;
    [[maybe_unused]] uint64_t strange = 0;
    if (s.copied) {
        const Rows<T> k = {tensor_row<const T>(p.k, s.b, s.kv_head, key), p.k.stride_s, nullptr};
        const Rows<T> v = {tensor_row<const T>(p.v, s.b, s.kv_head, key), p.v.stride_s, nullptr};
        if constexpr (M::parts > 1) {
            strange = rows_in_parts(k, n, p.head_dim, s.copy_k + at * s.k_stride) |
                      rows_in_parts(v, n, p.value_dim, s.copy_v + at * s.v_stride);
            columns_in_parts(k, n, p.head_dim, s.copy_across + at / M::numbers * s.across_stride);
        } else {
            rows_in_units<M>(k, n, p.head_dim, s.copy_k + at * s.k_stride, s.k_stride);
            rows_in_units<M>(v, n, p.value_dim, s.copy_v + at * s.v_stride, s.v_stride);
        }
        if constexpr (M::numbers > 1 && M::parts == 1)
            keys_across_units<M>(k, n, p.head_dim, s.copy_across + at / M::numbers * s.across_stride, s.across_stride);
    }
    bool finite;
    if constexpr (M::parts > 1)
        finite = !strange;
    else
        finite = finite_rows(s.k + at * s.k_stride, s.k_stride, n, units_of<M>(p.head_dim)) &&
                 finite_rows(s.v + at * s.v_stride, s.v_stride, n, units_of<M>(p.value_dim));
    s.blocks[at / block_keys] = finite ? BLOCK_FINITE : BLOCK_NOT_FINITE;
    __builtin_memset(s.d_k + at * s.head_width, 0, size_t(block_keys * s.head_width) * sizeof(sum_of<M>));
    __builtin_memset(s.d_v + at * s.value_width, 0, size_t(block_keys * s.value_width) * sizeof(sum_of<M>));
}

// The group of NK keys from `key`: p, ds and raw at place `at` of the block. words, keep: of the group, or NULL.
template <class M, int NZ, ScorePath PATH, Pass PASS>
TW_INLINE void slope_group(const Slopes<M> &s, const Tile<M> &tile, const unit_of<M> *d_out, int64_t key, int64_t at,
                           const uint64_t *words, const uint64_t *keep) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    constexpr int W = lanes<A>, width = NZ * W, NK = TW_GROUP_KEYS;
    const tw_problem &problem = *s.problem;
    // A ragged last group repeats the last key; its words bar every lane from the repetitions.
    int64_t row[NK];
    TW_UNROLL(int n = 0; n < NK; ++n) row[n] = (key + n < s.last ? key + n : s.last) - s.first;
    const bool masked = PATH == MASKED || (PATH == GENERAL && words);

    const U *own[NK];
    TW_UNROLL(int n = 0; n < NK; ++n) own[n] = s.k + row[n] * s.k_stride;
    vec<A> x[NK][NZ] = {};
    const U *q = tile.query;
    for (int64_t d = 0, units = units_of<M>(problem.head_dim); d < units; ++d, q += width) {
        vec<U> query[NZ];
        TW_UNROLL(int z = 0; z < NZ; ++z) query[z] = load(q + z * W);
        TW_UNROLL(int n = 0; n < NK; ++n) {
            const vec<U> number = splat(own[n][d]);
            TW_UNROLL(int z = 0; z < NZ; ++z) x[n][z] = add_product(x[n][z], number, query[z]);
        }
    }
    alignas(64) A whole[NK * width]; // probabilities before dropout, until they are multiplied below
    const bool capped = PATH == GENERAL && problem.softcap > 0;
    const Softcap<A> cap = softcap_of(problem, s.factor);
    const A inverse_keep = A(problem.dropout.inverse_keep);
    const vec<A> by = splat(capped ? A(1) : s.factor);
    TW_UNROLL(int n = 0; n < NK; ++n)
        TW_UNROLL(int z = 0; z < NZ; ++z) {
            const int place = n * width + z * W;
            if constexpr (PATH == GENERAL) {
                if (capped) {
                    vec<A> slope;
                    x[n][z] = cap_product<A>(x[n][z], cap, slope);
                    store(s.cap_slopes + place, slope);
                }
            }
            const A *bias = PATH == GENERAL && s.biased ? s.bias + at * width + place : nullptr;
            if constexpr (PASS == PEAKS) {
                const vec<A> score = whole_score<A>(x[n][z], by, bias);
                note_peak<A>(*s.found, z * W, masked ? words[n] >> (z * W) : ~uint64_t(0), score,
                             less_reference<A>(x[n][z], by, bias, score));
                continue;
            }
            x[n][z] = PASS == SUMS || (PATH == GENERAL && tile.far)
                          ? less_far_reference<A>(x[n][z], by, bias, tile, z * W)
                          : less_reference<A>(x[n][z], by, bias, load(tile.shift + z * W));
            vec<A> weight = exp2<A>(x[n][z], faintest<A>);
            if (PATH == GENERAL && tile.far) weight *= load(tile.limit + z * W);
            if (masked) weight = select<A>(words[n] >> (z * W), weight, vec<A>{});
            store(whole + place, weight);
            if constexpr (PASS == SUMS) store(s.found->sum + z * W, load(s.found->sum + z * W) + weight);
            x[n][z] = PATH == GENERAL && keep ? select<A>(keep[n] >> (z * W), weight * inverse_keep, vec<A>{}) : weight;
        }
    if constexpr (PASS == PEAKS) return;
    if constexpr (PASS == RESULTS) store_along<M>(s.p + at * width / M::numbers, x);
    if (!s.scores_wanted) return;

    TW_UNROLL(int n = 0; n < NK; ++n) own[n] = s.v + row[n] * s.v_stride;
    TW_UNROLL(int n = 0; n < NK; ++n)
        TW_UNROLL(int z = 0; z < NZ; ++z) x[n][z] = vec<A>{};
    for (int64_t e = 0, units = units_of<M>(problem.value_dim); e < units; ++e, d_out += width) {
        vec<U> gradient[NZ];
        TW_UNROLL(int z = 0; z < NZ; ++z) gradient[z] = load(d_out + z * W);
        TW_UNROLL(int n = 0; n < NK; ++n) {
            const vec<U> number = splat(own[n][e]);
            TW_UNROLL(int z = 0; z < NZ; ++z) x[n][z] = add_product(x[n][z], number, gradient[z]);
        }
    }
    const bool gathered = s.gradients->gather_count > 0;
    TW_UNROLL(int n = 0; n < NK; ++n)
        TW_UNROLL(int z = 0; z < NZ; ++z) {
            const int place = n * width + z * W;
            if (PATH == GENERAL && keep) x[n][z] = select<A>(keep[n] >> (z * W), x[n][z] * inverse_keep, vec<A>{});
            if constexpr (PASS == RESULTS) x[n][z] += load(tile.sum + z * W);
            vec<A> slope = load(whole + place) * x[n][z];
            if (masked) slope = select<A>(words[n] >> (z * W), slope, vec<A>{});
            if constexpr (PASS == SUMS) {
                store(s.found->pull + z * W, load(s.found->pull + z * W) + slope);
                continue;
            }
            if (gathered) store(s.ds + at * width + place, slope);
            if (capped) {
                slope *= load(s.cap_slopes + place);
                if (masked) slope = select<A>(words[n] >> (z * W), slope, vec<A>{});
            }
            x[n][z] = slope;
        }
    if constexpr (PASS == SUMS) return;
    store_along<M>(s.raw + at * width / M::numbers, x);
    if constexpr (M::numbers > 1) store_across<M>(s.raw_across + at / M::numbers * width, x);
}

template <class M, int NC>
TW_INLINE void row_block(const unit_of<M> *weights, int width, const unit_of<M> *rows, int64_t stride, int64_t count,
                         sum_of<M> *out) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    constexpr int W = lanes<A>, NK = TW_GROUP_KEYS;
    vec<A> acc[NK][NC];
    TW_UNROLL(int n = 0; n < NK; ++n)
        TW_UNROLL(int c = 0; c < NC; ++c) acc[n][c] = load(out + n * stride + c * W);
    for (int64_t l = 0; l < count; ++l, rows += stride) {
        vec<U> row[NC];
        TW_UNROLL(int c = 0; c < NC; ++c) row[c] = load(rows + c * W);
        TW_UNROLL(int n = 0; n < NK; ++n) {
            const vec<U> weight = splat(weights[n * width + l]);
            TW_UNROLL(int c = 0; c < NC; ++c) acc[n][c] = add_product(acc[n][c], weight, row[c]);
        }
    }
    TW_UNROLL(int n = 0; n < NK; ++n)
        TW_UNROLL(int c = 0; c < NC; ++c) store(out + n * stride + c * W, acc[n][c]);
}

// out [keys][columns] += weights [keys][width] times the first `count` rows [count][columns], width and count in units;
// keys: whole groups.
template <class M>
static __attribute__((noinline)) void add_rows(const unit_of<M> *weights, int width, const unit_of<M> *rows,
                                               int64_t count, int64_t keys, int64_t columns, sum_of<M> *out) {
    constexpr int W = lanes<sum_of<M>>, NC = TW_TILE_VECTORS;
    for (int64_t j = 0; j < keys; j += TW_GROUP_KEYS) {
        int64_t d = 0;
        for (; d + NC * W <= columns; d += NC * W) row_block<M, NC>(weights, width, rows + d, columns, count, out + d);
        for (; d < columns; d += W) row_block<M, 1>(weights, width, rows + d, columns, count, out + d);
        weights += TW_GROUP_KEYS * width;
        out += TW_GROUP_KEYS * columns;
    }
}

// The same sums over pairs that are visible alone, where something is not finite: what belongs to any other pair is made
// 0 times 0, which leaves every bit of the sums as it is.
template <class M>
TW_RARE void add_rows_carefully(const unit_of<M> *weights, int width, const unit_of<M> *rows, int count, int64_t keys,
                                int64_t columns, const uint64_t *words, sum_of<M> *out) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    for (int64_t j = 0; j < keys; ++j, out += columns)
        for (int64_t l = 0; l < units_of<M>(count); ++l) {
            const ivec<A> seen = seen_numbers<M>((words[j] & first_bits(count)) >> l * M::numbers);
            const vec<U> weight = splat(weights[j * width + l]);
            for (int64_t d = 0; d < columns; d += lanes<A>) {
                const vec<U> row = load(rows + l * columns + d);
                store(out + d,
                      add_product(load(out + d), (vec<U>)((ivec<A>)weight & seen), (vec<U>)((ivec<A>)row & seen)));
            }
        }
}

template <class M>
TW_RARE void add_keys_carefully(const unit_of<M> *weights, int width, const unit_of<M> *k, int64_t stride, int64_t keys,
                                int64_t columns, const uint64_t *words, sum_of<M> *out) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    for (int64_t j = 0; j < units_of<M>(keys); ++j, weights += width, k += stride, words += M::numbers)
        for (int z = 0; z < width; z += lanes<A>) {
            const ivec<A> seen = seen_lanes<M>(words, z);
            const vec<U> weight = (vec<U>)((ivec<A>)load(weights + z) & seen);
            for (int64_t d = 0; d < columns; ++d) {
                A *sums = out + d * width + z;
                store(sums, add_product(load(sums), (vec<U>)((ivec<A>)splat(k[d]) & seen), weight));
            }
        }
}

// Sums the places [begin, end) of the block at `key`, of which n keys exist. end is a whole group.
template <class M, int NZ>
static void add_run(const Slopes<M> &s, const Tile<M> &tile, int64_t key, int n, int begin, int end,
                    const uint64_t *words) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    constexpr int width = NZ * lanes<A>, row_units = width / M::numbers;
    if (begin >= end) return;
    const tw_problem &p = *s.problem;
    const tw_gradients &g = *s.gradients;
    const int64_t at = key - s.first + begin, groups = end - begin, keys = (end < n ? end : n) - begin;
    const U *weights = s.p + begin * row_units, *raw = s.raw + begin * row_units;
    const U *raw_across = s.raw_across + begin / M::numbers * width;
    const U *k = s.k_across + at / M::numbers * s.across_stride;
    const A *ds = s.ds + begin * width;
    A *d_k = s.d_k + at * s.head_width, *d_v = s.d_v + at * s.value_width;
    const bool careful = tile.masked || s.blocks[at / block_keys] == BLOCK_NOT_FINITE;
    if (careful) {
        words += begin;
        if (g.d_q.data) add_keys_carefully<M>(raw_across, width, k, s.across_stride, keys, p.head_dim, words, tile.out);
        if (g.d_k.data) add_rows_carefully<M>(raw, row_units, s.q_rows, tile.rows, keys, s.head_width, words, d_k);
        if (g.d_v.data)
            add_rows_carefully<M>(weights, row_units, s.d_out_rows, tile.rows, keys, s.value_width, words, d_v);
    } else {
        const int64_t rows = units_of<M>(tile.rows);
        if (g.d_q.data)
            add_values<M, NZ, false>(raw_across, k, s.across_stride, units_of<M>(keys), p.head_dim, tile.out);
        if (g.d_k.data) add_rows<M>(raw, row_units, s.q_rows, rows, groups, s.head_width, d_k);
        if (g.d_v.data) add_rows<M>(weights, row_units, s.d_out_rows, rows, groups, s.value_width, d_v);
    }
    gather_slopes(s, tile, key + begin, keys, ds);
}

// One block of 64 keys (n <= 64 of them exist).
template <class M, int NZ, Pass PASS>
static void slope_block(Slopes<M> &s, Tile<M> &tile, const unit_of<M> *d_out, int64_t key, int n) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>, width = NZ * W, NK = TW_GROUP_KEYS;
    const tw_problem &p = *s.problem;
    uint64_t *words = s.work.words[s.work.slot], *keep = s.work.keep;
    if (s.facts && look(p, s.b, tile, key, n, words) == SEES_NOTHING) return;
    const uint64_t every_lane = first_bits(width);
    if (!s.facts)
        for (int j = 0; j < block_keys; ++j) words[j] = j < n ? every_lane : 0;
    if (s.blocks[(key - s.first) / block_keys] == BLOCK_UNMET) s.meet(s, key, n);
    if constexpr (PASS == RESULTS) fetch_gathered(s, tile, key, n);
    if (s.biased && gather_bias(p, s.b, tile, key, n, s.bias)) bar_by_bias<A>(s.bias, n, width, words);
    if (p.dropout.enabled) draw_dropout(p, s.b, tile, key, n, keep);
    if constexpr (M::tiled) return slopes_in_tiles<PASS>(s, tile, d_out, key, n);
    int run = 0;
    for (int g = 0; g < n; g += NK) {
        if (p.bias_count) ask_for_bias(p, s.b, tile, key + block_keys, g / NK, block_keys / NK);
        uint64_t some = 0, all = every_lane;
        for (int j = g; j < g + NK; ++j) some |= words[j], all &= words[j];
        if (!some) {
            if constexpr (PASS == RESULTS) add_run<M, NZ>(s, tile, key, n, run, g, words);
            run = g + NK;
            continue;
        }
        const uint64_t *own = all != every_lane ? words + g : nullptr, *kept = p.dropout.enabled ? keep + g : nullptr;
        if (PASS != RESULTS || s.general || tile.far)
            slope_group<M, NZ, GENERAL, PASS>(s, tile, d_out, key + g, g, own, kept);
        else if (own)
            slope_group<M, NZ, MASKED, RESULTS>(s, tile, d_out, key + g, g, own, nullptr);
        else
            slope_group<M, NZ, PLAIN, RESULTS>(s, tile, d_out, key + g, g, nullptr, nullptr);
    }
    if constexpr (PASS == RESULTS) add_run<M, NZ>(s, tile, key, n, run, (n + NK - 1) / NK * NK, words);
}
