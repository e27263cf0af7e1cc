// The one door to parallel work: a pool of our own, safe for concurrent callers and across fork.
#pragma once

#include <stdint.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace tilewise {

// Runs task(context, index, worker) for every index in [0, count) on at most `threads` threads, the caller among them;
// worker is in [0, threads). Indices are taken in order, each by whoever is free. Where another caller holds the pool,
// or threads is 1, all run here. Tasks must not throw. Once the call is given up (Interruptible), no index is taken.
using Task = void (*)(void *context, int64_t index, int worker);
void parallel_for(int64_t count, int threads, Task task, void *context);

// How many of `threads` threads are worth waking for `work`, counted in operations (work_of): all, or the caller alone.
int threads_worth(int threads, double work);

// While this lives, parallel_for of the thread that made it works on the OpenMP threads that run torch's own operators, as
// one of those would: they spin for milliseconds after their work, on the very cores that our workers would wait for. Not
// where torch has no such threads, nor in a forked child, where OpenMP's threads are gone and it does not know.
class OnTorchThreads {
  public:
    explicit OnTorchThreads(int threads); // torch's number; 0: on the pool
    ~OnTorchThreads();
    OnTorchThreads(const OnTorchThreads &) = delete;
    OnTorchThreads &operator=(const OnTorchThreads &) = delete;

  private:
    const int before_;
};

// While this lives, the work of the thread that made it can be given up. That thread asks `wanted` every tenth of a second
// or so while it works or waits; from the first true on, parallel_for takes no index more, and tw_given_up
// (kernel_table.h), which long tasks ask, is true on every thread of the work. What was computed by then is of no use.
class Interruptible {
  public:
    using Wanted = bool (*)(void *context); // may itself start work, with an Interruptible of its own
    Interruptible(Wanted wanted, void *context);
    ~Interruptible();
    Interruptible(const Interruptible &) = delete;
    Interruptible &operator=(const Interruptible &) = delete;
    bool given_up(); // asks, where it is time and the thread its own

  private:
    const Wanted wanted_;
    void *const context_;
    Interruptible *const before_; // of the same thread
    const std::thread::id owner_;
    std::chrono::steady_clock::time_point next_;
    std::atomic<bool> given_up_{false};
};

// set_num_threads, else TILEWISE_NUM_THREADS, else OMP_NUM_THREADS, else the processors this process may use
// (affinity and cgroup quota).
int default_threads();
void set_default_threads(int threads); // 0: forget

} // namespace tilewise
