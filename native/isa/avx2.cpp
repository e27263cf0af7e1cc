// x86-64-v3: 256-bit vectors, fused multiply-add, 16 registers.
#define TW_PAGE tw_page_avx2
#define TW_PAGE_NAME "avx2"
#define TW_VECTOR_BYTES 32
#define TW_GROUP_KEYS 4    // keys whose scores are in registers together
#define TW_TILE_VECTORS 3  // vectors of queries in a tile
#define TW_VALUE_COLUMNS 4 // columns of the output in registers together
#include "kernel/page.inl.h"
