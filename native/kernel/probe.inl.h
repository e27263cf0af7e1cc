// The float32 multiply-add peak of this page: twelve independent chains, nothing loaded, nothing stored. Their starts
// come from memory, so that the compiler can neither foresee a chain nor join two.
static double peak_probe(int64_t steps, float *start) {
    constexpr int chains = 12;
    vf a[chains];
    const vf factor = splat<float>(0.999999f), term = splat<float>(1e-6f);
    TW_UNROLL for (int i = 0; i < chains; ++i) a[i] = splat<float>(start[i]);
    for (int64_t step = 0; step < steps; ++step) TW_UNROLL for (int i = 0; i < chains; ++i) a[i] = a[i] * factor + term;
    TW_UNROLL for (int i = 0; i < chains; ++i) start[i] = a[i][0];
    return 2.0 * chains * lanes<float> * double(steps);
}
