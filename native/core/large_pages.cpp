#include "core/large_pages.h"

#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tilewise {

void prefer_large_pages(void *memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    if (bytes < size_t(4) << 20) return;
    static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (uintptr_t(memory) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(memory) + bytes) / page * page; // pages that hold nothing else
    madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

} // namespace tilewise
