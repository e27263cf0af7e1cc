// Dropout: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; 2011).

// The number under which the pair (b, h, i, j) draws, and what the next key adds to it.
TW_INLINE uint64_t pair_number(const tw_problem &p, int64_t b, int64_t h, int64_t i, int64_t j, uint64_t *next_key) {
    const tw_dropout &d = p.dropout;
    if (!(d.stride_b | d.stride_h | d.stride_i | d.stride_j)) {
        *next_key = 1;
        return uint64_t(((b * p.q_heads + h) * p.q_len + i) * p.k_len + j);
    }
    *next_key = d.stride_j;
    return d.first + uint64_t(b) * d.stride_b + uint64_t(h) * d.stride_h + uint64_t(i) * d.stride_i +
           uint64_t(j) * d.stride_j;
}

// A counter per 64-bit lane. The words of a round stand in the low halves, which alone a multiplication reads; what it
// leaves in the high halves is carried along and cut off at the end.
typedef uint64_t vu64 __attribute__((vector_size(TW_VECTOR_BYTES), aligned(8), may_alias));
constexpr int counters = lanes<double>;

TW_INLINE vu64 low_products(vu64 x, uint32_t factor) {
#if defined(__AVX512F__)
    return (vu64)_mm512_maskz_mul_epu32(0xFF, (__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
    return (vu64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
    return (vu64)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#elif defined(__ARM_NEON)
    return (vu64)vmull_u32(vmovn_u64((uint64x2_t)x), vdup_n_u32(factor));
#else
    return (x & 0xFFFFFFFFu) * factor;
#endif
}

// The high halves as low ones, beside which the high ones may stay. Where a processor shuffles and shifts in different
// units, half of a round's halves are moved by this and half by shifts.
TW_INLINE vu64 high_halves(vu64 x) {
#if defined(__AVX512F__)
    return (vu64)_mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)x, _MM_PERM_DDBB);
#elif defined(__AVX2__)
    return (vu64)_mm256_shuffle_epi32((__m256i)x, 0xF5);
#elif defined(__SSE2__)
    return (vu64)_mm_shuffle_epi32((__m128i)x, 0xF5);
#else
    return x >> 32;
#endif
}

TW_INLINE vu64 exclusive_or(vu64 a, vu64 b, uint64_t c) {
#if defined(__AVX512F__)
    return (vu64)_mm512_maskz_ternarylogic_epi64(0xFF, (__m512i)a, (__m512i)b, _mm512_set1_epi64(int64_t(c)), 0x96);
#else
    return a ^ b ^ c;
#endif
}

enum { philox_rounds = 10 };

// A generator: its keys, round by round, are read from memory, which is cheaper than making them again.
struct Philox {
    uint64_t keys[philox_rounds][2], stream;
    Philox(uint64_t seed, uint64_t stream_) : stream(stream_) {
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (auto &key : keys) {
            key[0] = k0;
            key[1] = k1;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
    }
};

// Turns each index into the first word of counter (index, stream). Several vectors at once hide the time that a
// multiplication takes.
template <int N> TW_INLINE void first_words(const Philox &philox, vu64 (&x)[N]) {
    vu64 c1[N], c2[N], c3[N];
    TW_UNROLL(int n = 0; n < N; ++n) {
        c1[n] = high_halves(x[n]);
        c2[n] = vu64{} + (philox.stream & 0xFFFFFFFFu);
        c3[n] = vu64{} + (philox.stream >> 32);
    }
    TW_UNROLL(int round = 0; round < philox_rounds; ++round)
        TW_UNROLL(int n = 0; n < N; ++n) {
            const vu64 a = low_products(x[n], 0xD2511F53u), b = low_products(c2[n], 0xCD9E8D57u);
            x[n] = exclusive_or(high_halves(b), c1[n], philox.keys[round][0]);
            c2[n] = exclusive_or(a >> 32, c3[n], philox.keys[round][1]);
            c1[n] = b;
            c3[n] = a;
        }
    TW_UNROLL(int n = 0; n < N; ++n) x[n] &= 0xFFFFFFFFu;
}

// N vectors of pairs with each of n keys: bit `first` + l of keep[j] is set where pair l is kept, whose number is
// numbers[l] + j * step.
template <int N>
static __attribute__((noinline)) void keep_some(const Philox &philox, uint64_t threshold, const uint64_t *numbers,
                                                uint64_t step, int n, int first, uint64_t *keep) {
    vu64 next[N];
    TW_UNROLL(int v = 0; v < N; ++v) next[v] = *reinterpret_cast<const vu64 *>(numbers + v * counters);
    for (int j = 0; j < n; ++j) {
        vu64 x[N];
        TW_UNROLL(int v = 0; v < N; ++v) {
            x[v] = next[v];
            next[v] += step;
        }
        first_words(philox, x);
        uint64_t kept = 0;
        TW_UNROLL(int v = 0; v < N; ++v) {
#if defined(__AVX512F__)
            const __m512i least = _mm512_set1_epi64(int64_t(threshold));
            kept |= uint64_t(_mm512_cmpge_epu64_mask((__m512i)x[v], least)) << v * counters;
#else
            kept |= lane_bits((vi64)(x[v] >= threshold)) << v * counters;
#endif
        }
        keep[j] |= kept << first;
    }
}

// The same for `width` pairs, whole vectors of them and at most 64; the other bits are 0.
TW_INLINE void keep_pairs(const tw_dropout &d, const uint64_t *numbers, int width, uint64_t step, int n,
                          uint64_t *keep) {
    constexpr int N = TW_VECTOR_BYTES == 64 ? 4 : 2;
    const Philox philox(d.seed, d.stream);
    for (int j = 0; j < n; ++j) keep[j] = 0;
    int l = 0;
    for (; l + N * counters <= width; l += N * counters)
        keep_some<N>(philox, d.threshold, numbers + l, step, n, l, keep);
    for (; l < width; l += counters) keep_some<1>(philox, d.threshold, numbers + l, step, n, l, keep);
}

// The first word for each of `count` counters (index[l], stream) under the key `seed`.
static void philox_words(uint64_t seed, uint64_t stream, const uint64_t *index, int count, uint32_t *words) {
    const Philox philox(seed, stream);
    for (int l = 0; l < count; ++l) {
        vu64 x[1] = {vu64{} + index[l]};
        first_words(philox, x);
        words[l] = uint32_t(x[0][l % counters]);
    }
}
