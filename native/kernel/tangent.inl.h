// Tangents: how out and lse move with the operands (forward-mode differentiation). With p = exp(s - lse) of the scores s,
// z dropout's factor and c the softcap's slope of a pair, of each row:
//   ds = c scale (d_q . k + q . d_k) + d_bias
//   d_lse = sum p ds, and the sink's probability times its tangent       d_out = sum p z (ds v + d_v) - d_lse out
// The layout is that of the sweep, queries in lanes, with lse in the place of a moving reference. Products are summed in
// accumulators (`Singles`) for every element type, but for scores that the forward pass multiplies in parts: these are its
// own, to the bit, since out is taken from sums that are nearly the same. A block of 64 keys adds all ds v before its first
// d_v, and blocks stand at fixed places, so that a row's bits depend on the row alone.

// The rows of one array in a block of keys: in place, or widened into `copy`. NULL: there is no such array.
template <class A> struct KeyRows {
    const A *rows;
    int64_t stride;
    A *copy;
};

template <class A> struct MovingTile;

// What does not change during an item. A tile keeps lse in `shift`, d_lse in `sum`, d_out in `out`, and in `limit` what the
// probabilities of far rows are multiplied by (far_rows.inl.h).
template <class A> struct Motion {
    const tw_problem *problem;
    const tw_tangents *tangents;
    tw_problem moving_biases; // the problem with the tangents of its biases for biases
    int64_t b, kv_head;
    KeyRows<A> k, v, d_k, d_v; // of the block
    A *p, *weights;            // [block_keys][width]: p z, and p z ds
    A *bias, *d_bias;          // [block_keys][width]
    A *cap_slopes;             // [TW_GROUP_KEYS][width]: the softcap's
    A factor, scale;           // of the products, in units of scores and in natural ones
    // Where scores are multiplied in parts (amx_parts.inl.h): the block's keys, those that parts cannot hold, and the
    // products [block_keys][most lanes of a tile]; else NULL.
    int32_t *key_parts;
    uint64_t strange;
    A *products;
    void (*meet)(Motion &, int64_t key, int n);               // finds the block's rows, when a tile first sees it
    void (*multiply)(Motion &, const MovingTile<A> &, int n); // the block's products, for a tile; NULL: none in parts
    bool met, facts, biased, biases_move, scores_move, general;
    // Whether out is summed anew beside its tangent, from which it is taken off: where it is rounded to a narrower type.
    bool sums_out;
    bool careful;      // leave out lane by lane what is not visible: some of it is not finite
    FarRows<A> *found; // of passes that look for it alone
};

template <class A> struct MovingTile : Tile<Singles<A>> {
    int32_t *query_parts; // [parts][D in units][most lanes], where scores are multiplied in parts
    A *d_query;           // [D][width], with the sign that the queries have; read where d_q is given
    A *own_out;           // [Dv][width]: out of the rows; in the end, or summed
    // Of far rows d_lse is found beforehand and taken from their scores' tangents: what is left beside a probability of
    // nearly 1 is then as small as it should be. 0 of others.
    A known[most_lanes];
    uint64_t far_lanes;
};

template <class T, class A>
TW_INLINE void find_rows(const tw_tensor &x, const Motion<A> &s, int64_t key, int n, int64_t width, KeyRows<A> &to) {
    to.rows = nullptr;
    if (!x.data) return;
    const T *first = tensor_row<const T>(x, s.b, s.kv_head, key);
    if constexpr (sizeof(T) == sizeof(A)) {
        to.rows = first;
        to.stride = x.stride_s;
    } else {
        to.stride = padded<A>(width);
        rows_in_units<Singles<A>>(Rows<T>{first, x.stride_s, nullptr}, n, width, to.copy, to.stride);
        to.rows = to.copy;
    }
}

template <class T, class A, class M> static void meet_keys(Motion<A> &s, int64_t key, int n) {
    const tw_problem &p = *s.problem;
    if constexpr (M::parts > 1) {
        const Rows<T> k = {tensor_row<const T>(p.k, s.b, s.kv_head, key), p.k.stride_s, nullptr};
        s.strange = rows_in_parts(k, n, p.head_dim, s.key_parts);
    }
    find_rows<T>(p.k, s, key, n, p.head_dim, s.k);
    find_rows<T>(p.v, s, key, n, p.value_dim, s.v);
    find_rows<T>(s.tangents->k, s, key, n, p.head_dim, s.d_k);
    find_rows<T>(s.tangents->v, s, key, n, p.value_dim, s.d_v);
    s.met = true;
}

