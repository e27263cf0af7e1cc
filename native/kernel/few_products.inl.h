// A row among few (few_rows.inl.h), and its two products: scores of W keys, and weighted values of a block of keys. Lanes
// hold the head axis.

template <class A> constexpr int64_t few_rows = lanes<A> / 2;

// Query rows of a kv head in the whole problem. It decides how rows are summed; a slab of rows must not, and nothing may
// where rows must not depend on their number.
TW_INLINE int64_t rows_of(const tw_problem &p) { return p.q_heads / p.kv_heads * p.q_len; }

// One row of the group. State as in Tile, with the sum still spread over the lanes.
template <class M> struct Row {
    using A = sum_of<M>;
    unit_of<M> *query; // [D in units], filled up with zeros to whole vectors
    A *out;            // [Dv], likewise, in the order of add_weighted
    A shift, limit;
    vec<A> sum;
    int64_t i, h;
    uint64_t seen; // keys of the current block
    bool masked;
    alignas(64) A scores[block_keys];           // then probabilities
    alignas(64) unit_of<M> weights[block_keys]; // the same after dropout, in units
};

// What an item keeps beside its rows: nothing, but for tile registers (amx_few_rows.inl.h).
template <class M> struct FewTiles {
    static int64_t space(const tw_problem &) { return 0; } // in accumulators
};

// Numbers of a row's out: whole vectors of units across two keys.
template <class M> TW_INLINE int64_t out_numbers(const tw_problem &p) {
    return M::numbers * padded_units<M>(p.value_dim);
}

template <class M> TW_INLINE size_t row_bytes(const tw_problem &p) {
    const int64_t numbers = padded_units<M>(p.head_dim) + out_numbers<M>(p);
    return rounded(sizeof(Row<M>)) + rounded(size_t(numbers) * sizeof(sum_of<M>));
}

// Scores of W keys with one row: W sums over the head axis, then one reduction.
template <class M, class T>
TW_INLINE vec<sum_of<M>> dot_products(const T *const *keys, const unit_of<M> *query, int64_t head_dim) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    vec<A> x[W] = {};
    int64_t d = 0;
    const int64_t whole = head_dim / (W * M::numbers) * W;
    for (; d < whole; d += W) {
        const vec<unit_of<M>> q = load(query + d);
        TW_UNROLL(int n = 0; n < W; ++n) x[n] = add_product(x[n], load_units<M>(keys[n] + d * M::numbers), q);
    }
    if (d * M::numbers < head_dim) {
        const vec<unit_of<M>> q = load(query + d);
        TW_UNROLL(int n = 0; n < W; ++n) x[n] = add_product(x[n], row_units<M>(keys[n], d, head_dim), q);
    }
    sum_lanes<A, W>(x);
    return x[0];
}

// Probabilities of a block as units across the keys.
template <class M> TW_INLINE void weights_to_units(const sum_of<M> *scores, unit_of<M> *weights) {
    constexpr int W = lanes<sum_of<M>>;
    for (int j = 0; j < block_keys; j += W * M::numbers, weights += W) {
        if constexpr (M::numbers == 1)
            store(weights, load(scores + j));
        else
            store(weights, narrow_beside(load(scores + j), load(scores + j + W)));
    }
}

// The numbers of a unit of keys, from column d of rows[j] on, as units across them: NC vectors, of which `left` numbers
// exist. Bits say which of the keys are read; the others are zeros. Pairs stand in the order in which they are
// interleaved: of 32 columns, the first half of each eight, then the second.
template <class M, int NC, class T>
TW_INLINE void values_across(Rows<T> rows, int j, int64_t d, int64_t left, uint64_t bits,
                             vec<unit_of<M>> (&value)[NC]) {
    constexpr int W = lanes<sum_of<M>>;
    const T *row = rows[j] + d;
    if constexpr (M::numbers == 1) {
        TW_UNROLL(int c = 0; c < NC; ++c)
            value[c] = left >= (c + 1) * W ? widen(row + c * W) : widen_first(row + c * W, int(left - c * W));
    } else {
        const T *next = bits & 2 ? rows[j + 1] + d : row; // no row stands behind the last
        TW_UNROLL(int c = 0; c < NC; c += 2)
            interleave(row + c * W, next + c * W, left - c * W, bits, value[c], value[c + 1]);
    }
}

