// How products are summed. A kernel is compiled for one of these ways, M:
//   M::sum      the accumulators' type        M::unit   what a lane of an operand holds
//   M::numbers  how many numbers that is: they stand beside each other on the axis that is summed over
//   M::tiled    whether prefill and the backward pass multiply in tile registers
//   M::parts    how many units an operand's numbers are kept in, whose sum they are (amx_parts.inl.h)

// One number times one number, in the accumulator's own type.
template <class A> struct Singles {
    using sum = A;
    using unit = A;
    static constexpr int numbers = 1, parts = 1;
    static constexpr bool tiled = false;
};

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// Two bfloat16 numbers times two, both products added to a float: the machine's dot product.
struct Pairs {
    using sum = float;
    using unit = int32_t; // the first number in the low half
    static constexpr int numbers = 2, parts = 1;
    static constexpr bool tiled = false;
};
#endif

template <class M> using unit_of = typename M::unit;
template <class M> using sum_of = typename M::sum;

// Units that hold n numbers (the last is filled up with zeros), and the same in whole vectors.
template <class M> TW_INLINE int64_t units_of(int64_t n) { return (n + M::numbers - 1) / M::numbers; }
template <class M> TW_INLINE int64_t padded_units(int64_t n) { return padded<sum_of<M>>(units_of<M>(n)); }

// Rows of units, and of sums, that a tile of queries keeps for n numbers: whole registers where they are tiles.
template <class M> TW_INLINE int64_t unit_rows(int64_t n) {
    return M::tiled ? M::parts * padded_units<M>(n) : units_of<M>(n);
}
template <class M> TW_INLINE int64_t sum_rows(int64_t n) { return M::tiled ? padded<sum_of<M>>(n) : n; }

// What a kernel holds while it runs: nothing, but for tile registers (amx_tiles.inl.h).
template <class M> struct Registers {
    explicit Registers(uint8_t = 0) {}
};

// A weight that stands for "does not see this key" where values may be anything; real ones are never negative.
template <class A> constexpr A unseen = A(-1);

TW_INLINE vf add_product(vf sum, vf a, vf b) { return sum + a * b; }
TW_INLINE vd add_product(vd sum, vd a, vd b) { return sum + a * b; }

// The same in the lanes whose weight is not `unseen`.
TW_INLINE vf add_seen(vf sum, vf value, vf weight) { return weight == unseen<float> ? sum : sum + value * weight; }
TW_INLINE vd add_seen(vd sum, vd value, vd weight) { return weight == unseen<double> ? sum : sum + value * weight; }

#if defined(__AVX512BF16__)
// The instruction takes denormals for 0 and makes none, rounds to nearest, and treats infinities and NaN as multiplication
// and addition do.
TW_INLINE vf add_product(vf sum, vi32 a, vi32 b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

// An unseen half is 0 times 0 here, as a seen one of weight 0 is 0 times its value: the sums have the same bits.
TW_INLINE vf add_seen(vf sum, vi32 value, vi32 weight) {
    const __mmask32 seen = _mm512_cmpneq_epi16_mask((__m512i)weight, _mm512_set1_epi16(short(0xBF80))); // -1
    return add_product(sum, (vi32)_mm512_maskz_mov_epi16(seen, (__m512i)value),
                       (vi32)_mm512_maskz_mov_epi16(seen, (__m512i)weight));
}

// 32 numbers in bfloat16: `low`, then `high`.
TW_INLINE vi32 narrow_beside(vf low, vf high) { return (vi32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// The same, but one of each beside each other: low[0], high[0], low[1], high[1], ...
TW_INLINE vi32 narrow_across(vf low, vf high) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vi32)_mm512_maskz_permutexvar_epi16(~__mmask32(0), _mm512_load_si512(order),
                                                (__m512i)narrow_beside(low, high));
}

TW_INLINE vi32 load_pairs(const bfloat *p) { return (vi32)_mm512_loadu_si512(p); }

// The first n numbers at p, at most 32, and zeros; nothing beyond is read.
TW_INLINE vi32 first_numbers(const bfloat *p, int64_t n) {
    return (vi32)_mm512_maskz_loadu_epi16(__mmask32(n < 32 ? first_bits(n) : ~0u), p);
}

// A row's one or two vectors.
TW_INLINE void store_row(int32_t *out, const vf (&x)[1]) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), (__m256i)_mm512_cvtneps_pbh((__m512)x[0]));
}
TW_INLINE void store_row(int32_t *out, const vf (&x)[2]) { store(out, narrow_beside(x[0], x[1])); }

// The first numbers of two rows, `left` of them, at most 32, beside each other; of each eight the first four go to `low`.
// Rows that bits 0 and 1 do not name are zeros and not read.
TW_INLINE void interleave(const bfloat *row, const bfloat *next, int64_t left, uint64_t bits, vi32 &low, vi32 &high) {
    const __mmask32 exist = __mmask32(left < 32 ? first_bits(left) : ~0u);
    const __m512i first = _mm512_maskz_loadu_epi16(bits & 1 ? exist : 0, row);
    const __m512i second = _mm512_maskz_loadu_epi16(bits & 2 ? exist : 0, next);
    low = (vi32)_mm512_unpacklo_epi16(first, second);
    high = (vi32)_mm512_unpackhi_epi16(first, second);
}

