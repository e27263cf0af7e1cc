// The state of a row over some keys joined with its state over later ones. Splits of the keys are joined one after
// another in key order, by the same operations whether a split was an item of its own or a part of its tile's sweep.

// a * b + c, rounded once, so that every way to compile it gives the same bits.
TW_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TW_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// What the sums of both states are multiplied by to stand at the larger of their references.
template <class A> struct Joint {
    A shift, earlier, later;
};

template <class A> TW_INLINE Joint<A> joint_of(A earlier, A later) {
    const A shift = later > earlier ? later : earlier;
    return {shift, power_of_two_of(earlier - shift), power_of_two_of(later - shift)};
}

template <class A> TW_INLINE A joined(const Joint<A> &joint, A earlier, A later) {
    return fused(later, joint.later, earlier * joint.earlier);
}

// What the lanes of a tile have summed in earlier splits.
template <class A> struct Earlier {
    A *out; // [Dv][width]
    A shift[most_lanes], limit[most_lanes], sum[most_lanes];
};

// Keeps the tile's state, which can then be reset.
template <class M> static void keep_state(Tile<M> &tile, Earlier<sum_of<M>> &earlier) {
    sum_of<M> *const out = tile.out;
    tile.out = earlier.out;
    earlier.out = out;
    __builtin_memcpy(earlier.shift, tile.shift, sizeof tile.shift);
    __builtin_memcpy(earlier.limit, tile.limit, sizeof tile.limit);
    __builtin_memcpy(earlier.sum, tile.sum, sizeof tile.sum);
}

// The tile's state becomes that over the earlier keys and its own. Where one of the two has seen nothing, the other stays
// as it is, to the sign of a zero.
template <class M> static void join(const Earlier<sum_of<M>> &earlier, Tile<M> &tile, int64_t value_dim) {
    using A = sum_of<M>;
    const int width = tile.width;
    A first[most_lanes], second[most_lanes];
    int kind[most_lanes]; // 0: the tile's own, 1: the earlier, 2: both
    for (int l = 0; l < width; ++l) {
        const bool before = earlier.limit[l] > -A(__builtin_inf()) || earlier.sum[l] != 0;
        kind[l] = !before ? 0 : has_seen(tile, l) ? 2 : 1;
        if (kind[l] == 1)
            tile.shift[l] = earlier.shift[l], tile.limit[l] = earlier.limit[l], tile.sum[l] = earlier.sum[l];
        if (kind[l] != 2) continue;
        const Joint<A> joint = joint_of(earlier.shift[l], tile.shift[l]);
        first[l] = joint.earlier, second[l] = joint.later;
        tile.sum[l] = joined(joint, earlier.sum[l], tile.sum[l]);
        tile.limit[l] = earlier.limit[l] > tile.limit[l] ? earlier.limit[l] : tile.limit[l];
        tile.shift[l] = joint.shift;
    }
    for (int64_t d = 0; d < value_dim; ++d)
        for (int l = 0; l < width; ++l) {
            A &own = tile.out[d * width + l];
            const A before = earlier.out[d * width + l];
            own = kind[l] == 0 ? own : kind[l] == 1 ? before : joined<A>({0, first[l], second[l]}, before, own);
        }
}

// Rows stand together in each split; the splits follow each other in key order. The first split is summed into.
template <class T, class A>
static void merge(const tw_problem *problem, const tw_item *item, void *partials, int64_t splits) {
    const tw_problem &p = *problem;
    const int64_t rows = item->row_end - item->row_begin, state = p.value_dim + 3;
    const int64_t group = p.q_heads / p.kv_heads, per_head = p.row_end - p.row_begin;
    for (int64_t r = 0; r < rows; ++r) {
        A *whole = static_cast<A *>(partials) + r * state, *facts = whole + p.value_dim; // reference, sum, seen
        for (int64_t s = 1; s < splits; ++s) {
            const A *own = whole + s * rows * state;
            if (own[p.value_dim + 2] == 0) continue;
            if (facts[2] == 0) {
                __builtin_memcpy(whole, own, size_t(state) * sizeof(A));
                continue;
            }
            const Joint<A> joint = joint_of(facts[0], own[p.value_dim]);
            for (int64_t d = 0; d < p.value_dim; ++d) whole[d] = joined(joint, whole[d], own[d]);
            facts[1] = joined(joint, facts[1], own[p.value_dim + 1]);
            facts[0] = joint.shift;
        }
        const int64_t at = item->row_begin + r, h = item->kv_head * group + at / per_head;
        write_row<T, A>(p, item->b, h, p.row_begin + at % per_head, whole,
                        ending_of<A>(p, h, facts[0], facts[1], facts[2] != 0));
    }
}
