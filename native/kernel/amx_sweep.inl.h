// A sweep of one tile of 32 queries over keys, in tile registers: a group of 32 keys at a time, whose scores pass through
// memory, since vectors cannot read tile registers. While the vectors weigh one group, the tile registers already make
// the scores of the next. States, rules and layouts are those of sweep.inl.h.

TW_INLINE __m512 larger_of(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xFFFF, a, b); } // b where either is NaN

// 2^x for x <= about 100; exactly 0 below -126 and in lanes whose bit of `kept` is not set, exactly 1 for 0, NaN for NaN.
// 2^x = 2^floor(x) 2^f, with a polynomial for 2^f on [0, 1] of smallest largest relative error (1.5e-7, Remez), as two
// instructions split x and scale by floor(x).
TW_INLINE __m512 exp2_where(__mmask16 kept, __m512 x) {
    const __m512 f = _mm512_maskz_reduce_ps(0xFFFF, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 h = _mm512_set1_ps(0.0018671558937057853f);
    h = _mm512_fmadd_ps(h, f, _mm512_set1_ps(0.009016966447234154f));
    h = _mm512_fmadd_ps(h, f, _mm512_set1_ps(0.05579996854066849f));
    h = _mm512_fmadd_ps(h, f, _mm512_set1_ps(0.24016442894935608f));
    h = _mm512_fmadd_ps(h, f, _mm512_set1_ps(0.6931512951850891f));
    h = _mm512_fmadd_ps(h, f, _mm512_set1_ps(1));
    kept = _mm512_mask_cmp_ps_mask(kept, x, _mm512_set1_ps(-126), _CMP_NLT_UQ); // no denormals: they are slow
    return _mm512_maskz_scalef_ps(kept, h, x);
}

// The scores of 16 or 32 keys with 16 lanes, K Q^T, up to storing them.
TW_INLINE void begin_scores(Turn turn, const int32_t *keys, int64_t stride, int count, const int32_t *query, int64_t head_units) {
    clear_tiles(turn);
    for (int64_t d = 0; d < head_units; d += tile_side) {
        _tile_loadd(4, keys + d, stride * int64_t(sizeof(int32_t)));
        _tile_loadd(6, query + d * tile_lanes, tile_lanes * sizeof(int32_t));
        if (count > tile_side) {
            _tile_loadd(5, keys + d + tile_side * stride, stride * int64_t(sizeof(int32_t)));
            multiply_rows(turn);
        } else
            multiply_row(turn);
    }
}
TW_INLINE void end_scores(Turn turn, int count, float *scores) {
    store_tile(turn, 0, scores, tile_lanes * sizeof(float));
    if (count > tile_side) store_tile(turn, 1, scores + tile_side * tile_lanes, tile_lanes * sizeof(float));
}

// A group of keys whose scores are made, but not yet weighed.
struct Group {
    alignas(64) float scores[tile_keys * tile_lanes];
    int64_t key;
    int count;             // 32, or 16 where no more exist
    const uint64_t *words; // the lanes that see each key, or NULL: all
    bool stored;           // else they are still in registers
};

TW_INLINE void begin_group(const Sweep<Tiles> &s, const Tile<Tiles> &tile, Group &group) {
    const int32_t *keys = s.keys + (group.key - s.chunk) * s.key_stride;
    order_memory();
    begin_scores(FIRST, keys, s.key_stride, group.count, tile.query, s.head_units);
    begin_scores(SECOND, keys, s.key_stride, group.count, tile.query + tile_side, s.head_units);
    group.stored = false;
}
TW_INLINE void end_group(Group *group) {
    if (!group || group->stored) return;
    end_scores(FIRST, group->count, group->scores);
    end_scores(SECOND, group->count, group->scores + tile_side);
    order_memory();
    group->stored = true;
}

// Reference, probabilities and sums of a group. next: a group whose scores are to be stored meanwhile, or NULL. bias,
// keep: of the group's first key, or NULL; for the general path alone. Masks, biases of 0 and the path change no bit of
// what a lane sees.
template <ScorePath PATH>
static void weigh_group(Sweep<Tiles> &s, Tile<Tiles> &tile, Group &group, Group *next, const float *bias,
                        const uint64_t *keep) {
    const __m512 infinity = _mm512_set1_ps(__builtin_inff());
    const uint64_t *words = group.words;
    __m512 factor = _mm512_set1_ps(s.factor);
    if (PATH == GENERAL && s.problem->softcap > 0) {
        const float cap = float(s.problem->softcap * 1.4426950408889634074), twice_inverse = float(2 / s.problem->softcap);
        for (int at = 0; at < group.count * tile_lanes; at += tile_side) {
            const vf x = load(group.scores + at) * s.factor;
            store(group.scores + at, cap * tanh_of_log2<float>(x * twice_inverse));
        }
        factor = _mm512_set1_ps(1);
    }
    const auto whole_score = [&](int n, int z) {
        const int place = n * tile_lanes + z;
        const __m512 x = (__m512)load(group.scores + place);
        if (PATH != GENERAL) return x; // multiplied by the factor once the largest is known
        return _mm512_fmadd_ps(x, factor, bias ? (__m512)load(bias + place) : _mm512_setzero_ps());
    };

    // Finds the largest scores, and whether some are beyond their limits.
    alignas(64) float tops[tile_lanes];
    const auto find_tops = [&](const uint64_t *seen_by) {
        uint64_t beyond = 0;
        for (int z = 0; z < tile_lanes; z += tile_side) {
            __m512 top[4];
            TW_UNROLL for (int i = 0; i < 4; ++i) top[i] = -infinity;
            for (int half = 0; half < group.count; half += tile_side)
                TW_UNROLL for (int n = 0; n < tile_side; ++n) {
                    const __mmask16 seen = seen_by ? __mmask16(seen_by[half + n] >> z) : __mmask16(0xFFFF);
                    top[n % 4] = _mm512_mask_max_ps(top[n % 4], seen, whole_score(half + n, z), top[n % 4]);
                }
            // NaN is passed over: the sum is NaN too.
            __m512 highest = larger_of(larger_of(top[0], top[1]), larger_of(top[2], top[3]));
            if (PATH != GENERAL) highest = _mm512_mul_ps(highest, factor);
            beyond |= _mm512_cmp_ps_mask(highest, (__m512)load(tile.limit + z), _CMP_GT_OQ);
            _mm512_store_ps(tops + z, highest);
        }
        return beyond;
    };
    // Where no score at all is beyond, no seen one is, and masks cost nothing here.
    uint64_t beyond = find_tops(PATH == GENERAL ? words : nullptr);
    if (PATH == MASKED && beyond) beyond = find_tops(words);
    if (__builtin_expect(beyond != 0, 0)) {
        end_group(next); // values are weighed in the same registers
        raise_reference<Tiles, 2>(s, tile, tops, group.key);
    }

    int32_t *to = s.probabilities + (group.key - s.chunk) / 2 * tile_lanes;
    for (int z = 0; z < tile_lanes; z += tile_side) {
        const __m512 shift = (__m512)load(tile.shift + z);
        __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int half = 0; half < group.count; half += tile_side)
            TW_UNROLL for (int n = half; n < half + tile_side; n += 2) {
            __m512 weight[2];
            TW_UNROLL for (int i = 0; i < 2; ++i) {
                const __mmask16 seen = PATH == PLAIN || !words ? __mmask16(0xFFFF) : __mmask16(words[n + i] >> z);
                __m512 x = _mm512_fmsub_ps((__m512)load(group.scores + (n + i) * tile_lanes + z), factor, shift);
                if (PATH == GENERAL && bias) x = _mm512_add_ps(x, (__m512)load(bias + (n + i) * tile_lanes + z));
                weight[i] = exp2_where(seen, x);
                sums[i] = _mm512_add_ps(sums[i], weight[i]);
                if constexpr (PATH == GENERAL) {
                    if (keep) weight[i] = _mm512_maskz_mov_ps(__mmask16(keep[n + i] >> z), weight[i]);
                    if (s.careful) {
                        const __mmask16 lost = _mm512_cmp_ps_mask(whole_score(n + i, z), -infinity, _CMP_EQ_OQ);
                        weight[i] = _mm512_mask_mov_ps(weight[i], __mmask16(~seen | lost), _mm512_set1_ps(unseen<float>));
                    }
                }
            }
            store(to + n / 2 * tile_lanes + z, narrow_across((vf)weight[0], (vf)weight[1]));
        }
        for (int n = group.count; n < tile_keys; n += 2) store(to + n / 2 * tile_lanes + z, vi32{});
        store(tile.sum + z, load(tile.sum + z) + (vf)_mm512_add_ps(sums[0], sums[1]));
        end_group(next);
    }
}

