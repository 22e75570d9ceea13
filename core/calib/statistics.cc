#include "core/calib/statistics.h"

#include <array>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "quantmill/quantize_linear.h"

namespace quantmill {
namespace {

struct KindName {
  StatKind kind;
  std::string_view id;
};
constexpr std::array<KindName, 5> kKinds = {{{StatKind::kHessian, QM_STAT_HESSIAN},
                                             {StatKind::kCross, QM_STAT_CROSS},
                                             {StatKind::kAbsMean, QM_STAT_ABSMEAN},
                                             {StatKind::kAbsMax, QM_STAT_ABSMAX},
                                             {StatKind::kRows, QM_STAT_ROWS}}};

}  // namespace

std::string_view StatId(StatKind kind) {
  for (const KindName& entry : kKinds) {
    if (entry.kind == kind) return entry.id;
  }
  return "";
}

absl::StatusOr<StatKind> StatKindFromId(std::string_view id) {
  std::string known;
  for (const KindName& entry : kKinds) {
    if (entry.id == id) return entry.kind;
    absl::StrAppend(&known, known.empty() ? "" : ", ", std::string(entry.id));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown statistic '", std::string(id), "'; known are: ", known));
}

const Tensor* Statistics::Find(const StatRequest& request) const {
  const auto found = tensors_.find(request);
  return found == tensors_.end() ? nullptr : &found->second;
}

int64_t Statistics::RowCount(int input_group, bool from_original) const {
  const auto found = row_counts_.find({input_group, from_original});
  return found == row_counts_.end() ? 0 : found->second;
}

void Statistics::Set(const StatRequest& request, Tensor value) {
  tensors_[request] = std::move(value);
}

void Statistics::SetRowCount(int input_group, bool from_original, int64_t rows) {
  row_counts_[{input_group, from_original}] = rows;
}

}  // namespace quantmill
