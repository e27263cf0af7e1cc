// A sweep of one tile over keys: scores, softmax and values, a group of NK keys at a time.
//
// The layout throughout is "queries in lanes": S^T = K Q^T and O^T = V^T P^T, so keys and values are read in place, one
// number broadcast at a time, and maxima and sums are plain vectors. A group's scores live in registers from the product
// to the stored probabilities. Groups stand on multiples of NK keys, whatever the tile, so that a row's sums are always
// added in the same order.

// Which vectors of a tile of two see a group of keys: where half of it sees none, as beside a diagonal, nothing is computed
// for that half.
enum Half { BOTH, LOWER, UPPER };
template <Half HALF> constexpr int first_vector = HALF == UPPER ? 1 : 0;
template <Half HALF, int NZ> constexpr int last_vector = HALF == LOWER ? 0 : NZ - 1;

template <class M, int NZ, int ND, bool CAREFUL, Half HALF>
TW_INLINE void value_block(const unit_of<M> *p, const unit_of<M> *v, int64_t stride, int64_t count, sum_of<M> *out) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    constexpr int W = lanes<A>, width = NZ * W, FIRST = first_vector<HALF>, LAST = last_vector<HALF, NZ>;
    vec<A> acc[ND][NZ];
    TW_UNROLL(int d = 0; d < ND; ++d)
        TW_UNROLL(int z = FIRST; z <= LAST; ++z) acc[d][z] = load(out + d * width + z * W);
    for (int64_t k = 0; k < count; ++k, p += width, v += stride) {
        vec<U> row[NZ];
        TW_UNROLL(int z = FIRST; z <= LAST; ++z) row[z] = load(p + z * W);
        TW_UNROLL(int d = 0; d < ND; ++d) {
            const vec<U> value = splat(v[d]);
            TW_UNROLL(int z = FIRST; z <= LAST; ++z)
                acc[d][z] = CAREFUL ? add_seen(acc[d][z], value, row[z]) : add_product(acc[d][z], value, row[z]);
        }
    }
    TW_UNROLL(int d = 0; d < ND; ++d)
        TW_UNROLL(int z = FIRST; z <= LAST; ++z) store(out + d * width + z * W, acc[d][z]);
}

// out [columns][width] += for each of `count` units of keys its numbers v (rows `stride` apart) times its weights
// p [count][width].
template <class M, int NZ, bool CAREFUL, Half HALF = BOTH>
static __attribute__((noinline)) void add_values(const unit_of<M> *p, const unit_of<M> *v, int64_t stride,
                                                 int64_t count, int64_t columns, sum_of<M> *out) {
    constexpr int width = NZ * lanes<sum_of<M>>, ND = TW_VALUE_COLUMNS;
    int64_t d = 0;
    for (; d + ND <= columns; d += ND) value_block<M, NZ, ND, CAREFUL, HALF>(p, v + d, stride, count, out + d * width);
    for (; d + 4 <= columns; d += 4) value_block<M, NZ, 4, CAREFUL, HALF>(p, v + d, stride, count, out + d * width);
    for (; d < columns; ++d) value_block<M, NZ, 1, CAREFUL, HALF>(p, v + d, stride, count, out + d * width);
}

// tile.out += P V over the keys [s.run_begin, end), and starts the next run at `next`.
template <class M, int NZ> TW_INLINE void flush(Sweep<M> &s, Tile<M> &tile, int64_t end, int64_t next) {
    using U = unit_of<M>;
    const int64_t count = units_of<M>(end - s.run_begin), first = (s.run_begin - s.chunk) / M::numbers;
    U *p = s.probabilities + first * NZ * lanes<sum_of<M>>;
    const U *v = s.values + first * s.value_stride;
    s.run_begin = next;
    if (count <= 0) return;
    if (s.careful) return add_values<M, NZ, true>(p, v, s.value_stride, count, s.value_dim, tile.out);
    if constexpr (NZ == 2) {
        if (s.half == LOWER) return add_values<M, NZ, false, LOWER>(p, v, s.value_stride, count, s.value_dim, tile.out);
        if (s.half == UPPER) return add_values<M, NZ, false, UPPER>(p, v, s.value_stride, count, s.value_dim, tile.out);
    }
    add_values<M, NZ, false>(p, v, s.value_stride, count, s.value_dim, tile.out);
}

