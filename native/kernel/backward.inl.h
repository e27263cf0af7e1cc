// The backward pass: records are opened, segments pass over them, and they are closed.

// `scratch`: as large as segment_bytes says for `keys`.
template <class T, class M>
static void open_tile(const tw_problem *problem, const tw_gradients *gradients, int64_t b, int64_t kv_head,
                      int64_t number, void *record, int64_t keys, void *scratch) {
    using A = sum_of<M>;
    const tw_problem &p = *problem;
    if constexpr (M::parts > 1)
        if (!differentiates_parts(p))
            return open_tile<T, Singles<A>>(problem, gradients, b, kv_head, number, record, keys, scratch);
    const A infinity = A(__builtin_inf());
    Tile<M> &tile = *static_cast<Tile<M> *>(record);
    tile.query = reinterpret_cast<unit_of<M> *>(static_cast<char *>(record) + rounded(sizeof(Tile<M>)));
    unit_of<M> *d_out = d_out_of(p, tile);
    tile.out = reinterpret_cast<A *>(d_out + unit_rows<M>(p.value_dim) * tile_rows<A>);
    const int64_t row = number * tile_rows<A>, left = rows_in_call(p) - row;
    tw_item item = {};
    item.b = b;
    item.kv_head = kv_head;
    item.key_end = p.k_len;
    fill_tile<T>(p, item, row, left < tile_rows<A> ? left : tile_rows<A>, tile);
    __builtin_memset(tile.out, 0, size_t(sum_rows<M>(p.head_dim) * tile.width) * sizeof(A));
    const T *rows[most_lanes];
    for (int l = 0; l < tile.width; ++l) {
        const int64_t h = tile.h[l], i = tile.i[l], at = lse_at(p, b, h, i);
        const T *own = rows[l] = tensor_row<const T>(gradients->d_out, b, h, i);
        const T *out = tensor_row<const T>(p.out, b, h, i);
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
        tile.shift[l] = empty ? infinity : in_units<A>(p, lse);
        tile.sum[l] = empty ? A(0) : pull;
    }
    if constexpr (M::parts > 1) {
        for (int l = 0; l < tile.width; l += lanes<A>)
            tile.strange |= rows_to_lanes_in_parts(rows + l, p.value_dim, 1, d_out + l, tile.width, least_gradient)
                            << l;
        // Parts keep no other NaN.
        for (int l = 0; l < tile.width; ++l) {
            if (tile.shift[l] != tile.shift[l]) tile.shift[l] = __builtin_nanf("");
            if (tile.sum[l] != tile.sum[l]) tile.sum[l] = __builtin_nanf("");
            tile.strange |= uint64_t(is_strange_gradient(tile.sum[l])) << l;
        }
    } else {
        for (int l = 0; l < tile.width; l += lanes<A>)
            rows_to_lanes<M>(rows + l, p.value_dim, A(1), d_out + l, tile.width);
        tile.masked = !finite_rows(tile.query, 0, 1, units_of<M>(p.head_dim) * tile.width) ||
                      !finite_rows(d_out, 0, 1, units_of<M>(p.value_dim) * tile.width);
    }
    for (int l = 0; l < tile.width; ++l) tile.limit[l] = 1, tile.rest[l] = 0;
    tile.far = false;
    if ((has_far_rows(tile) || sums_pull<T, A>(p)) && !p.part)
        weigh_far_rows<T>(problem, gradients, b, kv_head, tile, keys, scratch);
}

template <class T, class M>
static void close_tile(const tw_problem *problem, const tw_gradients *gradients, int64_t b, void *record) {
    const tw_problem &p = *problem;
    using A = sum_of<M>;
    if constexpr (M::parts > 1)
        if (!differentiates_parts(p)) return close_tile<T, Singles<A>>(problem, gradients, b, record);
    const Tile<M> &tile = *static_cast<const Tile<M> *>(record);
    A factors[most_lanes];
    for (int l = 0; l < tile.width; ++l) factors[l] = A(p.scale);
    if (p.part)
        tile_to_rows<A>(gradients->d_q, b, tile, factors, p.head_dim);
    else
        tile_to_rows<T>(gradients->d_q, b, tile, factors, p.head_dim);
}

