// x86-64-v4 and the dot product of bfloat16 pairs: what avx512 does, with bfloat16 multiplied as it is.
#define TW_PAGE tw_page_avx512_bf16
#define TW_PAGE_NAME "avx512_bf16"
#define TW_VECTOR_BYTES 64
#define TW_GROUP_KEYS 8    // keys whose scores are in registers together
#define TW_TILE_VECTORS 2  // vectors of queries in a tile
#define TW_VALUE_COLUMNS 8 // columns of the output in registers together
#include "kernel/page.inl.h"
