#include "sdk/check/synthetic.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "core/base/status.h"
#include "core/calib/collector.h"
#include "core/formats/distortion.h"

namespace quantmill {
namespace {

// SplitMix64 (G. Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014) and the
// Box-Muller transform: the normal distribution of the standard library differs between libraries.
class NormalStream {
 public:
  explicit NormalStream(uint64_t seed) : state_(seed) {}

  float Next() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    constexpr double kTwoPi = 6.283185307179586;
    const double radius = std::sqrt(-2.0 * std::log(Uniform()));
    const double angle = kTwoPi * Uniform();
    spare_ = static_cast<float>(radius * std::sin(angle));
    has_spare_ = true;
    return static_cast<float>(radius * std::cos(angle));
  }

 private:
  double Uniform() {  // in (0, 1]
    state_ += 0x9E3779B97F4A7C15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return static_cast<double>((z >> 11) + 1) * 0x1p-53;
  }

  uint64_t state_;
  float spare_ = 0.0f;
  bool has_spare_ = false;
};

void FillNormal(uint64_t seed, float deviation, const Tensor& out) {
  NormalStream normal(seed);
  float* data = out.as<float>();
  for (int64_t i = 0; i < out.elements(); ++i) data[i] = deviation * normal.Next();
}

// Channels first, first + 32, ... of every row times `factor`.
void ScaleChannels(int64_t first, float factor, const Tensor& matrix) {
  constexpr int64_t kEvery = 32;
  const int64_t cols = matrix.dim(1);
  for (int64_t r = 0; r < matrix.dim(0); ++r) {
    float* row = matrix.as<float>() + r * cols;
    for (int64_t c = first; c < cols; c += kEvery) row[c] *= factor;
  }
}

// Every row becomes z A + 0.1 * row with A [rank, cols] and z [rank] normal, so that a channel's
// variance stays about 1.
absl::Status Correlate(uint64_t seed, const Tensor& inputs) {
  const int64_t cols = inputs.dim(1), rank = std::max<int64_t>(1, cols / 8);
  QM_ASSIGN_OR_RETURN(const Tensor mix, Tensor::Host(DType::kF32, {rank, cols}));
  FillNormal(seed, 1.0f / std::sqrt(static_cast<float>(rank)), mix);
  NormalStream normal(seed + 1);
  for (int64_t r = 0; r < inputs.dim(0); ++r) {
    float* row = inputs.as<float>() + r * cols;
    for (int64_t c = 0; c < cols; ++c) row[c] *= 0.1f;
    for (int64_t k = 0; k < rank; ++k) {
      const float z = normal.Next();
      const float* a = mix.as<float>() + k * cols;
      for (int64_t c = 0; c < cols; ++c) row[c] += z * a[c];
    }
  }
  return absl::OkStatus();
}

absl::Status TakeRows(const Tensor& inputs, int64_t max_rows, Tensor* out) {
  const RowSampling sampling = SampleRows(inputs.dim(0), max_rows);
  const int64_t cols = inputs.dim(1);
  QM_ASSIGN_OR_RETURN(*out, Tensor::Host(DType::kF32, {sampling.count, cols}));
  for (int64_t i = 0; i < sampling.count; ++i) {
    std::memcpy(out->as<float>() + i * cols, inputs.as<float>() + i * sampling.stride * cols,
                static_cast<size_t>(cols) * sizeof(float));
  }
  return absl::OkStatus();
}

absl::StatusOr<Tensor> Zeros(Backend& backend, const Shape& shape) {
  QM_ASSIGN_OR_RETURN(Tensor out, backend.Allocate(DType::kF32, shape));
  QM_RETURN_IF_ERROR(backend.Zero(&out));
  return out;
}

absl::StatusOr<Tensor> MeasureAbsMean(Backend& backend, const Tensor& x) {
  const int64_t rows = x.dim(0), cols = x.dim(1);
  QM_ASSIGN_OR_RETURN(Tensor mean, Tensor::HostZeros(DType::kF32, {cols}));
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 0.0;
    for (int64_t r = 0; r < rows; ++r) sum += std::fabs(x.as<float>()[r * cols + c]);
    mean.as<float>()[c] = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(rows, 1)));
  }
  return backend.ToDevice(mean);
}

// `host_inputs` and `x` are the same rows on the host and on the device.
absl::StatusOr<Tensor> Measure(Backend& backend, const qm_stat_request& request,
                               const Tensor& host_inputs, const Tensor& x,
                               const Tensor& x_original) {
  QM_ASSIGN_OR_RETURN(const StatKind kind, StatKindFromId(request.stat_id));
  const int64_t cols = x.dim(1);
  const bool any = x.dim(0) > 0;
  if (kind == StatKind::kRows) {
    if (request.max_rows < 1) {
      return absl::InvalidArgumentError("statistic 'rows' asks for max_rows below 1");
    }
    Tensor rows;
    QM_RETURN_IF_ERROR(TakeRows(host_inputs, request.max_rows, &rows));
    return backend.ToDevice(rows);
  }
  if (kind == StatKind::kAbsMean) return MeasureAbsMean(backend, host_inputs);
  const Shape shape = kind == StatKind::kAbsMax ? Shape{cols} : Shape{cols, cols};
  QM_ASSIGN_OR_RETURN(Tensor value, Zeros(backend, shape));
  if (!any) return value;
  if (kind == StatKind::kAbsMax) QM_RETURN_IF_ERROR(backend.AccumulateAbs(x, nullptr, &value));
  if (kind == StatKind::kHessian) QM_RETURN_IF_ERROR(backend.AccumulateGram(x, &value));
  if (kind == StatKind::kCross) {
    QM_RETURN_IF_ERROR(backend.AccumulateCross(x_original, x, &value));
  }
  return value;
}

}  // namespace

