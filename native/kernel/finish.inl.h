// From the state of a row to out and lse.

TW_INLINE float logarithm(float x) { return __builtin_logf(x); }
TW_INLINE double logarithm(double x) { return __builtin_log(x); }
template <class A> TW_INLINE A power_of_two_of(A x) { return exp2<A>(splat(x))[0]; }

// What a row's sums of values are multiplied by, and its lse.
template <class A> struct Ending {
    A factor, lse;
};

// With a sink, 2^(sink log2 e) joins the denominator; a row that saw nothing stays empty even so.
template <class A> TW_INLINE Ending<A> ending_of(const tw_problem &p, int64_t h, A shift, A sum, bool seen) {
    if (!seen) return {0, -A(__builtin_inf())}; // its sums are 0
    A factor = 1;
    if (p.sinks) {
        const A sink = static_cast<const A *>(p.sinks)[h] * A(1.4426950408889634074);
        const A top = sink > shift ? sink : shift;
        factor = power_of_two_of(shift - top);
        sum = sum * factor + power_of_two_of(sink - top);
        shift = top;
    }
    const A keep = p.dropout.enabled ? A(p.dropout.inverse_keep) : A(1);
    return {factor * keep / sum, shift * A(0.69314718055994530942) + logarithm(sum)};
}

template <class T, class A> static void write_row(const tw_problem &p, int64_t b, int64_t h, int64_t i, const A *from, Ending<A> end) {
    if (p.part)
        narrow_row(from, end.factor, p.value_dim, tensor_row<A>(p.out, b, h, i));
    else
        narrow_row(from, end.factor, p.value_dim, tensor_row<T>(p.out, b, h, i));
    static_cast<A *>(p.lse)[lse_at(p, b, h, i)] = end.lse;
}

// A row has seen a key once its limit has left -inf, or its sum is NaN.
template <class M> TW_INLINE bool has_seen(const Tile<M> &tile, int l) {
    return tile.limit[l] > -sum_of<M>(__builtin_inf()) || tile.sum[l] != 0;
}

// A tile's sums, each lane times its factor, as rows of `to`, whose elements are E.
template <class E, class M>
static void tile_to_rows(const tw_tensor &to, int64_t b, const Tile<M> &tile, const sum_of<M> *factors, int64_t columns) {
    using A = sum_of<M>;
    E *rows[most_lanes];
    for (int l = 0; l < tile.rows; ++l) rows[l] = tensor_row<E>(to, b, tile.h[l], tile.i[l]);
    for (int l = 0; l < tile.rows; l += lanes<A>)
        lanes_to_rows(tile.out + l, tile.width, factors + l, columns, rows + l, tile.rows - l);
}

template <class T, class M> static void finish(const tw_problem &p, const tw_item &item, const Tile<M> &tile) {
    using A = sum_of<M>;
    A factors[most_lanes];
    for (int l = 0; l < tile.rows; ++l) {
        const int64_t h = tile.h[l], i = tile.i[l];
        const Ending<A> end = ending_of<A>(p, h, tile.shift[l], tile.sum[l], has_seen(tile, l));
        factors[l] = end.factor;
        static_cast<A *>(p.lse)[lse_at(p, item.b, h, i)] = end.lse;
    }
    if (p.part)
        tile_to_rows<A>(p.out, item.b, tile, factors, p.value_dim);
    else
        tile_to_rows<T>(p.out, item.b, tile, factors, p.value_dim);
}

// A row's state for merge(): its sums of values, reference, denominator, and whether it has seen a key.
template <class A> static void write_partial(const tw_problem &p, A *to, const A *from, int64_t stride, A shift, A sum, bool seen) {
    for (int64_t d = 0; d < p.value_dim; ++d) to[d] = from[d * stride];
    to[p.value_dim] = shift;
    to[p.value_dim + 1] = sum;
    to[p.value_dim + 2] = seen;
}

template <class M>
static void finish_partial(const tw_problem &p, const tw_item &item, const Tile<M> &tile, int64_t row) {
    using A = sum_of<M>;
    A *to = static_cast<A *>(item.partial) + row * (p.value_dim + 3);
    for (int l = 0; l < tile.rows; ++l, to += p.value_dim + 3)
        write_partial(p, to, tile.out + l, tile.width, tile.shift[l], tile.sum[l], has_seen(tile, l));
}
