// One cell of a bench: an ordinary run in its own folder, and the time of generation from what it
// wrote. Figures that are there already are kept.
#ifndef QUANTMILL_HOST_BENCH_CELL_RUNNER_H_
#define QUANTMILL_HOST_BENCH_CELL_RUNNER_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "host/bench/cell_keys.h"
#include "host/pipeline/bench_file.h"
#include "host/supervisor/process.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct CellFigures {
  nlohmann::ordered_json row;  // flat
  std::vector<double> window_kl;
  bool kept = false;  // nothing was computed
};

class CellRunner {
 public:
  // directory: the bench's. plugins: files named on the command line. context and digests must
  // outlive the runner.
  CellRunner(std::string directory, std::vector<std::string> plugins, const CellContext& context,
             InputDigests* digests, std::optional<BenchSpeed> speed)
      : directory_(std::move(directory)),
        plugins_(std::move(plugins)),
        context_(context),
        digests_(digests),
        speed_(std::move(speed)) {}

  // The cell's quality, size, time and memory. CANCELLED when the user interrupts; other errors are
  // the cell's own.
  absl::StatusOr<CellFigures> Quality(const BenchCell& cell, const EventSink& sink);
  // The keys of BenchGeneration. After Quality.
  absl::StatusOr<CellFigures> Speed(const BenchCell& cell, const EventSink& sink);
  bool MeasuresSpeed() const { return speed_.has_value(); }

 private:
  // What result.json of the cell is to hold.
  absl::StatusOr<nlohmann::ordered_json> Compute(const BenchCell& cell, const std::string& key,
                                                 const EventSink& sink);
  absl::StatusOr<nlohmann::ordered_json> RunPipeline(const BenchCell& cell, const EventSink& sink);
  // Calibration text a model draws is drawn once for all of its rows.
  absl::StatusOr<std::string> SelfTextFolder(const BenchCell& cell);
  bool IsKept(const BenchCell& cell, const std::string& key,
              const nlohmann::ordered_json& saved) const;

  std::string directory_;
  std::vector<std::string> plugins_;
  const CellContext& context_;
  InputDigests* digests_;
  std::optional<BenchSpeed> speed_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_CELL_RUNNER_H_
