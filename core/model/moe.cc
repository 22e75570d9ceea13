#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/block_parts.h"

namespace quantmill {
namespace {

struct ExpertRows {
  std::vector<int32_t> rows;  // ascending
  std::vector<float> weights;
};

absl::Status CheckRouting(const Routing& routing, int64_t rows, int64_t top_k) {
  const Shape expected = {rows, top_k};
  if (routing.experts.shape() == expected && routing.weights.shape() == expected) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("routing given for ", routing.experts.shape().ToString(),
                   " does not fit the block's input; expected ", expected.ToString()));
}

// Rows of each expert, ascending, so that the result does not depend on anything but the routing.
absl::StatusOr<std::vector<ExpertRows>> RowsByExpert(const Routing& routing, int64_t experts) {
  std::vector<ExpertRows> by_expert(static_cast<size_t>(experts));
  const int64_t rows = routing.experts.dim(0);
  const int64_t top_k = routing.experts.dim(1);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t expert = routing.experts.as<int32_t>()[row * top_k + k];
      if (expert < 0 || expert >= experts) {
        return absl::InvalidArgumentError(
            absl::StrCat("routing names expert ", expert, " of ", experts));
      }
      ExpertRows& target = by_expert[static_cast<size_t>(expert)];
      target.rows.push_back(static_cast<int32_t>(row));
      target.weights.push_back(routing.weights.as<float>()[row * top_k + k]);
    }
  }
  return by_expert;
}

absl::Status ChooseExperts(Backend& backend, const ModelConfig& config, const MoeWeights& weights,
                           const Tensor& x, Routing* routing) {
  const int64_t rows = x.dim(0);
  QM_ASSIGN_OR_RETURN(Tensor logits, backend.Allocate(x.dtype(), {rows, config.experts}));
  QM_RETURN_IF_ERROR(ApplyLinear(backend, weights.router, x, &logits));
  QM_ASSIGN_OR_RETURN(routing->experts,
                      Tensor::Host(DType::kI32, {rows, config.experts_per_token}));
  QM_ASSIGN_OR_RETURN(routing->weights,
                      Tensor::Host(DType::kF32, {rows, config.experts_per_token}));
  return backend.RouteTopK(logits, config.experts_per_token, config.normalize_expert_weights,
                           &routing->experts, &routing->weights);
}

absl::Status RunExpert(Backend& backend, const ModelConfig& config,
                       const MoeWeights::Expert& weights, int index, const ExpertRows& routed,
                       const BlockRun& run, const Tensor& x, Tensor* out, bool* stopped) {
  const int64_t count = static_cast<int64_t>(routed.rows.size());
  const Tensor rows = Tensor::FromI32({count}, routed.rows);
  QM_ASSIGN_OR_RETURN(Tensor input, backend.Allocate(x.dtype(), {count, x.dim(1)}));
  if (count > 0) QM_RETURN_IF_ERROR(backend.GatherRows(x, rows, &input));
  QM_ASSIGN_OR_RETURN(Tensor output, backend.Allocate(x.dtype(), {count, x.dim(1)}));
  QM_RETURN_IF_ERROR(RunGatedMlp(backend, weights.gate, weights.up, weights.down,
                                 config.expert_intermediate_size, 2 + 2 * index, run, input,
                                 &output, stopped));
  if (*stopped || count == 0) return absl::OkStatus();
  return backend.ScatterAddRows(output, rows, Tensor::FromF32({count}, routed.weights), out);
}

}  // namespace

absl::Status RunExperts(Backend& backend, const ModelConfig& config, const MoeWeights& weights,
                        const BlockRun& run, const Tensor& x, Tensor* out, bool* stopped) {
  Routing own;
  Routing& routing = run.routing != nullptr ? *run.routing : own;
  if (routing.experts.empty()) {
    QM_RETURN_IF_ERROR(ChooseExperts(backend, config, weights, x, &routing));
  }
  QM_RETURN_IF_ERROR(CheckRouting(routing, x.dim(0), config.experts_per_token));
  QM_ASSIGN_OR_RETURN(const std::vector<ExpertRows> by_expert,
                      RowsByExpert(routing, static_cast<int64_t>(weights.experts.size())));
  QM_RETURN_IF_ERROR(backend.Zero(out));
  for (size_t expert = 0; expert < by_expert.size() && !*stopped; ++expert) {
    QM_RETURN_IF_ERROR(RunExpert(backend, config, weights.experts[expert], static_cast<int>(expert),
                                 by_expert[expert], run, x, out, stopped));
  }
  return absl::OkStatus();
}

}  // namespace quantmill
