// The backward pass. A record holds a tile between the segments of keys that pass over it: its facts, its queries and
// gradients of the output with queries in lanes, and the gradient to the queries so far.

template <class A> TW_INLINE size_t record_numbers(const tw_problem &p) {
    return size_t(2 * p.head_dim + p.value_dim) * size_t(tile_rows<A>);
}
template <class A> static size_t record_bytes(const tw_problem *p) {
    return rounded(sizeof(Tile<A>)) + rounded(record_numbers<A>(*p) * sizeof(A));
}

// The gradients of the output in a record.
template <class A> TW_INLINE A *d_out_of(const tw_problem &p, const Tile<A> &tile) {
    return tile.query + p.head_dim * tile_rows<A>;
}

template <class T, class A>
static void open_tile(const tw_problem *problem, const tw_gradients *gradients, int64_t b, int64_t kv_head,
                      int64_t number, void *record) {
    const tw_problem &p = *problem;
    const A infinity = A(__builtin_inf());
    Tile<A> &tile = *static_cast<Tile<A> *>(record);
    tile.query = reinterpret_cast<A *>(static_cast<char *>(record) + rounded(sizeof(Tile<A>)));
    tile.out = tile.query + (p.head_dim + p.value_dim) * tile_rows<A>;
    const int64_t row = number * tile_rows<A>, left = rows_in_call(p) - row;
    const tw_item item = {b, kv_head, 0, 0, 0, p.k_len, 0, nullptr};
    fill_tile<T, A>(p, item, row, left < tile_rows<A> ? left : tile_rows<A>, tile);
    __builtin_memset(tile.out, 0, size_t(p.head_dim * tile.width) * sizeof(A));
    A *d_out = d_out_of(p, tile);
    for (int l = 0; l < tile.width; ++l) {
        const int64_t h = tile.h[l], i = tile.i[l], at = (b * p.q_heads + h) * p.q_len + i;
        const T *own = tensor_row<const T>(gradients->d_out, b, h, i), *out = tensor_row<const T>(p.out, b, h, i);
        widen_down(own, p.value_dim, A(1), d_out + l, tile.width);
        vec<A> products = {};
        int64_t e = 0;
        for (; e + lanes<A> <= p.value_dim; e += lanes<A>) products += widen(own + e) * widen(out + e);
        const int rest = int(p.value_dim - e);
        if (rest) products += widen_first(own + e, rest) * widen_first(out + e, rest);
        A pull = gradients->d_lse ? static_cast<const A *>(gradients->d_lse)[at] : A(0), product = 0;
        for (int n = 0; n < lanes<A>; ++n) product += products[n];
        pull -= product;
        const A lse = static_cast<const A *>(p.lse)[at];
        const bool empty = lse == -infinity; // such a row has no probabilities and no gradient
        tile.shift[l] = empty ? infinity : lse * A(1.4426950408889634074);
        tile.sum[l] = empty ? A(0) : pull;
    }
    tile.masked = !finite_rows(tile.query, 0, 1, p.head_dim * tile.width) ||
                  !finite_rows(d_out, 0, 1, p.value_dim * tile.width);
}

template <class T, class A>
static void close_tile(const tw_problem *problem, const tw_gradients *gradients, int64_t b, void *record) {
    const tw_problem &p = *problem;
    const Tile<A> &tile = *static_cast<const Tile<A> *>(record);
    for (int l = 0; l < tile.rows; ++l)
        narrow_row(tile.out + l, tile.width, A(p.scale), p.head_dim,
                   tensor_row<T>(gradients->d_q, b, tile.h[l], tile.i[l]));
}

// A sink's gradient: the sum over rows of its probability times pull.
template <class A> static void close_sinks(const tw_problem *problem, const tw_gradients *gradients, void *record) {
    const Tile<A> &tile = *static_cast<const Tile<A> *>(record);
    A *to = static_cast<A *>(gradients->sinks), terms[most_lanes];
    const A *sinks = static_cast<const A *>(problem->sinks);
    for (int l = 0; l < tile.width; ++l) terms[l] = sinks[tile.h[l]] * A(1.4426950408889634074);
    for (int l = 0; l < tile.width; l += lanes<A>)
        store(terms + l, exp2<A>(load(terms + l) - load(tile.shift + l)) * load(tile.sum + l));
    for (int l = 0; l < tile.rows; ++l) to[tile.h[l]] += terms[l];
}

// Numbers of a segment's scratch; the marks of its blocks follow them.
template <class T, class A> static size_t segment_numbers(const tw_problem &p, int64_t keys) {
    const size_t widths = size_t(padded<A>(p.head_dim) + padded<A>(p.value_dim));
    const size_t whole = size_t((keys + block_keys - 1) / block_keys * block_keys);
    const size_t rows = size_t(tile_rows<A>), copies = sizeof(T) == sizeof(A) ? 1 : 2;
    return widths * (whole * copies + rows) + 4 * size_t(block_keys + TW_GROUP_KEYS) * rows;
}
template <class T, class A> static size_t segment_bytes(const tw_problem *p, int64_t keys) {
    return segment_numbers<T, A>(*p, keys) * sizeof(A) + rounded(size_t(keys / block_keys + 1));
}

