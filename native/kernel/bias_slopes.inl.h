// Gradients of biases: sums of the scores' gradient through strides (tw_gather). A vector of ds holds W rows of the tile
// with one key. What belongs to a row's consecutive keys is turned about first, what many pairs share is summed in
// registers first, and what is added to memory is exactly what the pairs of the block reach, so that segments of keys
// that run at the same time never touch the same number. The order of a sum is that of blocks and lanes.

// W rows of a tile, and where what they gather for the block's first key stands.
template <class A> struct Gathered {
    const A *ds; // [keys][width]
    int64_t width, keys;
    int lanes_used; // the others repeat a row
    A *rows[lanes<A>];
};

// The rows' gradients with one key, zeros where there is no row or no key.
template <class A> TW_INLINE vec<A> slopes_of_key(const Gathered<A> &g, int64_t j) {
    if (j >= g.keys) return vec<A>{};
    const vec<A> x = load(g.ds + j * g.width);
    return g.lanes_used < lanes<A> ? select<A>(first_bits(g.lanes_used), x, vec<A>{}) : x;
}

template <class A> TW_INLINE void add_numbers(A *to, vec<A> x, int64_t count) {
    if (count >= lanes<A>)
        store(to, load(to) + x);
    else
        for (int n = 0; n < count; ++n) to[n] += x[n];
}

// Each row to its own consecutive numbers; rows may share some. A row is added as a whole, since rows may lie so that
// they displace one another from the cache.
template <class A> static void gather_rows(const Gathered<A> &g) {
    constexpr int W = lanes<A>;
    A turned[W][block_keys];
    for (int64_t j = 0; j < g.keys; j += W) {
        vec<A> x[W];
        TW_UNROLL(int n = 0; n < W; ++n) x[n] = slopes_of_key(g, j + n);
        transpose<A>(x);
        TW_UNROLL(int l = 0; l < W; ++l) store(turned[l] + j, x[l]);
    }
    for (int l = 0; l < g.lanes_used; ++l)
        for (int64_t j = 0; j < g.keys; j += W) add_numbers(g.rows[l] + j, load(turned[l] + j), g.keys - j);
}

// All rows to the same consecutive numbers.
template <class A> static void gather_sums_of_rows(const Gathered<A> &g) {
    constexpr int W = lanes<A>;
    for (int64_t j = 0; j < g.keys; j += W) {
        vec<A> x[W];
        TW_UNROLL(int n = 0; n < W; ++n) x[n] = slopes_of_key(g, j + n);
        sum_lanes<A, W>(x);
        add_numbers(g.rows[0] + j, x[0], g.keys - j);
    }
}

// Each row's sum over the keys to one number.
template <class A> static void gather_sums_of_keys(const Gathered<A> &g) {
    vec<A> sum = {};
    for (int64_t j = 0; j < g.keys; ++j) sum += load(g.ds + j * g.width);
    TW_UNROLL(int l = 0; l < lanes<A>; ++l)
        if (l < g.lanes_used) *g.rows[l] += sum[l];
}

// Lane l of key N, counted from a multiple of W, lies on diagonal N - l. Moved N lanes down, lane m holds diagonal -m; the
// first N lanes leave for `next`, where lane m holds diagonal W - m.
template <class A, int N, int... P> TW_INLINE void add_skewed(vec<A> x, vec<A> &sum, vec<A> &next, indices<P...>) {
    sum += __builtin_shufflevector(x, vec<A>{}, (P + N)...);
    if constexpr (N > 0) next += __builtin_shufflevector(vec<A>{}, x, (P + N)...);
}

template <class A, int... N>
TW_INLINE void add_diagonals(const Gathered<A> &g, int64_t j, vec<A> &sum, vec<A> &next, indices<N...> lane) {
    (add_skewed<A, N>(slopes_of_key(g, j + N), sum, next, lane), ...);
}

// Consecutive rows to consecutive numbers, the last row first: sums along diagonals.
template <class A> static void gather_diagonals(const Gathered<A> &g) {
    constexpr int W = lanes<A>;
    A sums[block_keys + 2 * W]; // diagonal d at W - 1 + d
    vec<A> sum = {};
    int64_t j = 0;
    for (; j < g.keys; j += W) {
        vec<A> next = {};
        add_diagonals(g, j, sum, next, first_indices<W>{});
        store(sums + j, reversed<A>(sum, first_indices<W>{}));
        sum = next;
    }
    store(sums + j, reversed<A>(sum, first_indices<W>{}));
    const int64_t first = 1 - g.lanes_used;
    for (int64_t d = first; d < g.keys; ++d) g.rows[0][d] += sums[W - 1 + d];
}

// Adds ds [keys][tile.width], of the keys from `key`, to what gathers them.
template <class M>
static void gather_slopes(const Slopes<M> &s, const Tile<M> &tile, int64_t key, int64_t keys, const sum_of<M> *ds) {
    using A = sum_of<M>;
    constexpr int W = lanes<A>;
    const tw_gradients &gradients = *s.gradients;
    for (int t = 0; t < gradients.gather_count; ++t) {
        const tw_gather &own = gradients.gather[t];
        for (int first = 0; first < tile.rows; first += W) {
            Gathered<A> g = {ds + first, tile.width, keys, tile.rows - first < W ? tile.rows - first : W, {}};
            bool same = true, descending = true;
            for (int l = 0; l < g.lanes_used; ++l) {
                g.rows[l] = static_cast<A *>(own.data) + s.b * own.stride_b + tile.h[first + l] * own.stride_h +
                            tile.i[first + l] * own.stride_i + key * own.stride_j;
                same = same && g.rows[l] == g.rows[0];
                descending = descending && g.rows[l] == g.rows[0] - l;
            }
            if (own.stride_j == 0)
                gather_sums_of_keys(g);
            else if (same)
                gather_sums_of_rows(g);
            else if (descending)
                gather_diagonals(g);
            else
                gather_rows(g);
        }
    }
}

// Asks for the memory that a block's gradients will be added to, while they are not known yet.
template <class M> static void fetch_gathered(const Slopes<M> &s, const Tile<M> &tile, int64_t key, int n) {
    using A = sum_of<M>;
    const tw_gradients &gradients = *s.gradients;
    for (int t = 0; t < gradients.gather_count; ++t) {
        const tw_gather &own = gradients.gather[t];
        if (own.stride_j == 0 || own.stride_i == 0 || own.stride_i == -1) continue; // a few numbers for the whole block
        for (int l = 0; l < tile.rows; ++l) {
            const A *row = static_cast<const A *>(own.data) + s.b * own.stride_b + tile.h[l] * own.stride_h +
                           tile.i[l] * own.stride_i + key;
            for (int j = 0; j < n; j += lanes<A>) __builtin_prefetch(row + j, 1, 2);
        }
    }
}
