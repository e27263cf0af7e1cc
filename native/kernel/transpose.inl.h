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
    TW_UNROLL(int i = 0; i < W; ++i)
        if (!(i & SIZE)) exchange<U, SIZE>(x[i], x[i + SIZE], first_indices<W>{});
    if constexpr (2 * SIZE < W) transpose<U, 2 * SIZE>(x);
}

// W pieces of 16 bytes, the first units of the rows: to the vectors of P units each down the lanes. Pieces of rows that are P
// apart stand beside each other already, so only squares within 16 bytes are turned about.
template <class U> TW_INLINE void turn_pieces(const U *const *pieces, vec<U> (&x)[16 / sizeof(U)]) {
    constexpr int P = int(16 / sizeof(U)), W = int(TW_VECTOR_BYTES / sizeof(U));
    TW_UNROLL(int r = 0; r < P; ++r) {
#if defined(__AVX512F__)
        const auto piece = [&](int q) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(pieces[r + q * P])); };
        __m512i all = _mm512_castsi128_si512(piece(0));
        all = _mm512_inserti32x4(all, piece(1), 1);
        all = _mm512_inserti32x4(all, piece(2), 2);
        x[r] = (vec<U>)_mm512_inserti32x4(all, piece(3), 3);
#else
        TW_UNROLL(int q = 0; q < W / P; ++q) __builtin_memcpy((char *)&x[r] + 16 * q, pieces[r + q * P], 16);
#endif
    }
    TW_UNROLL(int i = 0; i < P; i += 2) exchange<U, 1>(x[i], x[i + 1], first_indices<W>{});
    if constexpr (P == 4)
        TW_UNROLL(int i = 0; i < 2; ++i) exchange<U, 2>(x[i], x[i + 2], first_indices<W>{});
}

// The units [d, d + W) of a row of n numbers, zeros beyond its end.
template <class M, class T> TW_INLINE vec<unit_of<M>> row_units(const T *row, int64_t d, int64_t n) {
    constexpr int W = lanes<sum_of<M>>;
    if constexpr (M::numbers == 1)
        return d + W <= n ? widen(row + d) : widen_first(row + d, int(n - d));
    else
        return first_numbers(row + 2 * d, n - 2 * d);
}

// W rows of n numbers, times `sign`, down the lanes of a tile `width` lanes wide: to [unit_rows of n][width].
template <class M, class T>
static void rows_to_lanes(const T *const *rows, int64_t n, sum_of<M> sign, unit_of<M> *to, int64_t width) {
    using U = unit_of<M>;
    constexpr int W = lanes<sum_of<M>>;
    constexpr int P = int(16 / sizeof(U));
    const int64_t units = unit_rows<M>(n);
    int64_t d = 0;
    if constexpr (sizeof(T) * M::numbers == sizeof(U)) { // units as they lie in memory
        for (; (d + P) * M::numbers <= n; d += P) {
            const U *pieces[W];
            for (int l = 0; l < W; ++l) pieces[l] = reinterpret_cast<const U *>(rows[l] + d * M::numbers);
            vec<U> x[P];
            turn_pieces<U>(pieces, x);
            TW_UNROLL(int i = 0; i < P; ++i) store(to + (d + i) * width, times_sign<M>(x[i], sign));
        }
    }
    for (; d < units; d += W) {
        vec<U> x[W];
        TW_UNROLL(int l = 0; l < W; ++l) x[l] = times_sign<M>(row_units<M>(rows[l], d, n), sign);
        transpose<U>(x);
        TW_UNROLL(int i = 0; i < W; ++i)
            if (d + i < units) store(to + (d + i) * width, x[i]);
    }
}

// The first `count` lanes of from [n][width] as rows of n numbers, each times its factor, rounded once; 0 is added, see
// narrow_row.
template <class T, class A>
static void lanes_to_rows(const A *from, int64_t width, const A *factors, int64_t n, T *const *rows, int count) {
    constexpr int W = lanes<A>;
    const vec<A> own = load(factors);
    for (int64_t d = 0; d < n; d += W) {
        vec<A> x[W];
        TW_UNROLL(int i = 0; i < W; ++i) x[i] = d + i < n ? load(from + (d + i) * width) * own + A(0) : vec<A>{};
        transpose<A>(x);
        TW_UNROLL(int l = 0; l < W; ++l) {
            if (l >= count) break;
            if (d + W <= n)
                narrow(rows[l] + d, x[l]);
            else
                narrow_first(rows[l] + d, x[l], int(n - d));
        }
    }
}

#if defined(__AVX512BF16__)
// The same in bfloat16, rounded before they are turned about, two columns in a unit.
static void lanes_to_rows(const float *from, int64_t width, const float *factors, int64_t n, bfloat *const *rows,
                          int count) {
    const vf own = load(factors);
    const auto column = [&](int64_t d) { return d < n ? load(from + d * width) * own + 0.f : vf{}; };
    for (int64_t d = 0; d < n; d += 32) {
        vi32 x[16];
        TW_UNROLL(int i = 0; i < 16; ++i) x[i] = narrow_across(column(d + 2 * i), column(d + 2 * i + 1));
        transpose<int32_t>(x);
        const __mmask32 exist = __mmask32(n - d < 32 ? first_bits(n - d) : ~0u);
        TW_UNROLL(int l = 0; l < 16; ++l) {
            if (l >= count) break;
            _mm512_mask_storeu_epi16(rows[l] + d, exist, (__m512i)x[l]);
        }
    }
}
#endif
