// avx512_bf16 and tile registers, for bfloat16, and for float32 and float16 in parts of it. float64 is left to the page
// avx512_bf16.
#define TW_PAGE tw_page_amx_bf16
#define TW_PAGE_NAME "amx_bf16"
#define TW_VECTOR_BYTES 64
#define TW_GROUP_KEYS 8    // keys whose scores are in registers together
#define TW_TILE_VECTORS 2  // vectors of queries in a tile
#define TW_VALUE_COLUMNS 8 // columns of the output in registers together
#include "kernel/page.inl.h"
