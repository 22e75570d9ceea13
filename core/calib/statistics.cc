#include "core/calib/statistics.h"

#include <array>
#include <cmath>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/threads/thread_pool.h"
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

void Statistics::Erase(int input_group) {
  std::erase_if(tensors_,
                [&](const auto& entry) { return entry.first.input_group == input_group; });
  std::erase_if(row_counts_, [&](const auto& entry) { return entry.first.first == input_group; });
}

void Statistics::SetRowCount(int input_group, bool from_original, int64_t rows) {
  row_counts_[{input_group, from_original}] = rows;
}

absl::Status DivideInputs(Backend& backend, int input_group, absl::Span<const float> scale,
                          Statistics* statistics) {
  const auto values = statistics->tensors();  // handles
  for (const auto& [request, tensor] : values) {
    if (request.input_group != input_group || tensor.elements() == 0) continue;
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, tensor.shape()));
    QM_RETURN_IF_ERROR(backend.Copy(tensor, &host));
    const bool pairs = request.kind == StatKind::kHessian || request.kind == StatKind::kCross;
    const bool magnitude = request.kind == StatKind::kAbsMean || request.kind == StatKind::kAbsMax;
    const int64_t columns = static_cast<int64_t>(scale.size());
    backend.threads().ParallelFor(host.elements() / columns, 16,
                                  [&](int64_t begin, int64_t end, int) {
                                    for (int64_t row = begin; row < end; ++row) {
                                      float* out = host.as<float>() + row * columns;
                                      for (int64_t i = 0; i < columns; ++i) {
                                        const float s = scale[static_cast<size_t>(i)];
                                        out[i] /= magnitude ? std::abs(s) : s;
                                        if (pairs) out[i] /= scale[static_cast<size_t>(row)];
                                      }
                                    }
                                  });
    QM_ASSIGN_OR_RETURN(Tensor divided, backend.ToDevice(host));
    statistics->Set(request, std::move(divided));
  }
  return absl::OkStatus();
}

}  // namespace quantmill
