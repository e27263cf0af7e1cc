// x86-64-v4: 512-bit vectors, masks, 32 registers.
#define TW_PAGE tw_page_avx512
#define TW_PAGE_NAME "avx512"
#define TW_VECTOR_BYTES 64
#define TW_GROUP_KEYS 8    // keys whose scores are in registers together
#define TW_TILE_VECTORS 2  // vectors of queries in a tile
#define TW_VALUE_COLUMNS 8 // columns of the output in registers together
#include "kernel/page.inl.h"