// x[n][z] += the products of row `at` + n with the tile's lanes. A ragged last group repeats the row `last`.
template <class A, int NZ>
TW_INLINE void add_dots(vec<A> (&x)[TW_GROUP_KEYS][NZ], const KeyRows<A> &keys, int at, int last, const A *lanes_of_d,
                        int64_t head_dim) {
    constexpr int W = lanes<A>, NK = TW_GROUP_KEYS;
    const A *own[NK];
    TW_UNROLL(int n = 0; n < NK; ++n) own[n] = keys.rows + (at + n < last ? at + n : last) * keys.stride;
    for (int64_t d = 0; d < head_dim; ++d, lanes_of_d += NZ * W) {
        vec<A> lane[NZ];
        TW_UNROLL(int z = 0; z < NZ; ++z) lane[z] = load(lanes_of_d + z * W);
        TW_UNROLL(int n = 0; n < NK; ++n) {
            const vec<A> number = splat(own[n][d]);
            TW_UNROLL(int z = 0; z < NZ; ++z) x[n][z] = add_product(x[n][z], number, lane[z]);
        }
    }
}

// The products of the block's n keys in parts.
template <class M> static void multiply_block(Motion<float> &s, const MovingTile<float> &tile, int n);
#if defined(__AMX_BF16__)
template <class M> static void multiply_block(Motion<float> &s, const MovingTile<float> &tile, int n) {
    const Registers<M> registers;
    const int64_t stride = unit_rows<M>(s.problem->head_dim);
    for (int g = 0; g < n; g += tile_keys) {
        OwedTiles owed;
        multiply_lanes<M>(s.key_parts + g * stride, stride, tile.query_parts, s.products + g * tile_lanes, owed);
        settle(owed);
    }
}
#endif

// The products of a group: in parts, but for keys and lanes that parts cannot hold, or of plain numbers.
template <class A, int NZ>
TW_INLINE void key_products(const Motion<A> &s, const MovingTile<A> &tile, int at, int last,
                            vec<A> (&x)[TW_GROUP_KEYS][NZ]) {
    constexpr int W = lanes<A>, NK = TW_GROUP_KEYS;
    const uint64_t strange = s.products ? s.strange >> at & first_bits(NK) : ~uint64_t(0);
    if (strange || tile.strange) add_dots<A, NZ>(x, s.k, at, last, tile.query, s.problem->head_dim);
    if (!s.products) return;
    TW_UNROLL(int n = 0; n < NK; ++n)
        TW_UNROLL(int z = 0; z < NZ; ++z) {
            const uint64_t plain = strange >> n & 1 ? ~uint64_t(0) : tile.strange >> (z * W);
            x[n][z] = select<A>(plain, x[n][z], load(s.products + (at + n) * tile_rows<A> + z * W));
        }
}

