// The units of scores. Exponents are of 2, so that a score s is wanted as s log2(e). What queries and keys are summed to is
// left as it is, since multiplied numbers would be rounded numbers, and scores of thousands wrong by thousands of their last
// places: where x is a product and f = |scale| log2(e),
//   the score is x f,   its reference the rounded x f of the row's largest x,   and what is raised x f - reference,
// rounded once (`fused`), where all that is large in both goes away exactly. The reference's own rounding is a common factor
// of the row, which out does not have and lse takes back. The scale's sign goes to the queries, which is exact, so that the
// largest score is that of the largest product.

template <class A> struct Scaling {
    A sign;         // of queries: 1, -1, or 0 where the scale is 0 (or so small that f would be)
    A factor;       // f > 0; anything where queries are multiplied by 0
    double natural; // one unit in natural ones: ln 2, but for the rounding of f
    double rest;    // what one natural one is in units beyond log2(e), for that rounding
};
template <class A> TW_INLINE Scaling<A> scaling_of(const tw_problem &p) {
    constexpr double ln_2 = 0.69314718055994530942;
    const double size = p.scale < 0 ? -p.scale : p.scale;
    const A factor = A(size * log2_e<double>);
    if (factor == 0) return {A(0), log2_e<A>, ln_2, 0};
    const A sign = p.scale < 0 ? A(-1) : A(1);
    if (p.softcap > 0) return {sign, factor, ln_2, 0};
    return {sign, factor, size / double(factor), -__builtin_fma(size, log2_e<double>, -double(factor)) / size};
}

// Numbers that parts hold (amx_parts.inl.h): from 2^-100 to below 2^56, as their bits with the sign shifted out. Of gradients
// of the output from 2^-70 on: what probabilities make of them should be whole, too.
constexpr uint32_t least_exponent = 27u << 24, end_exponent = 183u << 24, least_gradient = 57u << 24;

// From this factor on what is lost below 2^-126, where tile registers make 0 of sums and of products of parts, would count
// in scores: then all rows are strange (amx_parts.inl.h).
constexpr float end_factor = 0x1p80f;

// A natural number, as lse is, in units.
template <class A> TW_INLINE A in_units(const tw_problem &p, A x) { return A(double(x) / scaling_of<A>(p).natural); }

// From here on the rounding of the reference, 16 at least, is too much for an exponent by itself: half the place of 2^31 is
// 128, which makes infinity or 0 of a probability of 1. There a score is rounded as the reference was, before it is taken off.
template <class A> constexpr A coarse_shift = sizeof(A) == 4 ? A(0x1p28) : A(0x1p57);
template <class A> TW_INLINE bool is_coarse(A shift) {
    return (shift >= coarse_shift<A> || shift <= -coarse_shift<A>) && shift - shift == 0;
}
template <class A> TW_INLINE ivec<A> coarse_lanes(vec<A> shift) {
    const vec<A> size = shift < A(0) ? -shift : shift;
    const ivec<A> large = size >= coarse_shift<A>, finite = size < A(__builtin_inf());
    return large & finite;
}

// A product x that `by` makes a score, and a bias in natural units (or NULL), rounded as references are.
template <class A> TW_INLINE vec<A> whole_score(vec<A> x, vec<A> by, const A *bias) {
    return fused<A>(x, by, bias ? load(bias) * log2_e<A> : vec<A>{});
}

// The same less the reference. Of the three any two may be large and cancel: a large bias and the reference of its row, or
// large scores beside a small bias. So what the sum of bias and reference loses to rounding is added in the end (Knuth's
// sum of two and its error). With a bias of 0 it is the score's own bits; what overflows has lost nothing that counts.
template <class A> TW_INLINE vec<A> less_reference(vec<A> x, vec<A> by, const A *bias, vec<A> shift) {
    if (!bias) return fused<A>(x, by, -shift);
    const vec<A> own = load(bias), one = splat(log2_e<A>), product = fused<A>(own, one, vec<A>{});
    const vec<A> sum = product - shift, back = sum - product;
    const vec<A> lost = (product - (sum - back)) - (shift + back) + fused<A>(own, one, -product);
    return fused<A>(x, by, sum) + (lost - lost == A(0) ? lost : vec<A>{});
}

// The score of head h's sink, less a row's reference: rounded once, as other scores are. Where these are coarse it is rounded
// before, and beside biases as biases are, so that a sink and a bias of the same size are one score.
template <class A> TW_INLINE A sink_less(const tw_problem &p, int64_t h, A reference) {
    const A own = bounded<A>(static_cast<const A *>(p.sinks)[h]), as_bias = own * log2_e<A>;
    if ((p.bias_count || p.table.data) && (is_coarse(as_bias) || is_coarse(reference))) return as_bias - reference;
    const double sink = double(own), rest = sink - sink == 0 ? sink * scaling_of<A>(p).rest : 0;
    const auto less = [&](double shift) { return A(__builtin_fma(sink, log2_e<double>, -shift) + rest); };
    return is_coarse(reference) ? less(0) - reference : less(double(reference));
}
template <class A> TW_INLINE A sink_in_units(const tw_problem &p, int64_t h) { return sink_less<A>(p, h, A(0)); }
