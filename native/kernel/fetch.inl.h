// Where a sweep finds keys and values: in place, or copied a block at a time into the units that its products want, when
// the first tile sees the block, for all tiles of the item.

// What goes on beside the vectors' work: nothing, but for tile registers (amx_work.inl.h).
template <class M> struct Background {};

// Keys that all tiles of an item use before the next. Tile registers want to keep a tile's own arrays in the first-level
// cache for long and copy their keys and values anyway: as many as leave room in the second for the tiles.
template <class M> TW_INLINE int64_t chunk_keys(const tw_problem &p) {
    if (!M::tiled) return run_keys;
    const int64_t dims = p.head_dim + p.value_dim;
    return dims <= 256 ? 4 * run_keys : dims <= 512 ? 2 * run_keys : run_keys;
}

// Rows of keys and values that will be wanted next: the next chunk's, or those of the item that follows. They are asked for
// along the sweep, since memory is slow to begin and the processor's own prefetchers end where an array's rows do. In tile
// registers alone: other products take longer than memory.
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
    U *fetched_keys, *fetched_values;           // of a chunk
    uint32_t fetched;                           // bit per block of the chunk
    U *probabilities;       // [run_keys in units][width], of the keys from chunk or, in tile registers, from run_begin
    U *other_probabilities; // of the run before, where its values are added in the background
    A *bias;                // [block_keys][width]
    A factor;               // of the products, where queries are not multiplied by it: scale * log2(e)
    bool general;           // softcap, bias or dropout: every group takes the general path
    bool careful;           // bar invisible values lane by lane: they hold something that is not finite
    int64_t element_asked;  // bytes of an element of q and out where sweeps ask for their rows ahead, else 0
    int64_t chunk, run_begin; // chunk: the key that the one entered begins at, or -1
    const tw_item *item;
    int64_t tiles;   // of the item
    RowsAhead ahead; // of tile registers
    Background<M> background;
};

TW_INLINE void ask_for(const void *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char *>(from) + at, 0, 2);
}

// While a tile sweeps its only chunk: asks for the rows of lanes [begin, end) that are written next, and for those that the
// next tile reads (most often they follow in the same head). All at once they would wait for one another.
template <class M>
TW_INLINE void ask_for_rows(const Sweep<M> &s, const Tile<M> &tile, int64_t key, int begin, int end) {
    if (!s.element_asked || key != s.chunk) return;
    const tw_problem &p = *s.problem;
    const auto row = [&](const tw_tensor &x, int64_t h, int64_t i) {
        return static_cast<const char *>(x.data) +
               (s.batch * x.stride_b + h * x.stride_h + i * x.stride_s) * s.element_asked;
    };
    for (int l = begin; l < end; ++l) {
        ask_for(row(p.out, tile.h[l], tile.i[l]), p.value_dim * s.element_asked);
        ask_for(row(p.q, tile.h[l], tile.i[l] + tile.width), p.head_dim * s.element_asked);
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

// Finds the rows that are wanted after the chunk that begins at `key`.
template <class T, class M> static void look_ahead(Sweep<M> &s, int64_t key) {
    const tw_problem &p = *s.problem;
    const int64_t chunk = chunk_keys<M>(p);
    const tw_item *item = s.item;
    s.ahead = {};
    if (p.pages.table) return;
    key += chunk;
    if (key >= item->key_end) {
        const tw_item *next = item->next;
        if (!next || next->number != item->number) return;
        // A head of one chunk is there already.
        if (next->b == item->b && next->kv_head == item->kv_head && next->key_end - next->key_begin <= chunk) return;
        item = next;
        key = item->key_begin;
    }
    s.ahead.k = reinterpret_cast<const char *>(tensor_row<const T>(p.k, item->b, item->kv_head, key));
    s.ahead.v = reinterpret_cast<const char *>(tensor_row<const T>(p.v, item->b, item->kv_head, key));
    s.ahead.k_stride = p.k.stride_s * int64_t(sizeof(T));
    s.ahead.v_stride = p.v.stride_s * int64_t(sizeof(T));
    s.ahead.k_bytes = p.head_dim * int64_t(sizeof(T));
    s.ahead.v_bytes = p.value_dim * int64_t(sizeof(T));
    s.ahead.left = s.ahead.rows = item->key_end - key < chunk ? item->key_end - key : chunk;
    s.ahead.groups = s.tiles * (chunk / 32); // a group of tile registers has 32 keys
}

// Goes to the chunk that begins at `key`, unless it is there.
template <class T, class M> TW_INLINE void enter_chunk(Sweep<M> &s, int64_t key) {
    const tw_problem &p = *s.problem;
    if (s.chunk == key) return;
    s.chunk = key;
    s.fetched = 0;
    if constexpr (M::tiled) look_ahead<T>(s, key);
    if constexpr (sizeof(T) == sizeof(unit_of<M>)) {
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
    rows_in_units<M>(key_rows(p, p.k, s.batch, s.kv_head, key, n, each), n, p.head_dim,
                     s.fetched_keys + first * s.key_stride, s.key_stride);
    keys_across_units<M>(key_rows(p, p.v, s.batch, s.kv_head, key, n, each), n, p.value_dim,
                         s.fetched_values + first / M::numbers * s.value_stride, s.value_stride);
    s.fetched |= 1u << first / block_keys;
}

// Whether rows of keys or values lie so far apart (heads stand between them) that a chunk of them falls on few sets of the
// first-level cache, and on as many pages as it has rows.
template <class T> TW_INLINE bool scattered(const tw_tensor &x, int64_t n) {
    return x.stride_s >= 2 * n && x.stride_s * int64_t(sizeof(T)) >= 1024;
}

// Whether an item of so many tiles copies rows: their elements are no units, or a chunk of them may lie in several pages,
// or they are scattered and enough tiles use the copy. It changes no bit.
template <class T, class M> TW_INLINE bool copies(const tw_problem &p, int64_t tiles) {
    if (sizeof(T) != sizeof(unit_of<M>) || p.pages.table) return true;
    return tiles >= 4 && (scattered<T>(p.k, p.head_dim) || scattered<T>(p.v, p.value_dim));
}

// Units of a chunk's copy.
template <class T, class M> TW_INLINE int64_t fetched_units(const tw_problem &p, int64_t tiles) {
    if (!copies<T, M>(p, tiles)) return 0;
    const int64_t keys = chunk_keys<M>(p);
    return keys * padded_units<M>(p.head_dim) + keys / M::numbers * padded<sum_of<M>>(p.value_dim);
}

// Says where keys and values are: in place, or in `copy` as soon as they are fetched.
template <class T, class M> TW_INLINE void choose_source(Sweep<M> &s, int64_t tiles, unit_of<M> *copy) {
    const tw_problem &p = *s.problem;
    s.fetch = nullptr;
    s.key_stride = p.k.stride_s;
    s.value_stride = p.v.stride_s;
    if (copies<T, M>(p, tiles)) {
        s.fetch = fetch_block<T, M>;
        s.key_stride = padded_units<M>(p.head_dim);
        s.value_stride = padded<sum_of<M>>(p.value_dim);
        s.keys = s.fetched_keys = copy;
        s.values = s.fetched_values = copy + chunk_keys<M>(p) * s.key_stride;
    }
}