// The group of keys at place `at` of the block, whose last key stands at `last`: p z and p z ds, and the tile's sum of
// p ds; or what another pass looks for. words, keep: of the group, or NULL.
template <class A, int NZ, ScorePath PATH, Pass PASS>
TW_INLINE void move_group(const Motion<A> &s, MovingTile<A> &tile, int at, int last, const uint64_t *words,
                          const uint64_t *keep) {
    constexpr int W = lanes<A>, width = NZ * W, NK = TW_GROUP_KEYS;
    const tw_problem &problem = *s.problem;
    const bool masked = PATH == MASKED || (PATH == GENERAL && words);
    const bool capped = PATH == GENERAL && problem.softcap > 0;
    const Softcap<A> cap = softcap_of(problem, s.factor);
    const A inverse_keep = A(problem.dropout.inverse_keep);
    const vec<A> by = splat(capped ? A(1) : s.factor);

    vec<A> x[NK][NZ] = {};
    key_products<A, NZ>(s, tile, at, last, x);
    alignas(64) A whole[NK * width]; // probabilities before dropout
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
            vec<A> p = exp2<A>(x[n][z]);
            if (PATH == GENERAL && tile.far) p *= load(tile.limit + z * W);
            if (masked) p = select<A>(words[n] >> (z * W), p, vec<A>{});
            store(whole + place, p);
            if constexpr (PASS == SUMS) store(s.found->sum + z * W, load(s.found->sum + z * W) + p);
            if (PATH == GENERAL && keep) p = select<A>(keep[n] >> (z * W), p * inverse_keep, vec<A>{});
            store(s.p + at * width + place, p);
        }
    if (PASS == PEAKS || !s.scores_move) return;

    TW_UNROLL(int n = 0; n < NK; ++n)
        TW_UNROLL(int z = 0; z < NZ; ++z) x[n][z] = vec<A>{};
    if (s.tangents->q.data) add_dots<A, NZ>(x, s.k, at, last, tile.d_query, problem.head_dim);
    if (s.d_k.rows) add_dots<A, NZ>(x, s.d_k, at, last, tile.query, problem.head_dim);
    TW_UNROLL(int z = 0; z < NZ; ++z) {
        vec<A> sum = load(tile.sum + z * W);
        TW_UNROLL(int n = 0; n < NK; ++n) {
            const int place = n * width + z * W;
            if constexpr (PATH == GENERAL) {
                if (capped) x[n][z] *= load(s.cap_slopes + place);
            }
            x[n][z] *= s.scale;
            if (PATH == GENERAL && s.biases_move) x[n][z] += load(s.d_bias + at * width + place);
            if (PATH == GENERAL && tile.far) x[n][z] -= load(tile.known + z * W);
            vec<A> weight = load(whole + place) * x[n][z];
            if (masked) weight = select<A>(words[n] >> (z * W), weight, vec<A>{});
            sum += weight;
            if (PATH == GENERAL && keep) weight = select<A>(keep[n] >> (z * W), weight * inverse_keep, vec<A>{});
            store(s.weights + at * width + place, weight);
        }
        store(tile.sum + z * W, sum);
    }
}

// out += weights [keys][width] times the rows of the places [begin, end).
template <class A, int NZ>
TW_INLINE void add_rows_of(const Motion<A> &s, const A *weights, const KeyRows<A> &of, int begin, int end,
                           const uint64_t *words, A *out) {
    constexpr int width = NZ * lanes<A>;
    const A *from = of.rows + begin * of.stride;
    weights += begin * width;
    if (s.careful)
        add_keys_carefully<Singles<A>>(weights, width, from, of.stride, end - begin, s.problem->value_dim,
                                       words + begin, out);
    else
        add_values<Singles<A>, NZ, false>(weights, from, of.stride, end - begin, s.problem->value_dim, out);
}

// One block of 64 keys (n <= 64 of them exist).
template <class A, int NZ, Pass PASS> static void move_block(Motion<A> &s, MovingTile<A> &tile, int64_t key, int n) {
    constexpr int width = NZ * lanes<A>, NK = TW_GROUP_KEYS;
    const tw_problem &p = *s.problem;
    uint64_t words[block_keys], keep[block_keys];
    const Sight sight = s.facts ? look(p, s.b, tile, key, n, words) : SEES_ALL;
    if (sight == SEES_NOTHING) return;
    const uint64_t every_lane = first_bits(width);
    if (sight == SEES_ALL)
        for (int j = 0; j < block_keys; ++j) words[j] = j < n ? every_lane : 0;
    if (sight == SEES_SOME || s.general) tile.masked = true;
    if (!s.met) s.meet(s, key, n);
    if (s.multiply) s.multiply(s, tile, n);
    if (s.biased && gather_bias(p, s.b, tile, key, n, s.bias)) bar_by_bias<A>(s.bias, n, width, words);
    if (s.biases_move) gather_bias(s.moving_biases, s.b, tile, key, n, s.d_bias);
    if (p.dropout.enabled) draw_dropout(p, s.b, tile, key, n, keep);

    int begin = n, end = 0; // the places between which some lane sees a key
    for (int g = 0; g < n; g += NK) {
        uint64_t some = 0, all = every_lane;
        for (int j = g; j < g + NK; ++j) some |= words[j], all &= words[j];
        if (!some) { // between others that are seen, its values are multiplied by 0
            __builtin_memset(s.p + g * width, 0, NK * width * sizeof(A));
            __builtin_memset(s.weights + g * width, 0, NK * width * sizeof(A));
            continue;
        }
        begin = g < begin ? g : begin;
        end = g + NK < n ? g + NK : n;
        const uint64_t *own = all != every_lane ? words + g : nullptr;
        if (PASS != RESULTS || s.general || tile.far)
            move_group<A, NZ, GENERAL, PASS>(s, tile, g, n - 1, own, p.dropout.enabled ? keep + g : nullptr);
        else if (own)
            move_group<A, NZ, MASKED, RESULTS>(s, tile, g, n - 1, own, nullptr);
        else
            move_group<A, NZ, PLAIN, RESULTS>(s, tile, g, n - 1, nullptr, nullptr);
    }
    if (PASS != RESULTS || begin >= end) return;
    if (s.scores_move) add_rows_of<A, NZ>(s, s.weights, s.v, begin, end, words, tile.out);
    if (s.d_v.rows) add_rows_of<A, NZ>(s, s.p, s.d_v, begin, end, words, tile.out);
    if (s.sums_out) add_rows_of<A, NZ>(s, s.p, s.v, begin, end, words, tile.own_out);
}

