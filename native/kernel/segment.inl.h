// What a backward pass keeps: of a segment of keys, in a thread's scratch, and of a tile, in its record, between the segments
// that pass over it: its facts, its queries and gradients of the output with queries in lanes, and the gradient to the
// queries so far.

// Units and accumulators of a record, which take the same space.
template <class M> TW_INLINE size_t record_numbers(const tw_problem &p) {
    return size_t(unit_rows<M>(p.head_dim) + unit_rows<M>(p.value_dim) + sum_rows<M>(p.head_dim)) *
           size_t(tile_rows<sum_of<M>>);
}
template <class M> static size_t record_bytes(const tw_problem *p) {
    if constexpr (M::parts > 1)
        if (!differentiates_parts(*p)) return record_bytes<Singles<sum_of<M>>>(p);
    return rounded(sizeof(Tile<M>)) + rounded(record_numbers<M>(*p) * sizeof(sum_of<M>));
}

// The gradients of the output in a record.
template <class M> TW_INLINE unit_of<M> *d_out_of(const tw_problem &p, const Tile<M> &tile) {
    return tile.query + unit_rows<M>(p.head_dim) * tile_rows<sum_of<M>>;
}

// Units and accumulators of a segment's scratch, in the order in which run_segment takes them.
template <class T, class M> static size_t segment_numbers(const tw_problem &p, int64_t keys) {
    using A = sum_of<M>;
    const int64_t whole = (keys + block_keys - 1) / block_keys * block_keys;
    const int64_t head = padded<A>(p.head_dim), value = padded<A>(p.value_dim);
    int64_t numbers =
        whole * (head + value) + tiles_together<M> * M::parts * units_of<M>(tile_rows<A>) * (head + value);
    if (copies<T, M>(p, INT64_MAX))
        numbers += whole * M::parts *
                   (copied_stride<M>(padded_units<M>(p.head_dim)) + copied_stride<M>(padded_units<M>(p.value_dim)));
    if (M::numbers > 1) numbers += whole / M::numbers * M::parts * head;
    numbers += 2 * score_places<M> + (2 * tiles_together<M> + 1) * M::parts * (score_places<M> / M::numbers);
    numbers += TW_GROUP_KEYS * tile_rows<A>;
    return size_t(numbers);
}
// The marks of its blocks follow them.
template <class T, class M> static size_t segment_bytes(const tw_problem *p, int64_t keys) {
    if constexpr (M::parts > 1)
        if (!differentiates_parts(*p)) return segment_bytes<T, Singles<sum_of<M>>>(p, keys);
    return segment_numbers<T, M>(*p, keys) * sizeof(sum_of<M>) + rounded(size_t(keys / block_keys + 1));
}

// Begins the segment of the keys [key_begin, key_end) of a (batch, kv head), which `tiles` tiles pass over, in its scratch.
template <class T, class M>
static void enter_segment(Slopes<M> &s, const tw_problem *problem, const tw_gradients *gradients, int64_t b,
                          int64_t kv_head, int64_t key_begin, int64_t key_end, int64_t tiles, void *scratch) {
    using A = sum_of<M>;
    using U = unit_of<M>;
    const tw_problem &p = *problem;
    const tw_gradients &g = *gradients;
    s.problem = problem;
    s.gradients = gradients;
    s.b = b;
    s.kv_head = kv_head;
    s.first = key_begin;
    s.last = key_end - 1;
    s.meet = meet_block<T, M>;
    s.factor = scaling_of<A>(p).factor;
    s.facts = p.ranges.count || p.mask.data || p.labels.q || p.bits.index;
    s.biased = p.bias_count || p.table.data;
    s.general = p.softcap > 0 || s.biased || p.dropout.enabled;
    s.scores_wanted = g.d_q.data || g.d_k.data || g.gather_count;
    s.head_width = padded<A>(p.head_dim);
    s.value_width = padded<A>(p.value_dim);
    const int64_t keys = key_end - key_begin;
    constexpr int64_t row_units = tile_rows<A> / M::numbers;
    const int64_t whole = (keys + block_keys - 1) / block_keys * block_keys;

    A *numbers = static_cast<A *>(scratch);
    const auto take = [&numbers](int64_t count) { return (numbers += count) - count; };
    const auto take_units = [&take](int64_t count) { return reinterpret_cast<U *>(take(count)); };
    s.d_k = take(whole * s.head_width);
    s.d_v = take(whole * s.value_width);
    s.copied = copies<T, M>(p, tiles);
    if (s.copied) {
        s.k_stride = copied_stride<M>(M::parts * padded_units<M>(p.head_dim));
        s.v_stride = copied_stride<M>(M::parts * padded_units<M>(p.value_dim));
        s.k = s.copy_k = take_units(whole * s.k_stride);
        s.v = s.copy_v = take_units(whole * s.v_stride);
    } else if constexpr (!M::tiled && sizeof(T) == sizeof(U)) {
        s.k = tensor_row<const T>(p.k, s.b, s.kv_head, s.first);
        s.v = tensor_row<const T>(p.v, s.b, s.kv_head, s.first);
        s.k_stride = p.k.stride_s;
        s.v_stride = p.v.stride_s;
    }
    s.k_across = s.k;
    s.across_stride = s.k_stride;
    if constexpr (M::numbers > 1) {
        s.across_stride = M::parts * s.head_width;
        s.k_across = s.copy_across = take_units(whole / M::numbers * s.across_stride);
    }
    s.q_rows = take_units(tiles_together<M> * M::parts * row_units * s.head_width);
    s.d_out_rows = take_units(tiles_together<M> * M::parts * row_units * s.value_width);
    s.p = take_units(tiles_together<M> * M::parts * (score_places<M> / M::numbers));
    s.raw = s.raw_across = take_units(tiles_together<M> * M::parts * (score_places<M> / M::numbers));
    if constexpr (M::numbers > 1) s.raw_across = take_units(M::parts * (score_places<M> / M::numbers));
    s.ds = take(score_places<M>);
    s.bias = take(score_places<M>);
    s.cap_slopes = take(TW_GROUP_KEYS * tile_rows<A>);
    s.blocks = reinterpret_cast<uint8_t *>(numbers);
    __builtin_memset(s.blocks, BLOCK_UNMET, size_t(whole / block_keys));
}
