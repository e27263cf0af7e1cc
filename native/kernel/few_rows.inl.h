// Few query rows (decode): rows would leave most lanes empty, so here the lanes hold what is plentiful: the head axis in
// products, keys in the softmax. Every key and value is read once for all rows of the group and used while in cache.
// A row's bits depend on its own facts and on blocks of 64 keys at fixed places, as everywhere.

// A row's block of scores: products (after a softcap scores), by what they still have to be multiplied, and biases in
// natural units, or NULL.
template <class A> struct BlockScores {
    const A *products;
    A factor;
    const A *bias;
    // Of W keys, rounded.
    __attribute__((always_inline)) vec<A> whole(int j) const {
        return whole_score<A>(load(products + j), splat(factor), bias ? bias + j : nullptr);
    }
    // The same less the row's reference, rounded once (units.inl.h).
    __attribute__((always_inline)) vec<A> less(int j, A shift, bool coarse) const {
        if (coarse) return whole(j) - shift;
        return less_reference<A>(load(products + j), splat(factor), bias ? bias + j : nullptr, splat(shift));
    }
};

// Softcap, bias and mask on a row's block of products. bias: place for block_keys numbers.
template <class M>
static BlockScores<sum_of<M>> adjust_scores(const tw_problem &p, int64_t b, Row<M> &row, int64_t key, int n,
                                            sum_of<M> factor, sum_of<M> *bias) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    if (p.softcap > 0) {
        const Softcap<A> cap = softcap_of(p, factor);
        for (int j = 0; j < block_keys; j += W) store(row.scores + j, cap_product<A>(load(row.scores + j), cap));
        factor = 1;
    }
    const bool biased = p.bias_count || p.table.data;
    if (biased) {
        __builtin_memset(bias, 0, block_keys * sizeof(A));
        add_biases<A>(p, b, row.h, row.i, key, n, bias);
        for (int j = 0; j < block_keys; j += W) row.seen &= ~(lane_bits(load(bias + j) == -A(__builtin_inf())) << j);
    }
    for (int j = 0; j < block_keys && row.seen != ~uint64_t(0); j += W) {
        store(row.scores + j, select<A>(row.seen >> j, load(row.scores + j), splat<A>(-A(__builtin_inf()))));
        if (biased) store(bias + j, select<A>(row.seen >> j, load(bias + j), vec<A>{}));
    }
    return {row.scores, factor, biased ? bias : nullptr};
}

// Takes away what dropout does not keep of a row's block of probabilities.
template <class M> static void drop_out(const tw_problem &p, int64_t b, Row<M> &row, int64_t key) {
    constexpr int W = lanes<sum_of<M>>;
    uint64_t numbers[block_keys], step;
    const uint64_t first = pair_number(p, b, row.h, row.i, key, &step);
    for (int j = 0; j < block_keys; ++j) numbers[j] = first + uint64_t(j) * step;
    uint64_t kept;
    keep_pairs(p.dropout, numbers, block_keys, 0, 1, &kept);
    for (int j = 0; j < block_keys; j += W)
        store(row.scores + j, select<sum_of<M>>(kept >> j, load(row.scores + j), vec<sum_of<M>>{}));
}

// Turns a row's block of scores into probabilities.
template <class M>
static void weigh(const tw_problem &p, int64_t b, Row<M> &row, int64_t key, BlockScores<sum_of<M>> scores) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    vec<A> tops = scores.bias ? scores.whole(0) : load(row.scores);
    for (int j = W; j < block_keys; j += W)
        tops = larger<A>(tops, scores.bias ? scores.whole(j) : load(row.scores + j));
    if (!scores.bias) tops *= scores.factor;
    A top = tops[0];
    if (lane_bits(tops > row.limit))
        for (int l = 1; l < W; ++l) top = tops[l] > top ? tops[l] : top;
    if (top > row.limit) {
        if (row.limit > -A(__builtin_inf())) {
            const A factor = power_of_two_of(row.shift - top);
            row.sum *= factor;
            for (int64_t d = 0; d < out_numbers<M>(p); d += W) store(row.out + d, load(row.out + d) * factor);
        }
        row.shift = top;
        row.limit = top + slack<A>;
    }
    const bool coarse = is_coarse(row.shift);
    for (int j = 0; j < block_keys; j += W) {
        const vec<A> weight = exp2<A>(scores.less(j, row.shift, coarse));
        row.sum += weight;
        store(row.scores + j, weight);
    }
    if (p.dropout.enabled) drop_out(p, b, row, key);
    weights_to_units<M>(row.scores, row.weights);
}

// Which keys of the block each row sees; returns those that any does.
template <class M>
static uint64_t look_by_row(const tw_problem &p, int64_t b, Row<M> *const *rows, int64_t count, int64_t key, int n) {
    uint64_t some = 0;
    for (int64_t r = 0; r < count; ++r) {
        Row<M> &row = *rows[r];
        row.seen = row_sight(p, b, row.h, row.i, key, n);
        if (row.seen != first_bits(n)) row.masked = true;
        some |= row.seen;
    }
    return some;
}