// Takes `count` tiles over all keys that they see.
template <class A, Pass PASS> static void move_tiles(Motion<A> &s, MovingTile<A> *const *tiles, int64_t count) {
    const int64_t end = s.problem->k_len;
    for (int64_t key = 0;;) {
        int64_t next = end;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t own = next_key(*tiles[t], key, end);
            next = own < next ? own : next;
        }
        if (next >= end || tw_given_up()) return;
        next -= next % block_keys;
        key = next + block_keys < end ? next + block_keys : end;
        s.met = false;
        for (int64_t t = 0; t < count; ++t) {
            if (next_key(*tiles[t], next, key) >= key) continue;
            if (tiles[t]->width == lanes<A>)
                move_block<A, 1, PASS>(s, *tiles[t], next, int(key - next));
            else
                move_block<A, TW_TILE_VECTORS, PASS>(s, *tiles[t], next, int(key - next));
        }
    }
}

// Gives the far rows of a tile their largest score for lse, the reciprocal of their sum for a factor, and their d_lse.
template <class A> static void weigh_far_rows(Motion<A> &s, MovingTile<A> &tile) {
    const tw_problem &p = *s.problem;
    const tw_tangents &t = *s.tangents;
    MovingTile<A> *const alone[] = {&tile};
    FarRows<A> found;
    begin_finding(found, tile);
    s.found = &found;
    move_tiles<A, PEAKS>(s, alone, 1);
    end_peaks(p, found, tile);
    move_tiles<A, SUMS>(s, alone, 1);
    for (int l = 0; l < tile.width; ++l) {
        const A moved = tile.sum[l]; // the sum of p ds
        tile.sum[l] = 0;
        if (!is_far(found.lse[l])) continue;
        const A of_sink = p.sinks ? sink_share<A>(p, tile, l) : A(0);
        tile.limit[l] = 1 / (found.sum[l] + of_sink);
        const A sinks_part = t.sinks ? of_sink * static_cast<const A *>(t.sinks)[tile.h[l]] : A(0);
        tile.known[l] = (moved + sinks_part) * tile.limit[l];
        tile.far_lanes |= uint64_t(1) << l;
    }
    tile.far = true;
}

// Sets a tile's sums to 0 and its reference to lse, which for a row that sees nothing leaves no probability.
template <class A> static void begin_motion(Motion<A> &s, MovingTile<A> &tile) {
    const A infinity = A(__builtin_inf());
    reset(tile, s.problem->value_dim);
    if (s.sums_out) __builtin_memset(tile.own_out, 0, size_t(s.problem->value_dim * tile.width) * sizeof(A));
    for (int l = 0; l < tile.width; ++l) {
        const A lse = static_cast<const A *>(s.problem->lse)[lse_at(*s.problem, s.b, tile.h[l], tile.i[l])];
        tile.shift[l] = lse == -infinity ? infinity : in_units<A>(*s.problem, lse);
        tile.limit[l] = 1;
        tile.rest[l] = 0;
        tile.known[l] = 0;
    }
    tile.far_lanes = 0;
    tile.far = false;
    if (has_far_rows(tile) && !s.problem->part) weigh_far_rows(s, tile);
}

