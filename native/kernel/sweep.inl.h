// A sweep of one tile over keys: scores, softmax and values, a group of NK keys at a time.
//
// The layout throughout is "queries in lanes": S^T = K Q^T and O^T = V^T P^T, so keys and values are read in place, one
// number broadcast at a time, and maxima and sums are plain vectors. A group's scores live in registers from the product
// to the stored probabilities. Groups stand on multiples of NK keys, whatever the tile, so that a row's sums are always
// added in the same order.

// What does not change during an item, and the run of keys whose probabilities wait for their values.
template <class A> struct Sweep {
    const tw_problem *problem;
    const A *keys, *values; // from the chunk's first key
    int64_t key_stride, value_stride, head_dim, value_dim, batch, kv_head;
    // Elements narrower than A are widened a block at a time, when the first tile sees it, for all tiles of the item.
    void (*fetch)(Sweep &, int64_t key, int n); // NULL: read in place
    A *wide;                                    // [chunk_keys][padded D + padded Dv]
    uint32_t fetched;                           // bit per block of the chunk
    A *probabilities; // [chunk_keys][width], of the keys from chunk
    A *bias;          // [block_keys][width]
    bool general;     // softcap, bias or dropout: every group takes the general path
    bool careful;     // bar invisible values lane by lane: they hold something that is not finite
    int64_t chunk, run_begin;
};

// Goes to the chunk that begins at `key`.
template <class T, class A> TW_INLINE void enter_chunk(Sweep<A> &s, int64_t key) {
    const tw_problem &p = *s.problem;
    s.chunk = key;
    s.fetched = 0;
    if constexpr (sizeof(T) == sizeof(A)) {
        s.keys = tensor_row<const T>(p.k, s.batch, s.kv_head, key);
        s.values = tensor_row<const T>(p.v, s.batch, s.kv_head, key);
    }
}

template <class T, class A> static void fetch_block(Sweep<A> &s, int64_t key, int n) {
    const tw_problem &p = *s.problem;
    const int64_t first = key - s.chunk;
    A *keys = s.wide + first * s.key_stride, *values = s.wide + chunk_keys * s.key_stride + first * s.value_stride;
    for (int j = 0; j < n; ++j) {
        widen_row(tensor_row<const T>(p.k, s.batch, s.kv_head, key + j), p.head_dim, keys + j * s.key_stride);
        widen_row(tensor_row<const T>(p.v, s.batch, s.kv_head, key + j), p.value_dim, values + j * s.value_stride);
    }
    s.fetched |= 1u << first / block_keys;
}

// Numbers that `wide` must hold.
template <class T, class A> TW_INLINE int64_t wide_numbers(const tw_problem &p) {
    return sizeof(T) == sizeof(A) ? 0 : chunk_keys * (padded<A>(p.head_dim) + padded<A>(p.value_dim));
}

// Says where keys and values are: in place, or in `wide` as soon as they are fetched.
template <class T, class A> TW_INLINE void choose_source(Sweep<A> &s, A *wide) {
    const tw_problem &p = *s.problem;
    s.fetch = nullptr;
    s.key_stride = p.k.stride_s;
    s.value_stride = p.v.stride_s;
    if constexpr (sizeof(T) != sizeof(A)) {
        s.fetch = fetch_block<T, A>;
        s.key_stride = padded<A>(p.head_dim);
        s.value_stride = padded<A>(p.value_dim);
        s.keys = s.wide = wide;
        s.values = wide + chunk_keys * s.key_stride;
    }
}

// A probability that stands for "does not see this key" on the careful path; real ones are never negative.
template <class A> constexpr A unseen = A(-1);

template <class A, int NZ, int ND, bool CAREFUL>
TW_INLINE void value_block(const A *p, const A *v, int64_t stride, int64_t count, A *out) {
    constexpr int W = lanes<A>, width = NZ * W;
    vec<A> acc[ND][NZ];
    TW_UNROLL for (int d = 0; d < ND; ++d) TW_UNROLL for (int z = 0; z < NZ; ++z)
        acc[d][z] = load(out + d * width + z * W);
    for (int64_t k = 0; k < count; ++k, p += width, v += stride) {
        vec<A> row[NZ];
        TW_UNROLL for (int z = 0; z < NZ; ++z) row[z] = load(p + z * W);
        TW_UNROLL for (int d = 0; d < ND; ++d) {
            const vec<A> value = splat(v[d]);
            TW_UNROLL for (int z = 0; z < NZ; ++z) {
                if constexpr (CAREFUL)
                    acc[d][z] = row[z] == unseen<A> ? acc[d][z] : acc[d][z] + value * row[z];
                else
                    acc[d][z] += value * row[z];
            }
        }
    }
    TW_UNROLL for (int d = 0; d < ND; ++d) TW_UNROLL for (int z = 0; z < NZ; ++z)
        store(out + d * width + z * W, acc[d][z]);
}

