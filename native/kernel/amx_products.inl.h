// Products of the tile registers over whole arrays, in units of 32 x 32 sums in four tiles. For each 32 numbers summed over,
// two tiles of either side are loaded and each is multiplied with each, so that a product waits for one load on average.

// A column or a row of units: each [32 rows][32 columns] = or += a [32 rows][16 units] times b [16 units][32 columns], summed
// over `groups` of 16 units.
struct TileProduct {
    const int32_t *a, *b;
    float *out;
    int64_t a_stride, b_stride, out_stride; // of rows
    int64_t a_step, b_step;                 // to the next group
    int64_t a_part = 0, b_part = 0;         // to the next part of its numbers
    int64_t groups;
    int64_t a_next, b_next, out_next; // to the next unit
    int64_t sixteens;                 // rows, where units stand below each other, else columns
    bool below, adds;                 // adds: to what is there; else to 0
};

// What is still to be stored: a store that waits for its product keeps the processor from looking further, so a tile is
// stored when its register is needed again.
struct OwedTiles {
    float *out = nullptr;
    int64_t stride;
    bool rows, columns; // whether the unit's second sixteen exist
};

template <int PART> TW_INLINE void settle_part(const OwedTiles &owed) {
    if (!owed.out || (PART >= 2 && !owed.rows) || (PART % 2 && !owed.columns)) return;
    store_part<PART>(owed.out + PART / 2 * tile_side * owed.stride + PART % 2 * tile_side, owed.stride);
}
TW_INLINE void settle(OwedTiles &owed) {
    settle_part<0>(owed);
    settle_part<1>(owed);
    settle_part<2>(owed);
    settle_part<3>(owed);
    owed.out = nullptr;
    order_memory();
}

template <int PART> TW_INLINE void begin_part(const TileProduct &p, const OwedTiles &owed) {
    settle_part<PART>(owed);
    if (p.adds)
        load_part<PART>(p.out + PART / 2 * tile_side * p.out_stride + PART % 2 * tile_side, p.out_stride);
    else
        clear_part<PART>();
}

// One group of a unit, from one product of its parts on; rows, columns: whether the unit's second sixteen exist.
template <class M, Factors OF, int PRODUCT = 0>
TW_INLINE void multiply_group(const TileProduct &p, int64_t group, bool begins, bool rows, bool columns,
                              const OwedTiles &owed) {
    constexpr PartsOfProduct parts = parts_of_product<M, OF>(PRODUCT);
    const int32_t *a = p.a + group * p.a_step + parts.left * p.a_part,
                  *b = p.b + group * p.b_step + parts.right * p.b_part;
    const int64_t a_bytes = p.a_stride * int64_t(sizeof(int32_t)), b_bytes = p.b_stride * int64_t(sizeof(int32_t));
    if (begins) begin_part<0>(p, owed);
    if (parts.new_left) _tile_loadd(4, a, a_bytes);
    if (parts.new_right) _tile_loadd(6, b, b_bytes);
    multiply_part<0>();
    if (columns) {
        if (begins) begin_part<1>(p, owed);
        if (parts.new_right) _tile_loadd(7, b + tile_side, b_bytes);
        multiply_part<1>();
    }
    if (rows) {
        if (begins) begin_part<2>(p, owed);
        if (parts.new_left) _tile_loadd(5, a + tile_side * p.a_stride, a_bytes);
        multiply_part<2>();
    }
    if (rows && columns) {
        if (begins) begin_part<3>(p, owed);
        multiply_part<3>();
    }
    if constexpr (PRODUCT + 1 < products_of_parts<M, OF>.count)
        multiply_group<M, OF, PRODUCT + 1>(p, group, false, rows, columns, owed);
}
template <class M, Factors OF>
TW_INLINE void multiply_unit(const TileProduct &p, bool rows, bool columns, OwedTiles &owed) {
    multiply_group<M, OF>(p, 0, true, rows, columns, owed);
    for (int64_t g = 1; g < p.groups; ++g) multiply_group<M, OF>(p, g, false, rows, columns, owed);
    owed.out = p.out;
    owed.stride = p.out_stride;
    owed.rows = rows;
    owed.columns = columns;
}

template <class M, Factors OF> TW_INLINE void multiply(TileProduct p, OwedTiles &owed) {
    order_memory();
    for (; p.sixteens > 1; p.sixteens -= 2) {
        multiply_unit<M, OF>(p, true, true, owed);
        p.a += p.a_next;
        p.b += p.b_next;
        p.out += p.out_next;
    }
    if (p.sixteens) {
        settle(owed); // its own tiles are not all that may be owed
        multiply_unit<M, OF>(p, !p.below, p.below, owed);
    }
    order_memory();
}
