// Tile registers: eight of 16 rows of 64 bytes, which hold 16 x 16 sums or 16 rows of 16 units. One instruction
// (TDPBF16PS) adds to C[m][n] the products of A[m][k] and B[k][n] over 16 units k: C has a row of sums, A a row of units
// along k, and B a row of units for each k. It sums the first numbers of all units, then the second ones, adds the two,
// and that to C; it takes denormals for 0 and makes none.
//
// A sum's bits depend on its own units alone, not on its place in a tile, and zeros change nothing. So units stand in
// registers by their place on the axis summed over, filled up with zeros, and a row's bits are its own.

enum { tile_side = 16, tile_units = tile_side * tile_side };
enum { tile_keys = 2 * tile_side, tile_lanes = 2 * tile_side }; // of a group of keys, and of a tile of queries

// bfloat16 pairs: one row alone by the vector dot product, all else in tile registers.
struct Tiles : Pairs {
    static constexpr bool tiled = true;
};

// Numbers that are each the sum of some in bfloat16: three of float32, two of float16 (amx_parts.inl.h).
template <class T> struct Parts {
    using element = T;
    using sum = float;
    using unit = int32_t;
    static constexpr int numbers = 2, parts = sizeof(T) == sizeof(float) ? 3 : 2;
    static constexpr bool tiled = true;
};

// The tiles' shape is part of a thread's state, and other libraries use tiles too. So a kernel sets it when it begins
// and gives the registers back when it ends.
template <> struct Registers<Tiles> {
    Registers() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        __asm__ volatile("" : : "r"(&shape) : "memory");
        _tile_loadconfig(&shape);
    }
    ~Registers() { _tile_release(); }
    Registers(const Registers &) = delete;
    Registers &operator=(const Registers &) = delete;
};
template <class T> struct Registers<Parts<T>> : Registers<Tiles> {};

// What stands before this in the text is in memory before a tile is loaded, and the other way about: compilers do not
// all know that tile instructions touch memory.
TW_INLINE void order_memory() { __asm__ volatile("" : : : "memory"); }

// A product is made in units of two tiles of sums, in the registers 0 and 1 or, every other time, 2 and 3. What a unit
// stores is written down after the next unit's products: a store that waits for its product keeps the processor from
// looking further.
enum Turn { FIRST, SECOND };
TW_INLINE void load_tile(Turn turn, int which, const void *from, int64_t bytes) {
    if (turn == FIRST) {
        if (which)
            _tile_loadd(1, from, bytes);
        else
            _tile_loadd(0, from, bytes);
    } else {
        if (which)
            _tile_loadd(3, from, bytes);
        else
            _tile_loadd(2, from, bytes);
    }
}
TW_INLINE void store_tile(Turn turn, int which, void *to, int64_t bytes) {
    if (turn == FIRST) {
        if (which)
            _tile_stored(1, to, bytes);
        else
            _tile_stored(0, to, bytes);
    } else {
        if (which)
            _tile_stored(3, to, bytes);
        else
            _tile_stored(2, to, bytes);
    }
}

// The unit's tiles += A B, with A in the registers 4 and 5 and B in 6 and 7: one A and two B, or two A and one B.
TW_INLINE void multiply_columns(Turn turn) {
    if (turn == FIRST) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    } else {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
    }
}
TW_INLINE void multiply_rows(Turn turn) {
    if (turn == FIRST) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
    } else {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
    }
}

// The numbers [d, d + 8) of the 32 rows from r on, for each of the 8 a row of 16 pairs. Pieces of 16 bytes of the rows r,
// r + 8, r + 16 and r + 24 share a vector, so that the rest of the turn stays within 16 bytes.
TW_INLINE void turn_eight_columns(const Rows<bfloat> &from, int64_t r, int64_t d, int32_t *to) {
    const auto piece = [&](int64_t row) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from[row] + d)); };
    __m512i x[8], pairs[8], squares[8];
    TW_UNROLL(int i = 0; i < 8; ++i) {
        x[i] = _mm512_castsi128_si512(piece(r + i));
        x[i] = _mm512_inserti32x4(x[i], piece(r + i + 8), 1);
        x[i] = _mm512_inserti32x4(x[i], piece(r + i + 16), 2);
        x[i] = _mm512_inserti32x4(x[i], piece(r + i + 24), 3);
    }
    TW_UNROLL(int i = 0; i < 4; ++i) { // pairs of rows: columns 0 to 3, then 4 to 7
        pairs[i] = _mm512_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
        pairs[i + 4] = _mm512_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
    }
    TW_UNROLL(int i = 0; i < 8; i += 2) { // two pairs: columns 0 and 1, then 2 and 3
        squares[i] = _mm512_unpacklo_epi32(pairs[i], pairs[i + 1]);
        squares[i + 1] = _mm512_unpackhi_epi32(pairs[i], pairs[i + 1]);
    }
    TW_UNROLL(int i = 0; i < 8; ++i) {
        const int two = i / 4 * 4 + i / 2 % 2;
        const __m512i column = i % 2 ? _mm512_unpackhi_epi64(squares[two], squares[two + 2])
                                     : _mm512_unpacklo_epi64(squares[two], squares[two + 2]);
        store(to + i * tile_side, (vi32)column);
    }
}

// Rows of n numbers, turned about: to [groups of 32 rows][padded n][16], each group whole tiles that hold a number of
// the rows along k. Rows that do not exist are zeros.
TW_INLINE void columns_to_tiles(Rows<bfloat> from, int64_t count, int64_t n, int32_t *to) {
    for (int64_t r = 0; r < count; r += 2 * tile_side)
        for (int64_t d = 0; d < n; d += tile_side, to += tile_units) {
            if (count - r >= 2 * tile_side && n - d >= tile_side) {
                turn_eight_columns(from, r, d, to);
                turn_eight_columns(from, r, d + 8, to + 8 * tile_side);
                continue;
            }
            vi32 x[tile_side];
            for (int64_t i = 0; i < tile_side; ++i) {
                x[i] = vi32{};
                const int64_t rows = count - r - 2 * i, columns = n - d < tile_side ? n - d : int64_t(tile_side);
                if (rows <= 0) continue;
                const bfloat *first = from[r + 2 * i] + d, *second = rows > 1 ? from[r + 2 * i + 1] + d : nullptr;
                copy_across(first, second, columns, reinterpret_cast<int32_t *>(x + i));
            }
            transpose<int32_t>(x);
            for (int i = 0; i < tile_side; ++i) store(to + i * tile_side, x[i]);
        }
}
