// Layers made up for judging a method without a model: weights, rows of inputs, and what the host
// would have measured on those rows. Same arguments, same bytes.
#ifndef QUANTMILL_SDK_CHECK_SYNTHETIC_H_
#define QUANTMILL_SDK_CHECK_SYNTHETIC_H_

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/tensor/backend.h"
#include "core/tensor/tensor.h"
#include "quantmill/quantize_linear.h"

namespace quantmill {

enum class SyntheticKind {
  kGaussian,         // weights N(0, 0.02^2), inputs N(0, 1), all independent
  kOutlierChannels,  // of the channels, one in 32 has weights 8 times as large, and another one in
                     // 32 inputs 20 times as large
  kCorrelatedInputs  // inputs of rank in/8 plus a tenth of noise: what error compensation lives on
};
inline constexpr std::array<SyntheticKind, 3> kSyntheticKinds = {
    SyntheticKind::kGaussian, SyntheticKind::kOutlierChannels, SyntheticKind::kCorrelatedInputs};

// "gaussian", "outlier-channels", "correlated-inputs".
std::string_view SyntheticName(SyntheticKind kind);

// F32 host tensors.
struct SyntheticLayer {
  SyntheticKind kind = SyntheticKind::kGaussian;
  Tensor weight;           // [out, in]
  Tensor inputs;           // [rows, in]: of the model as quantized so far
  Tensor original_inputs;  // [rows, in]: the same rows in the untouched model, 5 % away
};

// rows may be 0: an expert no token was routed to. RESOURCE_EXHAUSTED when there is no memory.
absl::StatusOr<SyntheticLayer> MakeSyntheticLayer(SyntheticKind kind, int64_t out_features,
                                                  int64_t in_features, int64_t rows, uint64_t seed);

// The statistics a plan asks for, as STATS.md defines them, F32 on the backend's device (whose
// activations must be F32). INVALID_ARGUMENT for an unknown id.
absl::StatusOr<std::vector<NamedTensor>> MeasureStatistics(
    Backend& backend, const SyntheticLayer& layer, absl::Span<const qm_stat_request> requests);

// Statistics for the C ABI; valid while `items` lives and is not changed.
class StatsView {
 public:
  StatsView(const std::vector<NamedTensor>& items, int64_t row_count);
  const qm_stats* get() const { return &stats_; }

 private:
  std::vector<qm_named_tensor> items_;
  qm_stats stats_;
};

// sum |x (W - A)^T|^2 / sum |x W^T|^2 over the layer's rows: equal to tr(E H E^T) / tr(W H W^T)
// with H their Hessian. approximate: F32 [out, in] on the host. 0 / 0 counts as 0.
absl::StatusOr<double> OutputNmse(Backend& cpu, const SyntheticLayer& layer,
                                  const Tensor& approximate);
// sum (W - A)^2 / sum W^2.
absl::StatusOr<double> WeightNmse(const Tensor& weight, const Tensor& approximate);

}  // namespace quantmill

#endif  // QUANTMILL_SDK_CHECK_SYNTHETIC_H_
