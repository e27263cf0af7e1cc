// What the tile registers do while the vectors weigh a group of keys: the scores of the next group, and the values of the
// last run.
//
// Vectors and tile registers work at the same time only where their instructions stand close together, so the products
// are cut into steps of one, which stand between the vectors' instructions. (For some 400 cycles after any tile
// instruction the processor at hand multiplies vectors of 512 bits on one port instead of two; only additions, logic and
// comparisons keep both. Work in long separate phases would pay for that and gain nothing.)
//
// A unit is 32 x 32 sums in four tiles: the scores of a group, or 32 columns of values. For each 32 numbers summed over,
// two tiles of either side are loaded and each is multiplied with each, in four steps of one product. A tile of sums is
// stored when its register is needed again, since a store that waits for its product keeps the processor from looking
// further.

// What is multiplied: the operands themselves, or one of them and what was made of others and is rounded to its parts.
enum Factors { OPERANDS, WEIGHTS };

// The products of parts, in an order in which each has a part in common with the one before. Of those left out the largest
// is as small as the rounding: of a float32 product, or of a weight to two parts.
struct ProductsOfParts {
    int count;
    int8_t left[6], right[6];
};
constexpr ProductsOfParts one_product = {1, {0}, {0}}, three_products = {3, {1, 0, 0}, {0, 0, 1}},
                          four_products = {4, {1, 1, 0, 0}, {0, 1, 1, 0}},
                          six_products = {6, {2, 1, 1, 0, 0, 0}, {0, 0, 1, 1, 2, 0}};
template <class M, Factors OF>
constexpr ProductsOfParts products_of_parts = M::parts == 1    ? one_product
                                              : M::parts == 3  ? six_products
                                              : OF == OPERANDS ? four_products
                                                               : three_products;
struct PartsOfProduct {
    int left, right;
    bool new_left, new_right; // whether the product before had others
};
template <class M, Factors OF> constexpr PartsOfProduct parts_of_product(int product) {
    constexpr ProductsOfParts of = products_of_parts<M, OF>;
    return {of.left[product], of.right[product], product == 0 || of.left[product] != of.left[product - 1],
            product == 0 || of.right[product] != of.right[product - 1]};
}

// From one part of a run's probabilities to the next.
template <class M> constexpr int64_t part_of_run = (waiting_keys<M> + TW_GROUP_KEYS) / M::numbers * tile_lanes;

struct TileWork {
    float *scores = nullptr; // [32 keys][32 lanes], or NULL: all made
    const int32_t *keys, *query;
    int64_t key_stride, head_units, d = 0;
    bool half_scores; // whether only 16 of the keys exist
    float *out;       // [rows][32 lanes]
    const int32_t *weights, *values;
    int64_t groups = 0, group = 0, rows = 0, row = 0; // row >= rows: all added
    int step = 0;                                     // of 16 units of a unit of sums, which is next
    bool in_scores;                                   // whether the step before was one of scores
    float *owed = nullptr;                            // where the last unit is to be stored
    bool owed_half;                                   // whether only its first 16 rows
};
template <> struct Background<Tiles> : TileWork {};
template <class T> struct Background<Parts<T>> : TileWork {};

// The instructions of a part; their operands have to be written as numbers.
template <int PART> TW_INLINE void clear_part() {
    if (PART == 0) _tile_zero(0);
    if (PART == 1) _tile_zero(1);
    if (PART == 2) _tile_zero(2);
    if (PART == 3) _tile_zero(3);
}
template <int PART> TW_INLINE void load_part(const float *from, int64_t stride) {
    const int64_t bytes = stride * int64_t(sizeof(float));
    if (PART == 0) _tile_loadd(0, from, bytes);
    if (PART == 1) _tile_loadd(1, from, bytes);
    if (PART == 2) _tile_loadd(2, from, bytes);
    if (PART == 3) _tile_loadd(3, from, bytes);
}
template <int PART> TW_INLINE void store_part(float *to, int64_t stride) {
    const int64_t bytes = stride * int64_t(sizeof(float));
    if (PART == 0) _tile_stored(0, to, bytes);
    if (PART == 1) _tile_stored(1, to, bytes);
    if (PART == 2) _tile_stored(2, to, bytes);
    if (PART == 3) _tile_stored(3, to, bytes);
}
template <int PART> TW_INLINE void multiply_part() {
    if (PART == 0) _tile_dpbf16ps(0, 4, 6);
    if (PART == 1) _tile_dpbf16ps(1, 4, 7);
    if (PART == 2) _tile_dpbf16ps(2, 5, 6);
    if (PART == 3) _tile_dpbf16ps(3, 5, 7);
}

template <int PART> TW_INLINE float *quarter(float *unit) {
    return unit + PART / 2 * tile_side * tile_lanes + PART % 2 * tile_side;
}

template <int PART> TW_INLINE void settle_part(const TileWork &work) {
    if (work.owed && !(PART >= 2 && work.owed_half)) store_part<PART>(quarter<PART>(work.owed), tile_lanes);
}

// What is owed from the step that is next on.
TW_INLINE void settle(TileWork &work) {
    if (work.step <= 0) settle_part<0>(work);
    if (work.step <= 1) settle_part<1>(work);
    if (work.step <= 2) settle_part<2>(work);
    settle_part<3>(work);
    work.owed = nullptr;
}

// Steps in which 16 units of 32 rows are multiplied by 16 units of 32 columns: a product each, or, of parts, four.
template <class M, Factors OF> constexpr int steps_of_units = M::parts > 1 ? products_of_parts<M, OF>.count : 4;

// Where the units of a step stand: 32 rows and 32 columns of 16 units each, and from one part to the next.
struct StepPlace {
    const int32_t *a, *b;
    int64_t a_stride, a_part, b_part;
    bool half; // only 16 of the rows exist
};

