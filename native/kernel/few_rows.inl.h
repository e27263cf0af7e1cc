// Few query rows (decode): rows would leave most lanes empty, so here the lanes hold what is plentiful: the head axis in
// products, keys in the softmax. Every key and value is read once for all rows of the group and used while in cache.
// A row's bits depend on its own facts and on blocks of 64 keys at fixed places, as everywhere.

template <class A> constexpr int64_t few_rows = lanes<A> / 2;

// One row of the group. Units and state as in Tile, with the sum still spread over the lanes.
template <class A> struct Row {
    A *query, *out; // [D], [Dv], both padded with zeros to whole vectors
    A shift, limit;
    vec<A> sum;
    int64_t i, h;
    uint64_t seen; // keys of the current block
    bool masked;
    A scores[block_keys];
};

template <class A> static size_t few_rows_bytes(const tw_problem *p, int64_t rows) {
    return size_t(rows) * (rounded(sizeof(Row<A>)) + rounded(size_t(padded<A>(p->head_dim) + padded<A>(p->value_dim)) * sizeof(A)));
}

// Scores of W keys with one row: W sums over the head axis, then one reduction.
template <class T, class A>
TW_INLINE vec<A> dot_products(const T *const *keys, const A *query, int64_t head_dim) {
    constexpr int W = lanes<A>;
    vec<A> x[W] = {};
    int64_t d = 0;
    for (; d + W <= head_dim; d += W) {
        const vec<A> q = load(query + d);
        TW_UNROLL for (int n = 0; n < W; ++n) x[n] += widen(keys[n] + d) * q;
    }
    if (d < head_dim) {
        const vec<A> q = load(query + d);
        TW_UNROLL for (int n = 0; n < W; ++n) x[n] += widen_first(keys[n] + d, int(head_dim - d)) * q;
    }
    sum_lanes<A, W>(x);
    return x[0];
}

// Softcap, bias and mask on a row's block of scores.
template <class A> static void adjust_scores(const tw_problem &p, int64_t b, Row<A> &row, int64_t key, int n) {
    constexpr int W = lanes<A>;
    if (p.softcap > 0) {
        const A cap = A(p.softcap * 1.4426950408889634074), twice_inverse = A(2 / p.softcap);
        for (int j = 0; j < block_keys; j += W)
            store(row.scores + j, cap * tanh_of_log2<A>(load(row.scores + j) * twice_inverse));
    }
    if (p.bias_count || p.table.data) {
        add_biases<A>(p, b, row.h, row.i, key, n, 1, row.scores);
        for (int j = 0; j < block_keys; j += W)
            row.seen &= ~(lane_bits(load(row.scores + j) == -A(__builtin_inf())) << j);
    }
    if (row.seen == ~uint64_t(0)) return;
    for (int j = 0; j < block_keys; j += W)
        store(row.scores + j, select<A>(row.seen >> j, load(row.scores + j), splat<A>(-A(__builtin_inf()))));
}

// Turns a row's block of scores into probabilities.
template <class A> static void weigh(const tw_problem &p, int64_t b, Row<A> &row, int64_t key) {
    constexpr int W = lanes<A>;
    vec<A> tops = load(row.scores);
    for (int j = W; j < block_keys; j += W) tops = larger<A>(tops, load(row.scores + j));
    A top = tops[0];
    for (int l = 1; l < W; ++l) top = tops[l] > top ? tops[l] : top;
    if (top > row.limit) {
        if (row.limit > -A(__builtin_inf())) {
            const A factor = power_of_two_of(row.shift - top);
            row.sum *= factor;
            for (int64_t d = 0; d < p.value_dim; d += W) store(row.out + d, load(row.out + d) * factor);
        }
        row.shift = top;
        row.limit = top + slack<A>;
    }
    for (int j = 0; j < block_keys; j += W) {
        const vec<A> weight = exp2<A>(load(row.scores + j) - row.shift);
        row.sum += weight;
        store(row.scores + j, weight);
    }
    if (!p.dropout.enabled) return;
    uint64_t index[block_keys];
    uint32_t words[block_keys];
    for (int j = 0; j < block_keys; ++j)
        index[j] = uint64_t(((b * p.q_heads + row.h) * p.q_len + row.i) * p.k_len + key + j);
    philox_words(p.dropout.seed, p.dropout.stream, index, block_keys, words);
    for (int j = 0; j < block_keys; ++j) row.scores[j] = words[j] >= p.dropout.threshold ? row.scores[j] : A(0);
}