// out [columns][width] += for each of `count` keys its numbers v (rows `stride` apart) times its weights p [count][width].
template <class A, int NZ, bool CAREFUL>
static __attribute__((noinline)) void
add_values(const A *p, const A *v, int64_t stride, int64_t count, int64_t columns, A *out) {
    constexpr int width = NZ * lanes<A>, ND = TW_VALUE_COLUMNS;
    int64_t d = 0;
    for (; d + ND <= columns; d += ND) value_block<A, NZ, ND, CAREFUL>(p, v + d, stride, count, out + d * width);
    for (; d + 4 <= columns; d += 4) value_block<A, NZ, 4, CAREFUL>(p, v + d, stride, count, out + d * width);
    for (; d < columns; ++d) value_block<A, NZ, 1, CAREFUL>(p, v + d, stride, count, out + d * width);
}

// tile.out += P V over the keys [s.run_begin, end), and starts the next run at `next`.
template <class A, int NZ> TW_INLINE void flush(Sweep<A> &s, Tile<A> &tile, int64_t end, int64_t next) {
    const int64_t count = end - s.run_begin, first = s.run_begin - s.chunk;
    const A *p = s.probabilities + first * NZ * lanes<A>, *v = s.values + first * s.value_stride;
    s.run_begin = next;
    if (count <= 0) return;
    if (s.careful)
        add_values<A, NZ, true>(p, v, s.value_stride, count, s.value_dim, tile.out);
    else
        add_values<A, NZ, false>(p, v, s.value_stride, count, s.value_dim, tile.out);
}

// Raises the reference of every lane whose group maximum `top` is beyond its limit, and rescales what it has summed.
template <class A, int NZ>
TW_RARE void raise_reference(Sweep<A> &s, Tile<A> &tile, const A *top, int64_t key) {
    constexpr int W = lanes<A>, width = NZ * W;
    flush<A, NZ>(s, tile, key, key); // values weighed with the old reference come first
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
    }
    if (!rescale) return;
    for (int64_t d = 0; d < s.value_dim; ++d)
        for (int z = 0; z < NZ; ++z)
            store(tile.out + d * width + z * W, load(tile.out + d * width + z * W) * factor[z]);
}

enum ScorePath { PLAIN, MASKED, GENERAL };

// The group of NK keys from `key`: scores, reference, probabilities, sums. words: the lanes that see each key, or NULL.
// bias, keep: of the group's first key, or NULL; read on the general path alone.
template <class A, int NZ, ScorePath PATH>
TW_INLINE void score_group(Sweep<A> &s, Tile<A> &tile, int64_t key, const uint64_t *words, const A *bias, const uint64_t *keep) {
    constexpr int W = lanes<A>, width = NZ * W, NK = TW_GROUP_KEYS;
    const A infinity = A(__builtin_inf());
    // A ragged last group repeats the last key; its words bar every lane from the repetitions.
    const A *row[NK];
    const int64_t first = key - s.chunk, last = s.problem->k_len - 1 - s.chunk;
    TW_UNROLL for (int n = 0; n < NK; ++n) row[n] = s.keys + (first + n < last ? first + n : last) * s.key_stride;

    vec<A> x[NK][NZ] = {};
    const A *q = tile.query;
    for (int64_t d = 0; d < s.head_dim; ++d, q += width) {
        vec<A> query[NZ];
        TW_UNROLL for (int z = 0; z < NZ; ++z) query[z] = load(q + z * W);
        TW_UNROLL for (int n = 0; n < NK; ++n) {
            const vec<A> number = splat(row[n][d]);
            TW_UNROLL for (int z = 0; z < NZ; ++z) x[n][z] += number * query[z];
        }
    }

    if constexpr (PATH == GENERAL) {
        if (s.problem->softcap > 0) {
            const A cap = A(s.problem->softcap * 1.4426950408889634074), twice_inverse = A(2 / s.problem->softcap);
            TW_UNROLL for (int n = 0; n < NK; ++n) TW_UNROLL for (int z = 0; z < NZ; ++z)
                x[n][z] = cap * tanh_of_log2<A>(x[n][z] * twice_inverse);
        }
        if (bias)
            TW_UNROLL for (int n = 0; n < NK; ++n) TW_UNROLL for (int z = 0; z < NZ; ++z)
                x[n][z] += load(bias + n * width + z * W);
    }
    if (PATH == MASKED || (PATH == GENERAL && words))
        TW_UNROLL for (int n = 0; n < NK; ++n) TW_UNROLL for (int z = 0; z < NZ; ++z)
            x[n][z] = select<A>(words[n] >> (z * W), x[n][z], splat<A>(-infinity));

    vec<A> top[NZ];
    uint64_t beyond = 0;
    TW_UNROLL for (int z = 0; z < NZ; ++z) {
        top[z] = x[0][z];
        TW_UNROLL for (int n = 1; n < NK; ++n) top[z] = larger<A>(top[z], x[n][z]);
        beyond |= lane_bits(top[z] > load(tile.limit + z * W));
    }
    if (__builtin_expect(beyond != 0, 0)) {
        A tops[width];
        TW_UNROLL for (int z = 0; z < NZ; ++z) store(tops + z * W, top[z]);
        raise_reference<A, NZ>(s, tile, tops, key);
    }

    A *out = s.probabilities + (key - s.chunk) * width;
    TW_UNROLL for (int z = 0; z < NZ; ++z) {
        const vec<A> shift = load(tile.shift + z * W);
        vec<A> sum = load(tile.sum + z * W);
        TW_UNROLL for (int n = 0; n < NK; ++n) {
            vec<A> p = exp2<A>(x[n][z] - shift);
            sum += p;
            if constexpr (PATH == GENERAL) {
                if (keep) p = select<A>(keep[n] >> (z * W), p, vec<A>{});
                if (s.careful) p = x[n][z] == -infinity ? splat<A>(unseen<A>) : p;
            }
            store(out + n * width + z * W, p);
        }
        store(tile.sum + z * W, sum);
    }
}

