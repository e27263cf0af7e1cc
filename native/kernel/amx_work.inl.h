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

template <> struct Background<Tiles> {
    float *scores = nullptr; // [32 keys][32 lanes], or NULL: all made
    const int32_t *keys, *query;
    int64_t key_stride, head_units, d = 0;
    bool half_scores; // whether only 16 of the keys exist
    float *out;       // [rows][32 lanes]
    const int32_t *weights, *values;
    int64_t groups = 0, group = 0, rows = 0, row = 0; // row >= rows: all added
    int part = 0;                                     // which of the four products is next
    float *owed = nullptr;                            // where the last unit is to be stored
    bool owed_half;                                   // whether only its first 16 rows
};

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

template <int PART> TW_INLINE void settle_part(const Background<Tiles> &work) {
    if (work.owed && !(PART >= 2 && work.owed_half)) store_part<PART>(quarter<PART>(work.owed), tile_lanes);
}

// What is owed from the part that is next on.
TW_INLINE void settle(Background<Tiles> &work) {
    if (work.part <= 0) settle_part<0>(work);
    if (work.part <= 1) settle_part<1>(work);
    if (work.part <= 2) settle_part<2>(work);
    settle_part<3>(work);
    work.owed = nullptr;
}

template <int PART> TW_INLINE void step_of_scores(Background<Tiles> &work) {
    settle_part<PART>(work);
    if (PART < 2 || !work.half_scores) {
        if (work.d == 0) clear_part<PART>();
        const int64_t bytes = work.key_stride * int64_t(sizeof(int32_t));
        const int32_t *keys = work.keys + work.d, *query = work.query + work.d * tile_lanes;
        if (PART == 0) {
            _tile_loadd(4, keys, bytes);
            _tile_loadd(6, query, tile_lanes * sizeof(int32_t));
        }
        if (PART == 1) _tile_loadd(7, query + tile_side, tile_lanes * sizeof(int32_t));
        if (PART == 2) _tile_loadd(5, keys + tile_side * work.key_stride, bytes);
        multiply_part<PART>();
    }
    if (PART < 3) return;
    work.owed = nullptr;
    if ((work.d += tile_side) < work.head_units) return;
    work.owed = work.scores;
    work.owed_half = work.half_scores;
    work.scores = nullptr;
}

template <int PART> TW_INLINE void step_of_values(Background<Tiles> &work) {
    settle_part<PART>(work);
    const bool half = work.row + tile_side == work.rows;
    if (PART < 2 || !half) {
        float *own = work.out + work.row * tile_lanes;
        if (work.group == 0) load_part<PART>(quarter<PART>(own), tile_lanes);
        const int32_t *weights = work.weights + work.group * tile_side * tile_lanes;
        const int32_t *values = work.values + (work.group * work.rows + work.row) * tile_side;
        if (PART == 0) {
            _tile_loadd(4, values, 64);
            _tile_loadd(6, weights, tile_lanes * sizeof(int32_t));
        }
        if (PART == 1) _tile_loadd(7, weights + tile_side, tile_lanes * sizeof(int32_t));
        if (PART == 2) _tile_loadd(5, values + tile_units, 64);
        multiply_part<PART>();
    }
    if (PART < 3) return;
    work.owed = nullptr;
    if (++work.group < work.groups) return;
    work.owed = work.out + work.row * tile_lanes;
    work.owed_half = half;
    work.group = 0;
    work.row += 2 * tile_side;
}

template <int PART> TW_INLINE void step_part(Background<Tiles> &work) {
    if (work.scores && (work.d || !work.group))
        step_of_scores<PART>(work);
    else
        step_of_values<PART>(work);
}

TW_INLINE void step(Background<Tiles> &work) {
    order_memory();
    switch (work.part) {
    case 0: step_part<0>(work); break;
    case 1: step_part<1>(work); break;
    case 2: step_part<2>(work); break;
    default: step_part<3>(work);
    }
    work.part = (work.part + 1) % 4;
    order_memory();
}

// Steps that should be done while a group is weighed: the scores of the next, and of the values of a run as many as let
// it be added while a run of its length is weighed.
TW_INLINE int64_t steps_beside_group(const Background<Tiles> &work) {
    const int64_t scores = work.scores ? work.head_units / tile_side : 0;
    if (work.row >= work.rows) return 4 * scores;
    const int64_t share = (work.rows + tile_side) / (2 * tile_side);
    const int64_t values = (work.rows - work.row + tile_side) / (2 * tile_side) * work.groups - work.group;
    return 4 * (scores + (values < share ? values : share));
}

static __attribute__((noinline)) void finish_scores(Background<Tiles> &work) {
    while (work.scores) step(work);
    settle(work);
    order_memory();
}

static __attribute__((noinline)) void finish_work(Background<Tiles> &work) {
    while (work.scores || work.row < work.rows) step(work);
    settle(work);
    order_memory();
}