// out += weights * values for the keys of the block that some row sees, COUNT rows and four vectors of columns at a time.
template <class T, class A, int COUNT>
TW_INLINE void add_weighted(Row<A> *const *rows, const T *values, int64_t stride, int64_t value_dim, uint64_t some) {
    constexpr int W = lanes<A>;
    int64_t d = 0;
    for (; d + 4 * W <= value_dim; d += 4 * W) {
        vec<A> out[COUNT][4];
        TW_UNROLL for (int r = 0; r < COUNT; ++r) TW_UNROLL for (int c = 0; c < 4; ++c)
            out[r][c] = load(rows[r]->out + d + c * W);
        for (uint64_t left = some; left; left &= left - 1) {
            const int j = __builtin_ctzll(left);
            const T *v = values + j * stride + d;
            TW_UNROLL for (int c = 0; c < 4; ++c) {
                const vec<A> value = widen(v + c * W);
                TW_UNROLL for (int r = 0; r < COUNT; ++r) out[r][c] += value * rows[r]->scores[j];
            }
        }
        TW_UNROLL for (int r = 0; r < COUNT; ++r) TW_UNROLL for (int c = 0; c < 4; ++c)
            store(rows[r]->out + d + c * W, out[r][c]);
    }
    for (; d < value_dim; d += W) {
        vec<A> out[COUNT];
        TW_UNROLL for (int r = 0; r < COUNT; ++r) out[r] = load(rows[r]->out + d);
        for (uint64_t left = some; left; left &= left - 1) {
            const int j = __builtin_ctzll(left);
            const T *v = values + j * stride + d;
            const vec<A> value = d + W <= value_dim ? widen(v) : widen_first(v, int(value_dim - d));
            TW_UNROLL for (int r = 0; r < COUNT; ++r) out[r] += value * rows[r]->scores[j];
        }
        TW_UNROLL for (int r = 0; r < COUNT; ++r) store(rows[r]->out + d, out[r]);
    }
}

// Which keys of the block each row sees; returns those that any does.
template <class A> static uint64_t look_by_row(const tw_problem &p, int64_t b, Row<A> *const *rows, int64_t count, int64_t key, int n) {
    uint64_t some = 0;
    for (int64_t r = 0; r < count; ++r) {
        Row<A> &row = *rows[r];
        row.seen = row_sight(p, b, row.h, row.i, key, n);
        if (row.seen != first_bits(n)) row.masked = true;
        some |= row.seen;
    }
    return some;
}

