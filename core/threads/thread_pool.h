// A fixed set of worker threads with one blocking primitive. Work is cut by the caller's grain, not
// by the number of threads, so that results never depend on the latter.
#ifndef QUANTMILL_CORE_THREADS_THREAD_POOL_H_
#define QUANTMILL_CORE_THREADS_THREAD_POOL_H_

#include <cstdint>
#include <functional>
#include <memory>

namespace quantmill {

class ThreadPool {
 public:
  // threads: 0 = one per core the process may run on. The calling thread works too.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;
  // Runs body(begin, end, worker) over [0, n) in ranges of `grain` indices; worker in [0, size()).
  // Blocks until all are done. Inside a body it runs the ranges inline (no nesting).
  void ParallelFor(int64_t n, int64_t grain,
                   const std::function<void(int64_t begin, int64_t end, int worker)>& body);
  // True on a thread that is inside a ParallelFor body of any pool.
  static bool InParallelRegion();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_THREADS_THREAD_POOL_H_
