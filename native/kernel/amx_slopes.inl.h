// The backward pass of tiles of 32 queries and blocks of 64 keys, in tile registers, in groups of 32 keys. What is computed,
// and in which layouts, is said in slopes.inl.h.
//
// Four tiles pass over a block one after another. What their lanes add to its keys and values waits until all are done, so
// that these sums are read and written once for all, as a tile's own are once for the block. Products cut into steps between
// the vectors' instructions, as forward (amx_work.inl.h), were measured here too: of bfloat16 the vectors' time and the tile
// registers' added up, and the steps cost more than they hid. Of parts, whose products take longer, the next group's scores
// and slopes beside the vectors' work save 7 % of all.

// S^T and dP^T of a group, until they are turned into p, ds and raw.
struct SlopeGroup {
    alignas(64) float scores[tile_keys * tile_lanes], slopes[tile_keys * tile_lanes];
};

// Units of p or raw in a slot, and of one part of them.
template <class M> constexpr int64_t part_of_slot = score_places<M> / M::numbers;
template <class M> constexpr int64_t slot_units = M::parts * part_of_slot<M>;

template <class M> struct TileSlopes {
    SlopeGroup groups[2];
    int turn = 0; // which of them is at hand
    uint64_t words[tiles_together<M>][block_keys], keep[block_keys];
    const Tile<M> *tiles[tiles_together<M>];
    uint32_t met[tiles_together<M>] = {}; // which groups any lane sees
    int slot = 0;                         // the tile's at hand
};
template <> struct SlopeWork<Tiles> : TileSlopes<Tiles> {};

// The products of a group, made in steps: its scores, then its slopes.
template <class M> struct SlopeProducts : Background<M> {
    float *slopes; // still to be begun, or NULL
    const int32_t *values, *d_out;
    int64_t value_stride, value_units, steps; // steps: of all
};
// A group whose products are made. It is weighed while those of the next are.
template <class M> struct WaitingSlopes {
    Tile<M> *tile = nullptr; // NULL: none waits
    SlopeGroup *group;
    int64_t block, at;
    int slot;
    bool masked, last; // last: of its tile in the block
};

// Of a group where any are: the lanes whose pair with each key is strange. Parts hold neither their slopes, which may be as
// little as their gradients or infinite, nor what these are multiplied by: they stay in the group's and are added one by one.
template <class T> struct SlopeWork<Parts<T>> : TileSlopes<Parts<T>> {
    uint64_t apart[tile_keys];
    bool strange;
    SlopeProducts<Parts<T>> products;
    WaitingSlopes<Parts<T>> waiting;
};

