// The backward pass. A record holds a tile between the segments of keys that pass over it: its facts, its queries and
// gradients of the output with queries in lanes, and the gradient to the queries so far.

// Units and accumulators of a record, which take the same space.
template <class M> TW_INLINE size_t record_numbers(const tw_problem &p) {
    return size_t(unit_rows<M>(p.head_dim) + unit_rows<M>(p.value_dim) + sum_rows<M>(p.head_dim)) *
           size_t(tile_rows<sum_of<M>>);
}
template <class M> static size_t record_bytes(const tw_problem *p) {
    return rounded(sizeof(Tile<M>)) + rounded(record_numbers<M>(*p) * sizeof(sum_of<M>));
}

// The gradients of the output in a record.
template <class M> TW_INLINE unit_of<M> *d_out_of(const tw_problem &p, const Tile<M> &tile) {
    return tile.query + unit_rows<M>(p.head_dim) * tile_rows<sum_of<M>>;
}

// Rows whose lse is farther from 0 than this (in log2 units) are weighed.
constexpr int far_lse = 1024;

TW_INLINE bool may_be_far(const tw_problem &p) { return p.bias_count || p.table.data; }
template <class A> TW_INLINE bool is_far(A lse) { return (lse > A(far_lse) || lse < -A(far_lse)) && lse - lse == A(0); }

template <class M> TW_INLINE size_t states_bytes(const tw_problem &p) {
    return rounded(size_t(p.value_dim + 3) * tile_rows<sum_of<M>> * sizeof(sum_of<M>));
}
template <class T, class M> static size_t opening_bytes(const tw_problem *p) {
    return may_be_far(*p) ? states_bytes<M>(*p) + scratch_bytes<T, M>(p, 1) : 0;
}

// What the probabilities of a tile's rows are multiplied by, in `limit`. Where biases carry lse far from 0, its last places
// do not hold the logarithm of a sum any more (at 10^9 they are 64 apart): then 2^(x - lse) of all keys together is not 1,
// but the sum that the forward pass finds again. Of a part of the keys it cannot be told.
template <class T, class M>
static void weigh_rows(const tw_problem &p, int64_t b, int64_t kv_head, int64_t row, Tile<M> &tile, void *scratch) {
    using A = sum_of<M>;
    bool far = false;
    for (int l = 0; l < tile.width; ++l) {
        tile.limit[l] = 1;
        far |= is_far(tile.shift[l]);
    }
    if (!far || !may_be_far(p) || p.part) return;
    const A *state = static_cast<const A *>(scratch);
    tw_item item = {};
    item.b = b;
    item.kv_head = kv_head;
    item.row_begin = row;
    item.row_end = row + tile.rows;
    item.key_end = p.k_len;
    item.partial = scratch;
    forward<T, M>(&p, &item, 1, static_cast<char *>(scratch) + states_bytes<M>(p));
    for (int l = 0; l < tile.rows; ++l, state += p.value_dim + 3) {
        if (!is_far(tile.shift[l])) continue;
        A sum = state[p.value_dim + 1] * power_of_two_of(state[p.value_dim] - tile.shift[l]);
        if (p.sinks) sum += power_of_two_of(in_log2<A>(static_cast<const A *>(p.sinks)[tile.h[l]]) - tile.shift[l]);
        tile.limit[l] = 1 / sum;
    }
}

// `scratch`: as large as opening_bytes says.
template <class T, class M>
static void open_tile(const tw_problem *problem, const tw_gradients *gradients, int64_t b, int64_t kv_head,
                      int64_t number, void *record, void *scratch) {
    using A = sum_of<M>;
    const tw_problem &p = *problem;
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
        tile.shift[l] = empty ? infinity : lse * A(1.4426950408889634074);
        tile.sum[l] = empty ? A(0) : pull;
    }
    weigh_rows<T>(p, b, kv_head, row, tile, scratch);
    for (int l = 0; l < tile.width; l += lanes<A>) rows_to_lanes<M>(rows + l, p.value_dim, A(1), d_out + l, tile.width);
    tile.masked = !finite_rows(tile.query, 0, 1, units_of<M>(p.head_dim) * tile.width) ||
                  !finite_rows(d_out, 0, 1, units_of<M>(p.value_dim) * tile.width);
}

