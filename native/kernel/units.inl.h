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
};
template <class A> TW_INLINE Scaling<A> scaling_of(const tw_problem &p) {
    constexpr double ln_2 = 0.69314718055994530942;
    const double size = p.scale < 0 ? -p.scale : p.scale;
    const A factor = A(size * log2_e<double>);
    if (factor == 0) return {A(0), log2_e<A>, ln_2};
    return {p.scale < 0 ? A(-1) : A(1), factor, p.softcap > 0 ? ln_2 : size / double(factor)};
}

// A natural number, a lse or a sink, in units.
template <class A> TW_INLINE A in_units(const tw_problem &p, A x) { return A(double(x) / scaling_of<A>(p).natural); }
template <class A> TW_INLINE A sink_in_units(const tw_problem &p, int64_t h) {
    return in_units<A>(p, bounded<A>(static_cast<const A *>(p.sinks)[h]));
}

// From here on the rounding of the reference, 16 at least, is too much for an exponent by itself: half the place of 2^31 is
// 128, which makes infinity or 0 of a probability of 1. There a score is rounded as the reference was, before it is taken off.
template <class A> constexpr A coarse_shift = sizeof(A) == 4 ? A(0x1p28) : A(0x1p57);
template <class A> TW_INLINE ivec<A> coarse_lanes(vec<A> shift) {
    const vec<A> size = shift < A(0) ? -shift : shift;
    const ivec<A> large = size >= coarse_shift<A>, finite = size < A(__builtin_inf());
    return large & finite;
}
