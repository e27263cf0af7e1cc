// Where a sweep finds keys and values: in place, or copied a block at a time into the units that its products want, when
// the first tile sees the block, for all tiles of the item.

// What goes on beside the vectors' work: nothing, but for tile registers (amx_work.inl.h).
template <class M> struct Background {};

// Keys whose probabilities wait for their values, at most: as many units of them as stay in the first-level cache beside
// these, since values are read by columns, at strides of a row, which fall on few of its sets.
template <class M>
constexpr int64_t waiting_keys = M::parts > 1 ? run_keys / 2
                                 : M::tiled   ? run_keys
                                              : run_keys / 2 * M::numbers;

// Keys that all tiles of an item use before the next: the same. Tile registers want to keep a tile's own arrays in the
// first-level cache for long and copy their keys and values anyway: as many as leave room in the second for the tiles.
template <class M> TW_INLINE int64_t chunk_keys(const tw_problem &p) {
    if (!M::tiled) return waiting_keys<M>;
    const int64_t dims = (p.head_dim + p.value_dim) * M::parts * 2 / (M::parts + 1);
    return dims <= 256 ? 4 * run_keys : dims <= 512 ? 2 * run_keys : run_keys;
}

// Keys that a copy holds, block by block: a block's place is its key modulo these. Tiles that see fewer keys are swept one
// after another over all they see, and the copy moves along with them; two chunks of tile registers, where these are used.
template <class M> TW_INLINE int64_t held_keys(const tw_problem &p) { return chunk_keys<M>(p) * (M::tiled ? 2 : 1); }
enum { most_held_blocks = 8 * run_keys / block_keys };

// Keys of a group.
template <class M> constexpr int64_t group_keys = M::tiled ? 32 : TW_GROUP_KEYS;

// Rows of keys and values that will be wanted next: the next chunk's, the next block's, or those of the item that follows.
// They are asked for along the sweep, since memory and the last cache are slow to begin and the processor's own
// prefetchers end where an array's rows do.
struct RowsAhead {
    const char *k, *v;
    int64_t k_stride, v_stride, k_bytes, v_bytes; // in bytes
    int64_t left, rows, groups, due;              // rows not asked for yet; rows are spread over so many groups
};

// What does not change during an item, and the run of keys whose probabilities wait for their values.
template <class M> struct Sweep {
    using A = sum_of<M>;
    using U = unit_of<M>;
    const tw_problem *problem;
    const U *keys;   // [keys][D in units], from the chunk's first key
    const U *values; // [keys in units][Dv]
    int64_t key_stride, value_stride, head_units, value_dim, batch, kv_head;
    void (*fetch)(Sweep &, int64_t key, int n); // NULL: read in place
    U *fetched_keys, *fetched_values;           // of the keys held
    int64_t held[most_held_blocks];             // the first key of the block at each place, or -1
    uint64_t strange_keys[most_held_blocks];    // of that block: with numbers that parts cannot hold (amx_parts.inl.h)
    uint64_t strange_values[most_held_blocks];
    U *probabilities;         // [waiting_keys in units][width], from chunk or, in tile registers, run_begin on
    U *other_probabilities;   // of the run before, where its values are added in the background
    A *bias;                  // [block_keys][width]
    A factor;                 // of the products (units.inl.h)
    bool general;             // softcap, bias or dropout: every group takes the general path
    bool moving;              // tiles see few keys: each is swept over all before the next
    bool careful;             // bar invisible values lane by lane: they hold something that is not finite
    int64_t element_asked;    // bytes of an element of q and out where sweeps ask for their rows ahead, else 0
    int asked, ask_at_once;   // lanes of the tile whose rows are asked for; how many for each group of keys
    int64_t groups;           // of keys, that a tile which is finished alone may see
    int half;                 // which vectors see the keys of the run (sweep.inl.h)
    int64_t span;             // keys that have places beside each other: the chunk's, or all held
    int64_t chunk, run_begin; // chunk: the first key of the span entered, or -1
    const tw_item *item;
    int64_t tiles; // of the item
    RowsAhead ahead;
    Background<M> background;
};

TW_INLINE void ask_for(const void *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char *>(from) + at, 0, 2);
}

// For tiles that are finished one after another: spreads the rows to ask for over the groups of keys.
template <class M> TW_INLINE void plan_asking(Sweep<M> &s, const Tile<M> &tile) {
    int64_t keys = 0;
    for (int n = 0; n < tile.spans; ++n) keys += tile.span_end[n] - tile.span_begin[n];
    s.groups = keys > 2 * group_keys<M> ? keys / group_keys<M> - 1 : 1;
    s.asked = 0;
    const int64_t early = (3 * s.groups + 3) / 4; // the first of them, as what is asked for at the end comes late
    s.ask_at_once = int((tile.width + early - 1) / early);
}