// One block of 64 keys (n <= 64 of them exist).
template <class A, int NZ> static void sweep_block(Sweep<A> &s, Tile<A> &tile, int64_t key, int n) {
    constexpr int width = NZ * lanes<A>, NK = TW_GROUP_KEYS;
    uint64_t words[block_keys], keep[block_keys];
    const tw_problem &p = *s.problem;
    const bool facts = p.ranges.count || p.mask.data || p.labels.q || p.bits.index;
    Sight sight = facts ? look(p, s.batch, tile, key, n, words) : SEES_ALL;
    if (sight == SEES_NOTHING) {
        flush<A, NZ>(s, tile, key, key + n);
        return;
    }
    if (s.fetch && !(s.fetched >> (key - s.chunk) / block_keys & 1)) s.fetch(s, key, n);
    const uint64_t every_lane = first_bits(width);
    if (sight == SEES_ALL && n % NK != 0) {
        for (int j = 0; j < block_keys; ++j) words[j] = j < n ? every_lane : 0;
        sight = SEES_SOME;
    }
    if (sight == SEES_SOME || s.general) tile.masked = true;
    const bool biased = p.bias_count || p.table.data;
    if (biased) gather_bias(p, s.batch, tile, key, n, s.bias);
    if (p.dropout.enabled) draw_dropout(p, s.batch, tile, key, n, keep);

    for (int g = 0; g < n; g += NK) {
        bool masked = sight == SEES_SOME;
        if (masked) {
            uint64_t some = 0, all = every_lane;
            for (int j = g; j < g + NK; ++j) some |= words[j], all &= words[j];
            if (!some) {
                flush<A, NZ>(s, tile, key + g, key + (g + NK < n ? g + NK : n));
                continue;
            }
            masked = all != every_lane;
        }
        if (s.general || s.careful)
            score_group<A, NZ, GENERAL>(s, tile, key + g, masked ? words + g : nullptr,
                                           biased ? s.bias + g * width : nullptr, p.dropout.enabled ? keep + g : nullptr);
        else if (masked)
            score_group<A, NZ, MASKED>(s, tile, key + g, words + g, nullptr, nullptr);
        else
            score_group<A, NZ, PLAIN>(s, tile, key + g, nullptr, nullptr, nullptr);
    }
}

// The keys [begin, end) of the chunk entered, as far as the tile's spans reach.
template <class A, int NZ> static void sweep_chunk(Sweep<A> &s, Tile<A> &tile, int64_t begin, int64_t end) {
    s.run_begin = next_key(tile, begin, end);
    for (int64_t key = s.run_begin; key < end;) {
        const int64_t stop = key + block_keys < end ? key + block_keys : end;
        sweep_block<A, NZ>(s, tile, key, int(stop - key));
        key = next_key(tile, stop, end);
        if (key > stop) flush<A, NZ>(s, tile, stop, key);
    }
    flush<A, NZ>(s, tile, end, end);
}
