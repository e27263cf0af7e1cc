#include "core/kept_tiles.h"

#include <string.h>

#include "core/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace tilewise {

#if defined(__x86_64__)
namespace {

constexpr unsigned long long tiles = 3ull << 17; // XTILECFG and XTILEDATA among the components of XSAVE

size_t area_bytes() {
    unsigned enabled, b = 0, c, d;
    return host_runs_amx_bf16() && __get_cpuid_count(0xD, 0, &enabled, &b, &c, &d) ? b : 0;
}
__attribute__((target("xsave"))) void save(void *area) { _xsave64(area, tiles); }
__attribute__((target("xsave"))) void restore(void *area) { _xrstor64(area, tiles); }

} // namespace

KeptTiles::KeptTiles() : bytes_(area_bytes()), area_(bytes_) {
    if (!area_.memory()) bytes_ = 0;
    if (!bytes_) return;
    memset(area_.memory(), 0, bytes_); // the header, which the instruction does not write as a whole
    save(area_.memory());
}
KeptTiles::~KeptTiles() {
    if (bytes_) restore(area_.memory());
}
#else
KeptTiles::KeptTiles() : bytes_(0), area_(0) {}
KeptTiles::~KeptTiles() {}
#endif

} // namespace tilewise
