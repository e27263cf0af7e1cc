// The two products of few rows (few_products.inl.h) in tile registers, a block of 64 keys at a time: there the arithmetic
// of two rows and more takes less time than their keys and values take to come from memory. One row is taken by the dot
// product, which is as fast then.
//
// Scores: S = K Q^T with keys in the rows of A, in place where they stand in whole tiles, and query rows in the columns of
// B. Values: O += P V with query rows in the rows of A and of the sums, and values in B as they stand in memory. There two
// columns stand beside each other where the instruction wants two keys; so each row takes two rows of A: in one a zero
// stands after each probability, in the other before it, and they sum the even and the odd columns. Zero times what is
// not finite is NaN in a column that has nothing to do with it, so a row that ends with something that is not finite is
// summed again, carefully.
//
// A product's result is there after the time of three or four products, so four sums are made in turns. A sum's bits
// depend on its own row and key or column alone.

// What an item keeps for this; the rows' sums stand in `out`, one after another.
template <> struct FewTiles<Tiles> {
    bool used;
    int64_t units, numbers; // of a key, filled up to whole tiles; of a row's out
    int32_t *query;         // [units][16 rows]
    int32_t *keys;          // [block_keys][units], where they cannot be read in place
    int32_t *weights;       // [row][2][block_keys]: bfloat16 with a zero after it, and before it
    int32_t *values;        // [block_keys][numbers in pairs], where they cannot be read in place
    float *out, *spare;     // [row][2][numbers / 2]: even and odd columns; of all rows, and of one that is taken alone
    float *aside;           // [numbers / 2]

    // Lays these out from `memory` on and returns how many numbers they are; NULL: only counts them.
    int64_t lay_out(const tw_problem &p, int32_t *memory) {
        int64_t taken = 0;
        const auto take = [memory, &taken](int64_t count) {
            taken += count;
            return memory ? memory + (taken - count) : nullptr;
        };
        units = padded_units<Tiles>(p.head_dim);
        numbers = Tiles::numbers * padded_units<Tiles>(p.value_dim);
        query = take(units * tile_side);
        keys = take(block_keys * units);
        weights = take(tile_side * block_keys);
        values = take(block_keys / 2 * numbers);
        out = reinterpret_cast<float *>(take(tile_side * numbers / 2));
        spare = reinterpret_cast<float *>(take(tile_side * numbers / 2));
        aside = reinterpret_cast<float *>(take(numbers / 2));
        return taken;
    }

    static_assert(2 * few_rows<float> <= tile_side);
    static int64_t space(const tw_problem &p) { return FewTiles().lay_out(p, nullptr); }
};

// rows: of the whole problem, so that a part of it is summed in the same way.
TW_INLINE void place(const tw_problem &p, int64_t rows, FewTiles<Tiles> &f, int32_t *memory) {
    f.used = rows > 1;
    if (!f.used) return;
    f.lay_out(p, memory); // what stands there already is summed for rows that do not exist, and never read
}

// The queries of the rows, down the columns of B.
TW_INLINE void turn_queries(const FewTiles<Tiles> &f, Row<Tiles> *const *rows, int64_t count) {
    for (int64_t u = 0; u < f.units; u += tile_side) {
        vi32 x[tile_side];
        for (int r = 0; r < tile_side; ++r) x[r] = r < count ? load(rows[r]->query + u) : vi32{};
        transpose<int32_t>(x);
        for (int i = 0; i < tile_side; ++i) store(f.query + (u + i) * tile_side, x[i]);
    }
}

// Four numbers of each of 16 rows of 16, turned about.
TW_INLINE void turn_four(const float *from, vf (&x)[4]) {
    const auto piece = [from](int row) { return _mm_loadu_ps(from + row * tile_side); };
    __m512 y[4]; // in the part l of y[i] row 4 l + i
    TW_UNROLL(int i = 0; i < 4; ++i) {
        y[i] = _mm512_zextps128_ps512(piece(i));
        y[i] = _mm512_mask_broadcast_f32x4(y[i], 0x00F0, piece(4 + i));
        y[i] = _mm512_mask_broadcast_f32x4(y[i], 0x0F00, piece(8 + i));
        y[i] = _mm512_mask_broadcast_f32x4(y[i], 0xF000, piece(12 + i));
    }
    const __m512d low[2] = {_mm512_castps_pd(_mm512_unpacklo_ps(y[0], y[1])),
                            _mm512_castps_pd(_mm512_unpacklo_ps(y[2], y[3]))};
    const __m512d high[2] = {_mm512_castps_pd(_mm512_unpackhi_ps(y[0], y[1])),
                             _mm512_castps_pd(_mm512_unpackhi_ps(y[2], y[3]))};
    x[0] = (vf)_mm512_unpacklo_pd(low[0], low[1]);
    x[1] = (vf)_mm512_unpackhi_pd(low[0], low[1]);
    x[2] = (vf)_mm512_unpacklo_pd(high[0], high[1]);
    x[3] = (vf)_mm512_unpackhi_pd(high[0], high[1]);
}

