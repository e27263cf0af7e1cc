// float32 and float16 in tile registers. A number of 24 places is the sum of three bfloat16 numbers of 8, exactly, and a
// product of two such sums that of nine products, of which three are smaller than the rounding of the product (2^-26 of it at
// most) and are left out. Products of bfloat16 numbers are exact in float32, where they are summed. (Henry, Tang, Heinecke:
// Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, 2019.) The tile registers make
// 16 such products in the time in which vectors make one of float32.
//
// float16, of 11 places, is the sum of two, and all four products of scores are made. Weights (probabilities, and gradients
// of scores) are rounded to two, by 2^-17 at most, and of their products with float16 three are made.
//
// Parts must be numbers that the tile registers know: no denormals, no infinities. Numbers smaller than 2^-100, but for 0,
// or from 2^56 on, and such as are not finite, are strange and become 0. A row that has one or sees a key that has one is
// computed again as other pages compute it; those of values are added by themselves. So what a row does not see changes no
// bit of it, nor does one column another.

// Exponents of 2 below which a probability is 0: its parts would be denormals.
constexpr float least_in_parts = -100;

// x as some numbers, each rounded to bfloat16 (ties away from 0); what is left of float32 after two needs no rounding.
template <int PARTS> TW_INLINE void split(__m512 x, __m512i (&part)[PARTS]) {
    const __m512i half_place = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int32_t(0xFFFF0000));
    TW_UNROLL(int i = 0; i < 2; ++i) {
        part[i] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half_place), upper);
        if (i + 1 < PARTS) x = _mm512_sub_ps(x, _mm512_castsi512_ps(part[i]));
    }
    if (PARTS == 3) part[PARTS - 1] = _mm512_castps_si512(x);
}

// Two vectors as pairs (low[0], high[0]), ..., the units of each part `stride` after those before.
template <class M> TW_INLINE void store_parts(__m512 low, __m512 high, int32_t *to, int64_t stride) {
    __m512i first[M::parts], second[M::parts];
    split<M::parts>(low, first);
    split<M::parts>(high, second);
    TW_UNROLL(int i = 0; i < M::parts; ++i)
        store(to + i * stride, (vi32)_mm512_or_si512(_mm512_maskz_srli_epi32(0xFFFF, first[i], 16), second[i]));
}

// The same of 32 numbers in a row: (low[0], low[1]), ...
template <class M> TW_INLINE void store_parts_of_row(__m512 low, __m512 high, int32_t *to, int64_t stride) {
    alignas(64) static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    __m512i first[M::parts], second[M::parts];
    split<M::parts>(low, first);
    split<M::parts>(high, second);
    TW_UNROLL(int i = 0; i < M::parts; ++i)
        store(to + i * stride, (vi32)_mm512_permutex2var_epi16(first[i], _mm512_load_si512(upper), second[i]));
}

TW_INLINE bool is_strange(float x, uint32_t least = least_exponent) {
    uint32_t size;
    __builtin_memcpy(&size, &x, sizeof size);
    size <<= 1;
    return size && size - least >= end_exponent - least;
}
TW_INLINE bool is_strange_gradient(float x) { return is_strange(x, least_gradient); }

TW_INLINE float number(float x) { return x; }
TW_INLINE float number(half x) { return _cvtsh_ss(x.bits); }

// The numbers at p that `exist` names, and zeros; no others are read.
TW_INLINE __m512 load_numbers(const float *p, __mmask16 exist) { return _mm512_maskz_loadu_ps(exist, p); }
TW_INLINE __m512 load_numbers(const half *p, __mmask16 exist) {
    return _mm512_maskz_cvtph_ps(exist, _mm256_maskz_loadu_epi16(exist, p));
}

// The first n numbers at p, at most 16, zeros beyond and for those that are strange, of which it is said whether there are.
template <class T>
TW_INLINE __m512 first_not_strange(const T *p, int64_t n, bool &strange, uint32_t least = least_exponent) {
    const __mmask16 exist = __mmask16(n < 16 ? (n > 0 ? first_bits(n) : 0) : 0xFFFF);
    const __m512i x = _mm512_castps_si512(load_numbers(p, exist));
    const __m512i size = _mm512_add_epi32(x, x);
    const __mmask16 found = _mm512_mask_cmpge_epu32_mask(_mm512_test_epi32_mask(size, size),
                                                         _mm512_sub_epi32(size, _mm512_set1_epi32(int32_t(least))),
                                                         _mm512_set1_epi32(int32_t(end_exponent - least)));
    strange |= found != 0;
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(__mmask16(~found), x));
}