template <class T, class M>
static void close_tile(const tw_problem *problem, const tw_gradients *gradients, int64_t b, void *record) {
    const tw_problem &p = *problem;
    using A = sum_of<M>;
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
    const Tile<M> &tile = *static_cast<const Tile<M> *>(record);
    A *to = static_cast<A *>(gradients->sinks), terms[most_lanes];
    const A *sinks = static_cast<const A *>(problem->sinks);
    for (int l = 0; l < tile.width; ++l) terms[l] = in_log2<A>(sinks[tile.h[l]]);
    for (int l = 0; l < tile.width; l += lanes<A>)
        store(terms + l, exp2<A>(load(terms + l) - load(tile.shift + l)) * load(tile.limit + l) * load(tile.sum + l));
    for (int l = 0; l < tile.rows; ++l) to[tile.h[l]] += terms[l];
}

// Where a segment is longer than this, a tile asks on its way through it too whether the call was given up.
constexpr int64_t asking_keys = 4096;

// Units and accumulators of a segment's scratch, in the order in which run_segment takes them.
template <class T, class M> static size_t segment_numbers(const tw_problem &p, int64_t keys) {
    using A = sum_of<M>;
    const int64_t whole = (keys + block_keys - 1) / block_keys * block_keys;
    const int64_t head = padded<A>(p.head_dim), value = padded<A>(p.value_dim);
    int64_t numbers = whole * (head + value) + tiles_together<M> * units_of<M>(tile_rows<A>) * (head + value);
    if (copies<T, M>(p, INT64_MAX)) numbers += whole * (padded_units<M>(p.head_dim) + padded_units<M>(p.value_dim));
    if (M::numbers > 1) numbers += whole / M::numbers * head;
    numbers += 2 * score_places<M> + (2 * tiles_together<M> + 1) * (score_places<M> / M::numbers);
    numbers += TW_GROUP_KEYS * tile_rows<A>;
    return size_t(numbers);
}
// The marks of its blocks follow them.
template <class T, class M> static size_t segment_bytes(const tw_problem *p, int64_t keys) {
    return segment_numbers<T, M>(*p, keys) * sizeof(sum_of<M>) + rounded(size_t(keys / block_keys + 1));
}

// Adds a segment's rows, times `factor`, to what the caller has.
template <class M>
static void add_gradients(const tw_tensor &to, const Slopes<M> &s, const sum_of<M> *from, int64_t width,
                          int64_t columns, sum_of<M> factor) {
    using A = sum_of<M>;
    if (!to.data) return;
    for (int64_t key = s.first; key <= s.last; ++key, from += width) {
        if (s.blocks[(key - s.first) / block_keys] == BLOCK_UNMET) continue;
        A *row = tensor_row<A>(to, s.b, s.kv_head, key);
        for (int64_t d = 0; d < columns; ++d) row[d] += from[d] * factor;
    }
}

// Waits until the segments before this one have passed a tile: what it gathers, they add in the order of keys. False where
// the call was given up, as perhaps was the segment waited for.
TW_INLINE bool wait_for_turn(const tw_segment &segment, int64_t tile) {
    const uint64_t before = (uint64_t(1) << segment.number) - 1;
    for (int tries = 0;; ++tries) {
        if (tw_given_up()) return false;
        if ((__atomic_load_n(segment.done + tile, __ATOMIC_ACQUIRE) & before) == before) return true;
        segment.rest(tries);
    }
}

// The rows of a tile, across: the n-th of those that pass together.
template <class T, class M> static void write_rows(const Slopes<M> &s, const Tile<M> &tile, int64_t n) {
    constexpr int64_t row_units = tile_rows<sum_of<M>> / M::numbers;
    const tw_problem &p = *s.problem;
    unit_of<M> *q_rows = s.q_rows + n * row_units * s.head_width,
               *d_out_rows = s.d_out_rows + n * row_units * s.value_width;
    if (M::tiled && tile.rows < tile_rows<sum_of<M>>) { // rows that do not exist are multiplied too
        __builtin_memset(q_rows, 0, size_t(row_units * s.head_width) * sizeof(unit_of<M>));
        __builtin_memset(d_out_rows, 0, size_t(row_units * s.value_width) * sizeof(unit_of<M>));
    }
    for (int l = 0; l < tile.rows; l += M::numbers) {
        const T *q[M::numbers] = {}, *d_out[M::numbers] = {};
        for (int i = 0; i < M::numbers && l + i < tile.rows; ++i) {
            q[i] = tensor_row<const T>(p.q, s.b, tile.h[l + i], tile.i[l + i]);
            d_out[i] = tensor_row<const T>(s.gradients->d_out, s.b, tile.h[l + i], tile.i[l + i]);
        }
        write_across<M>(q, p.head_dim, q_rows + l / M::numbers * s.head_width);
        write_across<M>(d_out, p.value_dim, d_out_rows + l / M::numbers * s.value_width);
    }
}

