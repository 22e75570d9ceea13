// Statistics of the inputs of linears: what can be asked for, and the result. Meaning and numerics:
// plugin_api/STATS.md.
#ifndef QUANTMILL_CORE_CALIB_STATISTICS_H_
#define QUANTMILL_CORE_CALIB_STATISTICS_H_

#include <cstdint>
#include <map>
#include <string_view>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/tensor/backend.h"
#include "core/tensor/tensor.h"

namespace quantmill {

enum class StatKind { kHessian, kCross, kAbsMean, kAbsMax, kRows };

// "hessian", "cross", ...: the ids of quantize_linear.h.
std::string_view StatId(StatKind kind);
// The inverse; INVALID_ARGUMENT lists the known ids.
absl::StatusOr<StatKind> StatKindFromId(std::string_view id);

// One statistic of one input group (LinearSlot::input_group) of a block.
struct StatRequest {
  int input_group = 0;
  StatKind kind = StatKind::kHessian;
  int64_t max_rows = 0;        // kRows: at least 1; others: 0
  bool from_original = false;  // inputs of the untouched model; not allowed for kCross
  friend bool operator<(const StatRequest& a, const StatRequest& b) {
    return std::tie(a.input_group, a.kind, a.max_rows, a.from_original) <
           std::tie(b.input_group, b.kind, b.max_rows, b.from_original);
  }
};

// Collected statistics, F32 on the backend's device; slots of one input group share the tensors.
class Statistics {
 public:
  // Null if it was not collected.
  const Tensor* Find(const StatRequest& request) const;
  // Rows of the group's input seen in that stream; 0 for an expert nobody was routed to, and for a
  // group of which nothing was collected.
  int64_t RowCount(int input_group, bool from_original = false) const;

  void Set(const StatRequest& request, Tensor value);
  // Forgets what was measured of a group: its inputs are no longer those.
  void Erase(int input_group);
  const std::map<StatRequest, Tensor>& tensors() const { return tensors_; }
  void SetRowCount(int input_group, bool from_original, int64_t rows);

 private:
  std::map<StatRequest, Tensor> tensors_;
  std::map<std::pair<int, bool>, int64_t> row_counts_;
};

// The exact statistics of inputs divided by `scale`, one factor (not 0) per input feature, in the
// place of those of the group's inputs, in both streams: hessian and cross become S^-1 H S^-1,
// absmean and absmax are divided by |s|, rows by s. Computed on the host.
absl::Status DivideInputs(Backend& backend, int input_group, absl::Span<const float> scale,
                          Statistics* statistics);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CALIB_STATISTICS_H_