// A sink's gradient: the sum over rows of its probability times pull.
template <class M> static void close_sinks(const tw_problem *problem, const tw_gradients *gradients, void *record) {
    using A = sum_of<M>;
    if constexpr (M::parts > 1)
        if (!differentiates_parts(*problem)) return close_sinks<Singles<A>>(problem, gradients, record);
    const Tile<M> &tile = *static_cast<const Tile<M> *>(record);
    A *to = static_cast<A *>(gradients->sinks);
    for (int l = 0; l < tile.rows; ++l) to[tile.h[l]] += sink_share<A>(*problem, tile, l) * tile.limit[l] * tile.sum[l];
}

// Where a segment is longer than this, a tile asks on its way through it too whether the call was given up.
constexpr int64_t asking_keys = 4096;

// Gives the caller a segment's rows times `factor`: written as elements E, or added to what is there.
template <class E, class M>
static void give_rows(const tw_tensor &to, const Slopes<M> &s, const sum_of<M> *from, int64_t width, int64_t columns,
                      sum_of<M> factor) {
    for (int64_t key = s.first; key <= s.last; ++key, from += width) {
        E *row = tensor_row<E>(to, s.b, s.kv_head, key);
        if (s.blocks[(key - s.first) / block_keys] == BLOCK_UNMET)
            __builtin_memset(row, 0, size_t(columns) * sizeof(E));
        else
            narrow_row(from, factor, columns, row);
    }
}
template <class M>
static void add_rows_given(const tw_tensor &to, const Slopes<M> &s, const sum_of<M> *from, int64_t width,
                           int64_t columns, sum_of<M> factor) {
    for (int64_t key = s.first; key <= s.last; ++key, from += width) {
        if (s.blocks[(key - s.first) / block_keys] == BLOCK_UNMET) continue;
        auto *row = tensor_row<sum_of<M>>(to, s.b, s.kv_head, key);
        for (int64_t d = 0; d < columns; ++d) row[d] += from[d] * factor;
    }
}

// The last tile of a kv head in which queries of `tile` stand again, for other heads of the group.
template <class A> TW_INLINE int64_t last_tile_of_queries(const tw_problem &p, int64_t tile) {
    const int64_t rows = rows_in_call(p), per_head = p.row_end - p.row_begin, first = tile * tile_rows<A>;
    const int64_t end = first + tile_rows<A> < rows ? first + tile_rows<A> : rows;
    const bool whole = first / per_head != (end - 1) / per_head; // several heads stand in the tile: any query may
    return (whole ? rows - 1 : rows - per_head + (end - 1) % per_head) / tile_rows<A>;
}

// Waits until the segments before this one have passed a tile: what it gathers, they add in the order of keys; and until
// the head before has passed the tile `last`, if heads add to the same array. False where the call was given up, as perhaps
// was the segment waited for.
TW_INLINE bool wait_for_turn(const tw_segment &segment, int64_t tile, int64_t last) {
    const uint64_t own = uint64_t(1) << segment.number, lower = own - 1;
    for (int tries = 0;; ++tries) {
        if (tw_given_up()) return false;
        if ((__atomic_load_n(segment.done + tile, __ATOMIC_ACQUIRE) & lower) == lower &&
            (!segment.before || __atomic_load_n(segment.before + last, __ATOMIC_ACQUIRE) & own))
            return true;
        segment.rest(tries);
    }
}

// The rows of a tile, across: the n-th of those that pass together.
template <class T, class M> static void write_rows(const Slopes<M> &s, const Tile<M> &tile, int64_t n) {
    constexpr int64_t row_units = tile_rows<sum_of<M>> / M::numbers;
    const tw_problem &p = *s.problem;
    unit_of<M> *q_rows = s.q_rows + n * M::parts * row_units * s.head_width,
               *d_out_rows = s.d_out_rows + n * M::parts * row_units * s.value_width;
    if (M::tiled && tile.rows < tile_rows<sum_of<M>>) { // rows that do not exist are multiplied too
        __builtin_memset(q_rows, 0, size_t(M::parts * row_units * s.head_width) * sizeof(unit_of<M>));
        __builtin_memset(d_out_rows, 0, size_t(M::parts * row_units * s.value_width) * sizeof(unit_of<M>));
    }
    for (int l = 0; l < tile.rows; l += M::numbers) {
        const T *q[M::numbers] = {}, *d_out[M::numbers] = {};
        for (int i = 0; i < M::numbers && l + i < tile.rows; ++i) {
            q[i] = tensor_row<const T>(p.q, s.b, tile.h[l + i], tile.i[l + i]);
            d_out[i] = tensor_row<const T>(s.gradients->d_out, s.b, tile.h[l + i], tile.i[l + i]);
        }
        unit_of<M> *const q_to = q_rows + l / M::numbers * s.head_width;
        unit_of<M> *const d_out_to = d_out_rows + l / M::numbers * s.value_width;
        if constexpr (M::parts > 1) {
            pair_in_parts(q[0], q[1], p.head_dim, q_to, row_units * s.head_width, least_exponent);
            pair_in_parts(d_out[0], d_out[1], p.value_dim, d_out_to, row_units * s.value_width, least_gradient);
        } else {
            write_across<M>(q, p.head_dim, q_to);
            write_across<M>(d_out, p.value_dim, d_out_to);
        }
    }
}