// Raises the reference of every lane whose group maximum `top` is beyond its limit, and rescales what it has summed.
// Values weighed with the old reference have to be added before.
template <class M, int NZ> TW_RARE void raise_reference(Tile<M> &tile, const sum_of<M> *top, int64_t value_dim) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>, width = NZ * W;
    vec<A> factor[NZ];
    bool rescale = false;
    for (int z = 0; z < NZ; ++z) {
        const vec<A> limit = load(tile.limit + z * W), shift = load(tile.shift + z * W), new_shift = load(top + z * W);
        const ivec<A> raised = new_shift > limit, first = limit == -A(__builtin_inf());
        // A lane that has summed nothing yet has nothing to rescale.
        factor[z] = (raised & ~first) ? exp2<A>(shift - new_shift) : splat<A>(1);
        rescale |= lane_bits(raised & ~first) != 0;
        store(tile.shift + z * W, raised ? new_shift : shift);
        store(tile.limit + z * W, raised ? new_shift + slack<A> : limit);
        store(tile.sum + z * W, load(tile.sum + z * W) * factor[z]);
        tile.coarse |= lane_bits(raised & coarse_lanes<A>(new_shift)) != 0;
    }
    if (!rescale) return;
    for (int64_t d = 0; d < value_dim; ++d)
        for (int z = 0; z < NZ; ++z)
            store(tile.out + d * width + z * W, load(tile.out + d * width + z * W) * factor[z]);
}

enum ScorePath { PLAIN, MASKED, GENERAL };

template <class M, int NZ>
static void score_group_generally(Sweep<M> &s, Tile<M> &tile, int64_t key, const uint64_t *words, const sum_of<M> *bias,
                                  const uint64_t *keep);