// Called for each group of keys: asks for some rows that this tile writes, and for some that the next tile reads (most
// often they follow in the same head). All at once they would wait for one another.
template <class M> TW_INLINE void ask_for_rows(Sweep<M> &s, const Tile<M> &tile) {
    if (!s.element_asked || s.asked >= tile.width) return;
    const int begin = s.asked, end = begin + s.ask_at_once < tile.width ? begin + s.ask_at_once : tile.width;
    s.asked = end;
    const tw_problem &p = *s.problem;
    const auto row = [&](const tw_tensor &x, int64_t b, int64_t h, int64_t i) {
        return static_cast<const char *>(x.data) + (b * x.stride_b + h * x.stride_h + i * x.stride_s) * s.element_asked;
    };
    const tw_item *after = s.item->next ? s.item->next : s.item;
    const int64_t head_after = after->kv_head * (p.q_heads / p.kv_heads), rows = p.row_end - p.row_begin;
    for (int l = begin; l < end; ++l) {
        ask_for(row(p.out, s.batch, tile.h[l], tile.i[l]), p.value_dim * s.element_asked);
        const int64_t i = tile.i[l] + tile.width;
        ask_for(i < p.row_end ? row(p.q, s.batch, tile.h[l], i) : row(p.q, after->b, head_after, i - rows),
                p.head_dim * s.element_asked);
    }
}

// Called for each group of keys of each tile.
TW_INLINE void ask_ahead(RowsAhead &ahead) {
    for (ahead.due += ahead.rows; ahead.due >= ahead.groups && ahead.left; --ahead.left, ahead.due -= ahead.groups) {
        ask_for(ahead.k, ahead.k_bytes);
        ask_for(ahead.v, ahead.v_bytes);
        ahead.k += ahead.k_stride;
        ahead.v += ahead.v_stride;
    }
}

// Asks for up to `rows` rows from `key` on, along the next `groups` groups of keys.
template <class T, class M>
static void ask_along(Sweep<M> &s, const tw_item *item, int64_t key, int64_t rows, int64_t groups) {
    const tw_problem &p = *s.problem;
    s.ahead.k = reinterpret_cast<const char *>(tensor_row<const T>(p.k, item->b, item->kv_head, key));
    s.ahead.v = reinterpret_cast<const char *>(tensor_row<const T>(p.v, item->b, item->kv_head, key));
    s.ahead.k_stride = p.k.stride_s * int64_t(sizeof(T));
    s.ahead.v_stride = p.v.stride_s * int64_t(sizeof(T));
    s.ahead.k_bytes = p.head_dim * int64_t(sizeof(T));
    s.ahead.v_bytes = p.value_dim * int64_t(sizeof(T));
    s.ahead.left = s.ahead.rows = item->key_end - key < rows ? item->key_end - key : rows;
    s.ahead.groups = groups;
}

// Whether an item asks for rows that it will want. Without tile registers a tile alone does not, unless nobody else reads the
// head's keys: other items may have brought them near, from where they come faster as they are used.
template <class M> TW_INLINE bool looks_ahead(const Sweep<M> &s) {
    return M::tiled || s.tiles > 1 || s.item->row_end - s.item->row_begin == rows_in_call(*s.problem);
}

// Finds the rows that are wanted after a chunk that `tiles` tiles sweep. next: the first key of the chunk after it that any
// of them sees, or the item's end.
template <class T, class M> static void look_ahead(Sweep<M> &s, int64_t next, int64_t tiles) {
    const tw_problem &p = *s.problem;
    const int64_t chunk = chunk_keys<M>(p);
    const tw_item *item = s.item;
    s.ahead = {};
    if (p.pages.table) return;
    if (next >= item->key_end) {
        const tw_item *after = item->next;
        if (!after || after->number != item->number) return;
        // A head of one chunk is there already.
        if (after->b == item->b && after->kv_head == item->kv_head && after->key_end - after->key_begin <= chunk)
            return;
        item = after;
        next = item->key_begin;
    }
    ask_along<T>(s, item, next, chunk, tiles * (chunk / group_keys<M>));
}

// Goes to the span that begins at `key`, unless it is there.
template <class T, class M> TW_INLINE void enter_span(Sweep<M> &s, int64_t key) {
    const tw_problem &p = *s.problem;
    if (s.chunk == key) return;
    s.chunk = key;
    if constexpr (!M::tiled && sizeof(T) == sizeof(unit_of<M>)) {
        if (s.fetch) return;
        s.keys = tensor_row<const T>(p.k, s.batch, s.kv_head, key);
        s.values = tensor_row<const T>(p.v, s.batch, s.kv_head, key);
    }
}

