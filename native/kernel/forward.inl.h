// The forward pass of one item: its tiles are filled, swept over the keys chunk by chunk (so that a chunk's keys and
// values stay in cache while every tile uses them), and finished.

// Vectors of a tile of `rows` rows: few rows take narrow tiles. A row's bits do not depend on it.
template <class M> TW_INLINE int vectors_for(int64_t rows) {
    return !M::tiled && rows <= lanes<sum_of<M>> ? 1 : TW_TILE_VECTORS;
}
template <class A> constexpr int64_t tile_rows = TW_TILE_VECTORS * lanes<A>;

template <class A> TW_INLINE bool takes_few_rows(const tw_problem &p) {
    return !p.row_invariant && rows_of(p) <= few_rows<A>;
}

// Whether an item sums split by split: where rows must not depend on their number, so that few rows can be split among
// threads and many need not be.
TW_INLINE bool joins_splits(const tw_problem &p) { return p.row_invariant && p.k_len > split_keys; }

// Whether numbers are multiplied in parts (amx_parts.inl.h): but for few rows, whose sums have another order anyway, and
// where rows must not depend on their number, as few and many are then summed alike. It must not depend on how many keys
// there are, and on rows not beyond the border of few ones.
TW_INLINE bool takes_parts(const tw_problem &p) { return !p.row_invariant && p.kv_heads && !takes_few_rows<float>(p); }

// The same of derivatives: their sums do not depend on how many rows or keys there are, so neither may this.
TW_INLINE bool differentiates_parts(const tw_problem &p) { return !p.row_invariant; }

template <class M> static int64_t keys_of_chunk(const tw_problem *p) {
    if constexpr (M::parts > 1)
        if (!takes_parts(*p)) return chunk_keys<Singles<float>>(*p);
    return chunk_keys<M>(*p);
}

template <class M> static int64_t parts_of_numbers(const tw_problem *p) {
    return M::parts > 1 && takes_parts(*p) ? M::parts : 1;
}

template <class T, class M> static size_t scratch_bytes(const tw_problem *p, int64_t tiles) {
    using A = sum_of<M>;
    const size_t width = size_t(tile_rows<A>) * sizeof(A);
    size_t again = 0; // for a tile with strange rows
    if constexpr (M::parts > 1) {
        if (!takes_parts(*p)) return scratch_bytes<T, Singles<A>>(p, tiles);
        again = scratch_bytes<T, Singles<A>>(p, 1);
    }
    if constexpr (M::parts == 1)
        if (takes_few_rows<A>(*p)) return few_rows_bytes<T, M>(*p);
    const int64_t runs = M::tiled ? 2 : 1; // whose probabilities are kept
    const int64_t scores = M::parts * runs * (waiting_keys<M> + TW_GROUP_KEYS) / M::numbers + block_keys +
                           TW_GROUP_KEYS; // and their biases
    const size_t state =
        rounded(sizeof(Tile<M>)) + size_t(unit_rows<M>(p->head_dim) + sum_rows<M>(p->value_dim)) * width;
    const size_t earlier =
        joins_splits(*p) ? rounded(sizeof(Earlier<A>)) + size_t(sum_rows<M>(p->value_dim)) * width : 0;
    return size_t(tiles) * (state + earlier) + size_t(scores) * width +
           size_t(fetched_units<T, M>(*p, tiles)) * sizeof(A) + again;
}

