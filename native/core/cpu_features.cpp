#include "core/cpu_features.h"

namespace tilewise {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool host_runs_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
}

bool host_runs_avx512() {
    return host_runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

bool host_runs_avx512_bf16() { return host_runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool host_runs_avx2() { return false; }
bool host_runs_avx512() { return false; }
bool host_runs_avx512_bf16() { return false; }
#endif

} // namespace tilewise
