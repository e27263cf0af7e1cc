// The backward pass of tiles of 32 queries and blocks of 64 keys, in tile registers, in groups of 32 keys. What is computed,
// and in which layouts, is said in slopes.inl.h.
//
// Four tiles pass over a block one after another. What their lanes add to its keys and values waits until all are done, so
// that these sums are read and written once for all, as a tile's own are once for the block. Products cut into steps between
// the vectors' instructions, as forward (amx_work.inl.h), were measured here too: the vectors' time and the tile registers'
// added up, and the steps cost more than they hid.

// S^T and dP^T of a group, until they are turned into p, ds and raw.
struct SlopeGroup {
    alignas(64) float scores[tile_keys * tile_lanes], slopes[tile_keys * tile_lanes];
};

constexpr int64_t slot_units = score_places<Tiles> / Tiles::numbers; // of p or raw

template <> struct SlopeWork<Tiles> {
    SlopeGroup group;
    uint64_t words[tiles_together<Tiles>][block_keys], keep[block_keys];
    const Tile<Tiles> *tiles[tiles_together<Tiles>];
    uint32_t met[tiles_together<Tiles>] = {}; // which groups any lane sees
    int slot = 0;                             // the tile's at hand
};

// p, ds and raw of the group of 32 keys at place `at` of the block, in the slot at hand; or what another pass looks for.
template <ScorePath PATH, Pass PASS>
static void slopes_of_group(const Slopes<Tiles> &s, const Tile<Tiles> &tile, int64_t at) {
    const tw_problem &problem = *s.problem;
    const SlopeGroup &group = s.work.group;
    const uint64_t *words = s.work.words[s.work.slot] + at;
    const uint64_t *keep = problem.dropout.enabled ? s.work.keep + at : nullptr;
    const float *bias = s.bias + at * tile_lanes;
    const bool capped = PATH == GENERAL && problem.softcap > 0, gathered = s.gradients->gather_count > 0;
    const bool biased = PATH == GENERAL && s.biased;
    const Softcap<float> cap = softcap_of(problem, s.factor);
    const __m512 inverse_keep = _mm512_set1_ps(float(problem.dropout.inverse_keep)), factor = _mm512_set1_ps(s.factor);
    const int64_t own = s.work.slot * slot_units + at * tile_side;
    int32_t *p = s.p + own, *raw = s.raw + own, *raw_across = s.raw_across + at / 2 * tile_lanes;
    const __m512 to_log2 = _mm512_set1_ps(log2_e<float>);
    __m512 shift[2], pull[2], share[2];
    __mmask16 coarse[2];
    TW_UNROLL(int z = 0; z < 2; ++z) {
        shift[z] = (__m512)load(tile.shift + z * tile_side);
        coarse[z] = __mmask16(lane_bits(coarse_lanes<float>((vf)shift[z])));
        share[z] = (__m512)load(tile.limit + z * tile_side);
        pull[z] = (__m512)load(tile.sum + z * tile_side);
    }
    for (int n = 0; n < tile_keys; n += 2) {
        vf weights[2][2], slopes[2][2];
        TW_UNROLL(int i = 0; i < 2; ++i)
            TW_UNROLL(int z = 0; z < 2; ++z) {
                const int place = (n + i) * tile_lanes + z * tile_side;
                const __mmask16 seen = PATH == PLAIN ? __mmask16(0xFFFF) : __mmask16(words[n + i] >> z * tile_side);
                const __mmask16 kept =
                    PATH == GENERAL && keep ? __mmask16(keep[n + i] >> z * tile_side) : __mmask16(0xFFFF);
                __m512 x = (__m512)load(group.scores + place), cap_slope = _mm512_set1_ps(1);
                if (capped) {
                    vf slope_of_cap;
                    x = (__m512)cap_product<float>((vf)x, cap, slope_of_cap);
                    cap_slope = (__m512)slope_of_cap;
                    if (biased) x = _mm512_fmadd_ps((__m512)load(bias + place), to_log2, x);
                    x = _mm512_sub_ps(x, shift[z]);
                } else if (biased) {
                    x = _mm512_fmadd_ps((__m512)load(bias + place), to_log2, _mm512_mul_ps(x, factor));
                    x = _mm512_sub_ps(x, shift[z]);
                } else if (PATH == GENERAL && coarse[z]) { // of the peak, a rounded product: exactly 0
                    x = _mm512_mask_sub_ps(_mm512_fmsub_ps(x, factor, shift[z]), coarse[z], _mm512_mul_ps(x, factor),
                                           shift[z]);
                } else {
                    x = _mm512_fmsub_ps(x, factor, shift[z]);
                }
                if constexpr (PASS == PEAKS) { // the shift is 0
                    note_peak<float>(*s.found, z * tile_side, seen, (vf)x, vf{});
                    continue;
                }
                __m512 weight = exp2_where(seen, x);
                if (PATH == GENERAL && tile.far) weight = _mm512_mul_ps(weight, share[z]);
                __m512 used = weight, slope = (__m512)load(group.slopes + place);
                if (PATH == GENERAL && keep) {
                    used = _mm512_maskz_mul_ps(kept, weight, inverse_keep);
                    slope = _mm512_maskz_mul_ps(kept, slope, inverse_keep);
                }
                if constexpr (PASS == SUMS) {
                    float *const sum = s.found->sum + z * tile_side, *const pulls = s.found->pull + z * tile_side;
                    store(sum, load(sum) + (vf)weight);
                    store(pulls, load(pulls) + (vf)_mm512_maskz_mul_ps(seen, weight, slope));
                    continue;
                }
                slope = _mm512_maskz_mul_ps(seen, weight, _mm512_add_ps(slope, pull[z]));
                if (gathered) store(s.ds + at * tile_lanes + place, (vf)slope);
                if (capped) slope = _mm512_maskz_mul_ps(seen, slope, cap_slope);
                weights[i][z] = (vf)used;
                slopes[i][z] = (vf)slope;
            }
        if constexpr (PASS != RESULTS) continue;
        TW_UNROLL(int i = 0; i < 2; ++i) {
            store(p + (n + i) * tile_side, narrow_beside(weights[i][0], weights[i][1]));
            store(raw + (n + i) * tile_side, narrow_beside(slopes[i][0], slopes[i][1]));
        }
        TW_UNROLL(int z = 0; z < 2; ++z)
            store(raw_across + n / 2 * tile_lanes + z * tile_side, narrow_across(slopes[0][z], slopes[1][z]));
    }
}

