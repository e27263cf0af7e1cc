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

// The products of parts, small ones first, in an order in which each has a part in common with the one before.
template <class M> constexpr int products_of_parts = M::parts == 3 ? 6 : 1;
struct PartsOfProduct {
    int left, right;
    bool new_left, new_right; // whether the product before had others
};
template <class M> constexpr PartsOfProduct parts_of_product(int product) {
    constexpr int8_t left[] = {2, 1, 1, 0, 0, 0}, right[] = {0, 0, 1, 1, 2, 0};
    if (M::parts == 1) return {0, 0, true, true};
    return {left[product], right[product], product == 0 || left[product] != left[product - 1],
            product == 0 || right[product] != right[product - 1]};
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
    int product = 0;                                  // of parts, which is next
    bool in_scores;                                   // whether the step before was one of scores
    float *owed = nullptr;                            // where the last unit is to be stored
    bool owed_half;                                   // whether only its first 16 rows
};
template <> struct Background<Tiles> : TileWork {};
template <> struct Background<Thirds> : TileWork {};

// The instructions of a part; their operands have to be written as numbers.
template <int PART> struct Part {
    static constexpr int value = PART;
};
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

TW_INLINE void settle(TileWork &work) {
    settle_part<0>(work);
    settle_part<1>(work);
    settle_part<2>(work);
    settle_part<3>(work);
    work.owed = nullptr;
}

// Where the units of a step stand: 32 rows and 32 columns of 16 units each, and from one part to the next.
struct StepPlace {
    const int32_t *a, *b;
    int64_t a_stride, a_part, b_part;
    bool half; // only 16 of the rows exist
};

// One step, a product of parts. BEGINS: the first of a unit, whose sums begin with those at `from`, or with 0 (NULL).
template <class M, int PRODUCT, bool BEGINS = false>
TW_INLINE void multiply_unit(const TileWork &work, const StepPlace &at, float *from = nullptr) {
    constexpr PartsOfProduct parts = parts_of_product<M>(PRODUCT);
    const int64_t a_bytes = at.a_stride * int64_t(sizeof(int32_t));
    const int32_t *a = at.a + parts.left * at.a_part, *b = at.b + parts.right * at.b_part;
    const auto begin = [&](auto part) {
        constexpr int PART = decltype(part)::value;
        if (!BEGINS) return;
        settle_part<PART>(work);
        if (PART >= 2 && at.half) return;
        if (from)
            load_part<PART>(quarter<PART>(from), tile_lanes);
        else
            clear_part<PART>();
    };
    order_memory();
    begin(Part<0>());
    if (parts.new_left) _tile_loadd(4, a, a_bytes);
    if (parts.new_right) _tile_loadd(6, b, tile_lanes * sizeof(int32_t));
    multiply_part<0>();
    begin(Part<1>());
    if (parts.new_right) _tile_loadd(7, b + tile_side, tile_lanes * sizeof(int32_t));
    multiply_part<1>();
    begin(Part<2>());
    if (!at.half) {
        if (parts.new_left) _tile_loadd(5, a + tile_side * at.a_stride, a_bytes);
        multiply_part<2>();
    }
    begin(Part<3>());
    if (!at.half) multiply_part<3>();
    order_memory();
}

// The next step of a unit. Returns whether its products of parts are all made.
template <class M> TW_INLINE bool step_of_unit(TileWork &work, const StepPlace &at, bool begins, float *from) {
    if constexpr (M::parts > 1) {
        switch (work.product++) {
        case 1: multiply_unit<M, 1>(work, at); return false;
        case 2: multiply_unit<M, 2>(work, at); return false;
        case 3: multiply_unit<M, 3>(work, at); return false;
        case 4: multiply_unit<M, 4>(work, at); return false;
        case 5:
            multiply_unit<M, 5>(work, at);
            work.product = 0;
            return true;
        }
    }
    if (begins) {
        multiply_unit<M, 0, true>(work, at, from);
        work.owed = nullptr;
    } else {
        multiply_unit<M, 0>(work, at);
    }
    return M::parts == 1;
}

template <class M> TW_INLINE void step_of_scores(Background<M> &work) {
    const StepPlace at = {work.keys + work.d, work.query + work.d * tile_lanes, work.key_stride,
                          work.head_units,    work.head_units * tile_lanes,     work.half_scores};
    if (!step_of_unit<M>(work, at, work.d == 0, nullptr) || (work.d += tile_side) < work.head_units) return;
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
    if (!step_of_unit<M>(work, at, work.group == 0, out) || ++work.group < work.groups) return;
    work.group = 0;
    work.owed = out;
    work.owed_half = at.half;
    work.row += 2 * tile_side;
}

// Whether the unit at hand is one of scores: it was begun, or none of values was.
template <class M> TW_INLINE void step(Background<M> &work) {
    if (work.product ? work.in_scores : work.scores && (work.d || !work.group)) {
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
    constexpr int products = products_of_parts<M>;
    const int64_t scores = work.scores ? products * work.head_units / tile_side : 0;
    if (work.row >= work.rows) return scores;
    const int64_t share = products * ((work.rows + tile_side) / (2 * tile_side));
    const int64_t values = products * ((work.rows - work.row + tile_side) / (2 * tile_side) * work.groups - work.group);
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
