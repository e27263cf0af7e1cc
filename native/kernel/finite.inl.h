// Whether rows hold finite numbers alone: then what is masked may be multiplied by 0 instead of being left out.

template <class A> static bool finite_rows(const A *numbers, int64_t stride, int64_t rows, int64_t columns) {
    vec<A> doubt = {}; // x - x is 0 for finite numbers, else NaN
    for (int64_t r = 0; r < rows; ++r, numbers += stride) {
        int64_t d = 0;
        for (; d + lanes<A> <= columns; d += lanes<A>) doubt += load(numbers + d) - load(numbers + d);
        if (d == columns) continue;
        const vec<A> rest = widen_first(numbers + d, int(columns - d));
        doubt += rest - rest;
    }
    return lane_bits(doubt != doubt) == 0;
}

#if defined(__AVX512BF16__)
static bool finite_rows(const int32_t *numbers, int64_t stride, int64_t rows, int64_t columns) {
    __mmask32 doubt = 0; // an exponent of ones
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    for (int64_t r = 0; r < rows; ++r, numbers += stride)
        for (int64_t d = 0; d < columns; d += 16) {
            const __m512i x = _mm512_maskz_loadu_epi32(__mmask16(first_bits(columns - d)), numbers + d);
            doubt |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
        }
    return !doubt;
}
#endif