// `count` rows of n numbers, as units along the rows: to [count][parts][n in units]. Returns the rows that are strange.
template <class T> static uint64_t rows_in_parts(Rows<T> from, int64_t count, int64_t n, int32_t *to) {
    using M = Parts<T>;
    const int64_t units = padded_units<M>(n);
    uint64_t found = 0;
    for (int64_t r = 0; r < count; ++r, to += M::parts * units) {
        const T *row = from[r];
        bool strange = false;
        for (int64_t d = 0; d < n; d += 2 * tile_side) {
            const __m512 low = first_not_strange(row + d, n - d, strange);
            const __m512 high = first_not_strange(row + d + tile_side, n - d - tile_side, strange);
            store_parts_of_row<M>(low, high, to + d / 2, units);
        }
        found |= uint64_t(strange) << r;
    }
    return found;
}

// Rows of n numbers, turned about: to [groups of 32 rows][parts][padded n][16], as columns_to_tiles. Returns the rows that
// are strange.
template <class T> static uint64_t columns_in_parts(Rows<T> from, int64_t count, int64_t n, int32_t *to) {
    using M = Parts<T>;
    const int64_t stride = padded<float>(n) * tile_side;
    uint64_t found = 0;
    for (int64_t r = 0; r < count; r += 2 * tile_side, to += M::parts * stride)
        for (int64_t d = 0; d < n; d += tile_side) {
            vf x[2][tile_side];
            for (int i = 0; i < 2 * tile_side; ++i) {
                bool strange = false;
                x[i % 2][i / 2] = r + i < count ? (vf)first_not_strange(from[r + i] + d, n - d, strange) : vf{};
                found |= uint64_t(strange) << (r + i);
            }
            transpose<float>(x[0]);
            transpose<float>(x[1]);
            for (int i = 0; i < tile_side; ++i)
                store_parts<M>((__m512)x[0][i], (__m512)x[1][i], to + (d + i) * tile_side, stride);
        }
    return found;
}

// Two rows of n numbers (or one, and zeros) as units across them: to [parts][n], parts `stride` apart.
template <class T>
TW_INLINE void pair_in_parts(const T *low, const T *high, int64_t n, int32_t *to, int64_t stride, uint32_t least) {
    bool strange = false;
    for (int64_t d = 0; d < n; d += tile_side)
        store_parts<Parts<T>>(first_not_strange(low + d, n - d, strange, least),
                              high ? first_not_strange(high + d, n - d, strange, least) : _mm512_setzero_ps(), to + d,
                              stride);
}

// 16 rows of n numbers, times `sign`, down the lanes of a tile `width` lanes wide: to [parts][n in units][width]. Returns the
// rows that are strange.
template <class T>
static uint64_t rows_to_lanes_in_parts(const T *const *rows, int64_t n, float sign, int32_t *to, int64_t width,
                                       uint32_t least = least_exponent) {
    using M = Parts<T>;
    const int64_t units = padded_units<M>(n);
    uint64_t found = 0;
    for (int64_t d = 0; d < 2 * units; d += tile_side) {
        vf x[tile_side];
        for (int l = 0; l < tile_side; ++l) {
            bool strange = false;
            x[l] = (vf)first_not_strange(rows[l] + d, n - d, strange, least) * sign;
            found |= uint64_t(strange) << l;
        }
        transpose<float>(x);
        for (int i = 0; i < tile_side; i += 2)
            store_parts<M>((__m512)x[i], (__m512)x[i + 1], to + (d + i) / 2 * width, units * width);
    }
    return found;
}

// Notes the lanes that see a strange key of a block. words: the lanes that see each key, or NULL: all.
template <class M> TW_RARE void leave_lanes(Tile<M> &tile, uint64_t strange, const uint64_t *words) {
    for (; strange; strange &= strange - 1) tile.strange |= words ? words[__builtin_ctzll(strange)] : ~uint64_t(0);
}
