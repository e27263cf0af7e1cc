// Sums over the lanes of many vectors at once: W vectors become one whose lane l is the sum of vector l. Each step adds
// the two halves of every block of lanes and lays the blocks of two vectors alternately into one.

template <int... I> struct indices {};
#if defined(__clang__)
template <class, int... I> struct indices_from : indices<I...> {};
template <int N> using first_indices = __make_integer_seq<indices_from, int, N>;
#else
template <int N> using first_indices = indices<__integer_pack(N)...>;
#endif

// The source lane of result lane p, where blocks of `size` lanes are halved: even result blocks come from the first
// vector, odd ones from the second (lanes W and up); `half` says which half.
constexpr int source_lane(int width, int size, int p, int half) {
    const int block = p / (size / 2), within = p % (size / 2);
    return (block % 2) * width + (block / 2) * size + within + half * (size / 2);
}

template <class A, int SIZE, int... P> TW_INLINE vec<A> halve(vec<A> a, vec<A> b, indices<P...>) {
    return __builtin_shufflevector(a, b, source_lane(lanes<A>, SIZE, P, 0)...) +
           __builtin_shufflevector(a, b, source_lane(lanes<A>, SIZE, P, 1)...);
}

// x[0 .. SIZE) holds vectors of blocks of SIZE lanes; the sums end up in x[0].
template <class A, int SIZE> TW_INLINE void sum_lanes(vec<A> *x) {
    if constexpr (SIZE > 1) {
        TW_UNROLL(int i = 0; i < SIZE / 2; ++i) x[i] = halve<A, SIZE>(x[i], x[i + SIZE / 2], first_indices<lanes<A>>{});
        sum_lanes<A, SIZE / 2>(x);
    }
}