// Keys and values of the block that is wanted next, asked for along the work on the one before: memory is the bound here.
// The processor's own prefetchers follow addresses within a page of 4 KB and start anew in the next. Where several pages at
// once come faster than one after another (tw_read_streams), the block is taken in four parts, and each step asks for a line
// of keys and of values from each.
template <class T> struct Ahead {
    static constexpr int64_t line = 64 / int64_t(sizeof(T)), most_parts = 4;
    Rows<T> keys, values;
    int64_t key_numbers, value_numbers;           // of a row
    int64_t parts, rows;                          // of the block: 1 or 4; of each part
    int64_t row, column;                          // of each part, the next to ask for; row = rows: nothing is left
    const T *key[most_parts], *value[most_parts]; // where that row begins
    int64_t steps;                                // of each call of ask

    __attribute__((always_inline)) void enter_row(int64_t i) {
        row = i;
        column = 0;
        if (row >= rows) return;
        key[0] = keys[row];
        value[0] = values[row];
        if (parts == 1) return;
        TW_UNROLL(int part = 1; part < most_parts; ++part) {
            key[part] = keys[part * rows + row];
            value[part] = values[part * rows + row];
        }
    }

    // So many quarters of the lines will be asked for in so many calls: a few in each, for many at once would wait for one
    // another.
    __attribute__((always_inline)) void spread(int64_t quarters, int64_t calls) {
        const int64_t longest = key_numbers > value_numbers ? key_numbers : value_numbers;
        const int64_t all = (longest + line - 1) / line * rows * quarters / 4;
        steps = (all + calls - 1) / calls;
    }

    __attribute__((always_inline)) void ask() {
        for (int64_t n = 0; n < steps && row < rows; ++n) {
            ask_for_lines(0);
            if (parts != 1)
                TW_UNROLL(int part = 1; part < most_parts; ++part) ask_for_lines(part);
            column += line;
            if (column >= key_numbers && column >= value_numbers) enter_row(row + 1);
        }
    }

    __attribute__((always_inline)) void ask_for_lines(int part) {
        if (column < key_numbers) __builtin_prefetch(key[part] + column, 0, 2);
        if (column < value_numbers) __builtin_prefetch(value[part] + column, 0, 2);
    }
};

// The columns from d of add_weighted, in NC vectors of COUNT rows; `left` of them exist. Keys that `some` leaves out are
// not read.
template <class M, int COUNT, int NC, class T>
TW_INLINE void weighted_columns(Row<M> *const *rows, Rows<T> values, int64_t left, int64_t d, uint64_t some,
                                Ahead<T> &ahead) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    vec<A> out[COUNT][NC];
    TW_UNROLL(int r = 0; r < COUNT; ++r)
        TW_UNROLL(int c = 0; c < NC; ++c) out[r][c] = load(rows[r]->out + d + c * W);
    for (uint64_t rest = some; rest;) {
        const int unit = __builtin_ctzll(rest) / M::numbers, j = unit * M::numbers;
        vec<unit_of<M>> value[NC];
        values_across<M>(values, j, d, left, rest >> j, value);
        rest &= rest - 1;
        if constexpr (M::numbers > 1) rest &= ~(uint64_t(2) << j);
        ahead.ask();
        TW_UNROLL(int r = 0; r < COUNT; ++r) {
            const vec<unit_of<M>> weight = splat(rows[r]->weights[unit]);
            TW_UNROLL(int c = 0; c < NC; ++c) out[r][c] = add_product(out[r][c], value[c], weight);
        }
    }
    TW_UNROLL(int r = 0; r < COUNT; ++r)
        TW_UNROLL(int c = 0; c < NC; ++c) store(rows[r]->out + d + c * W, out[r][c]);
}

// out += weights * values, for the keys of the block that `some` names.
template <class M, int COUNT, class T>
TW_INLINE void add_weighted(Row<M> *const *rows, Rows<T> values, int64_t value_dim, uint64_t some, Ahead<T> &ahead) {
    constexpr int W = lanes<sum_of<M>>, N = M::numbers;
    int64_t d = 0;
    for (; d + 4 * W <= value_dim; d += 4 * W) weighted_columns<M, COUNT, 4>(rows, values, 4 * W, d, some, ahead);
    for (; d < value_dim; d += N * W) weighted_columns<M, COUNT, N>(rows, values, value_dim - d, d, some, ahead);
}