// Whether something that a tile multiplies in a block is not finite.
TW_INLINE bool careful(const Slopes<Tiles> &s, const Tile<Tiles> &tile, int64_t block) {
    return tile.masked || s.blocks[(block - s.first) / block_keys] == BLOCK_NOT_FINITE;
}

// d_q of the block, in the slot at hand.
static void add_to_tile(const Slopes<Tiles> &s, Tile<Tiles> &tile, int64_t block) {
    const uint32_t met = s.work.met[s.work.slot];
    const int64_t begin = met & 1 ? 0 : tile_keys, end = met & 2 ? int64_t(block_keys) : tile_keys;
    const int32_t *raw_across = s.raw_across + begin / 2 * tile_lanes;
    const int32_t *k = s.k_across + (block - s.first + begin) / 2 * s.across_stride;
    if (!careful(s, tile, block)) {
        TileProduct sums;
        sums.a = k;
        sums.b = raw_across;
        sums.out = tile.out;
        sums.a_stride = tile_side;
        sums.b_stride = sums.out_stride = tile_lanes;
        sums.a_step = tile_side * s.head_width;
        sums.b_step = tile_side * tile_lanes;
        sums.groups = (end - begin) / tile_keys;
        sums.a_next = 2 * tile_units;
        sums.b_next = 0;
        sums.out_next = 2 * tile_side * tile_lanes;
        sums.sixteens = s.head_width / tile_side;
        sums.below = sums.adds = true;
        OwedTiles owed;
        multiply(sums, owed);
        return settle(owed);
    }
    order_memory();
    for (int64_t at = begin; at < end; at += tile_keys) {
        const uint64_t *words = s.work.words[s.work.slot] + at;
        uint32_t by_lane[tile_lanes] = {};
        for (int j = 0; j < tile_keys; ++j)
            for (int l = 0; l < tile_lanes; ++l) by_lane[l] |= uint32_t(words[j] >> l & 1) << j;
        add_values_seen(raw_across, k, keys_not_finite(k, s.head_width), by_lane, s.head_width, tile.out);
        raw_across += tile_side * tile_lanes;
        k += tile_side * s.across_stride;
    }
    order_memory();
}

// out [32 keys][width] += the weights of `count` slots, times their tiles' rows [16 units][width] each.
TW_INLINE void add_rows_of_tiles(const int32_t *weights, const int32_t *rows, int count, int64_t width, float *out,
                                 OwedTiles &owed) {
    TileProduct sums;
    sums.a = weights;
    sums.b = rows;
    sums.out = out;
    sums.a_stride = tile_side;
    sums.b_stride = sums.out_stride = width;
    sums.a_step = slot_units;
    sums.b_step = tile_side * width;
    sums.groups = count;
    sums.a_next = 0;
    sums.b_next = sums.out_next = 2 * tile_side;
    sums.sixteens = width / tile_side;
    sums.below = false;
    sums.adds = true;
    multiply(sums, owed);
}