// The group of NK keys from `key`: scores, reference, probabilities, sums. words: the lanes that see each key, or NULL.
// bias, keep: of the group's first key, or NULL; read on the general path alone.
template <class M, int NZ, ScorePath PATH, Half HALF = BOTH>
TW_INLINE void score_group(Sweep<M> &s, Tile<M> &tile, int64_t key, const uint64_t *words, const sum_of<M> *bias,
                           const uint64_t *keep) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    constexpr int W = lanes<A>, width = NZ * W, NK = TW_GROUP_KEYS;
    constexpr int FIRST = first_vector<HALF>, LAST = last_vector<HALF, NZ>;
    const A infinity = A(__builtin_inf());
    // A ragged last group repeats the last key; its words bar every lane from the repetitions.
    const U *row[NK];
    const int64_t first = key - s.chunk, last = s.problem->k_len - 1 - s.chunk;
    TW_UNROLL(int n = 0; n < NK; ++n) row[n] = s.keys + (first + n < last ? first + n : last) * s.key_stride;

    vec<A> x[NK][NZ] = {};
    const U *q = tile.query;
    for (int64_t d = 0; d < s.head_units; ++d, q += width) {
        vec<U> query[NZ];
        TW_UNROLL(int z = FIRST; z <= LAST; ++z) query[z] = load(q + z * W);
        TW_UNROLL(int n = 0; n < NK; ++n) {
            const vec<U> number = splat(row[n][d]);
            TW_UNROLL(int z = FIRST; z <= LAST; ++z) x[n][z] = add_product(x[n][z], number, query[z]);
        }
    }

    A factor = s.factor; // by which x still has to be multiplied
    if constexpr (PATH == GENERAL) {
        if (s.problem->softcap > 0) {
            const Softcap<A> cap = softcap_of(*s.problem, factor);
            TW_UNROLL(int n = 0; n < NK; ++n)
                TW_UNROLL(int z = 0; z < NZ; ++z) x[n][z] = cap_product<A>(x[n][z], cap);
            factor = 1;
        }
    }
    const bool masked = PATH == MASKED || (PATH == GENERAL && words), biased = PATH == GENERAL && bias;
    const vec<A> by = splat(factor);
    if (masked && !biased)
        TW_UNROLL(int n = 0; n < NK; ++n)
            TW_UNROLL(int z = FIRST; z <= LAST; ++z)
                x[n][z] = select<A>(words[n] >> (z * W), x[n][z], splat<A>(-infinity));
    // A score, rounded as references are, and -inf where it is not seen.
    const auto score = [&](int n, int z) {
        const vec<A> whole = whole_score<A>(x[n][z], by, biased ? bias + n * width + z * W : nullptr);
        return masked && biased ? select<A>(words[n] >> (z * W), whole, splat<A>(-infinity)) : whole;
    };

    vec<A> top[NZ];
    uint64_t beyond = 0;
    TW_UNROLL(int z = FIRST; z <= LAST; ++z) {
        if (biased) {
            top[z] = score(0, z);
            TW_UNROLL(int n = 1; n < NK; ++n) top[z] = larger<A>(top[z], score(n, z));
        } else {
            top[z] = x[0][z];
            TW_UNROLL(int n = 1; n < NK; ++n) top[z] = larger<A>(top[z], x[n][z]);
            top[z] *= by;
        }
        beyond |= lane_bits(top[z] > load(tile.limit + z * W));
    }
    if (__builtin_expect(beyond != 0, 0)) {
        A tops[width];
        TW_UNROLL(int z = 0; z < NZ; ++z) store(tops + z * W, z < FIRST || z > LAST ? splat<A>(-infinity) : top[z]);
        flush<M, NZ>(s, tile, key, key);
        raise_reference<M, NZ>(tile, tops, s.value_dim);
        if (PATH != GENERAL && tile.coarse) return score_group_generally<M, NZ>(s, tile, key, words, bias, keep);
    }

    TW_UNROLL(int z = FIRST; z <= LAST; ++z) {
        const vec<A> shift = load(tile.shift + z * W);
        vec<A> sum = load(tile.sum + z * W);
        TW_UNROLL(int n = 0; n < NK; ++n) {
            vec<A> y = less_reference<A>(x[n][z], by, biased ? bias + n * width + z * W : nullptr, shift);
            if (PATH == GENERAL && tile.coarse) y = coarse_lanes<A>(shift) ? score(n, z) - shift : y;
            if (masked && biased) y = select<A>(words[n] >> (z * W), y, splat<A>(-infinity));
            vec<A> p = exp2<A>(y);
            sum += p;
            if constexpr (PATH == GENERAL) {
                if (keep) p = select<A>(keep[n] >> (z * W), p, vec<A>{});
                if (s.careful) p = y == -infinity ? splat<A>(unseen<A>) : p;
            }
            x[n][z] = p;
        }
        store(tile.sum + z * W, sum);
    }
    store_across<M>(s.probabilities + (key - s.chunk) / M::numbers * width, x);
}

// The same on the general path, which changes no bit of what the others make of a lane that is not coarse.
template <class M, int NZ>
static __attribute__((noinline)) void score_group_generally(Sweep<M> &s, Tile<M> &tile, int64_t key,
                                                            const uint64_t *words, const sum_of<M> *bias,
                                                            const uint64_t *keep) {
    score_group<M, NZ, GENERAL>(s, tile, key, words, bias, keep);
}

template <class M, int NZ>
TW_INLINE void score_masked_group(Sweep<M> &s, Tile<M> &tile, int64_t key, const uint64_t *words) {
    if constexpr (NZ == 2) {
        if (s.half == LOWER) return score_group<M, NZ, MASKED, LOWER>(s, tile, key, words, nullptr, nullptr);
        if (s.half == UPPER) return score_group<M, NZ, MASKED, UPPER>(s, tile, key, words, nullptr, nullptr);
    }
    score_group<M, NZ, MASKED>(s, tile, key, words, nullptr, nullptr);
}

