#include "core/threads/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace quantmill {
namespace {

// How often a worker looks for new work before it sleeps. Generating one token takes hundreds of
// short loops; waking a sleeping thread costs more than most of them. Some tens of
// microseconds in all.
constexpr int kSpins = 2000;

// The pool and the worker number of the body this thread is inside of.
thread_local const void* current_pool = nullptr;
thread_local int current_worker = 0;

void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int CoresOfThisProcess() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

class ThreadPool::Impl {
 public:
  using Body = std::function<void(int64_t, int64_t, int)>;

  explicit Impl(int threads) {
    const int count = threads > 0 ? threads : CoresOfThisProcess();
    workers_.reserve(static_cast<size_t>(count - 1));
    try {
      for (int worker = 1; worker < count; ++worker) {
        workers_.emplace_back([this, worker] { WorkerLoop(worker); });
      }
    } catch (const std::system_error&) {
      // The system gives no more threads: fewer workers give the same results, later.
    }
  }

  ~Impl() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void Run(int64_t n, int64_t grain, const Body& body) {
    std::lock_guard<std::mutex> one_caller(caller_mutex_);
    if (n <= grain || workers_.empty()) {
      const RegionMark mark(this, 0);
      RunInline(n, grain, body, 0);
      return;
    }
    body_ = &body;
    n_ = n;
    grain_ = grain;
    next_.store(0);
    open_.store(true);
    {
      // Under the mutex, so that a worker about to sleep cannot miss it.
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    TakeRanges(0);
    open_.store(false);
    WaitForActiveWorkers();
  }

  static void RunInline(int64_t n, int64_t grain, const Body& body, int worker) {
    for (int64_t begin = 0; begin < n; begin += grain) {
      body(begin, std::min(n, begin + grain), worker);
    }
  }

 private:
  // Marks this thread as being inside a body.
  struct RegionMark {
    RegionMark(const Impl* pool, int worker) {
      current_pool = pool;
      current_worker = worker;
    }
    ~RegionMark() {
      current_pool = nullptr;
      current_worker = 0;
    }
  };

  void TakeRanges(int worker) {
    const RegionMark mark(this, worker);
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_);
      if (begin >= n_) return;
      (*body_)(begin, std::min(n_, begin + grain_), worker);
    }
  }

  void WorkerLoop(int worker) {
    uint64_t seen = 0;
    for (;;) {
      seen = WaitForGeneration(seen);
      if (stop_.load()) return;
      // Either this sees the loop closed, or Run sees this worker active and waits for it (both
      // orders are sequentially consistent). Who comes too late leaves the loop's state alone.
      active_.fetch_add(1);
      if (open_.load()) TakeRanges(worker);
      if (active_.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  uint64_t WaitForGeneration(uint64_t seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
      const uint64_t now = generation_.load();
      if (now != seen) return now;
      CpuRelax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return generation_.load() != seen; });
    return generation_.load();
  }

  void WaitForActiveWorkers() {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (active_.load() == 0) return;
      CpuRelax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return active_.load() == 0; });
  }

  std::vector<std::thread> workers_;
  std::mutex caller_mutex_;  // one loop at a time
  std::mutex mutex_;         // of both condition variables
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<uint64_t> generation_{0};  // counts loops; a change is the signal to start
  std::atomic<bool> open_{false};        // ranges of the current loop may be taken
  std::atomic<int64_t> next_{0};         // first index nobody has taken
  std::atomic<int> active_{0};           // workers looking at the current loop
  std::atomic<bool> stop_{false};
  const Body* body_ = nullptr;
  int64_t n_ = 0;
  int64_t grain_ = 1;
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>(threads)) {}
ThreadPool::~ThreadPool() = default;

int ThreadPool::size() const { return impl_->size(); }

bool ThreadPool::InParallelRegion() { return current_pool != nullptr; }

void ThreadPool::ParallelFor(
    int64_t n, int64_t grain,
    const std::function<void(int64_t begin, int64_t end, int worker)>& body) {
  if (n <= 0) return;
  const int64_t step = std::max<int64_t>(1, grain);
  if (InParallelRegion()) {
    // Of the same pool: this thread keeps its number, which no other thread of the pool has.
    Impl::RunInline(n, step, body, current_pool == impl_.get() ? current_worker : 0);
  } else {
    impl_->Run(n, step, body);
  }
}

}  // namespace quantmill
