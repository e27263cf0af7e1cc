// Products of the tile registers over whole arrays: values weighed forward, and their like backward; and the careful
// forms of these, where something is not finite.

// Sixteen of the rows of add_values_in_tiles, up to storing them.
TW_INLINE void begin_values(Turn turn, const int32_t *weights, const int32_t *values, int64_t groups, int64_t rows,
                            const float *out) {
    load_tile(turn, 0, out, tile_lanes * sizeof(float));
    load_tile(turn, 1, out + tile_side, tile_lanes * sizeof(float));
    for (int64_t g = 0; g < groups; ++g, values += rows * tile_side, weights += tile_side * tile_lanes) {
        _tile_loadd(4, values, 64);
        _tile_loadd(6, weights, tile_lanes * sizeof(int32_t));
        _tile_loadd(7, weights + tile_side, tile_lanes * sizeof(int32_t));
        multiply_columns(turn);
    }
}
TW_INLINE void end_values(Turn turn, float *out) {
    store_tile(turn, 0, out, tile_lanes * sizeof(float));
    store_tile(turn, 1, out + tile_side, tile_lanes * sizeof(float));
}

// out [rows][32] += values [groups of 32][rows][16 units] times weights [groups of 16 units][32].
TW_INLINE void add_values_in_tiles(const int32_t *weights, const int32_t *values, int64_t groups, int64_t rows,
                                   float *out) {
    order_memory();
    begin_values(FIRST, weights, values, groups, rows, out);
    for (int64_t r = 0;;) { // row r is begun
        float *own = out + r * tile_lanes;
        const bool second = (r += tile_side) < rows;
        if (second) begin_values(SECOND, weights, values + r * tile_side, groups, rows, out + r * tile_lanes);
        end_values(FIRST, own);
        if (!second) break;
        own = out + r * tile_lanes;
        const bool third = (r += tile_side) < rows;
        if (third) begin_values(FIRST, weights, values + r * tile_side, groups, rows, out + r * tile_lanes);
        end_values(SECOND, own);
        if (!third) break;
    }
    order_memory();
}

// Which of a group's 32 keys have a value that is not finite.
TW_RARE uint32_t keys_not_finite(const int32_t *values, int64_t rows) {
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    __mmask32 found = 0;
    for (int64_t r = 0; r < rows; ++r)
        found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512((__m512i)load(values + r * tile_side), exponent), exponent);
    return found;
}

// One group of add_values_in_tiles where its keys `bad` have values that are not finite: words[lane] says which keys a
// lane sees, and what it does not see is 0 for it. Lanes that see the same bad keys are summed together.
TW_RARE void add_values_seen(const int32_t *weights, const int32_t *values, uint32_t bad, const uint32_t *words,
                             int64_t rows, float *out) {
    constexpr int width = tile_lanes;
    alignas(64) int32_t kept[tile_units];
    alignas(64) float sums[tile_side * width];
    for (uint32_t left = ~0u; left;) {
        const uint32_t pattern = words[__builtin_ctz(left)] & bad;
        uint32_t own = 0;
        for (int l = 0; l < width; ++l) own |= uint32_t((words[l] & bad) == pattern) << l;
        left &= ~own;
        for (int64_t r = 0; r < rows; r += tile_side) {
            for (int i = 0; i < tile_side; ++i) {
                const __m512i value = (__m512i)load(values + (r + i) * tile_side);
                store(kept + i * tile_side, (vi32)_mm512_maskz_mov_epi16(~bad | pattern, value));
            }
            order_memory();
            begin_values(FIRST, weights, kept, 1, rows, out + r * width);
            end_values(FIRST, sums);
            order_memory();
            for (int i = 0; i < tile_side; ++i)
                for (int z = 0; z < width; z += tile_side) {
                    float *to = out + (r + i) * width + z;
                    store(to, select<float>(own >> z, load(sums + i * width + z), load(to)));
                }
        }
    }
}

