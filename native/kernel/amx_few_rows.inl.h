// The two products of few rows (few_products.inl.h) in tile registers, a block of 64 keys at a time: there the arithmetic
// of four rows and more takes less time than their keys and values take to come from memory, which the vectors' dot
// product does not reach. Fewer rows are taken by the dot product.
//
// Scores: S = K Q^T with keys in the rows of A, in place where they stand in whole tiles, and query rows in the columns of
// B. Values: O += P V with query rows in the rows of A and of the sums, so that these take eight rows' time, and values in
// B, two keys beside each other as `interleave` lays them. A sum's bits depend on its own row and key or column alone.

// What an item keeps for this; the rows' sums stand in `out`, one after another.
template <> struct FewTiles<Tiles> {
    bool used;
    int64_t units, numbers; // of a key, filled up to whole tiles; of a row's out
    int32_t *query;         // [units][16 rows]
    int32_t *keys;          // [block_keys][units], where they cannot be read in place
    int32_t *weights;       // [8 rows][units of block_keys]
    int32_t *values;        // [2 groups of 32 keys][numbers in tiles of 16][16 units][16]
    float *out, *spare;     // [8 rows][numbers] each: of all rows, and of one that is taken alone

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
        weights = take(few_rows<float> * block_keys / 2);
        values = take(block_keys / 2 * numbers);
        out = reinterpret_cast<float *>(take(few_rows<float> * numbers));
        spare = reinterpret_cast<float *>(take(few_rows<float> * numbers));
        return taken;
    }

    static int64_t space(const tw_problem &p) { return FewTiles().lay_out(p, nullptr); }
};

// rows: of the whole problem, so that a part of it is summed in the same way.
TW_INLINE void place(const tw_problem &p, int64_t rows, FewTiles<Tiles> &f, int32_t *memory) {
    f.used = rows >= 4;
    if (!f.used) return;
    const int64_t count = f.lay_out(p, memory);
    __builtin_memset(memory, 0, size_t(count) * sizeof *memory); // rows that do not exist are multiplied too
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

// Scores of a block's n keys with `count` rows, of which all have stood in turn_queries, times `factor`.
static void scores_in_tiles(const FewTiles<Tiles> &f, Rows<bfloat> keys, int n, int64_t head_dim,
                            Row<Tiles> *const *rows, int64_t count, float factor) {
    const char *from = reinterpret_cast<const char *>(keys.first);
    int64_t bytes = keys.stride * int64_t(sizeof(bfloat));
    if (n < block_keys || keys.each || head_dim % (2 * tile_side)) {
        for (int j = 0; j < n; ++j) copy_row(keys[j], head_dim, f.keys + j * f.units);
        from = reinterpret_cast<const char *>(f.keys); // beyond n stands what stood there: no row sees it
        bytes = f.units * int64_t(sizeof(int32_t));
    }
    alignas(64) float scores[block_keys * tile_side];
    order_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t u = 0; u < f.units; u += tile_side, from += 64) {
        _tile_loadd(5, f.query + u * tile_side, 64);
        _tile_loadd(4, from, bytes);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(4, from + 16 * bytes, bytes);
        _tile_dpbf16ps(1, 4, 5);
        _tile_loadd(4, from + 32 * bytes, bytes);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(4, from + 48 * bytes, bytes);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + tile_units, 64);
    _tile_stored(2, scores + 2 * tile_units, 64);
    _tile_stored(3, scores + 3 * tile_units, 64);
    order_memory();
    for (int j = 0; j < block_keys; j += tile_side) {
        vf x[tile_side];
        TW_UNROLL(int i = 0; i < tile_side; ++i) x[i] = load(scores + (j + i) * tile_side);
        transpose<float>(x);
        TW_UNROLL(int r = 0; r < few_rows<float>; ++r)
            if (r < count) store(rows[r]->scores + j, x[r] * factor);
    }
}

// out += weights * values for the keys of a block that `some` names; the others are not read. out: of the first row.
static void add_weighted_in_tiles(const FewTiles<Tiles> &f, Row<Tiles> *const *rows, int64_t count, Rows<bfloat> values,
                                  int64_t value_dim, uint64_t some, Ahead<bfloat> next_keys,
                                  Ahead<bfloat> next_values) {
    constexpr int units = block_keys / 2, group = units / 2;
    for (int64_t r = 0; r < count; ++r)
        for (int u = 0; u < units; u += tile_side) store(f.weights + r * units + u, load(rows[r]->weights + u));
    for (int unit = 0; unit < units; ++unit, some >>= 2) {
        int32_t *to = f.values + unit / group * (f.numbers * group) + unit % group * tile_side;
        const bfloat *row = some & 1 ? values[2 * unit] : nullptr, *other = some & 2 ? values[2 * unit + 1] : nullptr;
        for (int j = 2 * unit; j < 2 * unit + 2; ++j) {
            if (next_keys.rows.first) ask_for(next_keys.rows[j], next_keys.n);
            if (next_values.rows.first) ask_for(next_values.rows[j], next_values.n);
        }
        for (int64_t d = 0; d < f.numbers; d += 2 * tile_side, to += 2 * tile_units) {
            vi32 low = {}, high = {};
            if (some & 3)
                interleave(row ? row + d : other + d, other ? other + d : row + d, value_dim - d, some, low, high);
            store(to, low);
            store(to + tile_units, high);
        }
    }
    float *out = rows[0]->out;
    const int64_t bytes = f.numbers * int64_t(sizeof(float));
    order_memory();
    for (int64_t d = 0; d < f.numbers; d += tile_side, out += tile_side) {
        const int32_t *tile = f.values + d * group;
        _tile_loadd(6, out, bytes);
        _tile_loadd(7, f.weights, units * sizeof(int32_t));
        _tile_loadd(5, tile, 64);
        _tile_dpbf16ps(6, 7, 5);
        _tile_loadd(7, f.weights + group, units * sizeof(int32_t));
        _tile_loadd(5, tile + f.numbers * group, 64);
        _tile_dpbf16ps(6, 7, 5);
        _tile_stored(6, out, bytes);
    }
    order_memory();
}
