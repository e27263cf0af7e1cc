// ARMv8-A and the dot product of bfloat16 pairs (BFDOT): what neon does, with bfloat16 multiplied as it is.
#define TW_PAGE tw_page_neon_bf16
#define TW_PAGE_NAME "neon_bf16"
#define TW_VECTOR_BYTES 16
#define TW_GROUP_KEYS 8    // keys whose scores are in registers together
#define TW_TILE_VECTORS 3  // vectors of queries in a tile
#define TW_VALUE_COLUMNS 8 // columns of the output in registers together
#include "kernel/page.inl.h"
