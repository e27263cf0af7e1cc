#if defined(__AMX_BF16__)
static double tile_peak_probe(int64_t steps) {
    const Registers<Tiles> registers; // all zeros
    for (int64_t step = 0; step < steps; ++step) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return 2.0 * 4 * tile_units * 2 * tile_side * double(steps);
}
#endif

// Reads numbers, whole vectors of them, four at a time, in the order of memory.
static float read_probe(const float *from, int64_t count) {
    constexpr int W = lanes<float>;
    vf sum[4] = {};
    for (int64_t at = 0; at + 4 * W <= count; at += 4 * W)
        TW_UNROLL(int i = 0; i < 4; ++i) sum[i] += load(from + at + i * W);
    return ((sum[0] + sum[1]) + (sum[2] + sum[3]))[0];
}

// The peak of this page: twelve independent chains of the products that a type's kernels are made of, nothing loaded,
// nothing stored; for tile registers four, as many as there are for sums. Their starts come from memory, so that the
// compiler can neither foresee a chain nor join two.
template <class M> static double peak_probe(int64_t steps, float *start) {
#if defined(__AMX_BF16__)
    if constexpr (M::tiled) // half of all products are of weights
        return tile_peak_probe(steps) * 2 /
               (products_of_parts<M, OPERANDS>.count + products_of_parts<M, WEIGHTS>.count);
#endif
    using A = sum_of<M>;
    constexpr int chains = 12;
    vec<A> a[chains];
    int32_t ones = 0x3F803F80; // 1 and 1 in bfloat16
    __asm__("" : "+r"(ones));  // gcc 12 for ARM takes it, as a known vector of bfloat16, for float16
    TW_UNROLL(int i = 0; i < chains; ++i) a[i] = splat(A(start[i]));
    for (int64_t step = 0; step < steps; ++step)
        TW_UNROLL(int i = 0; i < chains; ++i) {
            if constexpr (M::numbers == 1)
                a[i] = add_product(splat(A(1e-6)), a[i], splat(A(0.999999)));
            else
                a[i] = add_product(a[i], splat(ones), splat(ones));
        }
    TW_UNROLL(int i = 0; i < chains; ++i) start[i] = float(a[i][0]);
    return 2.0 * chains * M::numbers * lanes<A> * double(steps);
}
