// The backward pass of one tile of 32 queries and one block of 64 keys, in tile registers, in groups of 32 keys. What is
// computed, and in which layouts, is said in slopes.inl.h.

// S^T and dP^T of a group, until they are turned into p, ds and raw.
struct SlopeGroup {
    alignas(64) float scores[tile_keys * tile_lanes], slopes[tile_keys * tile_lanes];
};

// p, ds and raw of the group of 32 keys at place `at` of its block. words, keep: of the group; keep may be NULL.
template <ScorePath PATH>
static void slopes_of_group(const Slopes<Tiles> &s, const Tile<Tiles> &tile, const SlopeGroup &group, int64_t at,
                            const uint64_t *words, const uint64_t *keep) {
    const tw_problem &problem = *s.problem;
    const bool capped = PATH == GENERAL && problem.softcap > 0, gathered = s.gradients->gather_count > 0;
    const float cap = float(problem.softcap * 1.4426950408889634074), twice_inverse = float(2 / problem.softcap);
    const __m512 inverse_keep = _mm512_set1_ps(float(problem.dropout.inverse_keep)), factor = _mm512_set1_ps(s.factor);
    int32_t *p = s.p + at * tile_side, *raw = s.raw + at * tile_side, *raw_across = s.raw_across + at / 2 * tile_lanes;
    for (int n = 0; n < tile_keys; n += 2) {
        vf weights[2][2], slopes[2][2];
        TW_UNROLL for (int i = 0; i < 2; ++i) TW_UNROLL for (int z = 0; z < 2; ++z) {
            const int place = (n + i) * tile_lanes + z * tile_side;
            const __mmask16 seen = PATH == PLAIN ? __mmask16(0xFFFF) : __mmask16(words[n + i] >> z * tile_side);
            const __mmask16 kept = PATH == GENERAL && keep ? __mmask16(keep[n + i] >> z * tile_side) : __mmask16(0xFFFF);
            const __m512 shift = (__m512)load(tile.shift + z * tile_side);
            __m512 x = (__m512)load(group.scores + place), cap_slope = _mm512_set1_ps(1);
            if (capped) {
                const vf t = tanh_of_log2<float>((vf)_mm512_mul_ps(x, factor) * twice_inverse);
                cap_slope = (__m512)(1.f - t * t);
                x = _mm512_sub_ps((__m512)(cap * t), shift);
            } else {
                x = _mm512_fmsub_ps(x, factor, shift);
            }
            if (PATH == GENERAL && s.biased) x = _mm512_add_ps(x, (__m512)load(s.bias + at * tile_lanes + place));
            const __m512 weight = exp2_where(seen, x);
            __m512 used = weight, slope = (__m512)load(group.slopes + place);
            if (PATH == GENERAL && keep) {
                used = _mm512_maskz_mul_ps(kept, weight, inverse_keep);
                slope = _mm512_maskz_mul_ps(kept, slope, inverse_keep);
            }
            slope = _mm512_maskz_mul_ps(seen, weight, _mm512_add_ps(slope, (__m512)load(tile.sum + z * tile_side)));
            if (gathered) store(s.ds + at * tile_lanes + place, (vf)slope);
            if (capped) slope = _mm512_maskz_mul_ps(seen, slope, cap_slope);
            weights[i][z] = (vf)used;
            slopes[i][z] = (vf)slope;
        }
        TW_UNROLL for (int i = 0; i < 2; ++i) {
            store(p + (n + i) * tile_side, narrow_beside(weights[i][0], weights[i][1]));
            store(raw + (n + i) * tile_side, narrow_beside(slopes[i][0], slopes[i][1]));
        }
        TW_UNROLL for (int z = 0; z < 2; ++z)
            store(raw_across + n / 2 * tile_lanes + z * tile_side, narrow_across(slopes[0][z], slopes[1][z]));
    }
}

// Sums the group of 32 keys at place `at` of the block at `key`.
static void add_group(const Slopes<Tiles> &s, Tile<Tiles> &tile, int64_t key, int64_t at, const uint64_t *words) {
    const tw_gradients &g = *s.gradients;
    const int64_t first = key - s.first + at;
    const int32_t *p = s.p + at * tile_side, *raw = s.raw + at * tile_side, *raw_across = s.raw_across + at / 2 * tile_lanes;
    const int32_t *k = s.k_across + first / 2 * s.across_stride;
    float *d_k = s.d_k + first * s.head_width, *d_v = s.d_v + first * s.value_width;
    order_memory();
    if (tile.masked || s.blocks[first / block_keys] == BLOCK_NOT_FINITE) {
        uint32_t by_lane[tile_lanes] = {};
        for (int j = 0; j < tile_keys; ++j)
            for (int l = 0; l < tile_lanes; ++l) by_lane[l] |= uint32_t(words[j] >> l & 1) << j;
        if (g.d_q.data) add_values_seen(raw_across, k, keys_not_finite(k, s.head_width), by_lane, s.head_width, tile.out);
        if (g.d_k.data) add_rows_seen(raw, s.q_rows, words, s.head_width, d_k);
        if (g.d_v.data) add_rows_seen(p, s.d_out_rows, words, s.value_width, d_v);
    } else {
        if (g.d_q.data) add_values_in_tiles(raw_across, k, 1, s.head_width, tile.out);
        if (g.d_k.data) add_rows_in_tiles(raw, s.q_rows, s.head_width, d_k);
        if (g.d_v.data) add_rows_in_tiles(p, s.d_out_rows, s.value_width, d_v);
    }
    order_memory();
}

// The block at `key`, whose words (the lanes that see each key) and dropout are known.
static void slopes_in_tiles(Slopes<Tiles> &s, Tile<Tiles> &tile, const int32_t *d_out, int64_t key, int n,
                            uint64_t *words, const uint64_t *keep) {
    const uint64_t lanes_in_use = first_bits(tile.rows); // spare lanes would be added to keys
    SlopeGroup group;
    for (int g = 0; g < n; g += tile_keys) {
        uint64_t some = 0, all = first_bits(tile_lanes);
        for (int j = g; j < g + tile_keys; ++j) {
            words[j] &= lanes_in_use;
            some |= words[j];
            all &= words[j];
        }
        if (!some) continue;
        const int64_t first = key - s.first + g;
        order_memory();
        begin_scores(FIRST, s.k + first * s.k_stride, s.k_stride, tile_keys, tile.query, s.k_stride);
        begin_scores(SECOND, s.k + first * s.k_stride, s.k_stride, tile_keys, tile.query + tile_side, s.k_stride);
        end_scores(FIRST, tile_keys, group.scores);
        begin_scores(FIRST, s.v + first * s.v_stride, s.v_stride, tile_keys, d_out, s.v_stride);
        end_scores(SECOND, tile_keys, group.scores + tile_side);
        begin_scores(SECOND, s.v + first * s.v_stride, s.v_stride, tile_keys, d_out + tile_side, s.v_stride);
        end_scores(FIRST, tile_keys, group.slopes);
        end_scores(SECOND, tile_keys, group.slopes + tile_side);
        order_memory();
        if (s.general)
            slopes_of_group<GENERAL>(s, tile, group, g, words + g, s.problem->dropout.enabled ? keep + g : nullptr);
        else if (all != first_bits(tile_lanes))
            slopes_of_group<MASKED>(s, tile, group, g, words + g, nullptr);
        else
            slopes_of_group<PLAIN>(s, tile, group, g, words + g, nullptr);
        add_group(s, tile, key, g, words + g);
        gather_slopes(s, tile, key + g, g + tile_keys < n ? tile_keys : n - g, s.ds + g * tile_lanes);
    }
}