template <class T, class M>
static void fill_tile(const tw_problem &p, const tw_item &item, int64_t row, int64_t rows, Tile<M> &tile) {
    using A = sum_of<M>;
    const int64_t group = p.q_heads / p.kv_heads, per_head = p.row_end - p.row_begin;
    const A sign = scaling_of<A>(p).sign;
    tile.rows = int(rows);
    tile.width = vectors_for<M>(rows) * lanes<A>;
    tile.label_low = INT32_MAX;
    tile.label_high = INT32_MIN;
    const T *q[most_lanes];
    int64_t h = item.kv_head * group + row / per_head, i = p.row_begin + row % per_head;
    for (int l = 0; l < tile.width; ++l) {
        tile.h[l] = h;
        tile.i[l] = i;
        q[l] = tensor_row<const T>(p.q, item.b, h, i);
        if (p.labels.q) {
            const int32_t label = p.labels.q[item.b * p.labels.q_stride_b + h * p.labels.q_stride_h + i];
            tile.label_low = label < tile.label_low ? label : tile.label_low;
            tile.label_high = label > tile.label_high ? label : tile.label_high;
        }
        if (l + 1 < rows && ++i == p.row_end) {
            i = p.row_begin;
            ++h;
        }
    }
    tile.strange = 0;
    if (M::parts > 1 && scaling_of<A>(p).factor >= end_factor) tile.strange = ~uint64_t(0);
    for (int l = 0; l < tile.width; l += lanes<A>) {
        if constexpr (M::parts > 1)
            tile.strange |= rows_to_lanes_in_parts(q + l, p.head_dim, sign, tile.query + l, tile.width) << l;
        else
            rows_to_lanes<M>(q + l, p.head_dim, sign, tile.query + l, tile.width);
    }
    find_spans(p, item.b, item.key_begin, item.key_end, tile);
}

template <class M> TW_INLINE void sweep(Sweep<M> &s, Tile<M> &tile, int64_t begin, int64_t end) {
    if constexpr (M::tiled)
        sweep_chunk_in_tiles(s, tile, begin, end);
    else if (tile.width == lanes<sum_of<M>>)
        sweep_chunk<M, 1>(s, tile, begin, end);
    else
        sweep_chunk<M, TW_TILE_VECTORS>(s, tile, begin, end);
}

// Sweeps all `count` tiles over the keys [begin, end) of the item.
template <class T, class M>
static void sweep_all(Sweep<M> &s, Tile<M> *const *tiles, int64_t count, int64_t begin, int64_t end) {
    const auto first_key = [&](int64_t from) {
        int64_t next = end;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t own = next_key(*tiles[t], from, end);
            next = own < next ? own : next;
        }
        return next;
    };
    if (count == 1) plan_asking(s, *tiles[0]);
    for (int64_t key = begin, next = first_key(key); next < end && !tw_given_up();) {
        const int64_t first = next - next % s.span;
        key = first + s.span < end ? first + s.span : end;
        next = first_key(key);
        if (!s.moving && s.chunk != first && looks_ahead(s)) {
            int64_t meeting = 0; // tiles that see some of the chunk
            for (int64_t t = 0; t < count; ++t) meeting += next_key(*tiles[t], first, end) < key;
            look_ahead<T>(s, next, count > 1 ? meeting : s.tiles);
        }
        enter_span<T>(s, first);
        for (int64_t t = 0; t < count; ++t) sweep(s, *tiles[t], first, key);
        if constexpr (M::tiled)
            if (!s.moving || next >= end) finish_work(s.background); // which reads the chunk's values
    }
}

// Keys and values of a head that stay in the second-level cache where they are read in place.
template <class T> TW_INLINE int64_t keys_in_place(const tw_problem &p) {
    return (512 << 10) / ((p.head_dim + p.value_dim) * int64_t(sizeof(T)));
}

// Whether the rows of an item see so few keys that what a tile sees stays in cache for the next: in the copy, or, where
// they are read in place, in the second level. It changes no bit. Asked of one row of each tile.
template <class T, class M> static bool sees_few_keys(const tw_problem &p, const tw_item &item, bool copied) {
    const tw_ranges &ranges = p.ranges;
    if (copied && !M::tiled) return false;
    const int64_t keys = copied ? held_keys<M>(p) : keys_in_place<T>(p);
    if (!ranges.count) return !M::tiled && item.key_end - item.key_begin <= keys; // a chunk of tile registers is long
    const int64_t room = keys - 2 * block_keys * ranges.count, per_head = p.row_end - p.row_begin;
    for (int64_t row = item.row_begin; row < item.row_end; row += tile_rows<sum_of<M>>) {
        const int64_t h = item.kv_head * (p.q_heads / p.kv_heads) + row / per_head, i = p.row_begin + row % per_head;
        const int64_t at = range_row(ranges, item.b, h, i);
        int64_t keys = 0;
        for (int r = 0; r < ranges.count; ++r) {
            const int64_t start = read_range(ranges, ranges.starts, at + r),
                          stop = read_range(ranges, ranges.stops, at + r);
            keys += stop > start ? stop - start : 0;
        }
        if (keys > room) return false;
    }
    return true;
}