// Adds a segment's rows, times `factor`, to what the caller has.
template <class A>
static void add_gradients(const tw_tensor &to, const Slopes<A> &s, const A *from, int64_t width, int64_t columns,
                          A factor) {
    if (!to.data) return;
    for (int64_t key = s.first; key <= s.last; ++key, from += width) {
        if (s.blocks[(key - s.first) / block_keys] == BLOCK_UNMET) continue;
        A *row = tensor_row<A>(to, s.b, s.kv_head, key);
        for (int64_t d = 0; d < columns; ++d) row[d] += from[d] * factor;
    }
}

template <class T, class A>
static void run_segment(const tw_problem *problem, const tw_gradients *gradients, const tw_segment *segment,
                        void *scratch) {
    const tw_problem &p = *problem;
    const tw_gradients &g = *gradients;
    Slopes<A> s;
    s.problem = problem;
    s.gradients = gradients;
    s.b = segment->b;
    s.kv_head = segment->kv_head;
    s.first = segment->key_begin;
    s.last = segment->key_end - 1;
    s.meet = meet_block<T, A>;
    s.facts = p.ranges.count || p.mask.data || p.labels.q || p.bits.index;
    s.biased = p.bias_count || p.table.data;
    s.general = p.softcap > 0 || s.biased || p.dropout.enabled;
    s.scores_wanted = g.d_q.data || g.d_k.data || g.gather_count;
    s.head_width = padded<A>(p.head_dim);
    s.value_width = padded<A>(p.value_dim);
    const int64_t keys = segment->key_end - segment->key_begin;
    const int64_t whole = (keys + block_keys - 1) / block_keys * block_keys;

    A *numbers = static_cast<A *>(scratch);
    const auto take = [&numbers](int64_t count) { return (numbers += count) - count; };
    s.d_k = take(whole * s.head_width);
    s.d_v = take(whole * s.value_width);
    if constexpr (sizeof(T) == sizeof(A)) {
        s.k = tensor_row<const T>(p.k, s.b, s.kv_head, s.first);
        s.v = tensor_row<const T>(p.v, s.b, s.kv_head, s.first);
        s.k_stride = p.k.stride_s;
        s.v_stride = p.v.stride_s;
    } else {
        s.k_stride = s.head_width;
        s.v_stride = s.value_width;
        s.k = s.wide_k = take(whole * s.head_width);
        s.v = s.wide_v = take(whole * s.value_width);
    }
    s.q_rows = take(tile_rows<A> * s.head_width);
    s.d_out_rows = take(tile_rows<A> * s.value_width);
    const int64_t places = int64_t(block_keys + TW_GROUP_KEYS) * tile_rows<A>;
    s.p = take(places);
    s.ds = take(places);
    s.raw = take(places);
    if (!(p.softcap > 0)) s.raw = s.ds;
    s.bias = take(places);
    s.blocks = reinterpret_cast<uint8_t *>(numbers);
    __builtin_memset(s.blocks, BLOCK_UNMET, size_t(whole / block_keys));

    const size_t each = record_bytes<A>(problem);
    for (int64_t t = 0; t < segment->tiles; ++t) {
        Tile<A> &tile = *reinterpret_cast<Tile<A> *>(segment->records + size_t(t) * each);
        const A *d_out = d_out_of(p, tile);
        // What a tile gathers, its segments add in the order of keys.
        const uint64_t before = (uint64_t(1) << segment->number) - 1;
        for (int tries = 0; (__atomic_load_n(segment->done + t, __ATOMIC_ACQUIRE) & before) != before; ++tries)
            segment->rest(tries);
        int64_t key = next_key(tile, s.first, s.last + 1);
        if (key <= s.last)
            for (int l = 0; l < tile.rows; ++l) {
                const T *q = tensor_row<const T>(p.q, s.b, tile.h[l], tile.i[l]);
                const T *own = tensor_row<const T>(g.d_out, s.b, tile.h[l], tile.i[l]);
                widen_row(q, p.head_dim, s.q_rows + l * s.head_width);
                widen_row(own, p.value_dim, s.d_out_rows + l * s.value_width);
            }
        while (key <= s.last) {
            const int64_t stop = key + block_keys <= s.last ? key + block_keys : s.last + 1;
            if (tile.width == lanes<A>)
                slope_block<A, 1>(s, tile, d_out, key, int(stop - key));
            else
                slope_block<A, TW_TILE_VECTORS>(s, tile, d_out, key, int(stop - key));
            key = next_key(tile, stop, s.last + 1);
        }
        __atomic_fetch_or(segment->done + t, uint64_t(1) << segment->number, __ATOMIC_RELEASE);
    }
    add_gradients(g.d_k, s, s.d_k, s.head_width, p.head_dim, A(p.scale));
    add_gradients(g.d_v, s, s.d_v, s.value_width, p.value_dim, A(1));
}
