// Large pages for large arrays: fresh memory costs a fault per page, which takes longer than a fast kernel that fills it.
#pragma once

#include <stddef.h>

namespace tilewise {

// Asks the system to back these bytes by large pages as they are touched, where it takes such advice (Linux). Does nothing
// to what is there already, and nothing for less than 4 MB, as NumPy does for its arrays.
void prefer_large_pages(void *memory, size_t bytes);

} // namespace tilewise