std::string_view SyntheticName(SyntheticKind kind) {
  switch (kind) {
    case SyntheticKind::kGaussian:
      return "gaussian";
    case SyntheticKind::kOutlierChannels:
      return "outlier-channels";
    case SyntheticKind::kCorrelatedInputs:
      return "correlated-inputs";
  }
  return "";
}

absl::StatusOr<SyntheticLayer> MakeSyntheticLayer(SyntheticKind kind, int64_t out_features,
                                                  int64_t in_features, int64_t rows,
                                                  uint64_t seed) {
  SyntheticLayer layer;
  layer.kind = kind;
  QM_ASSIGN_OR_RETURN(layer.weight, Tensor::Host(DType::kF32, {out_features, in_features}));
  QM_ASSIGN_OR_RETURN(layer.inputs, Tensor::Host(DType::kF32, {rows, in_features}));
  QM_ASSIGN_OR_RETURN(layer.original_inputs, Tensor::Host(DType::kF32, {rows, in_features}));
  const uint64_t base = seed * 1000;
  FillNormal(base, 0.02f, layer.weight);
  FillNormal(base + 1, 1.0f, layer.inputs);
  if (kind == SyntheticKind::kOutlierChannels) {
    ScaleChannels(5, 8.0f, layer.weight);
    ScaleChannels(17, 20.0f, layer.inputs);
  }
  if (kind == SyntheticKind::kCorrelatedInputs) {
    QM_RETURN_IF_ERROR(Correlate(base + 2, layer.inputs));
  }
  NormalStream normal(base + 4);
  for (int64_t i = 0; i < layer.inputs.elements(); ++i) {
    const float x = layer.inputs.as<float>()[i];
    layer.original_inputs.as<float>()[i] = x * (1.0f + 0.05f * normal.Next());
  }
  return layer;
}

absl::StatusOr<std::vector<NamedTensor>> MeasureStatistics(
    Backend& backend, const SyntheticLayer& layer, absl::Span<const qm_stat_request> requests) {
  std::vector<NamedTensor> out;
  if (requests.empty()) return out;
  QM_ASSIGN_OR_RETURN(const Tensor x, backend.ToDevice(layer.inputs));
  QM_ASSIGN_OR_RETURN(const Tensor x_original, backend.ToDevice(layer.original_inputs));
  for (const qm_stat_request& request : requests) {
    const bool original = (request.flags & QM_STAT_FROM_ORIGINAL) != 0;
    absl::StatusOr<Tensor> value =
        Measure(backend, request, original ? layer.original_inputs : layer.inputs,
                original ? x_original : x, x_original);
    if (!value.ok()) return value.status();
    out.push_back({request.stat_id, *std::move(value)});
  }
  return out;
}

StatsView::StatsView(const std::vector<NamedTensor>& items, int64_t row_count) {
  for (const NamedTensor& item : items) {
    items_.push_back({item.name.c_str(), item.tensor.View()});
    items_.back().tensor.flags |= QM_TENSOR_READONLY;
  }
  stats_ = {sizeof(qm_stats), items_.data(), items_.size(), row_count};
}

absl::StatusOr<double> OutputNmse(Backend& cpu, const SyntheticLayer& layer,
                                  const Tensor& approximate) {
  const int64_t rows = layer.inputs.dim(0), out_features = layer.weight.dim(0);
  if (rows == 0) return 0.0;
  QM_ASSIGN_OR_RETURN(Tensor error, Tensor::Host(DType::kF32, layer.weight.shape()));
  for (int64_t i = 0; i < error.elements(); ++i) {
    error.as<float>()[i] = layer.weight.as<float>()[i] - approximate.as<float>()[i];
  }
  double energy[2] = {0.0, 0.0};
  for (int pass = 0; pass < 2; ++pass) {
    QM_ASSIGN_OR_RETURN(Tensor y, Tensor::Host(DType::kF32, {rows, out_features}));
    QM_RETURN_IF_ERROR(cpu.Linear(layer.inputs, pass == 0 ? error : layer.weight, Tensor(), &y));
    for (int64_t i = 0; i < y.elements(); ++i) {
      energy[pass] += static_cast<double>(y.as<float>()[i]) * y.as<float>()[i];
    }
  }
  return energy[0] == 0.0 ? 0.0 : energy[0] / energy[1];
}

absl::StatusOr<double> WeightNmse(const Tensor& weight, const Tensor& approximate) {
  QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(weight, approximate));
  return distortion.nmse();
}

}  // namespace quantmill
