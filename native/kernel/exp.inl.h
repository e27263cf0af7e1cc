// 2^x and tanh on vectors. 2^x = 2^n 2^f with n the nearest integer and |f| <= 1/2; 2^f is a polynomial with the
// smallest largest relative error (Remez): 1.2e-7 in float, 5e-18 in double before rounding.

template <class A> struct exp_numbers;
template <> struct exp_numbers<float> {
    using bits = uint32_t;
    static constexpr float round = 12582912.f; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    static constexpr float smallest = -126.f;  // below: 0, so that no denormal is ever made
    static constexpr int fraction_bits = 23, exponent_bias = 127, degree = 5;
    static constexpr float c[] = {0.69314709218781452365f, 0.24022215101903789405f, 0.055505700413257887019f,
                                  0.0096728808786743869238f, 0.0013313799784867156023f};
};
template <> struct exp_numbers<double> {
    using bits = uint64_t;
    static constexpr double round = 6755399441055744.0; // 1.5 * 2^52
    static constexpr double smallest = -1022.0;
    static constexpr int fraction_bits = 52, exponent_bias = 1023, degree = 11;
    static constexpr double c[] = {0.6931471805599453133,      0.24022650695910136288,   0.055504108664821082931,
                                   0.0096181291075914965755,   0.0013333558146558132966, 0.00015403530460764842419,
                                   0.000015252733684247801309, 1.321543338897090968e-6,  1.0178125486258941518e-7,
                                   7.0741122035811626119e-9,   4.4452571404588533101e-10};
};
constexpr float exp_numbers<float>::c[];
constexpr double exp_numbers<double>::c[];

// Splits x into n (as a number, and as round + n) and f, and returns (2^f - 1) / f.
template <class A> TW_INLINE vec<A> exp2_parts(vec<A> x, vec<A> &shifted, vec<A> &n, vec<A> &f) {
    using N = exp_numbers<A>;
    shifted = x + N::round;
    n = shifted - N::round;
    f = x - n;
    vec<A> h = splat<A>(N::c[N::degree - 1]);
    TW_UNROLL(int i = N::degree - 2; i >= 0; --i) h = h * f + N::c[i];
    return h;
}

// 2^n from round + n, for n in the exponent's range.
template <class A> TW_INLINE vec<A> power_of_two(vec<A> shifted) {
    using N = exp_numbers<A>;
    typedef typename N::bits words __attribute__((vector_size(TW_VECTOR_BYTES)));
    words w = ((words)shifted << N::fraction_bits) + (typename N::bits(N::exponent_bias) << N::fraction_bits);
    return (vec<A>)w;
}

// 2^x for x below the exponent's upper end; exactly 0 for x < smallest and -inf, exactly 1 for 0, NaN for NaN.
template <class A> TW_INLINE vec<A> exp2(vec<A> x, A smallest = exp_numbers<A>::smallest) {
    vec<A> shifted, n, f;
    vec<A> h = exp2_parts<A>(x, shifted, n, f);
    vec<A> p = h * f + A(1);
#if defined(__AVX512F__)
    // One instruction scales, and its mask makes the zeros ("not less" lets NaN pass).
    if constexpr (sizeof(A) == 4) {
        __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(smallest), _CMP_NLT_UQ);
        return (vec<A>)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
    } else {
        __mmask8 kept = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(smallest), _CMP_NLT_UQ);
        return (vec<A>)_mm512_maskz_scalef_pd(kept, (__m512d)p, (__m512d)n);
    }
#else
    p = p * power_of_two<A>(shifted);
    return x < smallest ? vec<A>{} : p;
#endif
}

