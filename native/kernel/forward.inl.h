// The forward pass of one item: its tiles are filled, swept over the keys chunk by chunk (so that a chunk's keys and
// values stay in cache while every tile uses them), and finished.

// Vectors of a tile of `rows` rows: few rows take narrow tiles. A row's bits do not depend on it.
template <class A> TW_INLINE int vectors_for(int64_t rows) { return rows <= lanes<A> ? 1 : TW_TILE_VECTORS; }
template <class A> constexpr int64_t tile_rows = TW_TILE_VECTORS * lanes<A>;

// Query rows of a kv head in the whole problem. It decides between the two orientations, which sum in different orders;
// a slab of rows must not.
TW_INLINE int64_t rows_in_call(const tw_problem &p) { return p.q_heads / p.kv_heads * (p.row_end - p.row_begin); }
TW_INLINE int64_t rows_of(const tw_problem &p) { return p.q_heads / p.kv_heads * p.q_len; }

template <class T, class A> static size_t scratch_bytes(const tw_problem *p, int64_t tiles) {
    const size_t width = size_t(tile_rows<A>) * sizeof(A);
    if (rows_of(*p) <= few_rows<A>) return few_rows_bytes<A>(p, few_rows<A>);
    return size_t(tiles) * (rounded(sizeof(Tile<A>)) + size_t(p->head_dim + p->value_dim) * width) +
           size_t(chunk_keys + TW_GROUP_KEYS + block_keys + TW_GROUP_KEYS) * width + size_t(wide_numbers<T, A>(*p)) * sizeof(A);
}

template <class T, class A>
static void fill_tile(const tw_problem &p, const tw_item &item, int64_t row, int64_t rows, Tile<A> &tile) {
    const int64_t group = p.q_heads / p.kv_heads, per_head = p.row_end - p.row_begin;
    const A factor = A(p.scale * 1.4426950408889634074);
    tile.rows = int(rows);
    tile.width = vectors_for<A>(rows) * lanes<A>;
    tile.label_low = INT32_MAX;
    tile.label_high = INT32_MIN;
    for (int l = 0; l < tile.width; ++l) {
        const int64_t at = row + (l < rows ? l : rows - 1);
        const int64_t h = tile.h[l] = item.kv_head * group + at / per_head, i = tile.i[l] = p.row_begin + at % per_head;
        widen_down(tensor_row<const T>(p.q, item.b, h, i), p.head_dim, factor, tile.query + l, tile.width);
        if (p.labels.q) {
            const int32_t label = p.labels.q[item.b * p.labels.q_stride_b + h * p.labels.q_stride_h + i];
            tile.label_low = label < tile.label_low ? label : tile.label_low;
            tile.label_high = label > tile.label_high ? label : tile.label_high;
        }
    }
    find_spans(p, item.b, item.key_begin, item.key_end, tile);
}

template <class A> TW_INLINE void sweep(Sweep<A> &s, Tile<A> &tile, int64_t begin, int64_t end) {
    if (tile.width == lanes<A>)
        sweep_chunk<A, 1>(s, tile, begin, end);
    else
        sweep_chunk<A, TW_TILE_VECTORS>(s, tile, begin, end);
}

// Sweeps all `count` tiles over the item's keys.
template <class T, class A> static void sweep_all(Sweep<A> &s, Tile<A> *const *tiles, int64_t count, int64_t end) {
    for (int64_t key = 0;;) {
        int64_t next = end;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t own = next_key(*tiles[t], key, end);
            next = own < next ? own : next;
        }
        if (next >= end) return;
        next -= next % chunk_keys;
        key = next + chunk_keys < end ? next + chunk_keys : end;
        enter_chunk<T>(s, next);
        for (int64_t t = 0; t < count; ++t) sweep(s, *tiles[t], next, key);
    }
}

// Something that no finite input explains: a value that is not finite may have reached rows that must not see it.
template <class A> static bool needs_care(const Tile<A> &tile, int64_t value_dim) {
    if (!tile.masked) return false;
    vec<A> doubt = {};
    for (int64_t at = 0; at < value_dim * tile.width; at += lanes<A>) {
        const vec<A> x = load(tile.out + at);
        doubt += x - x; // 0 for finite numbers, else NaN
    }
    return lane_bits(doubt != doubt) != 0;
}

template <class T, class A> static void forward(const tw_problem *problem, const tw_item *item, int64_t most_tiles, void *scratch) {
    const tw_problem &p = *problem;
    if (rows_of(p) <= few_rows<A>) return forward_few_rows<T, A>(problem, item, scratch);
    const int64_t count = (item->row_end - item->row_begin + tile_rows<A> - 1) / tile_rows<A>;
    const size_t width = size_t(tile_rows<A>);
    char *tile_memory = static_cast<char *>(scratch);
    A *numbers = reinterpret_cast<A *>(tile_memory + size_t(most_tiles) * rounded(sizeof(Tile<A>)));

    Sweep<A> s;
    s.problem = problem;
    s.batch = item->b;
    s.kv_head = item->kv_head;
    s.head_dim = p.head_dim;
    s.value_dim = p.value_dim;
    s.general = p.softcap > 0 || p.bias_count || p.table.data || p.dropout.enabled;
    s.probabilities = numbers;
    numbers += (chunk_keys + TW_GROUP_KEYS) * width;
    s.bias = numbers;
    numbers += (block_keys + TW_GROUP_KEYS) * width;
    choose_source<T>(s, numbers);
    numbers += wide_numbers<T, A>(p);
    s.careful = false;

    Tile<A> *tiles[most_tiles_of_item] = {};
    for (int64_t t = 0; t < count; ++t) {
        tiles[t] = reinterpret_cast<Tile<A> *>(tile_memory + size_t(t) * rounded(sizeof(Tile<A>)));
        tiles[t]->query = numbers;
        tiles[t]->out = numbers + size_t(p.head_dim) * width;
        numbers += size_t(p.head_dim + p.value_dim) * width;
        const int64_t row = item->row_begin + t * int64_t(width), left = item->row_end - row;
        fill_tile<T, A>(p, *item, row, left < int64_t(width) ? left : int64_t(width), *tiles[t]);
        reset(*tiles[t], p.value_dim);
    }
    sweep_all<T>(s, tiles, count, item->key_end);
    for (int64_t t = 0; t < count; ++t) {
        if (needs_care(*tiles[t], p.value_dim)) {
            reset(*tiles[t], p.value_dim);
            s.careful = true;
            for (int64_t key = 0; (key = next_key(*tiles[t], key, item->key_end)) < item->key_end;) {
                key -= key % chunk_keys;
                const int64_t end = key + chunk_keys < item->key_end ? key + chunk_keys : item->key_end;
                enter_chunk<T>(s, key);
                sweep(s, *tiles[t], key, end);
                key = end;
            }
            s.careful = false;
        }
        if (item->partial)
            finish_partial<A>(p, *item, *tiles[t], t * int64_t(width));
        else
            finish<T, A>(p, *item, *tiles[t]);
    }
}
