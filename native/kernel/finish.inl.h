// From the state of a row to out and lse.

template <class A> TW_INLINE A power_of_two_of(A x) { return exp2<A>(splat(x))[0]; }

// The natural logarithm of x > 0 that is no denormal; of infinity and NaN, themselves. x = 2^k m with m between the roots
// of 1/2 and 2, and log m = 2 artanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...) with s = (m - 1) / (m + 1), |s| < 0.172; what
// is left out is below 2e-9 of it in float, 1e-18 in double.
template <class A> TW_INLINE vec<A> logarithm(vec<A> x) {
    using N = exp_numbers<A>;
    constexpr int terms = sizeof(A) == 4 ? 5 : 11;
    const ivec<A> root = (ivec<A>)splat<A>(A(0.70710678118654752440));
    const ivec<A> k = ((ivec<A>)x - root) >> N::fraction_bits;
    const vec<A> m = (vec<A>)((ivec<A>)x - (k << N::fraction_bits));
    const vec<A> s = (m - A(1)) / (m + A(1)), square = s * s;
    vec<A> series = splat<A>(A(1) / (2 * terms - 1));
    TW_UNROLL(int i = terms - 2; i >= 0; --i) series = series * square + A(1) / (2 * i + 1);
    const vec<A> found = __builtin_convertvector(k, vec<A>) * A(0.69314718055994530942) + 2 * s * series;
    return x < A(__builtin_inf()) ? found : x;
}

// What rows' sums of values are multiplied by, and their lse. With a sink, its power of 2 joins the denominator; a row
// that saw nothing stays empty even so. Not inlined: whoever asks about a row gets the same bits.
template <class A> struct Endings {
    vec<A> factor, lse;
};
template <class A>
static __attribute__((noinline)) Endings<A> endings_of(const tw_problem &p, const int64_t *h, vec<A> shift, vec<A> sum,
                                                       ivec<A> seen) {
    vec<A> factor = splat<A>(1);
    if (p.sinks) {
        vec<A> sink, less;
        for (int l = 0; l < lanes<A>; ++l) sink[l] = sink_in_units<A>(p, h[l]);
        const vec<A> top = sink > shift ? sink : shift;
        for (int l = 0; l < lanes<A>; ++l) less[l] = sink_less<A>(p, h[l], top[l]);
        factor = exp2<A>(shift - top);
        sum = sum * factor + exp2<A>(less);
        shift = top;
    }
    const A keep = p.dropout.enabled ? A(p.dropout.inverse_keep) : A(1);
    const double natural = scaling_of<A>(p).natural;
    vec<A> lse = logarithm<A>(sum);
    for (int l = 0; l < lanes<A>; ++l) lse[l] = A(double(shift[l]) * natural + double(lse[l]));
    return {seen ? factor * keep / sum : vec<A>{},
            seen ? lse : splat<A>(-A(__builtin_inf()))}; // sums of the unseen are 0
}

// The same of one row.
template <class A> struct Ending {
    A factor, lse;
};
template <class A> TW_INLINE Ending<A> ending_of(const tw_problem &p, int64_t h, A shift, A sum, bool seen) {
    int64_t heads[lanes<A>];
    for (int l = 0; l < lanes<A>; ++l) heads[l] = h;
    const Endings<A> end = endings_of<A>(p, heads, splat(shift), splat(sum), ivec<A>{} - ilane<A>(seen));
    return {end.factor[0], end.lse[0]};
}

template <class T, class A>
static void write_row(const tw_problem &p, int64_t b, int64_t h, int64_t i, const A *from, Ending<A> end) {
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
static void tile_to_rows(const tw_tensor &to, int64_t b, const Tile<M> &tile, const sum_of<M> *factors,
                         int64_t columns) {
    using A = sum_of<M>;
    E *rows[most_lanes];
    for (int l = 0; l < tile.rows; ++l) rows[l] = tensor_row<E>(to, b, tile.h[l], tile.i[l]);
    for (int l = 0; l < tile.rows; l += lanes<A>)
        lanes_to_rows(tile.out + l, tile.width, factors + l, columns, rows + l, tile.rows - l);
}

template <class T, class M> static void finish(const tw_problem &p, const tw_item &item, const Tile<M> &tile) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    A factors[most_lanes], lse[most_lanes];
    for (int l = 0; l < tile.width; l += W) {
        const vec<A> sum = load(tile.sum + l);
        const ivec<A> seen = (load(tile.limit + l) > -A(__builtin_inf())) | (sum != A(0)); // as has_seen
        const Endings<A> end = endings_of<A>(p, tile.h + l, load(tile.shift + l), sum, seen);
        store(factors + l, end.factor);
        store(lse + l, end.lse);
    }
    for (int l = 0; l < tile.rows; ++l) static_cast<A *>(p.lse)[lse_at(p, item.b, tile.h[l], tile.i[l])] = lse[l];
    if (p.part)
        tile_to_rows<A>(p.out, item.b, tile, factors, p.value_dim);
    else
        tile_to_rows<T>(p.out, item.b, tile, factors, p.value_dim);
}

// A row's state for merge(): its sums of values, reference, denominator, and whether it has seen a key.
template <class A>
static void write_partial(const tw_problem &p, A *to, const A *from, int64_t stride, A shift, A sum, bool seen) {
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
