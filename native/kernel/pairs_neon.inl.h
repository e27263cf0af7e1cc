// `Pairs` of product.inl.h on NEON with BFDOT: what product.inl.h has for AVX-512, eight numbers to a vector.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

// The instruction takes denormals for 0 and makes none, and rounds to odd, whatever the thread's mode; infinities and NaN
// are treated as multiplication and addition do.
TW_INLINE vf add_product(vf sum, vi32 a, vi32 b) {
    return (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}

// An unseen half is 0 times 0 here, as a seen one of weight 0 is 0 times its value: the sums have the same bits.
TW_INLINE vf add_seen(vf sum, vi32 value, vi32 weight) {
    const uint16x8_t unseen_halves = vceqq_u16((uint16x8_t)weight, vdupq_n_u16(0xBF80)); // -1
    return add_product(sum, (vi32)vbicq_u16((uint16x8_t)value, unseen_halves),
                       (vi32)vbicq_u16((uint16x8_t)weight, unseen_halves));
}

// 8 numbers in bfloat16: `low`, then `high`.
TW_INLINE vi32 narrow_beside(vf low, vf high) {
    return (vi32)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
}

// The same, but one of each beside each other: low[0], high[0], low[1], high[1], ...
TW_INLINE vi32 narrow_across(vf low, vf high) {
    const uint16x8_t beside = (uint16x8_t)narrow_beside(low, high);
    return (vi32)vzip1q_u16(beside, vextq_u16(beside, beside, 4));
}

TW_INLINE vi32 load_pairs(const bfloat *p) { return load(reinterpret_cast<const int32_t *>(p)); }

// The first n numbers at p, at most 8, and zeros; nothing beyond is read.
TW_INLINE vi32 first_numbers(const bfloat *p, int64_t n) {
    if (n >= 8) return load_pairs(p);
    bfloat numbers[8] = {};
    for (int64_t l = 0; l < n; ++l) numbers[l] = p[l];
    return load_pairs(numbers);
}

// A row's vectors.
template <int NZ> TW_INLINE void store_row(int32_t *out, const vf (&x)[NZ]) {
    TW_UNROLL(int z = 0; z < NZ; ++z)
        vst1_u16(reinterpret_cast<uint16_t *>(out + 2 * z), (uint16x4_t)vcvt_bf16_f32((float32x4_t)x[z]));
}

// The first numbers of two rows, `left` of them, at most 8, beside each other: the first four in `low`.
// Rows that bits 0 and 1 do not name are zeros and not read.
TW_INLINE void interleave(const bfloat *row, const bfloat *next, int64_t left, uint64_t bits, vi32 &low, vi32 &high) {
    const uint16x8_t first = (uint16x8_t)(bits & 1 ? first_numbers(row, left) : vi32{});
    const uint16x8_t second = (uint16x8_t)(bits & 2 ? first_numbers(next, left) : vi32{});
    low = (vi32)vzip1q_u16(first, second);
    high = (vi32)vzip2q_u16(first, second);
}

// Sums of interleaved columns are in their own order here.
TW_INLINE void put_in_order(float *, int64_t) {}

// n numbers as whole vectors of units.
TW_INLINE void copy_row(const bfloat *from, int64_t n, int32_t *to) {
    for (int64_t d = 0; d < n; d += 8, to += 4) store(to, first_numbers(from + d, n - d));
}

// Two rows of n numbers as n units that hold one number of each, in whole vectors; zeros where there is no second.
TW_INLINE void copy_across(const bfloat *low, const bfloat *high, int64_t n, int32_t *to) {
    for (int64_t d = 0; d < n; d += 8) {
        const uint16x8_t first = (uint16x8_t)first_numbers(low + d, n - d);
        const uint16x8_t second = (uint16x8_t)(high ? first_numbers(high + d, n - d) : vi32{});
        store(to + d, (vi32)vzip1q_u16(first, second));
        if (n - d > 4) store(to + d + 4, (vi32)vzip2q_u16(first, second));
    }
}

// Whether all numbers of so many rows of units are finite.
static bool finite_rows(const int32_t *numbers, int64_t stride, int64_t rows, int64_t columns) {
    const uint16x8_t exponent = vdupq_n_u16(0x7F80);
    uint16x8_t doubt = vdupq_n_u16(0); // an exponent of ones
    for (int64_t r = 0; r < rows; ++r, numbers += stride)
        for (int64_t d = 0; d < columns; d += 4) {
            const bfloat *own = reinterpret_cast<const bfloat *>(numbers + d);
            const uint16x8_t x = (uint16x8_t)first_numbers(own, 2 * (columns - d));
            doubt = vorrq_u16(doubt, vceqq_u16(vandq_u16(x, exponent), exponent));
        }
    return vmaxvq_u16(doubt) == 0;
}
#endif