// The sums of n columns, from the order of interleave to their own.
TW_INLINE void put_in_order(float *sums, int64_t n) {
    for (float *block = sums; block < sums + n; block += 32) {
        float own[32];
        for (int c = 0; c < 32; ++c) own[c] = block[c % 8 / 4 * 16 + c / 8 * 4 + c % 4];
        __builtin_memcpy(block, own, sizeof own);
    }
}

// n numbers as whole vectors of units.
TW_INLINE void copy_row(const bfloat *from, int64_t n, int32_t *to) {
    for (int64_t d = 0; d < n; d += 32, to += 16) store(to, first_numbers(from + d, n - d));
}

// Two rows of n numbers as n units that hold one number of each; zeros where there is no second.
TW_INLINE void copy_across(const bfloat *low, const bfloat *high, int64_t n, int32_t *to) {
    for (int64_t d = 0; d < n; d += 16) {
        const __mmask16 exist = __mmask16(first_bits(n - d));
        __m512i both = _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(exist, low + d));
        if (high) {
            const __m512i second = _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(exist, high + d));
            both = _mm512_or_si512(both, _mm512_maskz_slli_epi32(0xFFFF, second, 16));
        }
        store(to + d, (vi32)both);
    }
}
#endif

// Units times 1, -1 or 0. Zero times what is not finite is NaN in bfloat16 too.
template <class M> TW_INLINE vec<unit_of<M>> times_sign(vec<unit_of<M>> x, sum_of<M> sign) {
    if constexpr (M::numbers == 1) {
        return x * sign;
    } else {
        if (sign > 0) return x;
        if (sign < 0) return x ^ int32_t(0x80008000);
        return (((x & 0x7F80) == 0x7F80) & 0x7FC0) | (((x & 0x7F800000) == 0x7F800000) & 0x7FC00000);
    }
}

// The units from the number at p on.
template <class M, class T> TW_INLINE vec<unit_of<M>> load_units(const T *p) {
    if constexpr (M::numbers == 1)
        return widen(p);
    else
        return load_pairs(p);
}

// `count` rows of n numbers, as units along the rows: to [count][n in units].
template <class M, class T>
TW_INLINE void rows_in_units(Rows<T> from, int64_t count, int64_t n, unit_of<M> *to, int64_t to_stride) {
    for (int64_t r = 0; r < count; ++r, to += to_stride) {
        if constexpr (M::numbers == 1)
            widen_row(from[r], n, to);
        else
            copy_row(from[r], n, to);
    }
}

// The rows that one row of units across them holds, as n units in whole vectors. NULL: no such row.
template <class M, class T> TW_INLINE void write_across(const T *const (&rows)[M::numbers], int64_t n, unit_of<M> *to) {
    if constexpr (M::numbers == 1)
        widen_row(rows[0], n, to);
    else
        copy_across(rows[0], rows[1], n, to);
}

// `count` rows of n numbers, as units across the rows: to [count in units][n].
template <class M, class T>
TW_INLINE void rows_across_units(Rows<T> from, int64_t count, int64_t n, unit_of<M> *to, int64_t to_stride) {
    for (int64_t r = 0; r < count; r += M::numbers, to += to_stride) {
        const T *rows[M::numbers] = {};
        for (int i = 0; i < M::numbers && r + i < count; ++i) rows[i] = from[r + i];
        write_across<M>(rows, n, to);
    }
}

// Weights x[row][vector], as units across the rows: out [rows in units][NZ vectors].
template <class M, int ROWS, int NZ> TW_INLINE void store_across(unit_of<M> *out, const vec<sum_of<M>> (&x)[ROWS][NZ]) {
    constexpr int W = lanes<sum_of<M>>;
    TW_UNROLL(int n = 0; n < ROWS; n += M::numbers)
        TW_UNROLL(int z = 0; z < NZ; ++z, out += W) {
            if constexpr (M::numbers == 1)
                store(out, x[n][z]);
            else
                store(out, narrow_across(x[n][z], x[n + 1][z]));
        }
}

// The same as units along the row: out [ROWS][NZ vectors in units].
template <class M, int ROWS, int NZ> TW_INLINE void store_along(unit_of<M> *out, const vec<sum_of<M>> (&x)[ROWS][NZ]) {
    if constexpr (M::numbers == 1)
        store_across<M>(out, x);
    else
        TW_UNROLL(int n = 0; n < ROWS; ++n) store_row(out + n * NZ * lanes<sum_of<M>> / M::numbers, x[n]);
}

// All bits set in the numbers that are seen: in the unit whose first number bit 0 stands for, in every lane alike.
template <class M> TW_INLINE ivec<sum_of<M>> seen_numbers(uint64_t bits) {
    using I = ilane<sum_of<M>>;
    if constexpr (M::numbers == 1)
        return ivec<sum_of<M>>{} - I(bits & 1);
    else
        return ivec<sum_of<M>>{} + I((bits & 1 ? 0xFFFFu : 0) | (bits & 2 ? 0xFFFF0000u : 0));
}

// The same for units of lanes: those from lane `first` on that a key's word names, a word for each number of a unit.
template <class M> TW_INLINE ivec<sum_of<M>> seen_lanes(const uint64_t *words, int first) {
    using A = sum_of<M>;
    const vec<A> all = (vec<A>)(ivec<A>{} - 1);
    const ivec<A> seen = (ivec<A>)select<A>(words[0] >> first, all, vec<A>{});
    if constexpr (M::numbers == 1)
        return seen;
    else
        return (seen & 0xFFFF) | ((ivec<A>)select<A>(words[1] >> first, all, vec<A>{}) & ~0xFFFF);
}