// add_values_in_tiles on weights of which some are `unseen`. These become 0.
TW_RARE void add_values_carefully_in_tiles(int32_t *weights, const int32_t *values, int64_t groups, int64_t rows,
                                           float *out) {
    constexpr int width = tile_lanes;
    for (int64_t g = 0; g < groups; ++g, weights += tile_side * width, values += rows * tile_side) {
        uint32_t words[width] = {};
        for (int u = 0; u < tile_side; ++u)
            for (int z = 0; z < width; z += tile_side) {
                const __m512i own = (__m512i)load(weights + u * width + z);
                const __mmask32 seen = _mm512_cmpneq_epi16_mask(own, _mm512_set1_epi16(short(0xBF80))); // -1
                store(weights + u * width + z, (vi32)_mm512_maskz_mov_epi16(seen, own));
                for (int l = 0; l < tile_side; ++l) words[z + l] |= (seen >> 2 * l & 3u) << 2 * u;
            }
        if (const uint32_t bad = keys_not_finite(values, rows))
            add_values_seen(weights, values, bad, words, rows, out);
        else
            add_values_in_tiles(weights, values, 1, rows, out);
    }
}

// The values of a run of `units` pairs of keys, which begins with a group.
static __attribute__((noinline)) void add_values_of_run(int32_t *weights, const int32_t *values, int64_t units,
                                                        int64_t rows, bool careful, float *out) {
    const int64_t groups = (units + tile_side - 1) / tile_side;
    if (careful)
        add_values_carefully_in_tiles(weights, values, groups, rows, out);
    else
        add_values_in_tiles(weights, values, groups, rows, out);
}

// Sixteen columns of weights times rows, up to storing them. The weights are in registers 4 and 5.
TW_INLINE void begin_rows(Turn turn, const int32_t *rows, int64_t columns, const float *out) {
    const int64_t bytes = columns * int64_t(sizeof(float));
    load_tile(turn, 0, out, bytes);
    load_tile(turn, 1, out + tile_side * columns, bytes);
    _tile_loadd(6, rows, bytes);
    multiply_rows(turn);
}
TW_INLINE void end_rows(Turn turn, int64_t columns, float *out) {
    const int64_t bytes = columns * int64_t(sizeof(float));
    store_tile(turn, 0, out, bytes);
    store_tile(turn, 1, out + tile_side * columns, bytes);
}
TW_INLINE void load_weights(const int32_t *weights) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(5, weights + tile_units, 64);
}

// out [32 keys][columns] += weights [32 keys][16 units of rows] times rows [16 units][columns], where some rows are not
// finite: words[key] says which rows see the key, and for one that does not, the row is 0. Keys that are seen by the same bad
// rows are summed together.
TW_RARE void add_rows_seen(const int32_t *weights, const int32_t *rows, const uint64_t *words, int64_t columns,
                           float *out) {
    alignas(64) int32_t kept[tile_units];
    alignas(64) float sums[tile_keys * tile_side];
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    uint32_t bad = 0;
    for (int64_t u = 0; u < tile_side; ++u)
        for (int64_t c = 0; c < columns; c += tile_side) {
            const __m512i own = (__m512i)load(rows + u * columns + c);
            const __mmask32 found = _mm512_cmpeq_epi16_mask(_mm512_and_si512(own, exponent), exponent);
            bad |= uint32_t((found & 0x55555555u) != 0) << 2 * u | uint32_t((found & 0xAAAAAAAAu) != 0) << (2 * u + 1);
        }
    for (uint32_t left = ~0u; left;) {
        const uint32_t pattern = uint32_t(words[__builtin_ctz(left)]) & bad;
        uint32_t own = 0;
        for (int j = 0; j < tile_keys; ++j) own |= uint32_t((uint32_t(words[j]) & bad) == pattern) << j;
        left &= ~own;
        const uint32_t allowed = ~bad | pattern;
        for (int64_t c = 0; c < columns; c += tile_side) {
            for (int64_t u = 0; u < tile_side; ++u) {
                const uint32_t both =
                    (allowed >> 2 * u & 1 ? 0xFFFFu : 0) | (allowed >> (2 * u + 1) & 1 ? 0xFFFF0000u : 0);
                store(kept + u * tile_side, load(rows + u * columns + c) & int32_t(both));
            }
            order_memory();
            for (int j = 0; j < tile_keys; ++j) store(sums + j * tile_side, load(out + j * columns + c));
            order_memory();
            load_weights(weights);
            begin_rows(FIRST, kept, tile_side, sums);
            end_rows(FIRST, tile_side, sums);
            order_memory();
            for (int j = 0; j < tile_keys; ++j)
                if (own >> j & 1) store(out + j * columns + c, load(sums + j * tile_side));
        }
    }
}