// p, ds and raw of a group of 32 keys at place `at` of the block, in a slot; or what another pass looks for.
template <ScorePath PATH, Pass PASS>
static void slopes_of_group(const Slopes<Tiles> &s, const Tile<Tiles> &tile, int64_t at, int slot,
                            const SlopeGroup &group) {
    const tw_problem &problem = *s.problem;
    const uint64_t *words = s.work.words[slot] + at;
    const uint64_t *keep = problem.dropout.enabled ? s.work.keep + at : nullptr;
    const float *bias = s.bias + at * tile_lanes;
    const bool capped = PATH == GENERAL && problem.softcap > 0, gathered = s.gradients->gather_count > 0;
    const bool biased = PATH == GENERAL && s.biased;
    const Softcap<float> cap = softcap_of(problem, s.factor);
    const __m512 inverse_keep = _mm512_set1_ps(float(problem.dropout.inverse_keep)), factor = _mm512_set1_ps(s.factor);
    const int64_t own = slot * slot_units<Tiles> + at * tile_side;
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

// Without the slopes below 2^-102, whose parts would be denormals.
TW_INLINE vf without_faint(vf slope) {
    const __m512i bits = (__m512i)slope, size = _mm512_add_epi32(bits, bits);
    return (vf)_mm512_maskz_mov_epi32(_mm512_cmpge_epu32_mask(size, _mm512_set1_epi32(25 << 24)), bits);
}

// Begins S^T and dP^T of the group of keys from place `first` of the segment.
template <class M>
TW_INLINE void begin_products(Slopes<M> &s, const Tile<M> &tile, const int32_t *d_out, int64_t first,
                              SlopeGroup &group) {
    SlopeProducts<M> &work = s.work.products;
    work.scores = group.scores;
    work.half_scores = false;
    work.keys = s.k + first * s.k_stride;
    work.key_stride = s.k_stride;
    work.query = tile.query;
    work.head_units = s.k_stride / M::parts;
    work.slopes = group.slopes;
    work.values = s.v + first * s.v_stride;
    work.d_out = d_out;
    work.value_stride = s.v_stride;
    work.value_units = s.v_stride / M::parts;
    work.steps = steps_of_units<M, OPERANDS> * (work.head_units + work.value_units) / tile_side;
}
template <class M> TW_INLINE void step_of_products(SlopeProducts<M> &work) {
    step_of_scores<M>(work);
    if (work.scores || !work.slopes) return;
    work.scores = work.slopes;
    work.keys = work.values;
    work.key_stride = work.value_stride;
    work.query = work.d_out;
    work.head_units = work.value_units;
    work.slopes = nullptr;
}
template <class M> static __attribute__((noinline)) void finish_products(SlopeProducts<M> &work) {
    while (work.scores) step_of_products(work);
    settle(work);
    order_memory();
}

// The same in parts, as exact as other pages are. Beside it the products of the next group, where they are begun.
template <ScorePath PATH, Pass PASS, class T>
static void slopes_of_group(Slopes<Parts<T>> &s, const Tile<Parts<T>> &tile, int64_t at, int slot, SlopeGroup &group) {
    using M = Parts<T>;
    const tw_problem &problem = *s.problem;
    const int64_t steps = PATH != GENERAL && s.work.products.scores ? s.work.products.steps : 0;
    int64_t due = 0;
    const uint64_t *words = s.work.words[slot] + at;
    const uint64_t *keep = PATH == GENERAL && problem.dropout.enabled ? s.work.keep + at : nullptr;
    const uint64_t *apart = s.work.strange ? s.work.apart : nullptr;
    const bool capped = PATH == GENERAL && problem.softcap > 0, gathered = s.gradients->gather_count > 0;
    const Softcap<float> cap = softcap_of(problem, s.factor);
    const float inverse_keep = float(problem.dropout.inverse_keep);
    const vf by = splat(capped ? 1 : s.factor);
    const int64_t own = slot * slot_units<M> + at * tile_side;
    int32_t *p = s.p + own, *raw = s.raw + own, *raw_across = s.raw_across + at / 2 * tile_lanes;
    for (int n = 0; n < tile_keys; n += 2) {
        vf weights[2][2], slopes[2][2];
        TW_UNROLL(int i = 0; i < 2; ++i)
            TW_UNROLL(int z = 0; z < 2; ++z) {
                const int lane = z * tile_side, place = (n + i) * tile_lanes + lane;
                const float *bias = PATH == GENERAL && s.biased ? s.bias + at * tile_lanes + place : nullptr;
                const uint64_t seen = PATH == PLAIN ? ~uint64_t(0) : words[n + i] >> lane;
                vf x = load(group.scores + place), cap_slope = splat(1.f);
                if (capped) x = cap_product<float>(x, cap, cap_slope);
                if constexpr (PASS == PEAKS) {
                    const vf score = whole_score<float>(x, by, bias);
                    note_peak<float>(*s.found, lane, seen, score, less_reference<float>(x, by, bias, score));
                    continue;
                }
                x = PASS == SUMS || (PATH == GENERAL && tile.far)
                        ? less_far_reference<float>(x, by, bias, tile, lane)
                        : less_reference<float>(x, by, bias, load(tile.shift + lane));
                vf weight = exp2<float>(x, least_in_parts);
                if (PATH == GENERAL && tile.far) weight *= load(tile.limit + lane);
                if (PATH != PLAIN) weight = select<float>(seen, weight, vf{});
                vf used = weight, slope = load(group.slopes + place);
                if (keep) {
                    used = select<float>(keep[n + i] >> lane, weight * inverse_keep, vf{});
                    slope = select<float>(keep[n + i] >> lane, slope * inverse_keep, vf{});
                }
                if constexpr (PASS == SUMS) {
                    float *const sum = s.found->sum + lane, *const pulls = s.found->pull + lane;
                    store(sum, load(sum) + weight);
                    store(pulls, load(pulls) + select<float>(seen, weight * slope, vf{}));
                    continue;
                }
                slope = weight * (slope + load(tile.sum + lane));
                if (PATH != PLAIN) slope = select<float>(seen, slope, vf{});
                if (gathered) store(s.ds + at * tile_lanes + place, slope);
                if (capped) slope = select<float>(seen, slope * cap_slope, vf{});
                weights[i][z] = used;
                slopes[i][z] = without_faint(slope);
                if (apart) {
                    store(group.slopes + place, slope);
                    slopes[i][z] = select<float>(apart[n + i] >> lane, vf{}, slopes[i][z]);
                }
            }
        if constexpr (PASS != RESULTS) continue;
        TW_UNROLL(int i = 0; i < 2; ++i) {
            store_parts_of_row<M>((__m512)weights[i][0], (__m512)weights[i][1], p + (n + i) * tile_side,
                                  part_of_slot<M>);
            store_parts_of_row<M>((__m512)slopes[i][0], (__m512)slopes[i][1], raw + (n + i) * tile_side,
                                  part_of_slot<M>);
        }
        TW_UNROLL(int z = 0; z < 2; ++z)
            store_parts<M>((__m512)slopes[0][z], (__m512)slopes[1][z], raw_across + n / 2 * tile_lanes + z * tile_side,
                           part_of_slot<M>);
        for (due += 2 * steps; due >= tile_keys; due -= tile_keys) step_of_products(s.work.products);
    }
}

// The product of two rows of n numbers; of NaN, the one that parts keep.
template <class T> TW_RARE float row_product(const T *a, const T *b, int64_t n) {
    float sum = 0;
    for (int64_t d = 0; d < n; ++d) sum += number(a[d]) * number(b[d]);
    return sum == sum ? sum : __builtin_nanf("");
}
template <class T> TW_RARE bool has_strange(const T *row, int64_t n) {
    for (int64_t d = 0; d < n; ++d)
        if (is_strange(number(row[d]))) return true;
    return false;
}

// Calls at(j, l, k, v, q, d_out), of rows, for each pair of a group's key j and a lane l that see each other, where the
// rows of either are strange.
template <class T, class F>
TW_INLINE void each_strange_pair(const Slopes<Parts<T>> &s, const Tile<Parts<T>> &tile, int64_t key,
                                 const uint64_t *words, F at) {
    const tw_problem &p = *s.problem;
    for (int64_t j = 0; j < tile_keys && key + j <= s.last; ++j) {
        const T *k = tensor_row<const T>(p.k, s.b, s.kv_head, key + j),
                *v = tensor_row<const T>(p.v, s.b, s.kv_head, key + j);
        uint64_t lanes = words[j];
        if (!has_strange(k, p.head_dim) && !has_strange(v, p.value_dim)) lanes &= tile.strange;
        for (; lanes; lanes &= lanes - 1) {
            const int l = __builtin_ctzll(lanes);
            at(j, l, k, v, tensor_row<const T>(p.q, s.b, tile.h[l], tile.i[l]),
               tensor_row<const T>(s.gradients->d_out, s.b, tile.h[l], tile.i[l]));
        }
    }
}

// The products of such pairs, in place of what their parts gave; but scores stay as the forward pass had them where only
// the value or the gradient is strange: lse is theirs.
template <class T>
TW_RARE void multiply_strange(Slopes<Parts<T>> &s, const Tile<Parts<T>> &tile, int64_t key, const uint64_t *words) {
    const tw_problem &p = *s.problem;
    SlopeGroup &group = s.work.groups[s.work.turn];
    const float sign = scaling_of<float>(p).sign;
    const bool never_in_parts = scaling_of<float>(p).factor >= end_factor;
    __builtin_memset(s.work.apart, 0, sizeof s.work.apart);
    each_strange_pair(s, tile, key, words, [&](int64_t j, int l, const T *k, const T *v, const T *q, const T *d_out) {
        if (never_in_parts || has_strange(q, p.head_dim) || has_strange(k, p.head_dim))
            group.scores[j * tile_lanes + l] = sign * row_product(q, k, p.head_dim);
        group.slopes[j * tile_lanes + l] = row_product(d_out, v, p.value_dim);
        s.work.apart[j] |= uint64_t(1) << l;
    });
}

// What such pairs add to d_q and d_k, and p times their strange gradients of the output, which parts left out of the sums.
// at: the group's place in the block.
template <class T>
TW_RARE void add_strange(const Slopes<Parts<T>> &s, const Tile<Parts<T>> &tile, int64_t key, int64_t at) {
    using M = Parts<T>;
    const tw_problem &p = *s.problem;
    const tw_gradients &g = *s.gradients;
    const auto weight_of = [&](int64_t j, int l) { // the sum of its parts
        float sum = 0;
        for (int part = M::parts - 1; part >= 0; --part) {
            const int32_t unit =
                              s.p[s.work.slot * slot_units<M> + part * part_of_slot<M> + (at + j) * tile_side + l / 2],
                          bits = l % 2 ? unit & int32_t(0xFFFF0000) : int32_t(uint32_t(unit) << 16);
            float own;
            __builtin_memcpy(&own, &bits, sizeof own);
            sum += own;
        }
        return sum;
    };
    each_strange_pair(
        s, tile, key, s.work.words[s.work.slot] + at,
        [&](int64_t j, int l, const T *k, const T *, const T *q, const T *d_out) {
            const float raw = s.work.groups[s.work.turn].slopes[j * tile_lanes + l], weight = weight_of(j, l);
            float *const d_k = s.d_k + (key - s.first + j) * s.head_width, *const d_v = s.d_v + (key - s.first + j) *
                                                                                                    s.value_width;
            for (int64_t d = 0; d < p.head_dim; ++d) {
                if (g.d_k.data) d_k[d] += raw * number(q[d]);
                if (g.d_q.data) tile.out[d * tile_lanes + l] += raw * number(k[d]);
            }
            for (int64_t e = 0; g.d_v.data && e < p.value_dim; ++e)
                if (is_strange_gradient(number(d_out[e]))) d_v[e] += weight * number(d_out[e]);
        });
}

// Whether something that a tile multiplies in a block is not finite: parts always are.
template <class M> TW_INLINE bool careful(const Slopes<M> &s, const Tile<M> &tile, int64_t block) {
    if (M::parts > 1) return false;
    return tile.masked || s.blocks[(block - s.first) / block_keys] == BLOCK_NOT_FINITE;
}

// d_q of the block, in a slot.
template <class M> static void add_to_tile(const Slopes<M> &s, Tile<M> &tile, int64_t block, int slot) {
    const uint32_t met = s.work.met[slot];
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
        sums.a_step = tile_side * s.across_stride;
        sums.b_step = tile_side * tile_lanes;
        sums.a_part = tile_side * s.head_width;
        sums.b_part = part_of_slot<M>;
        sums.groups = (end - begin) / tile_keys;
        sums.a_next = 2 * tile_units;
        sums.b_next = 0;
        sums.out_next = 2 * tile_side * tile_lanes;
        sums.sixteens = s.head_width / tile_side;
        sums.below = sums.adds = true;
        OwedTiles owed;
        multiply<M, WEIGHTS>(sums, owed);
        return settle(owed);
    }
    order_memory();
    for (int64_t at = begin; at < end; at += tile_keys) {
        const uint64_t *words = s.work.words[slot] + at;
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
template <class M>
TW_INLINE void add_rows_of_tiles(const int32_t *weights, const int32_t *rows, int count, int64_t width, float *out,
                                 OwedTiles &owed) {
    TileProduct sums;
    sums.a = weights;
    sums.b = rows;
    sums.out = out;
    sums.a_stride = tile_side;
    sums.b_stride = sums.out_stride = width;
    sums.a_step = slot_units<M>;
    sums.b_step = M::parts * tile_side * width;
    sums.a_part = part_of_slot<M>;
    sums.b_part = tile_side * width;
    sums.groups = count;
    sums.a_next = 0;
    sums.b_next = sums.out_next = 2 * tile_side;
    sums.sixteens = width / tile_side;
    sums.below = false;
    sums.adds = true;
    multiply<M, WEIGHTS>(sums, owed);
}

// d_k and d_v of the group of keys at place `at` of a block.
template <class M> static void add_to_keys(const Slopes<M> &s, int64_t block, int64_t at, OwedTiles &owed) {
    const SlopeWork<M> &work = s.work;
    const tw_gradients &g = *s.gradients;
    const int64_t first = block - s.first + at;
    float *d_k = s.d_k + first * s.head_width, *d_v = s.d_v + first * s.value_width;
    const auto meets = [&](int i) { return i < tiles_together<M> && work.met[i] >> at / tile_keys & 1; };
    for (int i = 0; i < tiles_together<Tiles>;) {
        const int begin = i++;
        if (!meets(begin)) continue;
        const int32_t *p = s.p + begin * slot_units<M> + at * tile_side,
                      *raw = s.raw + begin * slot_units<M> + at * tile_side;
        const int32_t *q_rows = s.q_rows + begin * M::parts * tile_side * s.head_width;
        const int32_t *d_out_rows = s.d_out_rows + begin * M::parts * tile_side * s.value_width;
        if (careful(s, *work.tiles[begin], block)) {
            settle(owed);
            const uint64_t *words = work.words[begin] + at;
            if (g.d_k.data) add_rows_seen(raw, q_rows, words, s.head_width, d_k);
            if (g.d_v.data) add_rows_seen(p, d_out_rows, words, s.value_width, d_v);
            continue;
        }
        while (meets(i) && !careful(s, *work.tiles[i], block)) ++i;
        if (g.d_k.data) add_rows_of_tiles<M>(raw, q_rows, i - begin, s.head_width, d_k, owed);
        if (g.d_v.data) add_rows_of_tiles<M>(p, d_out_rows, i - begin, s.value_width, d_v, owed);
    }
}

// What the slots so far add to the keys of the block at `key`.
template <class M> static void add_slots_to_keys(Slopes<M> &s, int64_t key) {
    OwedTiles owed;
    for (int64_t at = 0; at < block_keys; at += tile_keys) add_to_keys(s, key, at, owed);
    settle(owed);
    for (uint32_t &met : s.work.met) met = 0;
}

// out [32 keys][32 lanes] = rows of keys or values, times the tile's queries or gradients of the output.
template <class M>
TW_INLINE void multiply_lanes(const int32_t *rows, int64_t stride, const int32_t *lanes, float *out, OwedTiles &owed) {
    TileProduct product;
    product.a = rows;
    product.b = lanes;
    product.out = out;
    product.a_stride = stride;
    product.b_stride = product.out_stride = tile_lanes;
    product.a_step = tile_side;
    product.b_step = tile_side * tile_lanes;
    product.groups = stride / M::parts / tile_side;
    product.a_part = stride / M::parts;
    product.b_part = product.a_part * tile_lanes;
    product.a_next = product.b_next = product.out_next = 0;
    product.sixteens = 2;
    product.below = true;
    product.adds = false;
    multiply<M, OPERANDS>(product, owed);
}

// Weighs the group that waits, if any, beside the products of the next, and adds to its tile after the last of a block.
template <class T> static void weigh_waiting(Slopes<Parts<T>> &s) {
    WaitingSlopes<Parts<T>> &waiting = s.work.waiting;
    if (!waiting.tile) return;
    s.work.strange = false;
    if (waiting.masked)
        slopes_of_group<MASKED, RESULTS>(s, *waiting.tile, waiting.at, waiting.slot, *waiting.group);
    else
        slopes_of_group<PLAIN, RESULTS>(s, *waiting.tile, waiting.at, waiting.slot, *waiting.group);
    if (waiting.last && s.gradients->d_q.data) {
        finish_products(s.work.products);
        add_to_tile(s, *waiting.tile, waiting.block, waiting.slot);
    }
    waiting.tile = nullptr;
}

// The block at `key`, whose words (the lanes that see each key) and dropout are known, in the slot at hand.
template <Pass PASS, class M>
static void slopes_in_tiles(Slopes<M> &s, Tile<M> &tile, const unit_of<M> *d_out, int64_t key, int n) {
    SlopeWork<M> &work = s.work;
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
        SlopeGroup &group = work.groups[work.turn];
        [[maybe_unused]] bool strange = false;
        if constexpr (M::parts > 1 && PASS == RESULTS) {
            begin_products(s, tile, d_out, first, group);
            weigh_waiting(s);
            finish_products(work.products);
        } else {
            OwedTiles owed;
            multiply_lanes<M>(s.k + first * s.k_stride, s.k_stride, tile.query, group.scores, owed);
            multiply_lanes<M>(s.v + first * s.v_stride, s.v_stride, d_out, group.slopes, owed);
            settle(owed);
        }
        if constexpr (M::parts > 1) {
            strange = tile.strange || s.blocks[(key - s.first) / block_keys] == BLOCK_NOT_FINITE;
            if (PASS == RESULTS && !strange && !s.general && !tile.far && !s.gradients->gather_count) {
                work.waiting = {&tile, &group, key, g, work.slot, all != every_lane, false};
                work.turn ^= 1;
                continue;
            }
            work.strange = strange;
            if (strange) multiply_strange(s, tile, key + g, words + g);
        }
        if (PASS != RESULTS || s.general || tile.far)
            slopes_of_group<GENERAL, PASS>(s, tile, g, work.slot, group);
        else if (all != every_lane)
            slopes_of_group<MASKED, RESULTS>(s, tile, g, work.slot, group);
        else
            slopes_of_group<PLAIN, RESULTS>(s, tile, g, work.slot, group);
        if constexpr (M::parts > 1 && PASS == RESULTS)
            if (strange) {
                // However many tiles pass together, a key's sums take first what the tiles before this one add.
                const uint32_t own = met;
                met = 0;
                if (s.work.slot) add_slots_to_keys(s, key);
                met = own;
                add_strange(s, tile, key + g, g);
            }
        if constexpr (PASS == RESULTS)
            gather_slopes(s, tile, key + g, g + tile_keys < n ? tile_keys : n - g, s.ds + g * tile_lanes);
    }
    if (!met) return;
    if constexpr (M::parts > 1)
        if (work.waiting.tile) {
            work.waiting.last = true;
            return;
        }
    if (s.gradients->d_q.data) add_to_tile(s, tile, key, work.slot);
}

// After all tiles' turns with the block at `key`.
template <class M> static void end_block_in_tiles(Slopes<M> &s, int64_t key) {
    if constexpr (M::parts > 1) weigh_waiting(s);
    add_slots_to_keys(s, key);
    s.work.slot = 0;
}
