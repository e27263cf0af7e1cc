// Which keys of a block of 64 do the lanes of a tile see? A tile asks for a word per key (bit = lane), as scores are masked;
// few rows ask for a word per row (bit = key).

enum Sight { SEES_NOTHING, SEES_SOME, SEES_ALL };

// Bits of the keys [key, key + n) that lie in the row's ranges.
TW_INLINE uint64_t range_bits(const tw_ranges &ranges, int64_t row, int64_t key, int64_t n) {
    uint64_t bits = 0;
    for (int r = 0; r < ranges.count; ++r) {
        int64_t start = read_range(ranges, ranges.starts, row + r) - key;
        int64_t stop = read_range(ranges, ranges.stops, row + r) - key;
        start = start < 0 ? 0 : start;
        stop = stop > n ? n : stop;
        if (start < stop) bits |= first_bits(stop) & ~first_bits(start);
    }
    return bits;
}

// Bits of n <= 64 bools.
TW_INLINE uint64_t bool_bits(const uint8_t *data, int64_t stride, int64_t n) {
    if (stride == 0) return *data ? first_bits(n) : 0;
    if (stride == 1 && n == 64) {
#if defined(__AVX512BW__)
        __m512i bytes = _mm512_loadu_si512(data);
        return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
        const __m256i zero = _mm256_setzero_si256();
        __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)data), zero);
        __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)(data + 32)), zero);
        return ~(uint64_t(uint32_t(_mm256_movemask_epi8(low))) | uint64_t(uint32_t(_mm256_movemask_epi8(high))) << 32);
#endif
    }
    uint64_t bits = 0;
    for (int64_t j = 0; j < n; ++j) bits |= uint64_t(data[j * stride] != 0) << j;
    return bits;
}

// Bits of the keys [key, key + n), n <= 64, that row (b, h, i) sees by ranges and dense mask.
TW_INLINE uint64_t cheap_sight(const tw_problem &p, int64_t b, int64_t h, int64_t i, int64_t key, int n) {
    uint64_t row = first_bits(n);
    if (p.ranges.count) row &= range_bits(p.ranges, range_row(p.ranges, b, h, i), key, n);
    if (p.mask.data && row) {
        const uint8_t *data =
            p.mask.data + b * p.mask.stride_b + h * p.mask.stride_h + i * p.mask.stride_i + key * p.mask.stride_j;
        row &= bool_bits(data, p.mask.stride_j, n);
    }
    return row;
}

// The same by every fact. The block stands on a multiple of 64.
TW_INLINE uint64_t row_sight(const tw_problem &p, int64_t b, int64_t h, int64_t i, int64_t key, int n) {
    uint64_t row = cheap_sight(p, b, h, i, key, n);
    if (p.labels.q && row) {
        const int32_t own = p.labels.q[b * p.labels.q_stride_b + h * p.labels.q_stride_h + i];
        const int32_t *k = p.labels.k + b * p.labels.k_stride_b + h * p.labels.k_stride_h + key;
        for (int j = 0; j < n; ++j) row &= ~(uint64_t(k[j] != own) << j);
    }
    if (p.bits.index && row) {
        const int64_t q = i - p.bits.q_offset;
        const int32_t number = p.bits.index[b * p.bits.stride_b + h * p.bits.stride_h +
                                            q / TW_BIT_TILE * p.bits.tiles_k + key / TW_BIT_TILE];
        if (number == TW_TILE_EMPTY) return 0;
        if (number != TW_TILE_FULL) {
            const uint64_t *stored = p.bits.words + int64_t(number) * TW_BIT_TILE;
            for (int j = 0; j < n; ++j) row &= ~((~(stored[j] >> (q % TW_BIT_TILE)) & 1) << j);
        }
    }
    return row;
}

#if defined(__AVX512BW__)
// Narrows words[0..n) (bit = lane) by the rows' ranges, where these are 32 bits wide: a comparison of all lanes' starts, and
// one of all stops, for each key.
template <class M>
TW_INLINE Sight narrow_by_bounds(const tw_problem &p, const Tile<M> &tile, int64_t key, int n, uint64_t *words) {
    const __m512i first = _mm512_set1_epi32(int32_t(key)), most = _mm512_set1_epi32(block_keys);
    // Sides of the ranges as seen from the block: 0 to 64. Lanes that do not exist see from 0 to 0.
    const auto sides = [&](const int32_t *from) {
        alignas(64) uint8_t bytes[64] = {};
        for (int l = 0; l < tile.width; l += 16) {
            const __m512i own = _mm512_maskz_loadu_epi32(__mmask16(first_bits(tile.width - l)), from + l);
            const __m512i side = _mm512_min_epi32(_mm512_sub_epi32(_mm512_max_epi32(own, first), first), most);
            _mm_store_si128(reinterpret_cast<__m128i *>(bytes + l), _mm512_cvtepi32_epi8(side));
        }
        return _mm512_load_si512(bytes);
    };
    __m512i start[TW_MAX_RANGES], stop[TW_MAX_RANGES], at = _mm512_setzero_si512();
    for (int r = 0; r < p.ranges.count; ++r) start[r] = sides(tile.start[r]), stop[r] = sides(tile.stop[r]);
    uint64_t some = 0, all = first_bits(tile.width);
    for (int j = 0; j < n; ++j, at = _mm512_add_epi8(at, _mm512_set1_epi8(1))) {
        uint64_t seen = 0;
        for (int r = 0; r < p.ranges.count; ++r)
            seen |= _mm512_mask_cmpgt_epu8_mask(_mm512_cmple_epu8_mask(start[r], at), stop[r], at);
        words[j] &= seen;
        some |= seen;
        all &= seen;
    }
    return !some ? SEES_NOTHING : all == first_bits(tile.width) ? SEES_ALL : SEES_SOME;
}
#endif

