#include "host/run/preservation.h"

#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/distortion.h"
#include "core/model/block_parts.h"

namespace quantmill {
namespace {

// What is compared: the outputs of the two halves, and the router's logits.
struct Outputs {
  std::vector<Tensor> tensors;  // F32 on the host
  Routing routing;
};

class Halves {
 public:
  Halves(const ModelConfig& config, int64_t block, const RopeTables& rope, const Tensor& hidden,
         Backend& backend)
      : config_(config), block_(block), rope_(rope), hidden_(hidden), backend_(backend) {}

  // `reference`: the same experts see the same rows, and the second half the same input; null for
  // the first run.
  absl::StatusOr<Outputs> Run(const BlockWeights& weights, const Outputs* reference) {
    Outputs outputs;
    bool stopped = false;
    QM_ASSIGN_OR_RETURN(const Tensor x, Normalized(backend_, config_, weights.input_norm, hidden_));
    QM_ASSIGN_OR_RETURN(Tensor attention, backend_.Allocate(DType::kF32, hidden_.shape()));
    QM_RETURN_IF_ERROR(RunAttention(backend_, config_, weights, block_, rope_, BlockRun{}, x,
                                    &attention, &stopped));
    QM_RETURN_IF_ERROR(Keep(attention, &outputs));
    if (reference == nullptr) {
      QM_RETURN_IF_ERROR(backend_.Add(hidden_, &attention));
      middle_ = attention;
    } else {
      outputs.routing = reference->routing;
    }
    QM_ASSIGN_OR_RETURN(const Tensor y,
                        Normalized(backend_, config_, weights.post_attention_norm, middle_));
    if (!weights.moe.experts.empty()) {
      QM_ASSIGN_OR_RETURN(Tensor logits,
                          backend_.Allocate(DType::kF32, {y.dim(0), config_.experts}));
      QM_RETURN_IF_ERROR(ApplyLinear(backend_, weights.moe.router, y, &logits));
      QM_RETURN_IF_ERROR(Keep(logits, &outputs));
    }
    BlockRun run;
    run.routing = &outputs.routing;
    QM_ASSIGN_OR_RETURN(Tensor mlp, backend_.Allocate(DType::kF32, hidden_.shape()));
    QM_RETURN_IF_ERROR(RunMlp(backend_, config_, weights, run, y, &mlp, &stopped));
    QM_RETURN_IF_ERROR(Keep(mlp, &outputs));
    return outputs;
  }

 private:
  absl::Status Keep(const Tensor& tensor, Outputs* outputs) {
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, tensor.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(tensor, &host));
    outputs->tensors.push_back(std::move(host));
    return absl::OkStatus();
  }

  const ModelConfig& config_;
  int64_t block_;
  const RopeTables& rope_;
  const Tensor& hidden_;
  Tensor middle_;
  Backend& backend_;
};

// Largest relative error of the outputs; infinity for what is not finite.
absl::StatusOr<double> Difference(const Outputs& before, const Outputs& after) {
  double worst = 0;
  for (size_t i = 0; i < before.tensors.size(); ++i) {
    QM_ASSIGN_OR_RETURN(const Distortion distortion,
                        MeasureDistortion(before.tensors[i], after.tensors[i]));
    const double error = distortion.finite ? std::sqrt(distortion.nmse()) : HUGE_VAL;
    worst = std::max(worst, error);
  }
  return worst;
}

absl::StatusOr<double> ErrorOf(const BlockEditor& editor, const BlockWeights& weights,
                               absl::Span<const BlockEdit> edits, const Outputs& before,
                               Halves* halves) {
  BlockWeights edited = weights;
  std::set<std::string> changed;
  for (const BlockEdit& edit : edits) {
    if (edit.preserves()) QM_RETURN_IF_ERROR(editor.Apply(edit, &edited, &changed).status());
  }
  if (changed.empty()) return 0.0;
  QM_ASSIGN_OR_RETURN(const Outputs after, halves->Run(edited, &before));
  return Difference(before, after);
}

std::string Text(const BlockEdit& edit, double error) {
  return ErrorText(absl::StrCat("edit '", std::string(EditName(edit.kind)), "' of ", edit.target,
                                " changes what the block computes"),
                   absl::StrCat("relative error ", error, ", allowed ", kPreservedError),
                   "the block is left as it was");
}

}  // namespace

absl::Status CheckPreserved(const ModelConfig& config, int64_t block, const BlockEditor& editor,
                            const BlockWeights& weights, absl::Span<const BlockEdit> edits,
                            const Tensor& hidden, Backend& backend) {
  QM_ASSIGN_OR_RETURN(const RopeTables rope, MakeRopeTables(config, hidden.dim(0), backend));
  Halves halves(config, block, rope, hidden, backend);
  QM_ASSIGN_OR_RETURN(const Outputs before, halves.Run(weights, nullptr));
  QM_ASSIGN_OR_RETURN(const double error, ErrorOf(editor, weights, edits, before, &halves));
  if (error <= kPreservedError) return absl::OkStatus();
  const BlockEdit* last = nullptr;
  for (const BlockEdit& edit : edits) {
    if (!edit.preserves()) continue;
    last = &edit;
    QM_ASSIGN_OR_RETURN(const double alone, ErrorOf(editor, weights, {&edit, 1}, before, &halves));
    if (!(alone <= kPreservedError)) return absl::FailedPreconditionError(Text(edit, alone));
  }
  return absl::FailedPreconditionError(Text(*last, error));
}

}  // namespace quantmill
