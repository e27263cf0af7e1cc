#include "core/threads.h"

#include "core/apart.h"
#include "core/kept_tiles.h"
#include "core/kernel_table.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tilewise {
namespace {

constexpr int spins = 2000; // about 20 microseconds: longer than the gap between two calls of one layer
constexpr int most_workers = 1023;
constexpr int most_kept = 256; // of OpenMP's threads that a caller remembers
// Less work than this is done before threads have come to help. torch's mostly spin still, those of the pool mostly sleep.
constexpr double work_for_torch_threads = 2e6, work_for_pool = 12e6;
constexpr std::chrono::milliseconds between_questions(100);

thread_local Interruptible *interruptible = nullptr; // whose work this thread does
thread_local bool owns_region = false;               // has the pool; what it starts meanwhile runs on it alone
thread_local int on_torch_threads = 0;               // how many they are

// OpenMP's threads that work with this one: each caller has its own.
struct Team {
    Helper helpers[most_kept];
    int count = 0;
    std::chrono::steady_clock::time_point end; // of their last region
};
thread_local Team openmp_team;

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// Rounding to nearest, denormals kept, nothing trapped, while this lives; then as it was. A framework's thread may flush
// denormals (XLA's do), and a thread starts with the mode of whoever started it: a row's bits must not depend on either.
struct DefaultMode {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    DefaultMode() { _mm_setcsr(0x1F80); }
    ~DefaultMode() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    DefaultMode() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
    }
    ~DefaultMode() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

// OpenMP's entry to a team: runs work(context) on so many threads, the caller among them, and waits for all of them. GNU's
// library and LLVM's both have it.
using OpenMP = void (*)(void (*work)(void *), void *context, unsigned threads, unsigned flags);

// This process came from fork and has not become another program since. OpenMP's threads may have been left behind, even
// before this library was loaded.
bool forked() {
    unsigned flags = 0;
#if defined(__linux__)
    if (FILE *stat = fopen("/proc/self/stat", "r")) {
        // Number, name in parentheses, state, five numbers, flags; a name may hold anything, but no later field a ')'.
        char text[512];
        text[fread(text, 1, sizeof text - 1, stat)] = 0;
        fclose(stat);
        const char *name_end = strrchr(text, ')');
        if (!name_end || sscanf(name_end, ") %*c %*d %*d %*d %*d %*d %u", &flags) != 1) flags = 0;
    }
#endif
    return flags & 0x40; // PF_FORKNOEXEC
}

std::atomic<bool> left_behind{false}; // OpenMP's threads, by a fork

OpenMP torch_threads() {
    static const OpenMP found = [] {
        // The one that torch itself is bound to, if several are loaded.
        void *torch = forked() ? nullptr : dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        return torch ? reinterpret_cast<OpenMP>(dlsym(torch, "GOMP_parallel")) : nullptr;
    }();
    return left_behind.load(std::memory_order_relaxed) ? nullptr : found;
}

// Workers sleep until a region opens. A region is a task and a counter of indices; every thread takes the next index.
// The caller waits for workers *inside* the region only: one that the system has not scheduled yet is not waited for,
// it finds the region closed and goes back to sleep. (OpenMP's threads, where they do the work, are all waited for.)
struct Pool {
    std::mutex owner; // held by the caller whose region is open
    std::mutex sleep;
    std::condition_variable wake;
    std::atomic<uint64_t> epoch{0};
    std::atomic<int64_t> next{0};
    std::atomic<int> inside{0};
    std::atomic<int> joined{0}; // of OpenMP's threads
    std::atomic<bool> open{false};
    int64_t count = 0;
    int workers = 0, invited = 0, invited_openmp = 0; // how many there are; numbers up to these take part in the region
    Task task = nullptr;
    void *context = nullptr;
    Interruptible *caller = nullptr;
    Helper own[most_workers + 1];              // the workers by number
    std::chrono::steady_clock::time_point end; // of their last region
    Team *team = nullptr;                      // of the caller, where OpenMP's threads do the work

