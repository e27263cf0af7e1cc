#include "core/dispatch.h"

#include <stdlib.h>
#include <string.h>

#include "core/cpu_features.h"

namespace tilewise {

const Page *pages(int *count) {
    static const Page list[] = {
#ifdef TILEWISE_PAGE_AMX_BF16
        {&tw_page_amx_bf16, host_runs_amx_bf16(),
         host_has_amx_bf16() && !host_runs_amx_bf16() ? "the system refuses this process the tile registers" : nullptr},
#endif
#ifdef TILEWISE_PAGE_AVX512_BF16
        {&tw_page_avx512_bf16, host_runs_avx512_bf16()},
#endif
#ifdef TILEWISE_PAGE_AVX512
        {&tw_page_avx512, host_runs_avx512()},
#endif
#ifdef TILEWISE_PAGE_AVX2
        {&tw_page_avx2, host_runs_avx2()},
#endif
#ifdef TILEWISE_PAGE_NEON_BF16
        {&tw_page_neon_bf16, host_runs_neon_bf16()},
#endif
#ifdef TILEWISE_PAGE_NEON
        {&tw_page_neon, true},
#endif
        {&tw_page_scalar, true},
    };
    *count = int(sizeof list / sizeof *list);
    return list;
}

const tw_kernel_table *page_in_use(const char **message) {
    int count;
    const Page *list = pages(&count);
    const char *wanted = getenv("TILEWISE_ISA");
    for (int i = 0; i < count; ++i) {
        if (!wanted || !*wanted) {
            if (list[i].host_runs) return list[i].table;
        } else if (!strcmp(list[i].table->name, wanted)) {
            if (list[i].host_runs) return list[i].table;
            *message = list[i].refusal ? "TILEWISE_ISA: the system refuses this process the page it names"
                                       : "TILEWISE_ISA: this processor cannot run the page it names";
            return nullptr;
        }
    }
    *message = "TILEWISE_ISA: names no compiled page (see tilewise._native.build_info()['pages'])";
    return nullptr;
}

const tw_kernel_table *page_for(int32_t dtype, const char **message) {
    const tw_kernel_table *table = page_in_use(message);
    if (!table) return nullptr;
    int count;
    const Page *page = pages(&count);
    while (page->table != table) ++page;
    while (!page->host_runs || !page->table->kernels[dtype].forward) ++page; // the last page computes every type
    return page->table;
}

} // namespace tilewise