// Narrows words[0..n) (bit = lane) by the rows' ranges. A row's ranges are disjoint: as keys pass, each start and stop turns
// its lane over.
template <class M>
TW_INLINE Sight narrow_by_ranges(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n,
                                 uint64_t *words) {
    const tw_ranges &ranges = p.ranges;
#if defined(__AVX512BW__)
    if (!ranges.wide) return narrow_by_bounds(p, tile, key, n, words);
#endif
    uint64_t turned[block_keys] = {}, seen = 0; // lanes that key j turns over; those that see the key reached
    for (int l = 0; l < tile.width; ++l) {
        const uint64_t lane = uint64_t(1) << l;
        const int64_t row = range_row(ranges, b, tile.h[l], tile.i[l]);
        for (int r = 0; r < ranges.count; ++r) {
            const int64_t start = read_range(ranges, ranges.starts, row + r) - key;
            const int64_t stop = read_range(ranges, ranges.stops, row + r) - key;
            if (start >= stop || start >= n || stop <= 0) continue;
            if (start <= 0)
                seen ^= lane;
            else
                turned[start] ^= lane;
            if (stop < n) turned[stop] ^= lane;
        }
    }
    uint64_t some = 0, all = first_bits(tile.width);
    for (int j = 0; j < n; ++j) {
        seen ^= turned[j];
        words[j] &= seen;
        some |= seen;
        all &= seen;
    }
    return !some ? SEES_NOTHING : all == first_bits(tile.width) ? SEES_ALL : SEES_SOME;
}

// Narrows words[0..n) by the dense mask. Bytes of eight rows become one row of bytes, whose bits are those lanes.
template <class M>
TW_INLINE void narrow_by_mask(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n,
                              uint64_t *words) {
    const tw_dense_mask &mask = p.mask;
    constexpr int eights = (TW_TILE_VECTORS * lanes<sum_of<M>> + 7) / 8, parts = block_keys / TW_VECTOR_BYTES;
    static const uint8_t nothing[block_keys] = {};
    const uint8_t *const first = mask.data + b * mask.stride_b + key * mask.stride_j;
    const uint8_t *rows[8 * eights], *bytes[8 * eights];
    for (int l = 0; l < tile.width; ++l)
        bytes[l] = rows[l] = first + tile.h[l] * mask.stride_h + tile.i[l] * mask.stride_i;
    for (int l = tile.width; l < 8 * eights; ++l) bytes[l] = nothing;
    uint8_t copies[8 * eights][block_keys]; // of rows whose bytes do not stand beside each other, or are fewer
    if (mask.stride_j != 1 || n < block_keys)
        for (int l = 0; l < tile.width; ++l) {
            __builtin_memset(copies[l], *rows[l], block_keys);
            if (mask.stride_j)
                for (int j = 1; j < n; ++j) copies[l][j] = rows[l][j * mask.stride_j];
            bytes[l] = copies[l];
        }
    uint8_t seen[eights][block_keys];
    TW_UNROLL(int e = 0; e < eights; ++e)
        TW_UNROLL(int v = 0; v < parts; ++v) {
            vu8 bits = {};
            TW_UNROLL(int l = 0; l < 8; ++l) {
                const vu8 *row = reinterpret_cast<const vu8 *>(bytes[8 * e + l] + v * TW_VECTOR_BYTES);
                const uint8_t lane = uint8_t(1 << l);
                bits |= (vu8)(*row != 0) & lane;
            }
            *reinterpret_cast<vu8 *>(seen[e] + v * TW_VECTOR_BYTES) = bits;
        }
    // Rows lie far apart, each a cache line that no other block reads: ask for those of the block run_keys ahead, once this
    // block's are there.
    for (int l = 0; l < tile.width; ++l) __builtin_prefetch(rows[l] + run_keys * mask.stride_j, 0, 2);
    for (int j = 0; j < block_keys; ++j) { // of copies, words of keys that do not exist are 0 already
        uint64_t word = 0;
        TW_UNROLL(int e = 0; e < eights; ++e) word |= uint64_t(seen[e][j]) << 8 * e;
        words[j] &= word;
    }
}