template <class T, class M>
static void run_segment(const tw_problem *problem, const tw_gradients *gradients, const tw_segment *segment,
                        void *scratch) {
    const tw_problem &p = *problem;
    const tw_gradients &g = *gradients;
    using A = sum_of<M>;
    using U = unit_of<M>;
    if constexpr (M::parts > 1)
        if (!differentiates_parts(p)) return run_segment<T, Singles<A>>(problem, gradients, segment, scratch);
    const Registers<M> registers;
    Slopes<M> s;
    enter_segment<T>(s, problem, gradients, segment->b, segment->kv_head, segment->key_begin, segment->key_end,
                     segment->tiles, scratch);
    const int64_t keys = segment->key_end - segment->key_begin;
    const size_t each = record_bytes<M>(problem);
    const auto record = [&](int64_t t) { return reinterpret_cast<Tile<M> *>(segment->records + size_t(t) * each); };
    // Segments that run at the same time wait for one another's tiles: where there are few for each, they go one by one. So
    // they do where a bias is read and its gradient written: more rows at a time than pages are at hand.
    const int64_t segments = (p.k_len + keys - 1) / keys;
    const bool few = segments > 1 && segment->tiles < 4 * tiles_together<M> * segments, alone = few || p.bias_count;
    const int64_t together = alone ? 1 : tiles_together<M>;
    for (int64_t t = 0; t < segment->tiles; t += together) {
        const int64_t stop_tile = t + together < segment->tiles ? t + together : segment->tiles;
        int64_t key = s.last + 1;
        for (int64_t u = t; u < stop_tile; ++u) {
            if (!wait_for_turn(*segment, u, last_tile_of_queries<A>(p, u))) return;
            const int64_t first = next_key(*record(u), s.first, s.last + 1);
            if (first > s.last) continue;
            key = first < key ? first : key;
            write_rows<T>(s, *record(u), u - t);
        }
        while (key <= s.last) {
            if (key % asking_keys == 0 && tw_given_up()) return;
            const int64_t stop = key + block_keys <= s.last ? key + block_keys : s.last + 1;
            int64_t next = s.last + 1;
            for (int64_t u = t; u < stop_tile; ++u) {
                Tile<M> &tile = *record(u);
                const U *d_out = d_out_of(p, tile);
                const int n = next_key(tile, key, stop) < stop ? int(stop - key) : 0;
                if (n && !M::tiled && tile.width == lanes<A>)
                    slope_block<M, 1, RESULTS>(s, tile, d_out, key, n);
                else if (n)
                    slope_block<M, TW_TILE_VECTORS, RESULTS>(s, tile, d_out, key, n);
                if constexpr (M::tiled) ++s.work.slot;
                const int64_t own = next_key(tile, stop, s.last + 1);
                next = own < next ? own : next;
            }
            if constexpr (M::tiled) end_block_in_tiles(s, key);
            key = next;
        }
        for (int64_t u = t; u < stop_tile; ++u)
            __atomic_fetch_or(segment->done + u, uint64_t(1) << segment->number, __ATOMIC_RELEASE);
    }
    const auto give = [&](const tw_tensor &to, const A *from, int64_t width, int64_t columns, A factor) {
        if (!to.data) return;
        if (g.adds)
            add_rows_given(to, s, from, width, columns, factor);
        else if (p.part)
            give_rows<A>(to, s, from, width, columns, factor);
        else
            give_rows<T>(to, s, from, width, columns, factor);
    };
    give(g.d_k, s.d_k, s.head_width, p.head_dim, A(p.scale));
    give(g.d_v, s.d_v, s.value_width, p.value_dim, A(1));
}