// A product of parts, for a quarter of a unit. begins: the first of the unit, whose sums begin with those at `from`, or with 0
// (NULL).
template <class M, Factors OF, int PRODUCT, int PART>
TW_INLINE void multiply_quarter(const TileWork &work, const StepPlace &at, bool begins, float *from) {
    constexpr PartsOfProduct parts = parts_of_product<M, OF>(PRODUCT);
    const int64_t a_bytes = at.a_stride * int64_t(sizeof(int32_t)), b_bytes = tile_lanes * int64_t(sizeof(int32_t));
    const int32_t *a = at.a + parts.left * at.a_part, *b = at.b + parts.right * at.b_part;
    if (PRODUCT == 0 && begins) settle_part<PART>(work);
    if (PART >= 2 && at.half) return;
    if (PRODUCT == 0 && begins) {
        if (from)
            load_part<PART>(quarter<PART>(from), tile_lanes);
        else
            clear_part<PART>();
    }
    if (PART == 0 && parts.new_left) _tile_loadd(4, a, a_bytes);
    if (PART == 0 && parts.new_right) _tile_loadd(6, b, b_bytes);
    if (PART == 1 && parts.new_right) _tile_loadd(7, b + tile_side, b_bytes);
    if (PART == 2 && parts.new_left) _tile_loadd(5, a + tile_side * at.a_stride, a_bytes);
    multiply_part<PART>();
}
template <class M, Factors OF, int STEP>
TW_INLINE void multiply_step(TileWork &work, const StepPlace &at, bool begins, float *from) {
    if constexpr (STEP >= steps_of_units<M, OF>) {
        return;
    } else if constexpr (M::parts > 1) {
        multiply_quarter<M, OF, STEP, 0>(work, at, begins, from);
        multiply_quarter<M, OF, STEP, 1>(work, at, begins, from);
        multiply_quarter<M, OF, STEP, 2>(work, at, begins, from);
        multiply_quarter<M, OF, STEP, 3>(work, at, begins, from);
    } else {
        multiply_quarter<M, OF, 0, STEP>(work, at, begins, from);
    }
    if (STEP == (M::parts > 1 ? 0 : 3) && begins) work.owed = nullptr;
}

// The next step of a unit. Returns whether these 16 units are all multiplied.
template <class M, Factors OF>
TW_INLINE bool step_of_unit(TileWork &work, const StepPlace &at, bool begins, float *from) {
    order_memory();
    switch (work.step) {
    case 0: multiply_step<M, OF, 0>(work, at, begins, from); break;
    case 1: multiply_step<M, OF, 1>(work, at, begins, from); break;
    case 2: multiply_step<M, OF, 2>(work, at, begins, from); break;
    case 3: multiply_step<M, OF, 3>(work, at, begins, from); break;
    case 4: multiply_step<M, OF, 4>(work, at, begins, from); break;
    default: multiply_step<M, OF, 5>(work, at, begins, from);
    }
    order_memory();
    if (++work.step < steps_of_units<M, OF>) return false;
    work.step = 0;
    return true;
}

template <class M> TW_INLINE void step_of_scores(Background<M> &work) {
    const StepPlace at = {work.keys + work.d, work.query + work.d * tile_lanes, work.key_stride,
                          work.head_units,    work.head_units * tile_lanes,     work.half_scores};
    if (!step_of_unit<M, OPERANDS>(work, at, work.d == 0, nullptr) || (work.d += tile_side) < work.head_units) return;
    work.d = 0;
    work.owed = work.scores;
    work.owed_half = work.half_scores;
    work.scores = nullptr;
}

template <class M> TW_INLINE void step_of_values(Background<M> &work) {
    const StepPlace at = {work.values + (work.group * M::parts * work.rows + work.row) * tile_side,
                          work.weights + work.group * tile_side * tile_lanes,
                          tile_side,
                          work.rows * tile_side,
                          part_of_run<M>,
                          work.row + tile_side == work.rows};
    float *out = work.out + work.row * tile_lanes;
    if (!step_of_unit<M, WEIGHTS>(work, at, work.group == 0, out) || ++work.group < work.groups) return;
    work.group = 0;
    work.owed = out;
    work.owed_half = at.half;
    work.row += 2 * tile_side;
}

// Whether the unit at hand is one of scores: it was begun, or none of values was.
template <class M> TW_INLINE void step(Background<M> &work) {
    if (work.step ? work.in_scores : work.scores && (work.d || !work.group)) {
        work.in_scores = true;
        step_of_scores(work);
    } else {
        work.in_scores = false;
        step_of_values(work);
    }
}

// Steps that should be done while a group is weighed: the scores of the next, and of the values of a run as many as let
// it be added while a run of its length is weighed.
template <class M> TW_INLINE int64_t steps_beside_group(const Background<M> &work) {
    constexpr int steps = steps_of_units<M, WEIGHTS>;
    const int64_t scores = work.scores ? steps_of_units<M, OPERANDS> * work.head_units / tile_side : 0;
    if (work.row >= work.rows) return scores;
    const int64_t share = steps * ((work.rows + tile_side) / (2 * tile_side));
    const int64_t values = steps * ((work.rows - work.row + tile_side) / (2 * tile_side) * work.groups - work.group);
    return scores + (values < share ? values : share);
}

template <class M> static __attribute__((noinline)) void finish_scores(Background<M> &work) {
    while (work.scores) step(work);
    settle(work);
    order_memory();
}

template <class M> static __attribute__((noinline)) void finish_work(Background<M> &work) {
    while (work.scores || work.row < work.rows) step(work);
    settle(work);
    order_memory();
}
