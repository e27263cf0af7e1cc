// A sweep of one tile of 32 queries over keys, in tile registers: a group of 32 keys at a time, whose scores pass through
// memory, since vectors cannot read tile registers. While the vectors weigh one group, the tile registers make the scores
// of the next and add the values of the run before (amx_work.inl.h). States, rules and layouts are those of sweep.inl.h.

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

// A group of keys, and its scores.
struct Group {
    alignas(64) float scores[tile_keys * tile_lanes];
    int64_t key;
    int count;             // 32, or 16 where no more exist
    const uint64_t *words; // the lanes that see each key, or NULL: all
};

template <class M> TW_INLINE void begin_scores_of(Sweep<M> &s, const Tile<M> &tile, Group &group) {
    Background<M> &work = s.background;
    work.scores = group.scores;
    work.half_scores = group.count <= tile_side;
    work.keys = s.keys + (group.key - s.chunk) * s.key_stride;
    work.key_stride = s.key_stride;
    work.query = tile.query;
    work.head_units = s.head_units;
    work.d = 0;
}

// What scores are still to be multiplied by.
template <ScorePath PATH, class M> TW_INLINE float factor_of(const Sweep<M> &s) {
    return PATH == GENERAL && s.problem->softcap > 0 ? 1 : s.factor;
}

// What scores that are still to be multiplied by `factor` are less their references. bias: theirs, or NULL; coarse: the lanes
// whose reference is (units.inl.h).
template <ScorePath PATH, class M>
TW_INLINE __m512 exponents(const float *scores, __m512 factor, const float *bias, __m512 shift, __mmask16 coarse) {
    const __m512 to_log2 = _mm512_set1_ps(log2_e<float>), score = (__m512)load(scores);
    __m512 x;
    if constexpr (M::parts > 1) {
        x = (__m512)less_reference<float>((vf)score, (vf)factor, bias, (vf)shift);
    } else {
        __m512 less = shift; // of a bias, first: what is large in both goes away exactly
        if (bias) less = _mm512_fnmadd_ps((__m512)load(bias), to_log2, less);
        x = _mm512_fmsub_ps(score, factor, less);
    }
    if (PATH == GENERAL && coarse) { // rounded as in raise_to_group
        const __m512 own = bias ? _mm512_mul_ps((__m512)load(bias), to_log2) : _mm512_setzero_ps();
        x = _mm512_mask_sub_ps(x, coarse, _mm512_fmadd_ps(score, factor, own), shift);
    }
    return x;
}
template <ScorePath PATH> TW_INLINE __mmask16 coarse_of(__m512 shift) {
    return __mmask16(PATH == GENERAL ? lane_bits(coarse_lanes<float>((vf)shift)) : 0);
}

