// Timing of work on a CUDA backend, shared by the GPU benchmarks.
#ifndef QUANTMILL_TESTS_BENCH_CUDA_TIMING_H_
#define QUANTMILL_TESTS_BENCH_CUDA_TIMING_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/tensor/backend.h"

namespace quantmill::bench {

struct Row {
  std::string name;
  double microseconds = 0, gigabytes_per_second = 0, teraflops = 0;
};

// Seconds of one run: the median of 15 replays of a CUDA graph of run(0) ... run(sets - 1), each of
// which has data of its own, so that successive runs find cold caches.
absl::StatusOr<double> MedianSeconds(Backend& cuda, int64_t sets,
                                     const std::function<absl::Status(int64_t)>& run);

// How many sets of `bytes` exceed several times the L2 of any GPU so far; 1 to 64.
int64_t SetsFor(double bytes);

// Heading and lines of the table on stdout; "FAILED" with the reason for a case that is wrong.
void PrintHeading();
void Print(const Row& row);
void PrintFailure(const std::string& name, const absl::Status& status);

// --list, --filter TEXT, --json FILE.
struct Options {
  std::string json, filter;
  bool list = false;
};
// False after a message on stderr.
bool ParseOptions(int argc, char** argv, Options* options);
// False after a message on stderr. Nothing is written for an empty path.
bool WriteJson(const std::string& path, const std::vector<Row>& rows);

}  // namespace quantmill::bench

#endif  // QUANTMILL_TESTS_BENCH_CUDA_TIMING_H_