// Rows of keys or values as units across the keys, in the order that products over keys want.
template <class M, class T>
TW_INLINE void keys_across_units(Rows<T> from, int64_t count, int64_t n, unit_of<M> *to, int64_t to_stride) {
    if constexpr (M::tiled)
        columns_to_tiles(from, count, n, to);
    else
        rows_across_units<M>(from, count, n, to, to_stride);
}

template <class T, class M> static void fetch_block(Sweep<M> &s, int64_t key, int n) {
    const tw_problem &p = *s.problem;
    const int64_t first = key - s.chunk;
    const T *each[block_keys];
    unit_of<M> *const keys = s.fetched_keys + first * s.key_stride, *const values = s.fetched_values +
                                                                                    first / M::numbers * s.value_stride;
    const Rows<T> k = key_rows(p, p.k, s.batch, s.kv_head, key, n, each);
    if constexpr (M::parts > 1)
        s.strange_keys[first / block_keys] = rows_in_parts(k, n, p.head_dim, keys);
    else
        rows_in_units<M>(k, n, p.head_dim, keys, s.key_stride);
    const Rows<T> v = key_rows(p, p.v, s.batch, s.kv_head, key, n, each); // in place of k's
    if constexpr (M::parts > 1)
        s.strange_values[first / block_keys] = columns_in_parts(v, n, p.value_dim, values);
    else
        keys_across_units<M>(v, n, p.value_dim, values, s.value_stride);
    s.held[first / block_keys] = key;
    // What tiles that pass one after another see next. Two tiles or more share a block.
    if constexpr (M::tiled)
        if (s.moving && !p.pages.table && key + block_keys < s.item->key_end)
            ask_along<T>(s, s.item, key + block_keys, block_keys, 2 * s.groups);
}

// Whether the block at `key` has to be fetched first.
template <class M> TW_INLINE bool lacks(const Sweep<M> &s, int64_t key) {
    return s.fetch && s.held[(key - s.chunk) / block_keys] != key;
}

// Whether rows of keys or values lie so far apart (they are long, or heads stand between them) that a chunk of them falls on
// few sets of the first-level cache.
template <class T> TW_INLINE bool scattered(const tw_tensor &x) { return x.stride_s * int64_t(sizeof(T)) >= 1024; }

// Units from one row of a copy to the next. Values are read by columns: rows that lie a large power of two apart fall on few
// sets of the first-level cache, so such rows stand a line further apart.
template <class M> TW_INLINE int64_t copied_stride(int64_t units) {
    constexpr int64_t line = 64 / int64_t(sizeof(unit_of<M>));
    return units % (8 * line) == 0 && !M::tiled ? units + line : units;
}

// Whether an item of so many tiles copies rows: their elements are no units, or a chunk of them may lie in several pages,
// or they are scattered and enough tiles use the copy. It changes no bit.
template <class T, class M> TW_INLINE bool copies(const tw_problem &p, int64_t tiles) {
    if (M::tiled || sizeof(T) != sizeof(unit_of<M>) || p.pages.table) return true;
    return tiles >= 4 && (scattered<T>(p.k) || scattered<T>(p.v));
}

// Units of a chunk's copy.
template <class T, class M> TW_INLINE int64_t fetched_units(const tw_problem &p, int64_t tiles) {
    if (!copies<T, M>(p, tiles)) return 0;
    const int64_t keys = held_keys<M>(p);
    return keys * copied_stride<M>(M::parts * padded_units<M>(p.head_dim)) +
           keys / M::numbers * copied_stride<M>(M::parts * padded<sum_of<M>>(p.value_dim));
}

// Says where keys and values are: in place, or in `copy` as soon as they are fetched.
template <class T, class M> TW_INLINE void choose_source(Sweep<M> &s, int64_t tiles, unit_of<M> *copy) {
    const tw_problem &p = *s.problem;
    s.fetch = nullptr;
    s.key_stride = p.k.stride_s;
    s.value_stride = p.v.stride_s;
    if (copies<T, M>(p, tiles)) {
        s.fetch = fetch_block<T, M>;
        s.key_stride = copied_stride<M>(M::parts * padded_units<M>(p.head_dim));
        s.value_stride = copied_stride<M>(M::parts * padded<sum_of<M>>(p.value_dim));
        s.keys = s.fetched_keys = copy;
        s.values = s.fetched_values = copy + held_keys<M>(p) * s.key_stride;
        for (int64_t &key : s.held) key = -1;
    }
}
