// The one door to parallel work: a pool of our own, safe for concurrent callers and across fork.
#pragma once

#include <stdint.h>

namespace tilewise {

// Runs task(context, index, worker) for every index in [0, count) on at most `threads` threads, the caller among them;
// worker is in [0, threads). Indices are taken in order, each by whoever is free. Where another caller holds the pool,
// or threads is 1, all run here. Tasks must not throw.
using Task = void (*)(void *context, int64_t index, int worker);
void parallel_for(int64_t count, int threads, Task task, void *context);

// set_num_threads, else TILEWISE_NUM_THREADS, else OMP_NUM_THREADS, else the processors this process may use
// (affinity and cgroup quota).
int default_threads();
void set_default_threads(int threads); // 0: forget

} // namespace tilewise