// For tiles that pass one after another over a short head, read in place: along their sweeps, the head that follows.
template <class T, class M> static void look_beyond_head(Sweep<M> &s) {
    const tw_item &item = *s.item, *after = item.next;
    if (!after || after->number != item.number || (after->b == item.b && after->kv_head == item.kv_head)) return;
    const int64_t keys = after->key_end - after->key_begin;
    const double groups = item.cost / double(2 * tile_rows<sum_of<M>> * group_keys<M>);
    if (keys <= keys_in_place<T>(*s.problem)) ask_along<T>(s, after, after->key_begin, keys, int64_t(groups) + 1);
}

// Something that no finite input explains: a value that is not finite may have reached rows that must not see it.
template <class M> static bool needs_care(const Tile<M> &tile, int64_t value_dim) {
    using A = sum_of<M>;
    if (!tile.masked) return false;
    vec<A> doubt[4] = {}; // sums that need not wait for one another
    const int64_t numbers = value_dim * tile.width;
    const auto ask = [&](int which, int64_t at) {
        const vec<A> x = load(tile.out + at);
        doubt[which] += x - x; // 0 for finite numbers, else NaN
    };
    int64_t at = 0;
    for (; at + 4 * lanes<A> <= numbers; at += 4 * lanes<A>)
        TW_UNROLL(int i = 0; i < 4; ++i) ask(i, at + i * lanes<A>);
    for (; at < numbers; at += lanes<A>) ask(0, at);
    const vec<A> all = (doubt[0] + doubt[1]) + (doubt[2] + doubt[3]);
    return lane_bits(all != all) != 0;
}

// Sweeps a tile anew over the keys [begin, end), values barred lane by lane.
template <class T, class M> static void sweep_with_care(Sweep<M> &s, Tile<M> &tile, int64_t begin, int64_t end) {
    reset(tile, s.value_dim);
    s.careful = true;
    Tile<M> *const alone[] = {&tile};
    sweep_all<T>(s, alone, 1, begin, end);
    s.careful = false;
}

template <class T, class M>
static void forward(const tw_problem *problem, const tw_item *item, int64_t most_tiles, void *scratch);

#if defined(__AMX_BF16__)
// Computes the rows of a tile anew that have or see a query or key which parts cannot hold, or a score that is not finite:
// the tile's rows are those of the item from `row` on.
template <class T>
static void leave_rows(const tw_problem &p, const tw_item &item, const Tile<Parts<T>> &tile, int64_t row,
                       void *scratch) {
    uint64_t left = tile.strange;
    for (int z = 0; z < tile_lanes; z += tile_side) {
        const vf sum = load(tile.sum + z);
        left |= lane_bits(sum - sum != vf{}) << z; // not finite
    }
    left &= first_bits(tile.rows);
    while (left) {
        const int begin = __builtin_ctzll(left), count = __builtin_ctzll(~(left >> begin));
        left &= ~(first_bits(count) << begin);
        tw_item own = item;
        own.row_begin = row + begin;
        own.row_end = own.row_begin + count;
        own.next = nullptr;
        if (item.partial)
            own.partial = static_cast<float *>(item.partial) + (own.row_begin - item.row_begin) * (p.value_dim + 3);
        forward<T, Singles<float>>(&p, &own, 1, scratch);
    }
}
#endif

