#include "core/apart.h"

#if defined(__linux__)
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace tilewise {

struct KeptApart::Kept {
    int thread;
    cpu_set_t before;
};

void Helper::note() {
    static thread_local const int own = int(syscall(SYS_gettid));
    thread.store(own, std::memory_order_relaxed);
    processor.store(sched_getcpu(), std::memory_order_relaxed);
}

KeptApart::KeptApart(const Helper *helpers, int count, std::chrono::steady_clock::time_point end) {
    const int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE) return;
    const auto is_here = [here](const Helper &helper) {
        return helper.processor.load(std::memory_order_relaxed) == here;
    };
    const bool asleep = std::chrono::steady_clock::now() - end > std::chrono::milliseconds(1);
    if (!asleep && std::none_of(helpers, helpers + count, is_here)) return;
    kept_.reset(new (std::nothrow) Kept[size_t(count)]);
    if (!kept_) return;
    const auto process = getpid();
    cpu_set_t taken;
    CPU_ZERO(&taken);
    CPU_SET(here, &taken);
    for (int i = 0; i < count; ++i) {
        const int thread = helpers[i].thread.load(std::memory_order_relaxed);
        const int last = helpers[i].processor.load(std::memory_order_relaxed);
        Kept &kept = kept_[size_t(count_)];
        // It may have ended, and its number may be that of another process's thread by now.
        if (thread == 0 || syscall(SYS_tgkill, process, thread, 0) != 0) continue;
        if (sched_getaffinity(thread, sizeof kept.before, &kept.before) != 0) continue;
        cpu_set_t free;
        CPU_XOR(&free, &kept.before, &taken); // leaves what only one of them holds
        CPU_AND(&free, &free, &kept.before);
        if (CPU_COUNT(&free) == 0) continue;
        kept.thread = thread;
        if (sched_setaffinity(thread, sizeof free, &free) != 0) return;
        ++count_;
        // Where it is likely to wake: as before, or on the first that is free.
        int next = last >= 0 && last < CPU_SETSIZE && CPU_ISSET(last, &free) ? last : 0;
        while (!CPU_ISSET(next, &free)) ++next;
        CPU_SET(next, &taken);
    }
}

KeptApart::~KeptApart() {
    for (int i = 0; i < count_; ++i) {
        const Kept &kept = kept_[size_t(i)]; // the number of a thread that has ended is not given anew so soon
        sched_setaffinity(kept.thread, sizeof kept.before, &kept.before);
    }
}

} // namespace tilewise
#else
namespace tilewise {

struct KeptApart::Kept {};
void Helper::note() {}
KeptApart::KeptApart(const Helper *, int, std::chrono::steady_clock::time_point) {}
KeptApart::~KeptApart() = default;

} // namespace tilewise
#endif