// Narrows words[0..n) (bit = lane) by the labels. Disjoint or single labels are seen without comparing pairs.
template <class M>
TW_INLINE Sight narrow_by_labels(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n,
                                 uint64_t *words) {
    const tw_labels &labels = p.labels;
    const bool per_head = labels.q_stride_h != 0 || labels.k_stride_h != 0;
    if (!per_head) {
        const int32_t *k = labels.k + b * labels.k_stride_b + key;
        int32_t low = k[0], high = k[0];
        for (int j = 1; j < n; ++j) {
            low = k[j] < low ? k[j] : low;
            high = k[j] > high ? k[j] : high;
        }
        if (high < tile.label_low || low > tile.label_high) return SEES_NOTHING;
        if (low == high && tile.label_low == tile.label_high) return SEES_ALL;
    }
    for (int l = 0; l < tile.width; ++l) {
        int32_t own = labels.q[b * labels.q_stride_b + tile.h[l] * labels.q_stride_h + tile.i[l]];
        const int32_t *k = labels.k + b * labels.k_stride_b + tile.h[l] * labels.k_stride_h + key;
        for (int j = 0; j < n; ++j) words[j] &= ~(uint64_t(k[j] != own) << l);
    }
    return SEES_SOME;
}

// Narrows words[0..n) by the stored tiles. Lanes that stand beside each other in one stored tile are read together.
template <class M>
TW_INLINE Sight narrow_by_bits(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n,
                               uint64_t *words) {
    uint64_t seen[block_keys] = {};
    uint64_t all = 0, none = 0; // lanes whose stored tile is full, or empty
    for (int l = 0; l < tile.width;) {
        int64_t row = tile.i[l] - p.bits.q_offset, q_tile = row / TW_BIT_TILE, in_tile = row % TW_BIT_TILE;
        int run = 1;
        while (l + run < tile.width && tile.h[l + run] == tile.h[l] && tile.i[l + run] == tile.i[l] + run &&
               in_tile + run < TW_BIT_TILE)
            ++run;
        uint64_t here = first_bits(run) << l;
        int32_t number =
            p.bits
                .index[b * p.bits.stride_b + tile.h[l] * p.bits.stride_h + q_tile * p.bits.tiles_k + key / TW_BIT_TILE];
        if (number == TW_TILE_FULL)
            all |= here;
        else if (number == TW_TILE_EMPTY)
            none |= here;
        else {
            const uint64_t *stored = p.bits.words + int64_t(number) * TW_BIT_TILE;
            for (int j = 0; j < n; ++j) seen[j] |= ((stored[j] >> in_tile) << l) & here;
        }
        l += run;
    }
    const uint64_t every = first_bits(tile.width);
    if (all == every) return SEES_ALL;
    if (none == every) return SEES_NOTHING;
    for (int j = 0; j < n; ++j) words[j] &= seen[j] | all;
    return SEES_SOME;
}

// The words of the n keys from `key` (a multiple of 64); words beyond n are 0. Filled only where some are seen.
template <class M>
static Sight look(const tw_problem &p, int64_t b, const Tile<M> &tile, int64_t key, int n, uint64_t *words) {
    const uint64_t every_lane = first_bits(tile.width);
    for (int j = 0; j < block_keys; ++j) words[j] = j < n ? every_lane : 0;
    const bool asked = p.ranges.count && !within_common_range(p, tile, key, n);
    Sight ranges = asked ? narrow_by_ranges(p, b, tile, key, n, words) : SEES_ALL;
    if (ranges == SEES_NOTHING) return SEES_NOTHING;
    if (!p.mask.data && !p.labels.q && !p.bits.index) return ranges;
    if (p.mask.data) narrow_by_mask(p, b, tile, key, n, words);
    Sight labels = p.labels.q ? narrow_by_labels(p, b, tile, key, n, words) : SEES_ALL;
    if (labels == SEES_NOTHING) return SEES_NOTHING;
    Sight bits = p.bits.index ? narrow_by_bits(p, b, tile, key, n, words) : SEES_ALL;
    if (bits == SEES_NOTHING) return SEES_NOTHING;
    if (!p.mask.data && ranges == SEES_ALL && labels == SEES_ALL && bits == SEES_ALL) return SEES_ALL;
    uint64_t some = 0, all = every_lane;
    for (int j = 0; j < n; ++j) some |= words[j], all &= words[j];
    return !some ? SEES_NOTHING : all == every_lane ? SEES_ALL : SEES_SOME;
}
