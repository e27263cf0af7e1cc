// Rows in memory to lanes and back, W rows by W columns at a time, through a transposition in registers.

// Exchanges the squares of SIZE x SIZE that stand off the diagonal in each square of twice that size.
template <class U, int SIZE, int... P> TW_INLINE void exchange(vec<U> &a, vec<U> &b, indices<P...>) {
    constexpr int W = int(sizeof...(P));
    const vec<U> first = a, second = b;
    a = __builtin_shufflevector(first, second, (P & SIZE ? W + P - SIZE : P)...);
    b = __builtin_shufflevector(first, second, (P & SIZE ? W + P : P + SIZE)...);
}

// The lanes in the opposite order.
template <class A, int... P> TW_INLINE vec<A> reversed(vec<A> x, indices<P...>) {
    return __builtin_shufflevector(x, x, (lanes<A> - 1 - P)...);
}

template <class U, int SIZE = 1> TW_INLINE void transpose(vec<U> (&x)[TW_VECTOR_BYTES / sizeof(U)]) {
    constexpr int W = int(TW_VECTOR_BYTES / sizeof(U));
    TW_UNROLL for (int i = 0; i < W; ++i)
        if (!(i & SIZE)) exchange<U, SIZE>(x[i], x[i + SIZE], first_indices<W>{});
    if constexpr (2 * SIZE < W) transpose<U, 2 * SIZE>(x);
}

// The units [d, d + W) of a row of n numbers times `factor`, zeros beyond its end. Units of several numbers cannot be
// multiplied, and are not.
template <class M, class T> TW_INLINE vec<unit_of<M>> row_units(const T *row, int64_t d, int64_t n, sum_of<M> factor) {
    constexpr int W = lanes<sum_of<M>>;
    if constexpr (M::numbers == 1)
        return (d + W <= n ? widen(row + d) : widen_first(row + d, int(n - d))) * factor;
    else
        return first_numbers(row + 2 * d, n - 2 * d);
}

// W rows of n numbers down the lanes of a tile `width` lanes wide: to [unit_rows of n][width].
template <class M, class T>
static void rows_to_lanes(const T *const *rows, int64_t n, sum_of<M> factor, unit_of<M> *to, int64_t width) {
    using U = unit_of<M>;
    constexpr int W = lanes<sum_of<M>>;
    const int64_t units = unit_rows<M>(n);
    for (int64_t d = 0; d < units; d += W) {
        vec<U> x[W];
        TW_UNROLL for (int l = 0; l < W; ++l) x[l] = row_units<M>(rows[l], d, n, factor);
        transpose<U>(x);
        TW_UNROLL for (int i = 0; i < W; ++i)
            if (d + i < units) store(to + (d + i) * width, x[i]);
    }
}

// The first `count` lanes of from [n][width] as rows of n numbers, each times its factor, rounded once.
template <class T, class A>
static void lanes_to_rows(const A *from, int64_t width, const A *factors, int64_t n, T *const *rows, int count) {
    constexpr int W = lanes<A>;
    for (int64_t d = 0; d < n; d += W) {
        vec<A> x[W];
        TW_UNROLL for (int i = 0; i < W; ++i) x[i] = d + i < n ? load(from + (d + i) * width) : vec<A>{};
        transpose<A>(x);
        TW_UNROLL for (int l = 0; l < W; ++l) {
            if (l >= count) break;
            if (d + W <= n)
                narrow(rows[l] + d, x[l] * factors[l] + A(0));
            else
                narrow_first(rows[l] + d, x[l] * factors[l] + A(0), int(n - d));
        }
    }
}
