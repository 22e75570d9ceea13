// A bench: every row on every model, each an ordinary run, and the table they make together.
#ifndef QUANTMILL_HOST_BENCH_BENCH_H_
#define QUANTMILL_HOST_BENCH_BENCH_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "host/supervisor/process.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct BenchOptions {
  std::string file;
  std::string directory;
  bool resume = false;
  std::string device;                // overrides run.device; empty = as in the file
  std::vector<std::string> plugins;  // --plugin FILE
  EventSink sink;                    // progress, its stages prefixed with the cell's name, and log
  // What a finished cell has to say, one line. May be null.
  std::function<void(const std::string& line)> say;
};

// What results.json holds: facts of the measurement, and `rows`, one flat object per cell.
// Wrong usage (exit code 2): mistakes in the file. Refused (3): a directory that is not a bench's,
// or is one and `resume` is not given; a model or text that is not there; a row that no model can
// take; a speed no model has the positions for. CANCELLED when interrupted. A cell's own failure is
// a row with `status` failed or refused and its `error`.
absl::StatusOr<nlohmann::ordered_json> RunBench(const BenchOptions& options);

// Whether every cell has all of its figures.
bool BenchIsComplete(const nlohmann::ordered_json& results);

// results.json, results.csv, results.md and index.html in the bench's directory.
absl::Status WriteBenchFiles(const std::string& directory, const nlohmann::ordered_json& results);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_BENCH_H_