TW_INLINE void weigh_waiting(Sweep<Tiles> &s, Tile<Tiles> &tile, Group *&waiting, Group *next) {
    if (!waiting) return end_group(next);
    if (waiting->words)
        weigh_group<MASKED>(s, tile, *waiting, next, nullptr, nullptr);
    else
        weigh_group<PLAIN>(s, tile, *waiting, next, nullptr, nullptr);
    waiting = nullptr;
}

// The keys [begin, end) of the chunk entered, as far as the tile's spans reach.
static void sweep_chunk_in_tiles(Sweep<Tiles> &s, Tile<Tiles> &tile, int64_t begin, int64_t end) {
    const tw_problem &p = *s.problem;
    const bool facts = p.ranges.count || p.mask.data || p.labels.q || p.bits.index, biased = p.bias_count || p.table.data;
    // A scale that is not positive would turn the maximum of the products into something else.
    const bool general = s.general || s.careful || !(s.factor > 0);
    Group groups[2], *waiting = nullptr;
    uint64_t all_words[2][block_keys], keep[block_keys];
    int turn = 0, block = 0;
    const auto stop_run = [&](int64_t stop, int64_t next) {
        weigh_waiting(s, tile, waiting, nullptr);
        flush<Tiles, 2>(s, tile, stop, next);
    };
    s.run_begin = next_key(tile, begin, end);
    for (int64_t key = s.run_begin; key < end;) {
        const int64_t stop = key + block_keys < end ? key + block_keys : end;
        const int n = int(stop - key);
        uint64_t *words = all_words[block ^= 1];
        const Sight sight = facts ? look(p, s.batch, tile, key, n, words) : SEES_ALL;
        if (sight == SEES_NOTHING) {
            stop_run(key, stop);
        } else {
            if (!(s.fetched >> (key - s.chunk) / block_keys & 1)) s.fetch(s, key, n);
            bool masked = sight == SEES_SOME;
            if (!masked && n % tile_keys) {
                for (int j = 0; j < block_keys; ++j) words[j] = j < n ? first_bits(tile_lanes) : 0;
                masked = true;
            }
            if (sight == SEES_SOME || s.general) tile.masked = true;
            if (biased) {
                gather_bias(p, s.batch, tile, key, n, s.bias);
                if (!masked)
                    for (int j = 0; j < block_keys; ++j) words[j] = j < n ? first_bits(tile_lanes) : 0;
                masked |= bar_by_bias(s.bias, n, tile_lanes, words);
            }
            if (p.dropout.enabled) draw_dropout(p, s.batch, tile, key, n, keep);
            for (int g = 0; g < n; g += tile_keys) {
                ask_for_rows(s, tile, key, g / 2, g / 2 + tile_side);
                uint64_t some = 1, all = first_bits(tile_lanes);
                if (masked) {
                    some = 0;
                    for (int j = g; j < g + tile_keys; ++j) some |= words[j], all &= words[j];
                }
                if (!some) {
                    stop_run(key + g, key + g + tile_keys < stop ? key + g + tile_keys : stop);
                    continue;
                }
                Group &group = groups[turn ^= 1];
                group.key = key + g;
                group.count = n - g <= tile_side ? tile_side : tile_keys;
                group.words = all != first_bits(tile_lanes) ? words + g : nullptr;
                begin_group(s, tile, group);
                weigh_waiting(s, tile, waiting, &group);
                if (general)
                    weigh_group<GENERAL>(s, tile, group, nullptr, biased ? s.bias + g * tile_lanes : nullptr,
                                         p.dropout.enabled ? keep + g : nullptr);
                else
                    waiting = &group;
            }
        }
        key = next_key(tile, stop, end);
        if (key > stop) stop_run(stop, key);
    }
    stop_run(end, end);
}
