// The page for any machine: 128-bit vectors that the compiler maps to whatever there is.
#define TW_PAGE tw_page_scalar
#define TW_PAGE_NAME "scalar"
#define TW_VECTOR_BYTES 16
#define TW_GROUP_KEYS 4    // keys whose scores are in registers together
#define TW_TILE_VECTORS 2  // vectors of queries in a tile
#define TW_VALUE_COLUMNS 4 // columns of the output in registers together
#include "kernel/page.inl.h"