// What is wanted after the block at `key`: the next of the item, or the first of the item that follows. `each_key` and
// `each_value` hold the places of its rows where they lie in pages.
template <class T>
static Ahead<T> block_after(const tw_problem &p, const tw_item &item, int64_t key, const T **each_key,
                            const T **each_value) {
    Ahead<T> ahead = {};
    const tw_item *of = &item;
    key += block_keys;
    if (key >= item.key_end) {
        of = item.next;
        if (!of || of->number != item.number) return ahead;
        key = of->key_begin;
    }
    if (of->key_end - key < block_keys) return ahead;
    ahead.keys = key_rows(p, p.k, of->b, of->kv_head, key, block_keys, each_key);
    ahead.values = key_rows(p, p.v, of->b, of->kv_head, key, block_keys, each_value);
    ahead.key_numbers = p.head_dim;
    ahead.value_numbers = p.value_dim;
    ahead.parts = tw_read_streams();
    ahead.rows = block_keys / ahead.parts;
    ahead.enter_row(0);
    return ahead;
}

// Whether several rows take their scores from keys that are widened once for all: it changes no bit.
template <class T, class M> constexpr bool widens_keys = M::numbers == 1 && sizeof(T) != sizeof(unit_of<M>);

// Numbers of W widened keys.
template <class T, class M> TW_INLINE int64_t widened_numbers(const tw_problem &p) {
    using A = sum_of<M>;
    return widens_keys<T, M> ? lanes<A> * padded<A>(p.head_dim) : 0;
}

template <class T, class M> static size_t few_rows_bytes(const tw_problem &p) {
    using A = sum_of<M>;
    return size_t(few_rows<A>) * row_bytes<M>(p) + size_t(FewTiles<M>::space(p) + widened_numbers<T, M>(p)) * sizeof(A);
}

// Products of W keys with all rows; own: as they stand, or widened.
template <class M, class K, class T>
TW_INLINE void products_of_keys(const K *const *own, Row<M> *const *rows, int64_t count, int64_t dim, int j,
                                Ahead<T> &ahead) {
    for (int64_t r = 0; r < count; ++r) {
        ahead.ask();
        store(rows[r]->scores + j, dot_products<M>(own, rows[r]->query, dim));
    }
}

template <class T, class M>
static void sweep_rows(const tw_problem &p, const tw_item &item, FewTiles<M> &tiles, Row<M> *const *rows, int64_t count,
                       sum_of<M> *widened, bool careful) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    const T *each_key[block_keys], *each_value[block_keys]; // where rows lie in pages
    const T *each_key_ahead[block_keys], *each_value_ahead[block_keys];
    const A factor = scaling_of<A>(p).factor;
    A bias[block_keys];
    bool in_tiles = false;
    if constexpr (M::tiled) in_tiles = tiles.used;
    for (int64_t key = item.key_begin; key < item.key_end; key += block_keys) {
        const int n = int(item.key_end - key < block_keys ? item.key_end - key : int64_t(block_keys));
        const uint64_t some = look_by_row(p, item.b, rows, count, key, n);
        if (!some) continue;
        const Rows<T> keys = key_rows(p, p.k, item.b, item.kv_head, key, n, each_key);
        const Rows<T> values = key_rows(p, p.v, item.b, item.kv_head, key, n, each_value);
        Ahead<T> ahead = block_after(p, item, key, each_key_ahead, each_value_ahead);
        if constexpr (M::tiled)
            if (in_tiles) scores_in_tiles(tiles, keys, n, p.head_dim, rows, count, ahead);
        if (!in_tiles) ahead.spread(2, block_keys / W * count);
        for (int j = 0; j < n && !in_tiles; j += W) {
            const T *own[W]; // a ragged end repeats the last key; no row sees the repetitions
            TW_UNROLL(int l = 0; l < W; ++l) own[l] = keys[j + l < n ? j + l : n - 1];
            if constexpr (widens_keys<T, M>)
                if (count > 1) {
                    const A *wide[W];
                    TW_UNROLL(int l = 0; l < W; ++l) wide[l] = widened + l * padded<A>(p.head_dim);
                    TW_UNROLL(int l = 0; l < W; ++l) widen_row(own[l], p.head_dim, widened + l * padded<A>(p.head_dim));
                    products_of_keys(wide, rows, count, p.head_dim, j, ahead);
                    continue;
                }
            products_of_keys(own, rows, count, p.head_dim, j, ahead);
        }
        if (in_tiles) ahead.spread(1, count);
        for (int64_t r = 0; r < count; ++r) {
            for (int j = (n + W - 1) / W * W; j < block_keys; ++j) rows[r]->scores[j] = 0; // unseen, but not garbage
            weigh(p, item.b, *rows[r], key, adjust_scores(p, item.b, *rows[r], key, n, factor, bias));
            if (in_tiles) ahead.ask();
        }
        if constexpr (M::tiled)
            if (in_tiles) {
                add_weighted_in_tiles(tiles, rows, count, values, p.value_dim, n, careful ? rows[0]->seen : some,
                                      careful, ahead);
                continue;
            }
        const int64_t together = careful ? 0 : count / 4 * 4;
        ahead.spread(2, (together / 4 + count - together) * (block_keys / M::numbers) *
                            ((p.value_dim + 4 * W - 1) / (4 * W)));
        for (int64_t r = 0; r < together; r += 4) add_weighted<M, 4>(rows + r, values, p.value_dim, some, ahead);
        for (int64_t r = together; r < count; ++r)
            add_weighted<M, 1>(rows + r, values, p.value_dim, careful ? rows[r]->seen : some, ahead);
    }
}