// a b + c, rounded once. Compilers fuse sums of products, too, but not where a product belongs to two of them. Without such
// an instruction the product is exact all the same: floats' in double, doubles' with its error (Dekker 1971) added, which is
// left out where it overflows.
template <class A> TW_INLINE vec<A> fused(vec<A> a, vec<A> b, vec<A> c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
        return (vec<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else
        return (vec<A>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    if constexpr (sizeof(A) == 4)
        return (vec<A>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else
        return (vec<A>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON)
    if constexpr (sizeof(A) == 4)
        return (vec<A>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    else
        return (vec<A>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF)
    TW_UNROLL(int l = 0; l < lanes<A>; ++l)
        c[l] = sizeof(A) == 4 ? A(__builtin_fmaf(a[l], b[l], c[l])) : A(__builtin_fma(a[l], b[l], c[l]));
    return c;
#else
    if constexpr (sizeof(A) == 4) {
        typedef double wide __attribute__((vector_size(2 * TW_VECTOR_BYTES)));
        const auto widened = [](vec<A> x) { return __builtin_convertvector(x, wide); };
        return __builtin_convertvector(widened(a) * widened(b) + widened(c), vec<A>);
    } else {
        const auto upper = [](vec<A> x) { // half of its places
            const vec<A> large = x * A(0x1p27 + 1);
            return large - (large - x);
        };
        const vec<A> product = a * b, a_upper = upper(a), b_upper = upper(b), a_lower = a - a_upper,
                     b_lower = b - b_upper;
        const vec<A> error = a_upper * b_upper - product + a_upper * b_lower + a_lower * b_upper + a_lower * b_lower;
        return product + c + (error - error == A(0) ? error : vec<A>{});
    }
#endif
}

// One in log2 units.
template <class A> constexpr A log2_e = A(1.4426950408889634074);

// A bias or a sink, of which a finite number stays finite in log2 units: beyond 2^125 (2^1021 in double) it becomes that,
// which all scores vanish beside, too, and which all biases of a pair together (four and a table) may be. So the smallest
// number of a type, often written for "unseen", is not taken for -inf.
template <class A> constexpr A most_bias = sizeof(A) == 4 ? A(0x1p125f) : A(0x1p1021);
template <class A> TW_INLINE vec<A> bounded(vec<A> x) {
    const A most = most_bias<A>;
#if defined(__AVX512DQ__)
    // The smaller in size with the sign of the first, but for infinities and NaN.
    constexpr int smaller_in_size = 2, not_finite = 0x99;
    if constexpr (sizeof(A) == 4) {
        const __mmask16 finite = ~_mm512_fpclass_ps_mask((__m512)x, not_finite);
        return (vec<A>)_mm512_mask_range_ps((__m512)x, finite, (__m512)x, _mm512_set1_ps(most), smaller_in_size);
    } else {
        const __mmask8 finite = ~_mm512_fpclass_pd_mask((__m512d)x, not_finite);
        return (vec<A>)_mm512_mask_range_pd((__m512d)x, finite, (__m512d)x, _mm512_set1_pd(most), smaller_in_size);
    }
#else
    vec<A> kept = x > most ? splat<A>(most) : x;
    kept = kept < -most ? splat<A>(-most) : kept;
    return x - x == A(0) ? kept : x;
#endif
}
template <class A> TW_INLINE A bounded(A x) { return bounded<A>(splat<A>(x))[0]; }

// tanh(x ln 2 / 2), from 2^x - 1 = 2^n f h + (2^n - 1), which keeps its relative precision near 0.
template <class A> TW_INLINE vec<A> tanh_of_log2(vec<A> x) {
    x = x < A(-60) ? splat<A>(-60) : x; // beyond, tanh is 1 in either precision
    x = x > A(60) ? splat<A>(60) : x;
    vec<A> shifted, n, f;
    vec<A> h = exp2_parts<A>(x, shifted, n, f);
    vec<A> scale = power_of_two<A>(shifted);
    vec<A> less_one = scale * (f * h) + (scale - A(1));
    return less_one / (less_one + A(2));
}

// The softcap c in log2 units, c log2(e) tanh(s / c), of a score s. Products times `twice` are 2 s log2(e) / c.
template <class A> struct Softcap {
    A cap, twice;
};
template <class A> TW_INLINE Softcap<A> softcap_of(const tw_problem &p, A factor) {
    return {A(p.softcap * log2_e<double>), A(2 * double(factor) / p.softcap)};
}
template <class A> TW_INLINE vec<A> cap_product(vec<A> x, const Softcap<A> &c) {
    return c.cap * tanh_of_log2<A>(x * c.twice);
}
// The same and its slope, the derivative by the score.
template <class A> TW_INLINE vec<A> cap_product(vec<A> x, const Softcap<A> &c, vec<A> &slope) {
    const vec<A> t = tanh_of_log2<A>(x * c.twice), capped = c.cap * t;
    slope = A(1) - t * t;
    return capped;
}
