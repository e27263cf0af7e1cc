// Elements as they lie in memory, and vectors of them in the accumulator's type. float16 and bfloat16 become float: by
// the instruction where there is one, else by integer arithmetic. Rounding is to nearest, ties to even; infinities and
// NaN stay what they are.

struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};
typedef uint32_t vu32 __attribute__((vector_size(TW_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t vu16 __attribute__((vector_size(TW_VECTOR_BYTES / 2), aligned(2), may_alias)); // as many as floats

TW_INLINE vec<float> widen(const float *p) { return load(p); }
TW_INLINE vec<double> widen(const double *p) { return load(p); }

TW_INLINE vec<float> widen(const bfloat *p) {
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vu16 *>(p), vu32) << 16);
}

TW_INLINE vec<float> widen(const half *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__ARM_NEON)
    return (vf)vcvt_f32_f16((float16x4_t)vld1_u16(reinterpret_cast<const uint16_t *>(p)));
#else
    // The exponent is rebased by a multiplication, which also makes denormals right.
    const vu32 bits = __builtin_convertvector(*reinterpret_cast<const vu16 *>(p), vu32);
    vu32 rest = (bits & 0x7FFFu) << 13;
    rest |= rest >= 0x0F800000u ? vu32{} + 0x7F800000u : vu32{}; // infinity and NaN
    const vf number = (vf)rest * (rest < 0x7F800000u ? splat<float>(5.192296858534828e33f) : splat<float>(1)); // 2^112
    return (vf)((vu32)number | (bits & 0x8000u) << 16);
#endif
}

TW_INLINE void narrow(float *p, vec<float> x) { store(p, x); }
TW_INLINE void narrow(double *p, vec<double> x) { store(p, x); }

TW_INLINE void narrow(bfloat *p, vec<float> x) {
    const vu32 bits = (vu32)x;
    const vu32 rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    *reinterpret_cast<vu16 *>(p) = __builtin_convertvector(x != x ? bits >> 16 | 0x40u : rounded, vu16);
}

TW_INLINE void narrow(half *p, vec<float> x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                        _mm512_maskz_cvtps_ph(0xFFFF, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
    vst1_u16(reinterpret_cast<uint16_t *>(p), (uint16x4_t)vcvt_f16_f32((float32x4_t)x));
#else
    const vu32 sign = (vu32)x >> 16 & 0x8000u, size = (vu32)x & 0x7FFFFFFFu;
    const vu32 rebased = size - 0x38000000u;
    const vu32 normal = (rebased + 0xFFFu + (rebased >> 13 & 1u)) >> 13; // carries into infinity by itself
    const vu32 denormal = (vu32)((vf)size + 0.5f) - 0x3F000000u;         // 0.5 has the unit of half's denormals
    vu32 bits = size < 0x38800000u ? denormal : normal;
    bits = size >= 0x47800000u ? vu32{} + 0x7C00u : bits;
    bits = size > 0x7F800000u ? 0x7E00u | (size >> 13 & 0x3FFu) : bits;
    *reinterpret_cast<vu16 *>(p) = __builtin_convertvector(bits | sign, vu16);
#endif
}

// The first n < W numbers at p, and zeros; nothing beyond is read.
template <class T> TW_INLINE auto widen_first(const T *p, int n) {
    T numbers[TW_VECTOR_BYTES / (sizeof(T) == 8 ? 8 : 4)] = {};
    for (int l = 0; l < n; ++l) numbers[l] = p[l];
    return widen(numbers);
}
#if defined(__AVX512F__)
TW_INLINE vec<float> widen_first(const float *p, int n) {
    return (vf)_mm512_maskz_loadu_ps(__mmask16(first_bits(n)), p);
}
TW_INLINE vec<double> widen_first(const double *p, int n) {
    return (vd)_mm512_maskz_loadu_pd(__mmask8(first_bits(n)), p);
}
#endif

// The first n < W numbers of a vector, rounded; nothing beyond is written.
template <class T, class V> TW_INLINE void narrow_first(T *p, V x, int n) {
    T rounded[TW_VECTOR_BYTES / sizeof(x[0])];
    narrow(rounded, x);
    for (int l = 0; l < n; ++l) p[l] = rounded[l];
}
#if defined(__AVX512F__)
TW_INLINE void narrow_first(float *p, vf x, int n) { _mm512_mask_storeu_ps(p, __mmask16(first_bits(n)), (__m512)x); }
TW_INLINE void narrow_first(double *p, vd x, int n) { _mm512_mask_storeu_pd(p, __mmask8(first_bits(n)), (__m512d)x); }
#endif

// Numbers of a row that is made whole vectors by zeros.
template <class A> TW_INLINE int64_t padded(int64_t n) { return (n + lanes<A> - 1) / lanes<A> * lanes<A>; }

// The row of n numbers at `from` as padded(n) accumulators.
template <class T, class A> TW_INLINE void widen_row(const T *from, int64_t n, A *to) {
    int64_t d = 0;
    for (; d + lanes<A> <= n; d += lanes<A>) store(to + d, widen(from + d));
    if (d < n) store(to + d, widen_first(from + d, int(n - d)));
}

// n numbers times `factor`, rounded once, as a row at `to`. Both here and in lanes_to_rows 0 is added: a sum that was
// rescaled to -0 becomes 0 or stays -0 as unseen keys are multiplied or skipped, which no row's bits may depend on.
template <class T, class A> TW_INLINE void narrow_row(const A *from, A factor, int64_t n, T *to) {
    constexpr int W = lanes<A>;
    int64_t d = 0;
    for (; d + W <= n; d += W) narrow(to + d, load(from + d) * factor + A(0));
    if (d < n) narrow_first(to + d, widen_first(from + d, int(n - d)) * factor + A(0), int(n - d));
}