// Probabilities and sums of a group, with the references as they are. Returns the lanes that have a score beyond their
// limit; if there are any, nothing is added to the sums unless it must.
template <ScorePath PATH, class M>
static uint64_t weigh(Sweep<M> &s, Tile<M> &tile, const Group &group, const float *bias, const uint64_t *keep,
                      bool must) {
    const __m512 infinity = _mm512_set1_ps(__builtin_inff()), factor = _mm512_set1_ps(factor_of<PATH>(s));
    const uint64_t *words = group.words;
    int32_t *to = s.probabilities + (group.key - s.run_begin) / 2 * tile_lanes;
    __m512 shift[2], room[2], sums[2][2];
    __mmask16 within[2], coarse[2];
    TW_UNROLL(int z = 0; z < 2; ++z) {
        shift[z] = (__m512)load(tile.shift + z * tile_side);
        coarse[z] = coarse_of<PATH>(shift[z]);
        room[z] = _mm512_sub_ps((__m512)load(tile.limit + z * tile_side), shift[z]);
        sums[z][0] = sums[z][1] = _mm512_setzero_ps();
        within[z] = 0xFFFF;
    }
    const int64_t steps = steps_beside_group(s.background);
    int64_t due = 0;
    for (int n = 0; n < group.count; n += 2) {
        TW_UNROLL(int z = 0; z < 2; ++z) {
            __m512 weight[2];
            TW_UNROLL(int i = 0; i < 2; ++i) {
                const int place = (n + i) * tile_lanes + z * tile_side;
                const float *const own_bias = PATH == GENERAL && bias ? bias + place : nullptr;
                __m512 x = exponents<PATH, M>(group.scores + place, factor, own_bias, shift[z], coarse[z]);
                if (PATH == MASKED || (PATH == GENERAL && words))
                    x = _mm512_mask_mov_ps(-infinity, __mmask16(words[n + i] >> z * tile_side), x);
                within[z] = _mm512_mask_cmp_ps_mask(within[z], x, room[z], _CMP_NGT_UQ);
                weight[i] = M::parts == 3 ? (__m512)exp2<float>((vf)x, least_in_parts) : exp2_where(0xFFFF, x);
                sums[z][i] = _mm512_add_ps(sums[z][i], weight[i]);
                if constexpr (PATH == GENERAL) {
                    if (keep) weight[i] = _mm512_maskz_mov_ps(__mmask16(keep[n + i] >> z * tile_side), weight[i]);
                    if (M::parts == 1 && s.careful) {
                        const __mmask16 lost = _mm512_cmp_ps_mask(x, -infinity, _CMP_EQ_OQ);
                        weight[i] = _mm512_mask_mov_ps(weight[i], lost, _mm512_set1_ps(unseen<float>));
                    }
                }
            }
            int32_t *const unit = to + n / 2 * tile_lanes + z * tile_side;
            if constexpr (M::parts > 1)
                store_parts<M>(weight[0], weight[1], unit, part_of_run<M>);
            else
                store(unit, narrow_across((vf)weight[0], (vf)weight[1]));
        }
        for (due += 2 * steps; due >= group.count; due -= group.count) step(s.background);
    }
    for (int n = group.count; n < tile_keys; n += 2)
        for (int part = 0; part < M::parts; ++part)
            TW_UNROLL(int z = 0; z < 2; ++z)
                store(to + part * part_of_run<M> + n / 2 * tile_lanes + z * tile_side, vi32{});
    settle(s.background);
    order_memory();
    const uint64_t beyond = uint64_t(uint16_t(~within[0])) | uint64_t(uint16_t(~within[1])) << tile_side;
    if (!beyond || must)
        TW_UNROLL(int z = 0; z < 2; ++z)
            store(tile.sum + z * tile_side, load(tile.sum + z * tile_side) + (vf)_mm512_add_ps(sums[z][0], sums[z][1]));
    return beyond;
}

// tile.out += P V over the keys [s.run_begin, end): as work beside the next groups. The next run starts at `next`.
template <class M> static void end_run(Sweep<M> &s, Tile<M> &tile, int64_t end, int64_t next) {
    const int64_t first = s.run_begin - s.chunk, count = units_of<M>(end - s.run_begin);
    s.run_begin = next;
    if (count <= 0) return;
    Background<M> &work = s.background;
    finish_work(work);
    const int32_t *values = s.values + first / 2 * s.value_stride;
    if constexpr (M::parts == 1)
        if (s.careful) return add_values_of_run(s.probabilities, values, count, s.value_dim, true, tile.out);
    work.weights = s.probabilities;
    work.values = values;
    work.out = tile.out;
    work.groups = (count + tile_side - 1) / tile_side;
    work.rows = s.value_dim;
    work.group = work.row = 0;
    s.probabilities = s.other_probabilities;
    s.other_probabilities = const_cast<int32_t *>(work.weights);
}

// Raises the references of the lanes `beyond` to what they see in the group.
template <ScorePath PATH, class M>
TW_RARE void raise_to_group(Sweep<M> &s, Tile<M> &tile, const Group &group, const float *bias, uint64_t beyond) {
    end_run(s, tile, group.key, group.key); // values weighed with the old references come first
    finish_work(s.background);
    const __m512 infinity = _mm512_set1_ps(__builtin_inff()), factor = _mm512_set1_ps(factor_of<PATH>(s));
    const __m512 to_log2 = _mm512_set1_ps(log2_e<float>);
    alignas(64) float tops[tile_lanes];
    for (int z = 0; z < tile_lanes; z += tile_side) {
        __m512 top = -infinity; // of the others, too: beyond no limit
        for (int n = 0; n < group.count; ++n) {
            const int place = n * tile_lanes + z;
            const __m512 own = bias ? _mm512_mul_ps((__m512)load(bias + place), to_log2) : _mm512_setzero_ps();
            const __m512 x = _mm512_fmadd_ps((__m512)load(group.scores + place), factor, own);
            const uint64_t seen = beyond & (group.words ? group.words[n] : ~uint64_t(0));
            top = _mm512_mask_max_ps(top, __mmask16(seen >> z), x, top); // NaN is passed over: the sum is NaN too
        }
        _mm512_store_ps(tops + z, top);
    }
    raise_reference<M, 2>(tile, tops, s.value_dim);
}