// Scores of 16 keys, into a register.
template <int WHICH>
TW_INLINE void add_scores(const FewTiles<Tiles> &f, const char *keys, int64_t bytes, Ahead<bfloat> &ahead) {
    for (int64_t u = 0; u < f.units; u += tile_side, keys += 64) {
        _tile_loadd(5, f.query + u * tile_side, 64);
        _tile_loadd(4, keys, bytes);
        if (WHICH == 0) _tile_dpbf16ps(0, 4, 5); // operands have to be written as numbers
        if (WHICH == 1) _tile_dpbf16ps(1, 4, 5);
        if (WHICH == 2) _tile_dpbf16ps(2, 4, 5);
        if (WHICH == 3) _tile_dpbf16ps(3, 4, 5);
        ahead.ask();
    }
}

// Scores of a block's n keys with `count` rows, of which all have stood in turn_queries.
static void scores_in_tiles(const FewTiles<Tiles> &f, Rows<bfloat> keys, int n, int64_t head_dim,
                            Row<Tiles> *const *rows, int64_t count, Ahead<bfloat> &ahead) {
    const char *from = reinterpret_cast<const char *>(keys.first);
    int64_t bytes = keys.stride * int64_t(sizeof(bfloat));
    if (n < block_keys || keys.each || head_dim % (2 * tile_side)) {
        for (int j = 0; j < n; ++j) copy_row(keys[j], head_dim, f.keys + j * f.units);
        from = reinterpret_cast<const char *>(f.keys); // beyond n stands what stood there: no row sees it
        bytes = f.units * int64_t(sizeof(int32_t));
    }
    alignas(64) float scores[block_keys * tile_side];
    ahead.spread(2, f.units / tile_side * (block_keys / tile_side));
    order_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    add_scores<0>(f, from, bytes, ahead);
    add_scores<1>(f, from + 16 * bytes, bytes, ahead);
    add_scores<2>(f, from + 32 * bytes, bytes, ahead);
    add_scores<3>(f, from + 48 * bytes, bytes, ahead);
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + tile_units, 64);
    _tile_stored(2, scores + 2 * tile_units, 64);
    _tile_stored(3, scores + 3 * tile_units, 64);
    order_memory();
    for (int j = 0; j < block_keys; j += tile_side)
        for (int64_t first = 0; first < count; first += 4) {
            vf x[4];
            turn_four(scores + j * tile_side + first, x);
            TW_UNROLL(int r = 0; r < 4; ++r)
                if (first + r < count) store(rows[first + r]->scores + j, x[r]);
        }
}

// N tiles of 32 columns of out += weights * values.
template <int N>
TW_INLINE void add_columns(const FewTiles<Tiles> &f, const char *values, int64_t bytes, float *out,
                           Ahead<bfloat> &ahead) {
    constexpr int64_t weight_bytes = block_keys * sizeof(int32_t);
    const int64_t out_bytes = f.numbers / 2 * int64_t(sizeof(float));
    _tile_loadd(0, out, out_bytes);
    if (N > 1) _tile_loadd(1, out + tile_side, out_bytes);
    if (N > 2) _tile_loadd(2, out + 2 * tile_side, out_bytes);
    if (N > 2) _tile_loadd(3, out + 3 * tile_side, out_bytes);
    for (int key = 0; key < block_keys; key += tile_side, values += tile_side * bytes) {
        _tile_loadd(7, f.weights + key, weight_bytes);
        _tile_loadd(4, values, bytes);
        _tile_dpbf16ps(0, 7, 4);
        ahead.ask();
        if (N == 1) continue;
        _tile_loadd(5, values + 64, bytes);
        _tile_dpbf16ps(1, 7, 5);
        ahead.ask();
        if (N == 2) continue;
        _tile_loadd(4, values + 128, bytes);
        _tile_dpbf16ps(2, 7, 4);
        ahead.ask();
        _tile_loadd(5, values + 192, bytes);
        _tile_dpbf16ps(3, 7, 5);
        ahead.ask();
    }
    _tile_stored(0, out, out_bytes);
    if (N > 1) _tile_stored(1, out + tile_side, out_bytes);
    if (N > 2) _tile_stored(2, out + 2 * tile_side, out_bytes);
    if (N > 2) _tile_stored(3, out + 3 * tile_side, out_bytes);
}
TW_INLINE void add_all_columns(const FewTiles<Tiles> &f, const char *values, int64_t bytes, float *out,
                               Ahead<bfloat> &ahead) {
    ahead.spread(1, f.numbers / (2 * tile_side) * (block_keys / tile_side));
    order_memory();
    int64_t left = f.numbers / (2 * tile_side); // tiles
    for (; left >= 4; left -= 4, values += 4 * 64, out += 4 * tile_side) add_columns<4>(f, values, bytes, out, ahead);
    if (left & 2) add_columns<2>(f, values, bytes, out, ahead);
    if (left & 1) add_columns<1>(f, values + (left & 2) * 64, bytes, out + (left & 2) * tile_side, ahead);
    order_memory();
}

