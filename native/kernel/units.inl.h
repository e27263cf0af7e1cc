// The units of scores. Exponents are of 2, so that without biases a score s is wanted as s log2(e). What queries and keys
// are summed to is left as it is, since multiplied numbers would be rounded numbers, and scores of thousands wrong by
// thousands of their last places: where x is a product and f = |scale| log2(e),
//   the score is x f,   its reference the rounded x f of the row's largest x,   and what is raised x f - reference,
// rounded once (`fused`), where all that is large in both goes away exactly. The reference's own rounding is a common factor
// of the row, which out does not have and lse takes back. The scale's sign goes to the queries, which is exact, so that the
// largest score is that of the largest product.
//
// With a bias b three numbers may be large, and any two of them nearly alike. So units are natural ones then, as the bias
// is, and f = |scale|: what is raised is (x f + (b - reference)) log2(e), whose large parts are rounded nowhere where plain
// attention does not round them: not at all where scores and biases are whole numbers.

template <class A> struct Scaling {
    A sign;           // of queries: 1, -1, or 0 where the scale is 0 (or so small that f would be)
    A factor;         // f > 0; anything where queries are multiplied by 0
    A exponent;       // the exponent of 2 that a unit is
    double natural;   // one unit in natural ones: ln 2, but for the rounding of f; or 1
    double one, rest; // one natural one in units, and what the rounding of that has taken off it
};
template <class A> TW_INLINE Scaling<A> scaling_of(const tw_problem &p) {
    constexpr double ln_2 = 0.69314718055994530942;
    const double size = p.scale < 0 ? -p.scale : p.scale;
    const bool biased = p.bias_count || p.table.data;
    const double one = biased ? 1 : log2_e<double>, natural = biased ? 1 : ln_2;
    const A factor = A(size * one), exponent = biased ? log2_e<A> : A(1);
    if (factor == 0) return {A(0), A(one), exponent, natural, one, 0};
    const A sign = p.scale < 0 ? A(-1) : A(1);
    if (biased || p.softcap > 0) return {sign, factor, exponent, natural, one, 0};
    return {sign, factor, exponent, size / double(factor), one, -__builtin_fma(size, one, -double(factor)) / size};
}

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

// The score of head h's sink, less a row's reference: rounded once, as other scores are.
template <class A> TW_INLINE A sink_less(const tw_problem &p, int64_t h, A reference) {
    const Scaling<A> units = scaling_of<A>(p);
    const double sink = double(bounded<A>(static_cast<const A *>(p.sinks)[h])),
                 rest = sink - sink == 0 ? sink * units.rest : 0;
    const auto less = [&](double shift) { return A(__builtin_fma(sink, units.one, -shift) + rest); };
    return is_coarse(reference) ? less(0) - reference : less(double(reference));
}
template <class A> TW_INLINE A sink_in_units(const tw_problem &p, int64_t h) { return sink_less<A>(p, h, A(0)); }

// The softcap c in units, c tanh(s / c), of a score s. Products times `twice` are 2 s log2(e) / c.
template <class A> struct Softcap {
    A cap, twice;
};
template <class A> TW_INLINE Softcap<A> softcap_of(const tw_problem &p) {
    const double size = p.scale < 0 ? -p.scale : p.scale;
    return {A(p.softcap * scaling_of<A>(p).one), A(2 * log2_e<double> * size / p.softcap)};
}
template <class A> TW_INLINE vec<A> cap_product(vec<A> x, const Softcap<A> &c) {
    return c.cap * tanh_of_log2<A>(x * c.twice);
}
// The same and its slope, the derivative by the score.
template <class A> TW_INLINE vec<A> cap_product(vec<A> x, const Softcap<A> &c, vec<A> &slope) {
    const vec<A> t = tanh_of_log2<A>(x * c.twice), capped = c.cap * t;
    slope = A(1) - t * t;
    return capped;
}