template <class T, class A> static void sweep_rows(const tw_problem &p, const tw_item &item, Row<A> *const *rows, int64_t count, bool careful) {
    constexpr int W = lanes<A>;
    const T *keys = static_cast<const T *>(p.k.data) + item.b * p.k.stride_b + item.kv_head * p.k.stride_h;
    const T *values = static_cast<const T *>(p.v.data) + item.b * p.v.stride_b + item.kv_head * p.v.stride_h;
    constexpr int64_t ahead = 32; // keys; memory is the bound here, and its own prefetchers start too late
    for (int64_t key = item.key_begin; key < item.key_end; key += block_keys) {
        const int n = int(item.key_end - key < block_keys ? item.key_end - key : int64_t(block_keys));
        const uint64_t some = look_by_row(p, item.b, rows, count, key, n);
        if (!some) continue;
        for (int j = 0; j < n; j += W) {
            const T *own[W]; // a ragged end repeats the last key; no row sees the repetitions
            TW_UNROLL for (int l = 0; l < W; ++l) own[l] = keys + (key + (j + l < n ? j + l : n - 1)) * p.k.stride_s;
            if (key + j + ahead + W <= item.key_end)
                for (int l = 0; l < W; ++l)
                    for (int64_t d = 0; d < p.head_dim; d += 64 / int64_t(sizeof(T)))
                        __builtin_prefetch(own[l] + ahead * p.k.stride_s + d);
            for (int64_t r = 0; r < count; ++r) store(rows[r]->scores + j, dot_products<T, A>(own, rows[r]->query, p.head_dim));
        }
        for (int64_t r = 0; r < count; ++r) {
            for (int j = (n + W - 1) / W * W; j < block_keys; ++j) rows[r]->scores[j] = 0; // unseen, but not garbage
            adjust_scores(p, item.b, *rows[r], key, n);
            weigh(p, item.b, *rows[r], key);
        }
        const T *block = values + key * p.v.stride_s;
        int64_t r = 0;
        if (!careful)
            for (; r + 4 <= count; r += 4) add_weighted<T, A, 4>(rows + r, block, p.v.stride_s, p.value_dim, some);
        for (; r < count; ++r)
            add_weighted<T, A, 1>(rows + r, block, p.v.stride_s, p.value_dim, careful ? rows[r]->seen : some);
    }
}

template <class A> TW_INLINE void reset(Row<A> &row, int64_t value_dim) {
    row.shift = 0;
    row.limit = -A(__builtin_inf());
    row.sum = vec<A>{};
    row.masked = false;
    __builtin_memset(row.out, 0, size_t(padded<A>(value_dim)) * sizeof(A));
}

template <class A> TW_INLINE bool all_finite(const A *numbers, int64_t count) {
    A doubt = 0;
    for (int64_t d = 0; d < count; ++d) doubt += numbers[d] - numbers[d];
    return doubt == 0;
}

template <class T, class A> static void forward_few_rows(const tw_problem *problem, const tw_item *item, void *scratch) {
    const tw_problem &p = *problem;
    const int64_t count = item->row_end - item->row_begin, per_head = p.row_end - p.row_begin;
    const int64_t group = p.q_heads / p.kv_heads;
    const A factor = A(p.scale * 1.4426950408889634074);
    const size_t row_bytes = few_rows_bytes<A>(problem, 1);
    Row<A> *rows[few_rows<A>] = {};
    for (int64_t r = 0; r < count; ++r) {
        char *memory = static_cast<char *>(scratch) + size_t(r) * row_bytes;
        Row<A> &row = *(rows[r] = reinterpret_cast<Row<A> *>(memory));
        row.query = reinterpret_cast<A *>(memory + rounded(sizeof(Row<A>)));
        row.out = row.query + padded<A>(p.head_dim);
        row.i = p.row_begin + (item->row_begin + r) % per_head;
        row.h = item->kv_head * group + (item->row_begin + r) / per_head;
        const T *q = static_cast<const T *>(p.q.data) + item->b * p.q.stride_b + row.h * p.q.stride_h + row.i * p.q.stride_s;
        widen_row(q, p.head_dim, row.query);
        for (int64_t d = 0; d < p.head_dim; d += lanes<A>) store(row.query + d, load(row.query + d) * factor);
        reset(row, p.value_dim);
    }
    sweep_rows<T, A>(p, *item, rows, count, false);
    for (int64_t r = 0; r < count; ++r) {
        Row<A> &row = *rows[r];
        if ((row.masked || p.bias_count || p.table.data) && !all_finite(row.out, p.value_dim)) {
            reset(row, p.value_dim);
            sweep_rows<T, A>(p, *item, rows + r, 1, true);
        }
        A sum = 0;
        for (int l = 0; l < lanes<A>; ++l) sum += row.sum[l];
        const bool seen = row.limit > -A(__builtin_inf()) || sum != 0;
        if (item->partial)
            write_partial(p, static_cast<A *>(item->partial) + r * (p.value_dim + 3), row.out, 1, row.shift, sum, seen);
        else
            write_row<T, A>(p, item->b, row.h, row.i, row.out, 1, ending_of<A>(p, row.h, row.shift, sum, seen));
    }
}
