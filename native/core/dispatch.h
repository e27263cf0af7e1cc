// Chooses the kernel page: the best one the host runs, or the one TILEWISE_ISA names.
#pragma once

#include "core/kernel_table.h"

namespace tilewise {

struct Page {
    const tw_kernel_table *table;
    bool host_runs;
    const char *refusal = nullptr; // why a processor that has the instructions may not use them
};

// The compiled pages, best first; *count receives their number.
const Page *pages(int *count);

// The page in use. NULL, with *message set, where TILEWISE_ISA names an unknown page or one this host cannot run.
// TILEWISE_ISA is read on every call, so that one process can test every page.
const tw_kernel_table *page_in_use(const char **message);

// The page that computes a tw_dtype: the one in use, or, where it leaves the type to others, the best one after it.
const tw_kernel_table *page_for(int32_t dtype, const char **message);

} // namespace tilewise
