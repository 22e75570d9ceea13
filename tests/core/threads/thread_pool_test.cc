#include "core/threads/thread_pool.h"

#include <atomic>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

TEST(ThreadPool, ZeroThreadsMeansAtLeastOne) {
  ThreadPool pool(0);
  EXPECT_GE(pool.size(), 1);
}

TEST(ThreadPool, HasTheSizeAskedFor) {
  for (int threads : {1, 2, 5}) EXPECT_EQ(ThreadPool(threads).size(), threads);
}

TEST(ThreadPool, RunsEveryIndexOnceInRangesOfGrain) {
  for (int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    for (int64_t n : {1, 2, 7, 64, 1000}) {
      for (int64_t grain : {1, 3, 64, 2000}) {
        std::vector<std::atomic<int>> runs(static_cast<size_t>(n));
        pool.ParallelFor(n, grain, [&](int64_t begin, int64_t end, int worker) {
          EXPECT_EQ(begin % grain, 0);
          EXPECT_EQ(end, std::min(n, begin + grain));
          EXPECT_GE(worker, 0);
          EXPECT_LT(worker, threads);
          for (int64_t i = begin; i < end; ++i) ++runs[static_cast<size_t>(i)];
        });
        for (const std::atomic<int>& count : runs) ASSERT_EQ(count, 1);
      }
    }
  }
}

TEST(ThreadPool, NothingToDoCallsNothing) {
  ThreadPool pool(2);
  pool.ParallelFor(0, 1, [](int64_t, int64_t, int) { ADD_FAILURE(); });
  pool.ParallelFor(-3, 1, [](int64_t, int64_t, int) { ADD_FAILURE(); });
}

TEST(ThreadPool, GrainBelowOneCountsAsOne) {
  ThreadPool pool(2);
  std::atomic<int> calls = 0;
  pool.ParallelFor(5, 0, [&](int64_t begin, int64_t end, int) {
    EXPECT_EQ(end, begin + 1);
    ++calls;
  });
  EXPECT_EQ(calls, 5);
}

TEST(ThreadPool, WorkersRunAtTheSameTime) {
  ThreadPool pool(3);
  // Three bodies that wait for each other end only if three threads run them.
  std::atomic<int> arrived = 0;
  pool.ParallelFor(3, 1, [&](int64_t, int64_t, int) {
    ++arrived;
    while (arrived < 3) std::this_thread::yield();
  });
  EXPECT_EQ(arrived, 3);
}

TEST(ThreadPool, NestedLoopsRunInlineOnTheSameThreadAndWorker) {
  ThreadPool pool(3);
  ThreadPool other(2);
  std::atomic<int> inner = 0;
  pool.ParallelFor(6, 1, [&](int64_t, int64_t, int worker) {
    const std::thread::id thread = std::this_thread::get_id();
    pool.ParallelFor(10, 3, [&](int64_t begin, int64_t end, int nested_worker) {
      EXPECT_EQ(std::this_thread::get_id(), thread);
      EXPECT_EQ(nested_worker, worker);
      inner += static_cast<int>(end - begin);
    });
    other.ParallelFor(10, 1, [&](int64_t, int64_t, int nested_worker) {
      EXPECT_EQ(std::this_thread::get_id(), thread);
      EXPECT_LT(nested_worker, other.size());
    });
  });
  EXPECT_EQ(inner, 60);
}

TEST(ThreadPool, KnowsWhetherItIsInsideABody) {
  EXPECT_FALSE(ThreadPool::InParallelRegion());
  for (int threads : {1, 2}) {
    ThreadPool pool(threads);
    for (int64_t n : {1, 8}) {
      pool.ParallelFor(n, 1,
                       [](int64_t, int64_t, int) { EXPECT_TRUE(ThreadPool::InParallelRegion()); });
      EXPECT_FALSE(ThreadPool::InParallelRegion());
    }
  }
}

TEST(ThreadPool, ManyShortLoopsAndPauses) {
  ThreadPool pool(3);
  int64_t expected = 0;
  std::atomic<int64_t> sum = 0;
  for (int round = 0; round < 2000; ++round) {
    pool.ParallelFor(5, 1, [&](int64_t begin, int64_t, int) { sum += begin + round; });
    expected += 10 + 5 * round;
    // Long enough for workers to fall asleep now and then.
    if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  EXPECT_EQ(sum, expected);
}

TEST(ThreadPool, SeveralCallersTakeTurns) {
  ThreadPool pool(2);
  std::atomic<int64_t> sum = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        pool.ParallelFor(8, 1, [&](int64_t, int64_t, int) { ++sum; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 4 * 200 * 8);
}

}  // namespace
}  // namespace quantmill