// Writes a tile's rows; E is the type of out.
template <class E, class A> static void finish_motion(const Motion<A> &s, MovingTile<A> &tile) {
    constexpr int W = lanes<A>;
    const tw_problem &p = *s.problem;
    const tw_tangents &t = *s.tangents;
    const E *out[most_lanes];
    A d_lse[most_lanes], left[most_lanes], whole[most_lanes];
    for (int l = 0; l < tile.width; ++l) {
        const int64_t h = tile.h[l], i = tile.i[l];
        const bool empty = tile.shift[l] == A(__builtin_inf());
        out[l] = tensor_row<const E>(p.out, s.b, h, i);
        whole[l] = 1;
        d_lse[l] = empty ? A(0) : tile.sum[l];
        if (t.sinks && !empty) {
            d_lse[l] += sink_share<A>(p, tile, l) * static_cast<const A *>(t.sinks)[h];
        }
        const bool far = tile.far_lanes >> l & 1;
        d_lse[l] = far ? tile.known[l] : d_lse[l];
        left[l] = far && s.scores_move ? A(0) : d_lse[l]; // still to be taken off
        static_cast<A *>(t.lse)[lse_at(p, s.b, h, i)] = d_lse[l];
    }
    for (int l = 0; l < tile.width && !s.sums_out; l += W)
        rows_to_lanes<Singles<A>>(out + l, p.value_dim, A(1), tile.own_out + l, tile.width);
    for (int64_t d = 0; d < p.value_dim; ++d)
        for (int l = 0; l < tile.width; l += W) {
            A *const sums = tile.out + d * tile.width + l;
            const vec<A> moved = load(sums) - load(left + l) * load(tile.own_out + d * tile.width + l);
            store(sums, load(tile.shift + l) == A(__builtin_inf()) ? vec<A>{} : moved);
        }
    tile_to_rows<E>(t.out, s.b, tile, whole, p.value_dim);
}

// Bytes of an item's scratch, in the order in which `tangent` takes them.
template <class T, class A, class M = Singles<A>> static size_t tangent_bytes(const tw_problem *p, int64_t tiles) {
    size_t parts = 0;
    if constexpr (M::parts > 1) {
        if (!differentiates_parts(*p)) return tangent_bytes<T, A>(p, tiles);
        const size_t units = size_t(unit_rows<M>(p->head_dim));
        parts = (size_t(tiles) * units + block_keys) * tile_rows<A> + block_keys * units;
    }
    const size_t width = size_t(tile_rows<A>) * sizeof(A);
    const size_t tile = rounded(sizeof(MovingTile<A>)) + size_t(2 * p->head_dim + p->value_dim) * width;
    const int64_t copies =
        sizeof(T) == sizeof(A) ? 0 : 2 * block_keys * (padded<A>(p->head_dim) + padded<A>(p->value_dim));
    const size_t outs = size_t(p->value_dim) * (sizeof(T) == sizeof(A) ? 1 : size_t(tiles));
    return size_t(tiles) * tile + (size_t(4 * block_keys + TW_GROUP_KEYS) + outs) * width +
           (size_t(copies) + parts) * sizeof(A);
}

