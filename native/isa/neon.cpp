// ARMv8-A: 128-bit vectors, fused multiply-add, 32 registers.
#define TW_PAGE tw_page_neon
#define TW_PAGE_NAME "neon"
#define TW_VECTOR_BYTES 16
#define TW_GROUP_KEYS 8    // keys whose scores are in registers together
#define TW_TILE_VECTORS 3  // vectors of queries in a tile
#define TW_VALUE_COLUMNS 8 // columns of the output in registers together
#include "kernel/page.inl.h"
