// Where sleeping threads wake up: not on the processor of the one that wakes them.
//
// A thread that slept wakes on the processor where it ran last, unless Linux finds an idle one. In a virtual machine it
// may find none: a processor that the host has taken back while it was idle counts as a busy one (vcpu_is_preempted). So
// after a pause threads wake on the caller's own processor, and wait there until its slice of time ends, 4 ms and more.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>

namespace tilewise {

// A thread that helps others. It tells where it is itself; others may read that at any time.
struct Helper {
    std::atomic<int> thread{0}, processor{-1}; // numbers of the system's; 0: unknown
    void note();                               // called by the thread
};

// While this lives, helpers that may be asleep, or that were last on the caller's processor, are kept off that one, and off
// those of one another as far as there are enough; then they may run where they might before. Does nothing where the
// system is another than Linux, or refuses.
class KeptApart {
  public:
    // `end`: when they last worked together, after which they spin, or sleep soon.
    KeptApart(const Helper *helpers, int count, std::chrono::steady_clock::time_point end);
    ~KeptApart();
    KeptApart(const KeptApart &) = delete;
    KeptApart &operator=(const KeptApart &) = delete;

  private:
    struct Kept;
    std::unique_ptr<Kept[]> kept_;
    int count_ = 0;
};

} // namespace tilewise
