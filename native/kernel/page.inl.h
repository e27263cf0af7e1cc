// The body of every page: compiled once per instruction set, inside an unnamed namespace, without C++ library headers,
// so that the linker can never hand code of one instruction set to another.
#include <stddef.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "core/kernel_table.h"

namespace {
// clang-format off: the order is that of use
#include "kernel/vector.inl.h"
#include "kernel/reduce.inl.h"
#include "kernel/element.inl.h"
#include "kernel/rows.inl.h"
#include "kernel/pairs_neon.inl.h"
#include "kernel/product.inl.h"
#include "kernel/transpose.inl.h"
#include "kernel/exp.inl.h"
#include "kernel/units.inl.h"
#include "kernel/philox.inl.h"
#include "kernel/tile.inl.h"
#include "kernel/tile_mask.inl.h"
#include "kernel/tile_bias.inl.h"
#if defined(__AMX_BF16__)
#include "kernel/amx_tiles.inl.h"
#include "kernel/amx_values.inl.h"
#include "kernel/amx_parts.inl.h"
#endif
#include "kernel/fetch.inl.h"
#include "kernel/sweep.inl.h"
#if defined(__AMX_BF16__)
#include "kernel/amx_work.inl.h"
#include "kernel/amx_products.inl.h"
#include "kernel/amx_sweep.inl.h"
#endif
#include "kernel/finish.inl.h"
#include "kernel/join.inl.h"
#include "kernel/few_products.inl.h"
#if defined(__AMX_BF16__)
#include "kernel/amx_few_rows.inl.h"
#endif
#include "kernel/few_rows.inl.h"
#include "kernel/forward.inl.h"
#include "kernel/finite.inl.h"
#include "kernel/slopes.inl.h"
#include "kernel/bias_slopes.inl.h"
#if defined(__AMX_BF16__)
#include "kernel/amx_slopes.inl.h"
#endif
#include "kernel/segment.inl.h"
#include "kernel/far_rows.inl.h"
#include "kernel/backward.inl.h"
#include "kernel/tangent.inl.h"
#include "kernel/probe.inl.h"
// clang-format on

template <class T, class M> constexpr tw_kernels kernels_of() {
    using A = sum_of<M>;
    return {tile_rows<A>,     keys_of_chunk<M>, parts_of_numbers<M>,    scratch_bytes<T, M>, forward<T, M>,
            merge<T, A>,      record_bytes<M>,  segment_bytes<T, M>,    open_tile<T, M>,     run_segment<T, M>,
            close_tile<T, M>, close_sinks<M>,   tangent_bytes<T, A, M>, tangent<T, A, M>};
}

#if defined(__AMX_BF16__)
using bfloat_products = Tiles;
#elif defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
using bfloat_products = Pairs;
#else
using bfloat_products = Singles<float>;
#endif

void philox(uint64_t seed, uint64_t stream, const uint64_t *index, int count, uint32_t *words) {
    philox_words(seed, stream, index, count, words);
}
} // namespace

extern "C" {
extern const tw_kernel_table TW_PAGE;
const tw_kernel_table TW_PAGE = {
    TW_PAGE_NAME,
#if defined(__AMX_BF16__)
    {kernels_of<float, Parts<float>>(), {}, kernels_of<half, Parts<half>>(), kernels_of<bfloat, bfloat_products>()},
    {peak_probe<Parts<float>>, nullptr, peak_probe<Parts<half>>, peak_probe<bfloat_products>},
#else
    {kernels_of<float, Singles<float>>(), kernels_of<double, Singles<double>>(), kernels_of<half, Singles<float>>(),
     kernels_of<bfloat, bfloat_products>()},
    {peak_probe<Singles<float>>, peak_probe<Singles<double>>, peak_probe<Singles<float>>, peak_probe<bfloat_products>},
#endif
    read_probe,
    philox};
}
