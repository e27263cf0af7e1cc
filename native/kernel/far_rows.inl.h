// Far rows, whose lse is far from 0: its last places are too few. Of 10^4 and its neighbour, which are 0.001 apart, a
// probability is made that is as much wrong, and of 10^9 and its neighbour, 64 apart, the logarithm of the sum is lost as
// a whole. And where one probability is nearly 1, its gradient is a difference of what is nearly alike, times keys that may
// be as large as the scores. So their largest score and sums are found again, in the backward pass's own arithmetic.

// In the units of scores.
constexpr int far_lse = 256;
template <class A> TW_INLINE bool is_far(A lse) { return (lse > A(far_lse) || lse < -A(far_lse)) && lse - lse == A(0); }

// Whether a tile, whose lse stands in `shift`, holds any.
template <class M> TW_INLINE bool has_far_rows(const Tile<M> &tile) {
    bool far = false;
    for (int l = 0; l < tile.width; ++l) far |= is_far(tile.shift[l]);
    return far;
}

// Before the first pass: it finds scores as they are, less 0.
template <class M> static void begin_finding(FarRows<sum_of<M>> &found, Tile<M> &tile) {
    using A = sum_of<M>;
    for (int l = 0; l < tile.width; ++l) {
        found.lse[l] = tile.shift[l];
        found.peak[l] = -A(__builtin_inf());
        tile.shift[l] = tile.rest[l] = found.rest[l] = found.sum[l] = found.pull[l] = 0;
    }
}

// Between the passes: a far row's reference is its largest score, that of its sink among them.
template <class M> static void end_peaks(const tw_problem &p, const FarRows<sum_of<M>> &found, Tile<M> &tile) {
    using A = sum_of<M>;
    for (int l = 0; l < tile.width; ++l) {
        const A sink = p.sinks ? sink_in_units<A>(p, tile.h[l]) : -A(__builtin_inf());
        const A top = found.peak[l] > sink ? found.peak[l] : sink;
        tile.shift[l] = is_far(found.lse[l]) ? top : found.lse[l];
        if (is_far(found.lse[l]) && found.peak[l] >= sink && !is_coarse(top)) tile.rest[l] = found.rest[l];
    }
}

// A pass of a tile over all its keys, `keys` at a time.
template <class T, Pass PASS, class M>
static void pass_over(Slopes<M> &s, const tw_problem *problem, const tw_gradients *gradients, int64_t b,
                      int64_t kv_head, Tile<M> &tile, int64_t keys, FarRows<sum_of<M>> &found, void *scratch) {
    for (int64_t begin = 0, end; begin < problem->k_len && !tw_given_up(); begin = end) {
        end = begin + keys < problem->k_len ? begin + keys : problem->k_len;
        enter_segment<T>(s, problem, gradients, b, kv_head, begin, end, 1, scratch);
        s.found = &found;
        for (int64_t key = next_key(tile, begin, end), stop; key < end; key = next_key(tile, stop, end)) {
            stop = key + block_keys < end ? key + block_keys : end;
            if (!M::tiled && tile.width == lanes<sum_of<M>>)
                slope_block<M, 1, PASS>(s, tile, d_out_of(*problem, tile), key, int(stop - key));
            else
                slope_block<M, TW_TILE_VECTORS, PASS>(s, tile, d_out_of(*problem, tile), key, int(stop - key));
        }
    }
}

// Whether out, where it is rounded to a narrower type, would leave too little of pull: its rounding counts as often as
// dropout's factor says. Then all rows have their pull from the sums of their own probabilities.
template <class T, class A> TW_INLINE bool sums_pull(const tw_problem &p) {
    return sizeof(T) != sizeof(A) && p.dropout.enabled && p.dropout.inverse_keep >= 4;
}

// Gives the far rows of a tile their largest score for lse, the reciprocal of their sum for a factor, and their pull.
// Of a part of the keys these cannot be told.
template <class T, class M>
static void weigh_far_rows(const tw_problem *problem, const tw_gradients *gradients, int64_t b, int64_t kv_head,
                           Tile<M> &tile, int64_t keys, void *scratch) {
    using A = sum_of<M>;
    const tw_problem &p = *problem;
    const Registers<M> registers;
    Slopes<M> s;
    FarRows<A> found;
    begin_finding(found, tile);
    pass_over<T, PEAKS>(s, problem, gradients, b, kv_head, tile, keys, found, scratch);
    end_peaks(p, found, tile);
    pass_over<T, SUMS>(s, problem, gradients, b, kv_head, tile, keys, found, scratch);
    for (int l = 0; l < tile.rows; ++l) {
        if (is_far(found.lse[l]))
            tile.limit[l] = 1 / (found.sum[l] + (p.sinks ? sink_share<A>(p, tile, l) : A(0)));
        else if (!sums_pull<T, A>(p) || tile.shift[l] == A(__builtin_inf()))
            continue;
        const A d_lse =
            gradients->d_lse ? static_cast<const A *>(gradients->d_lse)[lse_at(p, b, tile.h[l], tile.i[l])] : A(0);
        tile.sum[l] = d_lse - found.pull[l] * tile.limit[l];
    }
    for (int l = tile.rows; l < tile.width; ++l) { // the spare lanes, of which nothing may have been found
        tile.shift[l] = tile.shift[tile.rows - 1];
        tile.rest[l] = tile.rest[tile.rows - 1];
        tile.limit[l] = tile.limit[tile.rows - 1];
        tile.sum[l] = tile.sum[tile.rows - 1];
    }
    tile.far = true;
}
