// A tile: up to 64 query rows, one per lane, with their running softmax state.
//
// Queries come as they are given, but for the scale's sign; all else is in the units of units.inl.h. For each lane, with s
// the scores so far,
//   shift  the exponent's reference (0 until a key is seen),   sum = sum of 2^(s - shift),   out = sum of 2^(s - shift) v,
//   limit  raise the reference once a score exceeds this: shift + slack, or -inf while no key is seen.
// The reference moves rarely (Milakov, Gimelshein 2018 move it always); a lane decides for itself, so a row's bits never
// depend on the rows beside it.

// run_keys: keys whose probabilities wait for their values, at most (fetch.inl.h: for some products, half of them).
enum { most_lanes = 64, block_keys = TW_BIT_TILE, run_keys = 128 };
template <class A>
constexpr A slack = A(8); // 2^8 times the first reference is far from overflow and costs no precision

template <class M> struct Tile {
    using A = sum_of<M>;
    unit_of<M> *query; // [D in units][width]
    A *out;            // [Dv][width]
    A shift[most_lanes], limit[most_lanes], sum[most_lanes];
    A rest[most_lanes];                   // backward: what the rounding of a far row's reference has taken off it
    int64_t i[most_lanes], h[most_lanes]; // query index and query head; spare lanes repeat the last row
    int rows, width;                      // rows in use; lanes: one or two vectors
    int32_t label_low, label_high;
    bool masked;      // whether any lane was ever barred from a key that another saw
    bool coarse;      // whether any lane's reference is, or was (units.inl.h): then every group takes the general path
    bool far;         // backward: whether some rows are far, and `limit` holds their factors
    uint64_t strange; // lanes that have met numbers which parts cannot hold (amx_parts.inl.h)
    int spans;        // key intervals that hold everything any lane sees, whole blocks, in order
    int64_t span_begin[TW_MAX_RANGES], span_end[TW_MAX_RANGES];
    // Each lane's ranges, where ranges are 32 bits wide; spare lanes have the last row's.
    alignas(64) int32_t start[TW_MAX_RANGES][TW_TILE_VECTORS * lanes<A>],
        stop[TW_MAX_RANGES][TW_TILE_VECTORS * lanes<A>];
    int64_t common_begin[TW_MAX_RANGES], common_end[TW_MAX_RANGES]; // keys that interval r of every lane holds
};

TW_INLINE int64_t read_range(const tw_ranges &ranges, const void *side, int64_t at) {
    return ranges.wide ? static_cast<const int64_t *>(side)[at] : static_cast<const int32_t *>(side)[at];
}

// The element of row (b, h, i) in lse.
TW_INLINE int64_t lse_at(const tw_problem &p, int64_t b, int64_t h, int64_t i) {
    return b * p.lse_stride_b + h * p.lse_stride_h + i;
}

TW_INLINE int64_t range_row(const tw_ranges &r, int64_t b, int64_t h, int64_t i) {
    return b * r.stride_b + h * r.stride_h + i * r.count;
}

template <class M> TW_INLINE void reset(Tile<M> &tile, int64_t value_dim) {
    using A = sum_of<M>;
    for (int l = 0; l < tile.width; ++l) {
        tile.shift[l] = tile.sum[l] = 0;
        tile.limit[l] = -A(__builtin_inf());
    }
    __builtin_memset(tile.out, 0, size_t(value_dim * tile.width) * sizeof(A));
    tile.masked = tile.coarse = false;
}

// Spans of the keys in [begin, end) that any lane may see by its ranges.
template <class M> static void find_spans(const tw_problem &p, int64_t b, int64_t begin, int64_t end, Tile<M> &tile) {
    tile.spans = 0;
    if (begin >= end) return;
    if (!p.ranges.count) {
        tile.spans = 1;
        tile.span_begin[0] = begin;
        tile.span_end[0] = end;
        return;
    }
    for (int r = 0; r < p.ranges.count; ++r) {
        int64_t low = end, high = begin;
        int64_t &common_low = tile.common_begin[r] = 0, &common_high = tile.common_end[r] = INT64_MAX;
        for (int l = 0; l < tile.width; ++l) {
            int64_t at = range_row(p.ranges, b, tile.h[l], tile.i[l]) + r;
            int64_t start = read_range(p.ranges, p.ranges.starts, at), stop = read_range(p.ranges, p.ranges.stops, at);
            if (!p.ranges.wide) tile.start[r][l] = int32_t(start), tile.stop[r][l] = int32_t(stop);
            common_low = start > common_low ? start : common_low;
            common_high = stop < common_high ? stop : common_high;
            if (start >= stop) continue;
            low = start < low ? start : low;
            high = stop > high ? stop : high;
        }
        low = low < begin ? begin : low;
        high = high > end ? end : high;
        if (low >= high) continue;
        low -= low % block_keys;
        high += (block_keys - high % block_keys) % block_keys;
        high = high > end ? end : high;
        // Insert in order, then swallow what it touches.
        int at = tile.spans++;
        for (; at > 0 && tile.span_begin[at - 1] > low; --at) {
            tile.span_begin[at] = tile.span_begin[at - 1];
            tile.span_end[at] = tile.span_end[at - 1];
        }
        tile.span_begin[at] = low;
        tile.span_end[at] = high;
    }
    int kept = 0;
    for (int s = 1; s < tile.spans; ++s) {
        if (tile.span_begin[s] <= tile.span_end[kept]) {
            if (tile.span_end[s] > tile.span_end[kept]) tile.span_end[kept] = tile.span_end[s];
        } else {
            ++kept;
            tile.span_begin[kept] = tile.span_begin[s];
            tile.span_end[kept] = tile.span_end[s];
        }
    }
    if (tile.spans) tile.spans = kept + 1;
}

// The first key at or after `key` that some span holds, or `none`.
template <class M> TW_INLINE int64_t next_key(const Tile<M> &tile, int64_t key, int64_t none) {
    for (int s = 0; s < tile.spans; ++s)
        if (key < tile.span_end[s]) return key > tile.span_begin[s] ? key : tile.span_begin[s];
    return none;
}

// Whether every lane sees the n keys from `key` by its ranges, as far as can be told without asking each lane.
template <class M> TW_INLINE bool within_common_range(const tw_problem &p, const Tile<M> &tile, int64_t key, int n) {
    for (int r = 0; r < p.ranges.count; ++r)
        if (key >= tile.common_begin[r] && key + n <= tile.common_end[r]) return true;
    return false;
}
