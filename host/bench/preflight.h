// What can be known of a bench before any work.
#ifndef QUANTMILL_HOST_BENCH_PREFLIGHT_H_
#define QUANTMILL_HOST_BENCH_PREFLIGHT_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "host/pipeline/bench_file.h"
#include "host/plugins/catalog.h"

namespace quantmill {

// Models and texts are there; every row can run on at least one model; the models have the
// positions that `speed` asks for. Refused with every mistake, one per line. Otherwise a status per
// cell: the rows that some of the models cannot take fail there.
absl::StatusOr<std::vector<absl::Status>> CheckBench(const BenchFile& bench,
                                                     const Catalog& catalog);

// Refused: `path` is there and is no bench's directory, or is one and `resume` is false.
absl::Status CheckBenchDirectory(const std::string& path, bool resume);

// The directory of a bench, held against other processes while this lives.
class BenchDirectory {
 public:
  // Makes it if it is not there. Refused: as CheckBenchDirectory, or another process holds it.
  static absl::StatusOr<std::unique_ptr<BenchDirectory>> Open(const std::string& path, bool resume);
  ~BenchDirectory();
  BenchDirectory(const BenchDirectory&) = delete;
  BenchDirectory& operator=(const BenchDirectory&) = delete;

 private:
  explicit BenchDirectory(int descriptor) : descriptor_(descriptor) {}
  int descriptor_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_PREFLIGHT_H_