    void run(int worker) {
        for (int64_t i; !tw_given_up() && (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            task(context, i, worker);
    }

    // A worker's part in the region, if it is still open. most: a field of the region, to be read once that stands.
    void help(int number, const int &most) {
        inside.fetch_add(1); // before asking whether the region is open: the caller closes it, then counts
        if (open.load() && number <= most) {
            interruptible = caller;
            run(number);
            interruptible = nullptr;
        }
        inside.fetch_sub(1);
    }

    // The caller's part.
    void lead() {
        run(0);
        open.store(false);
        for (int i = 0; inside.load() != 0; ++i) {
            i < spins ? pause_briefly() : std::this_thread::yield();
            tw_given_up(); // the workers' last tasks may be long ones
        }
    }

    // What each of OpenMP's threads does.
    static void take_part(void *pool) {
        Pool &region = *static_cast<Pool *>(pool);
        if (owns_region) return region.lead();
        DefaultMode mode;
        const int number = region.joined.fetch_add(1) + 1;
        if (number <= most_kept) region.team->helpers[number - 1].note();
        region.help(number, region.invited_openmp);
    }

    // Opens the region to OpenMP's threads.
    void lead_openmp(OpenMP openmp_parallel) {
        team = &openmp_team;
        const KeptApart apart(team->helpers, team->count, team->end);
        openmp_parallel(Pool::take_part, this, unsigned(on_torch_threads), 0); // all: it ends threads that are left out
        team->count = std::min(joined.load(), most_kept);
        team->end = std::chrono::steady_clock::now();
    }

    // Opens it to the workers.
    void lead_workers() {
        const KeptApart apart(own + 1, std::min(invited, workers), end);
        {
            std::lock_guard<std::mutex> sleepers(sleep);
            epoch.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        lead();
        end = std::chrono::steady_clock::now();
    }

    void work(int number) {
        DefaultMode mode;
        own[number].note();
        uint64_t seen = 0;
        for (;;) {
            for (int i = 0; i < spins && epoch.load(std::memory_order_acquire) == seen; ++i) pause_briefly();
            if (epoch.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep);
                wake.wait(lock, [&] { return epoch.load(std::memory_order_acquire) != seen; });
            }
            seen = epoch.load(std::memory_order_acquire);
            own[number].note();
            help(number, invited);
        }
    }

    // Grows the pool to `wanted` workers where the system allows; fewer are no error, only slower.
    void grow(int wanted) {
        while (workers < wanted && workers < most_workers) {
            try {
                std::thread(&Pool::work, this, workers + 1).detach();
            } catch (const std::system_error &) {
                return;
            }
            ++workers;
        }
    }
};

// Leaked on purpose: its threads may outlive every destructor of the process. After a fork the child has none of the
// threads, so it forgets the pool and makes another when it needs one.
std::atomic<Pool *> the_pool{nullptr};

Pool *pool() {
    static std::mutex making;
    if (Pool *made = the_pool.load(std::memory_order_acquire)) return made;
    std::lock_guard<std::mutex> lock(making);
    if (Pool *made = the_pool.load(std::memory_order_acquire)) return made;
    static const int once = pthread_atfork([] { making.lock(); }, [] { making.unlock(); },
                                           [] {
                                               making.unlock();
                                               the_pool.store(nullptr);
                                               left_behind.store(true);
                                           });
    (void)once;
    Pool *made = new (std::nothrow) Pool;
    the_pool.store(made, std::memory_order_release);
    return made;
}

std::atomic<int> chosen_threads{0};

int positive_from_environment(const char *name) {
    const char *text = getenv(name);
    int value = text ? atoi(text) : 0; // OMP_NUM_THREADS may be a list, "4,2": the outermost number counts
    return value > 0 ? value : 0;
}

// Processors that the cgroup's quota amounts to, rounded up; 0 where there is none.
int processors_of_quota() {
    double quota = 0, period = 0;
    if (FILE *v2 = fopen("/sys/fs/cgroup/cpu.max", "r")) {
        if (fscanf(v2, "%lf %lf", &quota, &period) != 2) quota = 0;
        fclose(v2);
    } else {
        const char *names[] = {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"};
        double *values[] = {&quota, &period};
        for (int i = 0; i < 2; ++i)
            if (FILE *v1 = fopen(names[i], "r")) {
                if (fscanf(v1, "%lf", values[i]) != 1) *values[i] = 0;
                fclose(v1);
            }
    }
    return quota > 0 && period > 0 ? int((quota + period - 1) / period) : 0;
}

int processors() {
    int allowed = 0;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) allowed = CPU_COUNT(&set);
#endif
    if (allowed < 1) allowed = int(std::thread::hardware_concurrency());
    int quota = processors_of_quota();
    if (quota && quota < allowed) allowed = quota;
    return allowed < 1 ? 1 : allowed;
}

} // namespace

void parallel_for(int64_t count, int threads, Task task, void *context) {
    DefaultMode mode;
    Pool *shared = threads > 1 && count > 1 && !owns_region ? pool() : nullptr;
    std::unique_lock<std::mutex> lock;
    if (shared) lock = std::unique_lock<std::mutex>(shared->owner, std::try_to_lock);
    if (!lock.owns_lock()) {
        for (int64_t i = 0; i < count && !tw_given_up(); ++i) task(context, i, 0);
        return;
    }
    int64_t helpers = threads - 1 < count - 1 ? threads - 1 : count - 1;
    const OpenMP openmp = on_torch_threads ? torch_threads() : nullptr;
    if (!openmp) shared->grow(int(helpers));
    shared->task = task;
    shared->context = context;
    shared->count = count;
    shared->caller = interruptible;
    shared->invited = openmp ? 0 : int(helpers);
    shared->invited_openmp = openmp ? int(helpers) : 0;
    shared->next.store(0, std::memory_order_relaxed);
    shared->joined.store(0, std::memory_order_relaxed);
    shared->open.store(true);
    owns_region = true;
    openmp ? shared->lead_openmp(openmp) : shared->lead_workers();
    owns_region = false;
}

int threads_worth(int threads, double work) {
    const bool spinning = on_torch_threads && torch_threads();
    return work < (spinning ? work_for_torch_threads : work_for_pool) ? 1 : threads;
}

OnTorchThreads::OnTorchThreads(int threads) : before_(on_torch_threads) { on_torch_threads = threads; }

OnTorchThreads::~OnTorchThreads() { on_torch_threads = before_; }

Interruptible::Interruptible(Wanted wanted, void *context)
    : wanted_(wanted), context_(context), before_(interruptible), owner_(std::this_thread::get_id()),
      next_(std::chrono::steady_clock::now() + between_questions) {
    interruptible = this;
}

Interruptible::~Interruptible() { interruptible = before_; }

bool Interruptible::given_up() {
    if (given_up_.load(std::memory_order_relaxed)) return true;
    if (std::this_thread::get_id() != owner_ || std::chrono::steady_clock::now() < next_) return false;
    const KeptTiles kept; // a kernel may be at work on this thread
    if (wanted_(context_)) given_up_.store(true, std::memory_order_relaxed);
    next_ = std::chrono::steady_clock::now() + between_questions;
    return given_up_.load(std::memory_order_relaxed);
}

int default_threads() {
    if (int chosen = chosen_threads.load()) return chosen;
    if (int own = positive_from_environment("TILEWISE_NUM_THREADS")) return own;
    if (int openmp = positive_from_environment("OMP_NUM_THREADS")) return openmp;
    static const int counted = processors();
    return counted;
}

void set_default_threads(int threads) { chosen_threads.store(threads); }

} // namespace tilewise

int tw_given_up() { return tilewise::interruptible && tilewise::interruptible->given_up(); }