// Reference, probabilities and sums of a group whose scores are made. bias, keep: of the group's first key, or NULL; for
// the general path alone. Masks, biases of 0 and the path change no bit of what a lane sees.
template <ScorePath PATH, class M>
static void weigh_group(Sweep<M> &s, Tile<M> &tile, Group &group, const float *bias, const uint64_t *keep) {
    if (PATH == GENERAL && s.problem->softcap > 0) {
        const Softcap<float> cap = softcap_of(*s.problem, s.factor);
        for (int at = 0; at < group.count * tile_lanes; at += tile_side)
            store(group.scores + at, cap_product<float>(load(group.scores + at), cap));
    }
    bool fresh = true; // a lane that has seen nothing is beyond its limit with whatever it sees
    for (int z = 0; z < tile_lanes; z += tile_side) fresh &= lane_bits(load(tile.limit + z) != -__builtin_inff()) == 0;
    uint64_t beyond = fresh ? first_bits(tile_lanes) : weigh<PATH>(s, tile, group, bias, keep, false);
    if (__builtin_expect(beyond == 0, 1)) return;
    raise_to_group<PATH>(s, tile, group, bias, beyond);
    if (PATH != GENERAL && tile.coarse)
        weigh<GENERAL>(s, tile, group, nullptr, nullptr, true);
    else
        weigh<PATH>(s, tile, group, bias, keep, true);
}

// Adds the values of a group's keys `strange` that parts cannot hold, number by number, to the lanes that see them. All other
// values of the run are added before. Probabilities are made again, since these values may be large enough to count beside
// one that is 0 in parts. bias, keep: as of weigh_group.
template <class M>
TW_RARE void add_strange_values(Sweep<M> &s, Tile<M> &tile, const Group &group, const float *bias, const uint64_t *keep,
                                uint32_t strange) {
    using T = typename M::element;
    const tw_problem &p = *s.problem;
    const __m512 factor = _mm512_set1_ps(factor_of<GENERAL>(s));
    const int64_t stop = group.key + tile_keys;
    end_run(s, tile, stop, stop);
    finish_work(s.background);
    const T *each[block_keys];
    const int64_t left = s.item->key_end - group.key;
    const int count = left < group.count ? int(left) : group.count;
    const Rows<T> rows = key_rows(p, p.v, s.batch, s.kv_head, group.key, count, each);
    for (; strange; strange &= strange - 1) {
        const int n = __builtin_ctz(strange);
        const uint64_t seen = group.words ? group.words[n] : ~uint64_t(0);
        for (int z = 0; z < tile_lanes; z += tile_side) {
            const int place = n * tile_lanes + z;
            const __m512 shift = (__m512)load(tile.shift + z);
            const __m512 x = exponents<GENERAL, M>(group.scores + place, factor, bias ? bias + place : nullptr, shift,
                                                   coarse_of<GENERAL>(shift));
            vf weight = exp2<float>((vf)x);
            if (keep) weight = select<float>(keep[n] >> z, weight, vf{});
            for (int64_t c = 0; c < p.value_dim; ++c) {
                const float value = number(rows[n][c]);
                if (!is_strange(value)) continue;
                float *const to = tile.out + c * tile_lanes + z;
                store(to, select<float>(seen >> z, add_product(load(to), splat(value), weight), load(to)));
            }
        }
    }
}