template <class M> TW_INLINE void reset(const tw_problem &p, Row<M> &row) {
    using A = sum_of<M>;
    row.shift = 0;
    row.limit = -A(__builtin_inf());
    row.sum = vec<A>{};
    row.masked = false;
    __builtin_memset(row.out, 0, size_t(out_numbers<M>(p)) * sizeof(A));
}

template <class A> TW_INLINE bool all_finite(const A *numbers, int64_t count) {
    A doubt = 0;
    for (int64_t d = 0; d < count; ++d) doubt += numbers[d] - numbers[d];
    return doubt == 0;
}

template <class T, class M>
static void forward_few_rows(const tw_problem *problem, const tw_item *item, void *scratch) {
    using A = sum_of<M>;
    const tw_problem &p = *problem;
    const int64_t count = item->row_end - item->row_begin, per_head = p.row_end - p.row_begin;
    const int64_t group = p.q_heads / p.kv_heads;
    const A sign = scaling_of<A>(p).sign;
    const Registers<M> registers;
    Row<M> *rows[few_rows<A>] = {};
    FewTiles<M> tiles;
    char *const beside = static_cast<char *>(scratch) + few_rows<A> * row_bytes<M>(p);
    A *const widened = reinterpret_cast<A *>(beside);
    if constexpr (M::tiled) place(p, rows_of(p), tiles, reinterpret_cast<int32_t *>(beside));
    for (int64_t r = 0; r < count; ++r) {
        char *memory = static_cast<char *>(scratch) + size_t(r) * row_bytes<M>(p);
        Row<M> &row = *(rows[r] = reinterpret_cast<Row<M> *>(memory));
        row.query = reinterpret_cast<unit_of<M> *>(memory + rounded(sizeof(Row<M>)));
        row.out = reinterpret_cast<A *>(row.query + padded_units<M>(p.head_dim));
        if constexpr (M::tiled)
            if (tiles.used) row.out = tiles.out + r * tiles.numbers;
        row.i = p.row_begin + (item->row_begin + r) % per_head;
        row.h = item->kv_head * group + (item->row_begin + r) / per_head;
        const T *q = tensor_row<const T>(p.q, item->b, row.h, row.i);
        for (int64_t d = 0; d < padded_units<M>(p.head_dim); d += lanes<A>)
            store(row.query + d, times_sign<M>(row_units<M>(q, d, p.head_dim), sign));
        reset(p, row);
    }
    if constexpr (M::tiled)
        if (tiles.used) turn_queries(tiles, rows, count);
    sweep_rows<T>(p, *item, tiles, rows, count, widened, false);
    for (int64_t r = 0; r < count; ++r) {
        Row<M> &row = *rows[r];
        bool doubtful = row.masked || p.bias_count || p.table.data;
        if constexpr (M::tiled) doubtful |= tiles.used;
        if (doubtful && !all_finite(row.out, out_numbers<M>(p))) {
            if constexpr (M::tiled)
                if (tiles.used) {
                    row.out = tiles.spare;
                    turn_queries(tiles, rows + r, 1);
                }
            reset(p, row);
            sweep_rows<T>(p, *item, tiles, rows + r, 1, widened, true);
        }
        bool in_order = M::numbers == 1;
        if constexpr (M::tiled)
            if (tiles.used) {
                put_columns_in_order(tiles, row.out, p.value_dim);
                in_order = true;
            }
        if constexpr (M::numbers > 1)
            if (!in_order) put_in_order(row.out, p.value_dim);
        A sum = 0;
        for (int l = 0; l < lanes<A>; ++l) sum += row.sum[l];
        const bool seen = row.limit > -A(__builtin_inf()) || sum != 0;
        if (item->partial)
            write_partial(p, static_cast<A *>(item->partial) + r * (p.value_dim + 3), row.out, 1, row.shift, sum, seen);
        else
            write_row<T, A>(p, item->b, row.h, row.i, row.out, ending_of<A>(p, row.h, row.shift, sum, seen));
    }
}