// d_k and d_v of the group of keys at place `at` of a block.
static void add_to_keys(const Slopes<Tiles> &s, int64_t block, int64_t at, OwedTiles &owed) {
    const SlopeWork<Tiles> &work = s.work;
    const tw_gradients &g = *s.gradients;
    const int64_t first = block - s.first + at;
    float *d_k = s.d_k + first * s.head_width, *d_v = s.d_v + first * s.value_width;
    const auto meets = [&](int i) { return i < tiles_together<Tiles> && work.met[i] >> at / tile_keys & 1; };
    for (int i = 0; i < tiles_together<Tiles>;) {
        const int begin = i++;
        if (!meets(begin)) continue;
        const int32_t *p = s.p + begin * slot_units + at * tile_side,
                      *raw = s.raw + begin * slot_units + at * tile_side;
        const int32_t *q_rows = s.q_rows + begin * tile_side * s.head_width;
        const int32_t *d_out_rows = s.d_out_rows + begin * tile_side * s.value_width;
        if (careful(s, *work.tiles[begin], block)) {
            settle(owed);
            const uint64_t *words = work.words[begin] + at;
            if (g.d_k.data) add_rows_seen(raw, q_rows, words, s.head_width, d_k);
            if (g.d_v.data) add_rows_seen(p, d_out_rows, words, s.value_width, d_v);
            continue;
        }
        while (meets(i) && !careful(s, *work.tiles[i], block)) ++i;
        if (g.d_k.data) add_rows_of_tiles(raw, q_rows, i - begin, s.head_width, d_k, owed);
        if (g.d_v.data) add_rows_of_tiles(p, d_out_rows, i - begin, s.value_width, d_v, owed);
    }
}

// out [32 keys][32 lanes] = rows of keys or values, times the tile's queries or gradients of the output.
TW_INLINE void multiply_lanes(const int32_t *rows, int64_t stride, const int32_t *lanes, float *out, OwedTiles &owed) {
    TileProduct product;
    product.a = rows;
    product.b = lanes;
    product.out = out;
    product.a_stride = stride;
    product.b_stride = product.out_stride = tile_lanes;
    product.a_step = tile_side;
    product.b_step = tile_side * tile_lanes;
    product.groups = stride / tile_side;
    product.a_next = product.b_next = product.out_next = 0;
    product.sixteens = 2;
    product.below = true;
    product.adds = false;
    multiply(product, owed);
}

// The block at `key`, whose words (the lanes that see each key) and dropout are known, in the slot at hand.
template <Pass PASS, class M>
static void slopes_in_tiles(Slopes<M> &s, Tile<M> &tile, const unit_of<M> *d_out, int64_t key, int n) {
    SlopeWork<Tiles> &work = s.work;
    uint64_t *words = work.words[work.slot];
    uint32_t &met = work.met[work.slot];
    const uint64_t every_lane = first_bits(tile_lanes);
    const uint64_t lanes_in_use = first_bits(tile.rows); // spare lanes would be added to keys
    work.tiles[work.slot] = &tile;
    for (int g = 0; g < n; g += tile_keys) {
        if (s.problem->bias_count) ask_for_bias(*s.problem, s.b, tile, key + block_keys, g / tile_keys, 2);
        uint64_t some = 0, all = every_lane;
        for (int j = g; j < g + tile_keys; ++j) {
            words[j] &= lanes_in_use;
            some |= words[j];
            all &= words[j];
        }
        if (!some) continue;
        if constexpr (PASS == RESULTS) met |= 1u << g / tile_keys;
        const int64_t first = key - s.first + g;
        OwedTiles owed;
        multiply_lanes(s.k + first * s.k_stride, s.k_stride, tile.query, work.group.scores, owed);
        multiply_lanes(s.v + first * s.v_stride, s.v_stride, d_out, work.group.slopes, owed);
        settle(owed);
        if (PASS != RESULTS || s.general || tile.far)
            slopes_of_group<GENERAL, PASS>(s, tile, g);
        else if (all != every_lane)
            slopes_of_group<MASKED, RESULTS>(s, tile, g);
        else
            slopes_of_group<PLAIN, RESULTS>(s, tile, g);
        if constexpr (PASS == RESULTS)
            gather_slopes(s, tile, key + g, g + tile_keys < n ? tile_keys : n - g, s.ds + g * tile_lanes);
    }
    if (met && s.gradients->d_q.data) add_to_tile(s, tile, key);
}

// After all tiles' turns with the block at `key`.
static void end_block_in_tiles(Slopes<Tiles> &s, int64_t key) {
    OwedTiles owed;
    for (int64_t at = 0; at < block_keys; at += tile_keys) add_to_keys(s, key, at, owed);
    settle(owed);
    for (uint32_t &met : s.work.met) met = 0;
    s.work.slot = 0;
}
