// What this processor can run. Compiled without instruction-set flags, so that asking is always safe.
#pragma once

namespace tilewise {
bool host_runs_avx2();        // AVX2, FMA, F16C, BMI: x86-64-v3
bool host_runs_avx512();      // AVX-512 F, BW, CD, DQ, VL: x86-64-v4
bool host_runs_avx512_bf16(); // the same and AVX-512 BF16
bool host_has_amx_bf16();     // the same and the tile registers and their bfloat16 product
bool host_runs_amx_bf16();    // whether the kernel also lets this process use them: it is asked once
bool host_runs_neon_bf16();   // FEAT_BF16: BFDOT and BFCVT; NEON itself every 64-bit ARM has
} // namespace tilewise
