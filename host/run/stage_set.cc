#include "host/run/stage_set.h"

#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

std::string Option(const ResolvedOptions& options, const char* name) {
  const auto it = options.find(name);
  return it == options.end() ? "" : it->second;
}

const LoadedMethod* FindLoaded(const std::vector<LoadedMethod>& methods, std::string_view id) {
  for (const LoadedMethod& method : methods) {
    if (id == method.method->id) return &method;
  }
  return nullptr;
}

class Preparer {
 public:
  Preparer(const PipelinePlan& plan, const Catalog& catalog,
           const std::vector<LoadedMethod>& methods, MethodRunner& runner, StageSet* set)
      : plan_(plan), catalog_(catalog), methods_(methods), runner_(runner), set_(*set) {}

  absl::Status Add(const PlannedStage& stage) {
    PreparedStage prepared;
    prepared.stage = &stage;
    for (const std::string& table : stage.tables) {
      if (table == QM_EXT_QUANTIZE_LINEAR) continue;
      return absl::UnimplementedError(ErrorText(
          absl::StrCat(stage.location.ToString(), ": stage '", stage.name, "' needs ", table),
          "this version runs methods that quantize linears only",
          "use a packing method such as ptq or gptq"));
    }
    QM_ASSIGN_OR_RETURN(prepared.method, Bind(stage, stage.method, nullptr));
    if (stage.on_error.action == OnError::Action::kUse) {
      const std::string id = stage.on_error.use.substr(0, stage.on_error.use.find('.'));
      QM_ASSIGN_OR_RETURN(prepared.fallback, Bind(stage, id, &stage.fallback_options));
    }
    if (!stage.options.empty()) {
      const std::string inputs = Option(stage.options[0], "inputs");
      prepared.sequential = Option(stage.options[0], "sequential") == "true";
      prepared.from_original =
          inputs == "original" || (inputs != "quantized" && !plan_.pipeline.inputs_quantized);
    }
    Redirect(&prepared, &prepared.method);
    if (prepared.fallback) Redirect(&prepared, &*prepared.fallback);
    QM_RETURN_IF_ERROR(RefuseHeadStatistics(prepared));
    set_.stages.push_back(std::move(prepared));
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<BoundMethod> Bind(const PlannedStage& stage, const std::string& id,
                                   const ResolvedOptions* fallback_options) {
    const LoadedMethod* loaded = FindLoaded(methods_, id);
    const PluginInfo* info = catalog_.FindPlugin(id);
    if (loaded == nullptr || info == nullptr) {
      return absl::NotFoundError(
          absl::StrCat("method '", id, "' of stage '", stage.name, "' is in no loaded plugin"));
    }
    BoundMethod bound{*loaded, info->sha256, {}};
    for (size_t i = 0; i < stage.slots.size(); ++i) {
      const size_t slot = static_cast<size_t>(stage.slots[i]);
      const ResolvedOptions& options = fallback_options ? *fallback_options : stage.options[i];
      QM_ASSIGN_OR_RETURN(SlotPlan plan,
                          runner_.Plan(*loaded, stage.name, plan_.slots[slot], options,
                                       set_.weight_dtypes[slot], set_.scale_dtype));
      bound.plans.push_back(std::move(plan));
    }
    return bound;
  }

  // Turns the stage's default stream into requests, and notes which streams are needed.
  static void Redirect(PreparedStage* prepared, BoundMethod* bound) {
    for (SlotPlan& plan : bound->plans) {
      for (SlotPlan::Stat& stat : plan.stats) {
        prepared->needs_statistics = true;
        if (stat.request.kind == StatKind::kCross) {
          prepared->uses_quantized_stream = prepared->uses_original_stream = true;
          continue;
        }
        stat.request.from_original = stat.request.from_original || prepared->from_original;
        (stat.request.from_original ? prepared->uses_original_stream
                                    : prepared->uses_quantized_stream) = true;
      }
    }
  }

  absl::Status RefuseHeadStatistics(const PreparedStage& prepared) const {
    for (size_t i = 0; i < prepared.stage->slots.size(); ++i) {
      const LinearSlot& slot = plan_.slots[static_cast<size_t>(prepared.stage->slots[i])];
      if (slot.block >= 0 || prepared.method.plans[i].stats.empty()) continue;
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat(prepared.stage->location.ToString(), ": stage '",
                                 prepared.stage->name, "' cannot quantize ", slot.name),
                    absl::StrCat(prepared.stage->method,
                                 " needs statistics, which are measured inside blocks only"),
                    "quantize the head with a method without calibration, such as ptq"));
    }
    return absl::OkStatus();
  }

  const PipelinePlan& plan_;
  const Catalog& catalog_;
  const std::vector<LoadedMethod>& methods_;
  MethodRunner& runner_;
  StageSet& set_;
};

}  // namespace

std::vector<StatRequest> PreparedStage::Requests(const std::vector<size_t>& indices) const {
  std::set<StatRequest> requests;
  auto add = [&requests](const SlotPlan& plan) {
    for (const SlotPlan::Stat& stat : plan.stats) {
      requests.insert(stat.request);
      StatRequest sample;
      sample.input_group = stat.request.input_group;
      sample.kind = StatKind::kRows;
      sample.max_rows = kOutputSampleRows;
      sample.from_original = stat.request.from_original;
      requests.insert(sample);
    }
  };
  for (size_t index : indices) {
    add(method.plans[index]);
    if (fallback) add(fallback->plans[index]);
  }
  return {requests.begin(), requests.end()};
}

bool StageSet::NeedsStatistics() const {
  for (const PreparedStage& stage : stages) {
    if (stage.needs_statistics) return true;
  }
  return false;
}

bool StageSet::UsesQuantizedStream() const {
  for (const PreparedStage& stage : stages) {
    if (stage.uses_quantized_stream) return true;
  }
  return false;
}

bool StageSet::UsesOriginalStream() const {
  for (const PreparedStage& stage : stages) {
    if (stage.uses_original_stream) return true;
  }
  return false;
}

DType ScaleDType(std::string_view target, DType model_dtype) {
  if (target == "gptq" || target == "gptq_v2") return DType::kF16;
  if (target == "compressed-tensors") return model_dtype;
  return model_dtype == DType::kF32 ? DType::kF32 : DType::kF16;
}

absl::StatusOr<StageSet> PrepareStages(const PipelinePlan& plan, const Catalog& catalog,
                                       const std::vector<LoadedMethod>& methods,
                                       const Checkpoint& checkpoint, MethodRunner& runner) {
  StageSet set;
  for (const LinearSlot& slot : plan.slots) {
    const CheckpointTensor* tensor = checkpoint.Find(slot.name + ".weight");
    set.weight_dtypes.push_back(tensor != nullptr && tensor->entry->dtype ? *tensor->entry->dtype
                                                                          : plan.config.dtype);
  }
  const DType model_dtype =
      set.weight_dtypes.empty() ? plan.config.dtype : set.weight_dtypes.front();
  set.scale_dtype = ScaleDType(plan.pipeline.export_format, model_dtype);
  Preparer preparer(plan, catalog, methods, runner, &set);
  for (const PlannedStage& stage : plan.stages) QM_RETURN_IF_ERROR(preparer.Add(stage));
  return set;
}

}  // namespace quantmill