// One block of 64 keys (n <= 64 of them exist).
template <class M, int NZ> static void sweep_block(Sweep<M> &s, Tile<M> &tile, int64_t key, int n) {
    constexpr int width = NZ * lanes<sum_of<M>>, NK = TW_GROUP_KEYS;
    uint64_t words[block_keys], keep[block_keys];
    const tw_problem &p = *s.problem;
    const bool facts = p.ranges.count || p.mask.data || p.labels.q || p.bits.index;
    Sight sight = facts ? look(p, s.batch, tile, key, n, words) : SEES_ALL;
    if (sight == SEES_NOTHING) {
        flush<M, NZ>(s, tile, key, key + n);
        return;
    }
    if (lacks(s, key)) s.fetch(s, key, n);
    const uint64_t every_lane = first_bits(width);
    if (sight == SEES_ALL && n % NK != 0) {
        for (int j = 0; j < block_keys; ++j) words[j] = j < n ? every_lane : 0;
        sight = SEES_SOME;
    }
    if (sight == SEES_SOME || s.general) tile.masked = true;
    const bool biased = p.bias_count || p.table.data;
    if (biased && gather_bias(p, s.batch, tile, key, n, s.bias)) {
        if (sight == SEES_ALL)
            for (int j = 0; j < block_keys; ++j) words[j] = j < n ? every_lane : 0;
        bar_by_bias(s.bias, n, width, words);
        sight = SEES_SOME;
    }
    if (p.dropout.enabled) draw_dropout(p, s.batch, tile, key, n, keep);

    for (int g = 0; g < n; g += NK) {
        ask_for_rows(s, tile);
        ask_ahead(s.ahead);
        if (p.bias_count) ask_for_bias(p, s.batch, tile, key + block_keys, g / NK, block_keys / NK);
        bool masked = sight == SEES_SOME;
        Half half = BOTH;
        if (masked) {
            uint64_t some = 0, all = every_lane;
            for (int j = g; j < g + NK; ++j) some |= words[j], all &= words[j];
            if (!some) {
                flush<M, NZ>(s, tile, key + g, key + (g + NK < n ? g + NK : n));
                continue;
            }
            masked = all != every_lane;
            if constexpr (NZ == 2)
                if (!s.general && !s.careful && !tile.coarse)
                    half = !(some >> lanes<sum_of<M>>) ? LOWER : !(some & first_bits(lanes<sum_of<M>>)) ? UPPER : BOTH;
        }
        if (half != s.half) {
            flush<M, NZ>(s, tile, key + g, key + g);
            s.half = half;
        }
        if (s.general || s.careful || tile.coarse)
            score_group_generally<M, NZ>(s, tile, key + g, masked ? words + g : nullptr,
                                         biased ? s.bias + g * width : nullptr, p.dropout.enabled ? keep + g : nullptr);
        else if (masked)
            score_masked_group<M, NZ>(s, tile, key + g, words + g);
        else
            score_group<M, NZ, PLAIN>(s, tile, key + g, nullptr, nullptr, nullptr);
    }
}

// The keys [begin, end) of the chunk entered, as far as the tile's spans reach.
template <class M, int NZ> static void sweep_chunk(Sweep<M> &s, Tile<M> &tile, int64_t begin, int64_t end) {
    s.run_begin = next_key(tile, begin, end);
    s.half = BOTH;
    for (int64_t key = s.run_begin; key < end;) {
        const int64_t stop = key + block_keys < end ? key + block_keys : end;
        sweep_block<M, NZ>(s, tile, key, int(stop - key));
        key = next_key(tile, stop, end);
        if (key > stop) flush<M, NZ>(s, tile, stop, key);
    }
    flush<M, NZ>(s, tile, end, end);
}