template <class T, class A, class M = Singles<A>>
static void tangent(const tw_problem *problem, const tw_tangents *tangents, const tw_item *item, int64_t most_tiles,
                    void *scratch) {
    if constexpr (M::parts > 1)
        if (!differentiates_parts(*problem)) return tangent<T, A>(problem, tangents, item, most_tiles, scratch);
    constexpr int64_t width = tile_rows<A>;
    const tw_problem &p = *problem;
    const tw_tangents &t = *tangents;
    char *tile_memory = static_cast<char *>(scratch);
    A *numbers = reinterpret_cast<A *>(tile_memory + size_t(most_tiles) * rounded(sizeof(MovingTile<A>)));
    const auto take = [&numbers](int64_t count) { return (numbers += count) - count; };

    Motion<A> s;
    s.problem = problem;
    s.tangents = tangents;
    s.moving_biases = p;
    s.moving_biases.bias_count = t.bias_count;
    s.moving_biases.table = t.table;
    __builtin_memcpy(s.moving_biases.bias, t.bias, sizeof t.bias);
    s.b = item->b;
    s.kv_head = item->kv_head;
    s.facts = p.ranges.count || p.mask.data || p.labels.q || p.bits.index;
    s.biased = p.bias_count || p.table.data;
    s.biases_move = t.bias_count || t.table.data;
    s.scores_move = s.biases_move || t.q.data || t.k.data;
    s.general = p.softcap > 0 || s.biased || p.dropout.enabled;
    s.careful = false;
    s.factor = scaling_of<A>(p).factor;
    s.scale = A(p.scale < 0 ? -p.scale : p.scale); // the queries have its sign
    s.meet = meet_keys<T, A, M>;
    s.multiply = nullptr;
    s.products = nullptr;
    s.p = take(block_keys * width);
    s.weights = take(block_keys * width);
    s.bias = take(block_keys * width);
    s.d_bias = take(block_keys * width);
    s.cap_slopes = take(TW_GROUP_KEYS * width);
    s.sums_out = sizeof(T) != sizeof(A) && s.scores_move && !p.part; // of a part of the keys there are no sums of out
    A *const one_out = s.sums_out ? nullptr : take(p.value_dim * width);
    if (sizeof(T) != sizeof(A)) {
        s.k.copy = take(block_keys * padded<A>(p.head_dim));
        s.v.copy = take(block_keys * padded<A>(p.value_dim));
        s.d_k.copy = take(block_keys * padded<A>(p.head_dim));
        s.d_v.copy = take(block_keys * padded<A>(p.value_dim));
    }

    if constexpr (M::parts > 1) {
        s.multiply = multiply_block<M>;
        s.products = take(block_keys * width);
        s.key_parts = reinterpret_cast<int32_t *>(take(block_keys * unit_rows<M>(p.head_dim)));
    }

    MovingTile<A> *tiles[most_tiles_of_item] = {};
    const int64_t count = (item->row_end - item->row_begin + width - 1) / width;
    for (int64_t n = 0; n < count; ++n) {
        MovingTile<A> &tile =
            *reinterpret_cast<MovingTile<A> *>(tile_memory + size_t(n) * rounded(sizeof(MovingTile<A>)));
        tiles[n] = &tile;
        tile.query = take(p.head_dim * width);
        tile.d_query = take(p.head_dim * width);
        tile.out = take(p.value_dim * width);
        tile.own_out = s.sums_out ? take(p.value_dim * width) : one_out;
        const int64_t row = item->row_begin + n * width, left = item->row_end - row;
        fill_tile<T, Singles<A>>(p, *item, row, left < width ? left : width, tile);
        if constexpr (M::parts > 1) {
            tile.query_parts = reinterpret_cast<int32_t *>(take(unit_rows<M>(p.head_dim) * width));
            const T *q[most_lanes];
            for (int l = 0; l < width; ++l) {
                const int own = l < tile.width ? l : tile.width - 1;
                q[l] = tensor_row<const T>(p.q, s.b, tile.h[own], tile.i[own]);
            }
            for (int l = 0; l < width; l += lanes<A>)
                tile.strange |=
                    rows_to_lanes_in_parts(q + l, p.head_dim, scaling_of<A>(p).sign, tile.query_parts + l, width) << l;
            if (scaling_of<A>(p).factor >= end_factor) tile.strange = ~uint64_t(0);
        }
        if (t.q.data) {
            const T *d_q[most_lanes];
            for (int l = 0; l < tile.width; ++l) d_q[l] = tensor_row<const T>(t.q, s.b, tile.h[l], tile.i[l]);
            for (int l = 0; l < tile.width; l += lanes<A>)
                rows_to_lanes<Singles<A>>(d_q + l, p.head_dim, scaling_of<A>(p).sign, tile.d_query + l, tile.width);
        }
        begin_motion(s, tile);
    }
    move_tiles<A, RESULTS>(s, tiles, count);
    for (int64_t n = 0; n < count; ++n) {
        if (needs_care(*tiles[n], p.value_dim)) {
            begin_motion(s, *tiles[n]);
            s.careful = true;
            move_tiles<A, RESULTS>(s, tiles + n, 1);
            s.careful = false;
        }
        if (p.part)
            finish_motion<A>(s, *tiles[n]);
        else
            finish_motion<T>(s, *tiles[n]);
    }
}
