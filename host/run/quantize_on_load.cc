#include "host/run/quantize_on_load.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/packed_linear.h"
#include "core/checkpoint/quantization_config.h"
#include "core/model/dense_source.h"
#include "host/run/fingerprint.h"
#include "host/run/method_runner.h"
#include "host/run/slot_work.h"
#include "host/run/stage_set.h"
#include "host/worker/plugin_log.h"

namespace quantmill {
namespace {

constexpr char kStage[] = "load";

void PrintPluginWarning(const nlohmann::json& event) {
  if (event.value("type", "") == "log") {
    PrintWarning(event.value("severity", 0), event.value("text", ""));
  }
}

class OnLoadSource : public WeightSource {
 public:
  OnLoadSource(std::unique_ptr<DenseSource> original, const LoadedMethod& method,
               const ResolvedOptions& options, PluginFormats& formats, Backend& backend,
               PackedMode mode)
      : original_(std::move(original)),
        method_(method),
        options_(options),
        formats_(formats),
        mode_(mode),
        runner_(backend, /*words=*/nullptr, &PrintPluginWarning) {}

  // What LoadBlock would refuse for every linear of a kind.
  absl::Status Check() {
    for (const LinearSlot& slot : AllSlots(config())) QM_RETURN_IF_ERROR(Plan(slot).status());
    return absl::OkStatus();
  }

  const ModelConfig& config() const override { return original_->config(); }
  absl::StatusOr<BlockWeights> LoadBlock(int64_t block, Backend& backend) override {
    QM_ASSIGN_OR_RETURN(
        BlockWeights weights,
        LoadBlockWeights(config(), original_->checkpoint(), block, backend,
                         [&](const LinearSlot& slot, Backend& on) { return Load(slot, on); }));
    original_->ReleaseBlock(block);  // norms are read again when they are needed
    return weights;
  }
  absl::StatusOr<Tensor> Embedding() override { return original_->Embedding(); }
  absl::StatusOr<Tensor> FinalNorm(Backend& backend) override {
    return original_->FinalNorm(backend);
  }
  absl::StatusOr<LinearWeight> Head(Backend& backend) override { return original_->Head(backend); }
  void ReleaseBlock(int64_t block) override { original_->ReleaseBlock(block); }

 private:
  DType StoredDType(const LinearSlot& slot) const {
    const CheckpointTensor* tensor = original_->checkpoint().Find(slot.name + ".weight");
    return tensor != nullptr && tensor->entry->dtype ? *tensor->entry->dtype : DType::kF32;
  }

  absl::StatusOr<SlotPlan> Plan(const LinearSlot& slot) {
    const DType stored = StoredDType(slot);
    QM_ASSIGN_OR_RETURN(SlotPlan plan, runner_.Plan(method_, kStage, slot, options_, stored,
                                                    ScaleDType(kNativeTarget, stored)));
    for (const SlotPlan::Stat& stat : plan.stats) {
      if (stat.optional) continue;
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat("method '", method_.method->id, "' cannot quantize while loading"),
                    absl::StrCat("it asks for the statistic '", AbslView(StatId(stat.request.kind)),
                                 "' of calibration data"),
                    "quantize with quantmill run, or load with a method that needs no data"));
    }
    plan.stats.clear();
    return plan;
  }

  absl::StatusOr<LinearWeight> Load(const LinearSlot& slot, Backend& backend) {
    QM_ASSIGN_OR_RETURN(LinearWeight dense,
                        LoadDenseLinear(original_->checkpoint(), slot, backend));
    QM_ASSIGN_OR_RETURN(const SlotPlan plan, Plan(slot));
    SlotTask task;
    task.slot = &slot;
    task.options = &options_;
    task.plan = &plan;
    task.weight_dtype = StoredDType(slot);
    task.scale_dtype = ScaleDType(kNativeTarget, task.weight_dtype);
    task.seed = SlotSeed(/*run_seed=*/0, kStage, slot.name);
    QM_ASSIGN_OR_RETURN(task.weight, backend.Allocate(DType::kF32, dense.dense.shape()));
    QM_RETURN_IF_ERROR(backend.Copy(dense.dense, &task.weight));
    dense.dense = Tensor();
    QM_RETURN_IF_ERROR(CheckFinite(task.weight, slot.name, backend));
    RunContext context;
    context.stage = kStage;
    SlotOutcome outcome = std::move(runner_.Run(method_, context, {&task, 1})[0]);
    QM_RETURN_IF_ERROR(outcome.status);
    QM_RETURN_IF_ERROR(WithContext(formats_.Check(outcome.packed), slot.name));
    task.weight = Tensor();
    QM_ASSIGN_OR_RETURN(LinearWeight linear,
                        MakePackedLinear(std::move(outcome.packed), mode_, &formats_, backend));
    linear.bias = std::move(dense.bias);
    return linear;
  }

  const std::unique_ptr<DenseSource> original_;
  const LoadedMethod method_;
  const ResolvedOptions options_;
  PluginFormats& formats_;
  const PackedMode mode_;
  MethodRunner runner_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<WeightSource>> QuantizeOnLoad(const std::string& directory,
                                                             const LoadedMethod& method,
                                                             const ResolvedOptions& options,
                                                             PluginFormats& formats,
                                                             Backend& backend, PackedMode mode) {
  QM_RETURN_IF_ERROR(CheckModelDirectory(directory));
  QM_ASSIGN_OR_RETURN(const auto quantization, ReadQuantizationConfig(directory));
  if (quantization != nullptr) {
    return absl::FailedPreconditionError(
        ErrorText(absl::StrCat(directory, " is quantized already"),
                  "only an original checkpoint can be quantized while it is loaded",
                  "leave --load out, or name the original"));
  }
  QM_ASSIGN_OR_RETURN(auto original, DenseSource::Open(directory));
  auto source =
      std::make_unique<OnLoadSource>(std::move(original), method, options, formats, backend, mode);
  QM_RETURN_IF_ERROR(source->Check());
  return std::unique_ptr<WeightSource>(std::move(source));
}

}  // namespace quantmill