template <class T, class M>
static void run_segment(const tw_problem *problem, const tw_gradients *gradients, const tw_segment *segment,
                        void *scratch) {
    const tw_problem &p = *problem;
    const tw_gradients &g = *gradients;
    using A = sum_of<M>;
    using U = unit_of<M>;
    const Registers<M> registers;
    Slopes<M> s;
    s.problem = problem;
    s.gradients = gradients;
    s.b = segment->b;
    s.kv_head = segment->kv_head;
    s.first = segment->key_begin;
    s.last = segment->key_end - 1;
    s.meet = meet_block<T, M>;
    s.factor = A(p.scale * 1.4426950408889634074);
    s.facts = p.ranges.count || p.mask.data || p.labels.q || p.bits.index;
    s.biased = p.bias_count || p.table.data;
    s.general = p.softcap > 0 || s.biased || p.dropout.enabled;
    s.scores_wanted = g.d_q.data || g.d_k.data || g.gather_count;
    s.head_width = padded<A>(p.head_dim);
    s.value_width = padded<A>(p.value_dim);
    const int64_t keys = segment->key_end - segment->key_begin;
    constexpr int64_t row_units = tile_rows<A> / M::numbers;
    const int64_t whole = (keys + block_keys - 1) / block_keys * block_keys;

    A *numbers = static_cast<A *>(scratch);
    const auto take = [&numbers](int64_t count) { return (numbers += count) - count; };
    const auto take_units = [&take](int64_t count) { return reinterpret_cast<U *>(take(count)); };
    s.d_k = take(whole * s.head_width);
    s.d_v = take(whole * s.value_width);
    s.copied = copies<T, M>(p, segment->tiles);
    if (s.copied) {
        s.k_stride = padded_units<M>(p.head_dim);
        s.v_stride = padded_units<M>(p.value_dim);
        s.k = s.copy_k = take_units(whole * s.k_stride);
        s.v = s.copy_v = take_units(whole * s.v_stride);
    } else if constexpr (sizeof(T) == sizeof(U)) {
        s.k = tensor_row<const T>(p.k, s.b, s.kv_head, s.first);
        s.v = tensor_row<const T>(p.v, s.b, s.kv_head, s.first);
        s.k_stride = p.k.stride_s;
        s.v_stride = p.v.stride_s;
    }
    s.k_across = s.k;
    s.across_stride = s.k_stride;
    if constexpr (M::numbers > 1) {
        s.across_stride = s.head_width;
        s.k_across = s.copy_across = take_units(whole / M::numbers * s.across_stride);
    }
    s.q_rows = take_units(tiles_together<M> * row_units * s.head_width);
    s.d_out_rows = take_units(tiles_together<M> * row_units * s.value_width);
    s.p = take_units(tiles_together<M> * (score_places<M> / M::numbers));
    s.raw = s.raw_across = take_units(tiles_together<M> * (score_places<M> / M::numbers));
    if constexpr (M::numbers > 1) s.raw_across = take_units(score_places<M> / M::numbers);
    s.ds = take(score_places<M>);
    s.bias = take(score_places<M>);
    s.cap_slopes = take(TW_GROUP_KEYS * tile_rows<A>);
    s.blocks = reinterpret_cast<uint8_t *>(numbers);
    __builtin_memset(s.blocks, BLOCK_UNMET, size_t(whole / block_keys));

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
            if (!wait_for_turn(*segment, u)) return;
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
                    slope_block<M, 1>(s, tile, d_out, key, n);
                else if (n)
                    slope_block<M, TW_TILE_VECTORS>(s, tile, d_out, key, n);
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
    add_gradients(g.d_k, s, s.d_k, s.head_width, p.head_dim, A(p.scale));
    add_gradients(g.d_v, s, s.d_v, s.value_width, p.value_dim, A(1));
}