// Copies the n values of a block, of whose numbers those under `kept` stay and the others become 0, as do all numbers of
// keys that `seen` does not name; these are not read.
TW_INLINE void copy_values(const FewTiles<Tiles> &f, Rows<bfloat> values, int64_t value_dim, uint64_t seen,
                           uint32_t kept) {
    int32_t *to = f.values;
    for (int j = 0; j < block_keys; ++j, to += f.numbers / 2) {
        if (seen >> j & 1)
            copy_row(values[j], value_dim, to);
        else
            __builtin_memset(to, 0, size_t(f.numbers) * sizeof(bfloat));
        if (~kept)
            for (int64_t u = 0; u < f.numbers / 2; u += tile_side) store(to + u, load(to + u) & int32_t(kept));
    }
}

// out += weights * values for the n keys of a block, of which no row sees others than `seen`; out: of the first row.
// careful: values of the others are left out, and what is not finite stays in its column; it changes no bit of what is
// finite.
static void add_weighted_in_tiles(const FewTiles<Tiles> &f, Row<Tiles> *const *rows, int64_t count, Rows<bfloat> values,
                                  int64_t value_dim, int n, uint64_t seen, bool careful, Ahead<bfloat> &ahead) {
    for (int64_t r = 0; r < count; ++r)
        for (int j = 0; j < block_keys; j += tile_side) {
            const __m256i own = _mm256_loadu_si256((const __m256i *)(rows[r]->weights + j / 2));
            const __m512i low = _mm512_cvtepu16_epi32(own);
            store(f.weights + 2 * r * block_keys + j, (vi32)low);
            store(f.weights + (2 * r + 1) * block_keys + j, (vi32)_mm512_slli_epi32(low, 16));
        }
    float *const out = rows[0]->out;
    const char *from = reinterpret_cast<const char *>(f.values);
    const int64_t bytes = f.numbers * int64_t(sizeof(bfloat));
    if (careful) {
        for (int odd = 0; odd < 2; ++odd) {
            float *const others = out + (1 - odd) * f.numbers / 2; // which zero times what is not finite would spoil
            copy_values(f, values, value_dim, seen, odd ? 0xFFFF0000u : 0x0000FFFFu);
            __builtin_memcpy(f.aside, others, size_t(f.numbers / 2) * sizeof *others);
            add_all_columns(f, from, bytes, out, ahead);
            __builtin_memcpy(others, f.aside, size_t(f.numbers / 2) * sizeof *others);
        }
    } else if (n < block_keys || values.each || value_dim % (2 * tile_side)) {
        copy_values(f, values, value_dim, seen, ~0u);
        add_all_columns(f, from, bytes, out, ahead);
    } else {
        add_all_columns(f, reinterpret_cast<const char *>(values.first), values.stride * int64_t(sizeof(bfloat)), out,
                        ahead);
    }
}

// The n sums of a row, from the order of add_columns to their own.
TW_INLINE void put_columns_in_order(const FewTiles<Tiles> &f, float *sums, int64_t n) {
    float *const own = reinterpret_cast<float *>(f.values); // [numbers]
    for (int64_t c = 0; c < n; ++c) own[c] = sums[c % 2 * f.numbers / 2 + c / 2];
    __builtin_memcpy(sums, own, size_t(n) * sizeof *sums);
}
