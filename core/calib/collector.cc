#include "core/calib/collector.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

absl::StatusOr<Tensor> ZeroTensor(Backend& backend, const Shape& shape) {
  QM_ASSIGN_OR_RETURN(Tensor tensor, backend.Allocate(DType::kF32, shape));
  QM_RETURN_IF_ERROR(backend.Zero(&tensor));
  return tensor;
}

int64_t Lookup(const std::map<int, int64_t>& counts, int group) {
  const auto found = counts.find(group);
  return found == counts.end() ? 0 : found->second;
}

// sum / rows, computed on the host so that every backend rounds alike.
absl::Status DivideByRows(Backend& backend, int64_t rows, Tensor* value) {
  if (rows == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, value->shape()));
  QM_RETURN_IF_ERROR(backend.Copy(*value, &host));
  for (int64_t i = 0; i < host.elements(); ++i) {
    host.as<float>()[i] /= static_cast<float>(rows);
  }
  return backend.Copy(host, value);
}

}  // namespace

RowSampling SampleRows(int64_t row_count, int64_t max_rows) {
  RowSampling sampling;
  sampling.stride = std::max<int64_t>(1, row_count / max_rows);
  sampling.count = std::min(max_rows, (row_count + sampling.stride - 1) / sampling.stride);
  return sampling;
}

Collector::Collector(Backend& backend, bool from_original, std::vector<int64_t> in_features,
                     GroupRows expected_rows, std::vector<int> capture)
    : backend_(backend),
      from_original_(from_original),
      in_features_(std::move(in_features)),
      expected_rows_(std::move(expected_rows)),
      capture_(std::move(capture)) {}

absl::Status Collector::Add(const StatRequest& request) {
  if (values_.contains(request)) return absl::OkStatus();
  const int64_t in = in_features_[static_cast<size_t>(request.input_group)];
  Shape shape = {in};
  if (request.kind == StatKind::kHessian) shape = {in, in};
  if (request.kind == StatKind::kRows) {
    const int64_t rows = Lookup(expected_rows_, request.input_group);
    shape = {SampleRows(rows, request.max_rows).count, in};
  }
  QM_ASSIGN_OR_RETURN(values_[request], ZeroTensor(backend_, shape));
  return absl::OkStatus();
}

void Collector::BeginBatch(int64_t windows) {
  batch_windows_ = windows;
  captured_.clear();
}

absl::Status Collector::OnInput(int input_group, const Tensor& x) {
  if (std::find(capture_.begin(), capture_.end(), input_group) != capture_.end()) {
    captured_[input_group] = x;
  }
  const int64_t rows = x.dim(0) / batch_windows_;
  for (int64_t window = 0; window < batch_windows_ && rows > 0; ++window) {
    const Tensor slice = x.Rows(window * rows, (window + 1) * rows);
    for (auto& [request, value] : values_) {
      if (request.input_group != input_group) continue;
      QM_RETURN_IF_ERROR(Accumulate(request, slice, &value));
    }
    rows_seen_[input_group] += rows;
  }
  return absl::OkStatus();
}

absl::Status Collector::Accumulate(const StatRequest& request, const Tensor& x, Tensor* value) {
  switch (request.kind) {
    case StatKind::kHessian:
      return backend_.AccumulateGram(x, value);
    case StatKind::kAbsMean:
      return backend_.AccumulateAbs(x, value, nullptr);
    case StatKind::kAbsMax:
      return backend_.AccumulateAbs(x, nullptr, value);
    case StatKind::kRows:
      return TakeRows(request, x, value);
    case StatKind::kCross:
      break;
  }
  return absl::InvalidArgumentError("cross statistics need both streams");
}

absl::Status Collector::TakeRows(const StatRequest& request, const Tensor& x, Tensor* value) {
  const int64_t first = Lookup(rows_seen_, request.input_group);
  const int64_t total = Lookup(expected_rows_, request.input_group);
  const RowSampling sampling = SampleRows(total, request.max_rows);
  std::vector<int32_t> picked;
  const int64_t begin = (first + sampling.stride - 1) / sampling.stride;
  int64_t sample = begin;
  for (; sample < sampling.count && sample * sampling.stride < first + x.dim(0); ++sample) {
    picked.push_back(static_cast<int32_t>(sample * sampling.stride - first));
  }
  if (picked.empty()) return absl::OkStatus();
  const int64_t count = static_cast<int64_t>(picked.size());
  QM_ASSIGN_OR_RETURN(Tensor gathered, backend_.Allocate(x.dtype(), {count, x.dim(1)}));
  QM_RETURN_IF_ERROR(backend_.GatherRows(x, Tensor::FromI32({count}, picked), &gathered));
  Tensor target = value->Rows(begin, sample);
  return backend_.Copy(gathered, &target);
}

absl::StatusOr<Tensor> Collector::Captured(int input_group) const {
  const auto found = captured_.find(input_group);
  if (found == captured_.end()) {
    return absl::InternalError(
        absl::StrCat("the input of group ", input_group, " was not seen in the quantized stream"));
  }
  return found->second;
}

absl::Status Collector::Finish(Statistics* out) {
  for (const auto& [group, rows] : rows_seen_) out->SetRowCount(group, from_original_, rows);
  for (auto& [request, value] : values_) {
    const int64_t rows = Lookup(rows_seen_, request.input_group);
    if (request.kind == StatKind::kAbsMean) {
      QM_RETURN_IF_ERROR(DivideByRows(backend_, rows, &value));
    }
    out->SetRowCount(request.input_group, request.from_original, rows);
    out->Set(request, std::move(value));
  }
  return absl::OkStatus();
}

absl::Status CrossCollector::Add(const StatRequest& request, int64_t in_features) {
  QM_ASSIGN_OR_RETURN(values_[request], ZeroTensor(backend_, {in_features, in_features}));
  return absl::OkStatus();
}

absl::Status CrossCollector::OnInput(int input_group, const Tensor& x) {
  const auto found = values_.find({input_group, StatKind::kCross, 0, false});
  if (found == values_.end() || x.dim(0) == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor quantized, quantized_.Captured(input_group));
  const int64_t windows = quantized_.batch_windows();
  const int64_t rows = x.dim(0) / windows;
  for (int64_t window = 0; window < windows; ++window) {
    QM_RETURN_IF_ERROR(backend_.AccumulateCross(x.Rows(window * rows, (window + 1) * rows),
                                                quantized.Rows(window * rows, (window + 1) * rows),
                                                &found->second));
  }
  return absl::OkStatus();
}

void CrossCollector::Finish(Statistics* out) {
  for (auto& [request, value] : values_) out->Set(request, std::move(value));
}

}  // namespace quantmill
