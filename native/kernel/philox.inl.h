// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; 2011).

// The number under which the pair (b, h, i, j) draws, and what the next key adds to it.
TW_INLINE uint64_t pair_number(const tw_problem &p, int64_t b, int64_t h, int64_t i, int64_t j, uint64_t *next_key) {
    const tw_dropout &d = p.dropout;
    if (d.stride_j == 0) {
        *next_key = 1;
        return uint64_t(((b * p.q_heads + h) * p.q_len + i) * p.k_len + j);
    }
    *next_key = d.stride_j;
    return d.first + uint64_t(b) * d.stride_b + uint64_t(h) * d.stride_h + uint64_t(i) * d.stride_i + uint64_t(j) * d.stride_j;
}

// The first word for each of `count` counters (index[l], stream) under the key `seed`.
TW_INLINE void philox_words(uint64_t seed, uint64_t stream, const uint64_t *index, int count, uint32_t *words) {
    for (int l = 0; l < count; ++l) {
        uint32_t c0 = uint32_t(index[l]), c1 = uint32_t(index[l] >> 32), c2 = uint32_t(stream), c3 = uint32_t(stream >> 32);
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        TW_UNROLL for (int round = 0; round < 10; ++round) {
            uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
            c0 = uint32_t(b >> 32) ^ c1 ^ k0;
            c2 = uint32_t(a >> 32) ^ c3 ^ k1;
            c1 = uint32_t(b);
            c3 = uint32_t(a);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[l] = c0;
    }
}