// Fetches a block. If the last run's values, which may still be waited for, lie in its place, they are added before.
template <class M> static void fetch_beside_work(Sweep<M> &s, int64_t key, int n) {
    const Background<M> &work = s.background;
    const int32_t *place = s.fetched_values + (key - s.chunk) / 2 * s.value_stride;
    const int64_t run = work.groups * tile_side * s.value_stride, block = block_keys / 2 * s.value_stride;
    if (work.row < work.rows && work.values < place + block && place < work.values + run) finish_work(s.background);
    s.fetch(s, key, n);
}

// The keys [begin, end) of the span entered, as far as the tile's spans reach.
template <class M> static void sweep_chunk_in_tiles(Sweep<M> &s, Tile<M> &tile, int64_t begin, int64_t end) {
    const tw_problem &p = *s.problem;
    const bool facts = p.ranges.count || p.mask.data || p.labels.q || p.bits.index,
               biased = p.bias_count || p.table.data;
    const bool general = s.general || s.careful;
    Group groups[2], *waiting = nullptr; // for its turn: the next group's scores are made beside it
    uint64_t all_words[2][block_keys], keep[block_keys];
    int turn = 0, block = 0;
    const auto end_full_run = [&](int64_t stop) {
        if (stop - s.run_begin >= waiting_keys<M>) end_run(s, tile, stop, stop);
    };
    const auto weigh_waiting = [&] {
        if (!waiting) return;
        if (tile.coarse)
            weigh_group<GENERAL>(s, tile, *waiting, nullptr, nullptr);
        else if (waiting->words)
            weigh_group<MASKED>(s, tile, *waiting, nullptr, nullptr);
        else
            weigh_group<PLAIN>(s, tile, *waiting, nullptr, nullptr);
        end_full_run(waiting->key + tile_keys);
        waiting = nullptr;
    };
    const auto stop_run = [&](int64_t stop, int64_t next) {
        weigh_waiting();
        end_run(s, tile, stop, next);
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
            if (lacks(s, key)) fetch_beside_work(s, key, n);
            bool masked = sight == SEES_SOME;
            if (!masked && n % tile_keys) {
                for (int j = 0; j < block_keys; ++j) words[j] = j < n ? first_bits(tile_lanes) : 0;
                masked = true;
            }
            if (sight == SEES_SOME || s.general) tile.masked = true;
            if (biased && gather_bias(p, s.batch, tile, key, n, s.bias)) {
                if (!masked)
                    for (int j = 0; j < block_keys; ++j) words[j] = j < n ? first_bits(tile_lanes) : 0;
                bar_by_bias(s.bias, n, tile_lanes, words);
                masked = true;
            }
            if constexpr (M::parts > 1)
                if (const uint64_t strange = s.strange_keys[(key - s.chunk) / block_keys])
                    leave_lanes(tile, strange, masked ? words : nullptr);
            if (p.dropout.enabled) draw_dropout(p, s.batch, tile, key, n, keep);
            for (int g = 0; g < n; g += tile_keys) {
                ask_ahead(s.ahead);
                if (p.bias_count) ask_for_bias(p, s.batch, tile, key + block_keys, g / tile_keys, 2);
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
                group.count = n - g <= tile_side ? int(tile_side) : int(tile_keys);
                group.words = all != first_bits(tile_lanes) ? words + g : nullptr;
                begin_scores_of(s, tile, group);
                weigh_waiting();
                ask_for_rows(s, tile); // not in one go with what is asked ahead
                finish_scores(s.background);
                const float *const own_bias = biased ? s.bias + g * tile_lanes : nullptr;
                const uint64_t *const own_keep = p.dropout.enabled ? keep + g : nullptr;
                if constexpr (M::parts > 1)
                    if (const uint32_t strange = uint32_t(s.strange_values[(key - s.chunk) / block_keys] >> g)) {
                        weigh_group<GENERAL>(s, tile, group, own_bias, own_keep);
                        add_strange_values(s, tile, group, own_bias, own_keep, strange);
                        continue;
                    }
                if (general) {
                    weigh_group<GENERAL>(s, tile, group, own_bias, own_keep);
                    end_full_run(group.key + tile_keys);
                } else {
                    waiting = &group;
                }
            }
        }
        key = next_key(tile, stop, end);
        if (key > stop) stop_run(stop, key);
    }
    stop_run(end, end);
}