template <class T, class M>
static void forward(const tw_problem *problem, const tw_item *item, int64_t most_tiles, void *scratch) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    const tw_problem &p = *problem;
    if constexpr (M::parts > 1) {
        if (!takes_parts(p)) return forward<T, Singles<A>>(problem, item, most_tiles, scratch);
    } else if (takes_few_rows<A>(p)) {
        return forward_few_rows<T, M>(problem, item, scratch);
    }
    const int64_t count = (item->row_end - item->row_begin + tile_rows<A> - 1) / tile_rows<A>;
    constexpr int64_t width = tile_rows<A>;
    const Registers<M> registers;
    char *tile_memory = static_cast<char *>(scratch);
    char *memory = tile_memory + size_t(most_tiles) * rounded(sizeof(Tile<M>));
    // Units and accumulators take the same space.
    const auto take = [&memory](int64_t count) {
        return (memory += size_t(count) * sizeof(A)) - size_t(count) * sizeof(A);
    };

    Sweep<M> s;
    s.problem = problem;
    s.batch = item->b;
    s.kv_head = item->kv_head;
    s.head_units = unit_rows<M>(p.head_dim) / M::parts;
    s.value_dim = sum_rows<M>(p.value_dim);
    s.general = p.softcap > 0 || p.bias_count || p.table.data || p.dropout.enabled;
    s.factor = scaling_of<A>(p).factor;
    const int64_t run = M::parts * (waiting_keys<M> + TW_GROUP_KEYS) / M::numbers * width;
    s.probabilities = reinterpret_cast<U *>(take(run));
    if (M::tiled) s.other_probabilities = reinterpret_cast<U *>(take(run));
    s.bias = reinterpret_cast<A *>(take((block_keys + TW_GROUP_KEYS) * width));
    choose_source<T>(s, count, reinterpret_cast<U *>(take(fetched_units<T, M>(p, count))));
    s.careful = false;
    s.ahead = {};
    s.chunk = -1;
    s.item = item;
    s.tiles = count;

    // Tiles share a chunk's keys; where there is one chunk, or tiles see few keys, each is finished before the next, which
    // takes its memory.
    s.moving = sees_few_keys<T, M>(p, *item, s.fetch != nullptr);
    s.span = s.moving ? held_keys<M>(p) : chunk_keys<M>(p);
    if (s.moving && !s.fetch) look_beyond_head<T>(s);
    const int64_t together = s.moving || item->key_end - item->key_begin <= s.span ? 1 : count;
    s.element_asked = together == 1 && !p.part ? sizeof(T) : 0;
    Tile<M> *tiles[most_tiles_of_item] = {};
    for (int64_t t = 0; t < together; ++t) {
        tiles[t] = reinterpret_cast<Tile<M> *>(tile_memory + size_t(t) * rounded(sizeof(Tile<M>)));
        tiles[t]->query = reinterpret_cast<U *>(take(unit_rows<M>(p.head_dim) * width));
        tiles[t]->out = reinterpret_cast<A *>(take(s.value_dim * width));
    }
    const bool joins = joins_splits(p) && !item->partial;
    Earlier<A> *earlier[most_tiles_of_item] = {};
    for (int64_t t = 0; joins && t < together; ++t) {
        earlier[t] = reinterpret_cast<Earlier<A> *>(take(int64_t(rounded(sizeof(Earlier<A>)) / sizeof(A))));
        earlier[t]->out = reinterpret_cast<A *>(take(s.value_dim * width));
    }
    for (int64_t first = 0; first < count; first += together) {
        for (int64_t t = 0; t < together; ++t) {
            const int64_t row = item->row_begin + (first + t) * width, left = item->row_end - row;
            fill_tile<T>(p, *item, row, left < width ? left : width, *tiles[t]);
        }
        for (int64_t key = item->key_begin, end;; key = end) {
            end = joins && item->key_end - key > split_keys ? key + split_keys : item->key_end;
            for (int64_t t = 0; t < together; ++t) {
                if (key > item->key_begin) keep_state(*tiles[t], *earlier[t]);
                reset(*tiles[t], s.value_dim);
            }
            sweep_all<T>(s, tiles, together, key, end);
            for (int64_t t = 0; t < together; ++t) {
                if constexpr (M::parts == 1)
                    if (needs_care(*tiles[t], p.value_dim)) sweep_with_care<T>(s, *tiles[t], key, end);
                if (key > item->key_begin) join(*earlier[t], *tiles[t], p.value_dim);
            }
            if (end == item->key_end) break;
        }
        for (int64_t t = 0; t < together; ++t) {
            if (item->partial)
                finish_partial(p, *item, *tiles[t], (first + t) * width);
            else
                finish<T>(p, *item, *tiles[t]);
            if constexpr (M::parts > 1) leave_rows(p, *item, *tiles[t], item->row_begin + (first + t) * width, memory);
        }
    }
}
