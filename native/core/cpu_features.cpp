#include "core/cpu_features.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>
#endif

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

bool host_runs_neon_bf16() {
#if defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long bf16 = 1UL << 14; // HWCAP2_BF16, which older headers do not name
    return getauxval(AT_HWCAP2) & bf16;
#elif defined(__aarch64__) && defined(__APPLE__)
    int answer = 0;
    size_t bytes = sizeof answer;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &answer, &bytes, nullptr, 0) == 0 && answer;
#else
    return false;
#endif
}

} // namespace tilewise
