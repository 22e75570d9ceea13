// The accumulators behind Calibration::Collect: a BlockObserver that turns the inputs of linears
// into statistics, window by window.
#ifndef QUANTMILL_CORE_CALIB_COLLECTOR_H_
#define QUANTMILL_CORE_CALIB_COLLECTOR_H_

#include <cstdint>
#include <map>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "core/calib/statistics.h"
#include "core/model/decoder.h"
#include "core/tensor/backend.h"

namespace quantmill {

// Rows of each input group that a whole calibration will show: needed beforehand for `rows` only.
using GroupRows = std::map<int, int64_t>;

// What StatRequest says about stride and number of sampled rows (STATS.md).
struct RowSampling {
  int64_t stride = 1;
  int64_t count = 0;
};
RowSampling SampleRows(int64_t row_count, int64_t max_rows);

// Collects the requests of one stream. The batch's windows are told apart by their equal share of
// the rows; batches of more than one window must not reach the experts of a mixture.
class Collector : public BlockObserver {
 public:
  // in_features: of each input group of the block. `capture`: groups whose input Captured() hands
  // out until the next batch.
  Collector(Backend& backend, bool from_original, std::vector<int64_t> in_features,
            GroupRows expected_rows, std::vector<int> capture);

  // Allocates the accumulator.
  absl::Status Add(const StatRequest& request);
  // Announces how many windows the next block run holds.
  void BeginBatch(int64_t windows);
  absl::Status OnInput(int input_group, const Tensor& x) override;
  // Input of a captured group in the current batch.
  absl::StatusOr<Tensor> Captured(int input_group) const;
  int64_t batch_windows() const { return batch_windows_; }

  // Divides the means and hands over the results, with the row counts of every group seen.
  absl::Status Finish(Statistics* out);

 private:
  absl::Status Accumulate(const StatRequest& request, const Tensor& x, Tensor* value);
  absl::Status TakeRows(const StatRequest& request, const Tensor& x, Tensor* value);

  Backend& backend_;
  bool from_original_;
  std::vector<int64_t> in_features_;
  GroupRows expected_rows_;
  std::vector<int> capture_;
  std::map<StatRequest, Tensor> values_;
  std::map<int, int64_t> rows_seen_;
  std::map<int, Tensor> captured_;
  int64_t batch_windows_ = 1;
};

// Adds (x_original - x)^T x of every requested group while the untouched block runs: x is what
// `quantized` captured of the same batch.
class CrossCollector : public BlockObserver {
 public:
  CrossCollector(Backend& backend, const Collector& quantized)
      : backend_(backend), quantized_(quantized) {}
  absl::Status Add(const StatRequest& request, int64_t in_features);
  absl::Status OnInput(int input_group, const Tensor& x) override;
  void Finish(Statistics* out);

 private:
  Backend& backend_;
  const Collector& quantized_;
  std::map<StatRequest, Tensor> values_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CALIB_COLLECTOR_H_
