// Vectors of one register, in GCC/Clang vector extensions: the same text for every instruction set.
// TW_VECTOR_BYTES is set by the page. Loads and stores need no alignment.

#define TW_UNROLL(...) _Pragma("GCC unroll 64") for (__VA_ARGS__)
#define TW_INLINE static inline __attribute__((always_inline))
#define TW_RARE static __attribute__((noinline, cold))

typedef float vf __attribute__((vector_size(TW_VECTOR_BYTES), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(TW_VECTOR_BYTES), aligned(8), may_alias));
typedef int32_t vi32 __attribute__((vector_size(TW_VECTOR_BYTES), aligned(4), may_alias));
typedef int64_t vi64 __attribute__((vector_size(TW_VECTOR_BYTES), aligned(8), may_alias));
typedef uint8_t vu8 __attribute__((vector_size(TW_VECTOR_BYTES), aligned(1), may_alias));

// For accumulators of type A: the vector, the integers that its comparisons give, and one such integer.
template <class A> struct vectors;
template <> struct vectors<float> {
    using type = vf;
    using ints = vi32;
    using lane = int32_t;
};
template <> struct vectors<double> {
    using type = vd;
    using ints = vi64;
    using lane = int64_t;
};
template <> struct vectors<int32_t> {
    using type = vi32;
};
template <class A> using vec = typename vectors<A>::type;
template <class A> using ivec = typename vectors<A>::ints;
template <class A> using ilane = typename vectors<A>::lane;
template <class A> constexpr int lanes = int(TW_VECTOR_BYTES / sizeof(A));

template <class A> TW_INLINE vec<A> splat(A x) { return x - vec<A>{}; }
template <class A> TW_INLINE vec<A> load(const A *p) { return *reinterpret_cast<const vec<A> *>(p); }
template <class A> TW_INLINE void store(A *p, vec<A> x) { *reinterpret_cast<vec<A> *>(p) = x; }

// The larger of each pair; the second where either is NaN, as the hardware's own maximum does it.
template <class A> TW_INLINE vec<A> larger(vec<A> a, vec<A> b) { return a > b ? a : b; }

// Bit l of the result is set where lane l of a comparison's result is.
TW_INLINE uint64_t lane_bits(vi32 truth) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)truth);
#elif defined(__AVX2__)
    return uint64_t(uint32_t(_mm256_movemask_ps((__m256)truth)));
#elif defined(__ARM_NEON)
    return vaddvq_u32((uint32x4_t)(truth & vi32{1, 2, 4, 8}));
#else
    uint64_t bits = 0;
    for (int l = 0; l < lanes<float>; ++l) bits |= uint64_t(truth[l] & 1) << l;
    return bits;
#endif
}

TW_INLINE uint64_t lane_bits(vi64 truth) {
#if defined(__AVX512DQ__)
    return _mm512_movepi64_mask((__m512i)truth);
#elif defined(__AVX2__)
    return uint64_t(uint32_t(_mm256_movemask_pd((__m256d)truth)));
#elif defined(__ARM_NEON)
    return vaddvq_u64((uint64x2_t)(truth & vi64{1, 2}));
#else
    uint64_t bits = 0;
    for (int l = 0; l < lanes<double>; ++l) bits |= uint64_t(truth[l] & 1) << l;
    return bits;
#endif
}

// Lane l of `yes` where bit l is set, else of `no`.
template <class A> TW_INLINE vec<A> select(uint64_t bits, vec<A> yes, vec<A> no) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
        return (vec<A>)_mm512_mask_blend_ps(__mmask16(bits), (__m512)no, (__m512)yes);
    else
        return (vec<A>)_mm512_mask_blend_pd(__mmask8(bits), (__m512d)no, (__m512d)yes);
#else
    ivec<A> lane_bit;
    TW_UNROLL(int l = 0; l < lanes<A>; ++l) lane_bit[l] = ilane<A>(1) << l;
    return ((ilane<A>(bits) & lane_bit) != 0) ? yes : no;
#endif
}

TW_INLINE size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
TW_INLINE uint64_t first_bits(int64_t n) { return n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }
