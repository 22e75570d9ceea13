#include "host/run/stage_set.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/run/fingerprint.h"

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
           const std::vector<LoadedMethod>& methods, MethodRunner& runner,
           TransformRunner& transforms, TuneRunner& tuning, ReparamCalls& training, StageSet* set)
      : plan_(plan),
        catalog_(catalog),
        methods_(methods),
        runner_(runner),
        transforms_(transforms),
        tuning_(tuning),
        training_(training),
        set_(*set) {}

  absl::Status Add(const PlannedStage& stage, int index) {
    for (const std::string& table : stage.tables) {
      PreparedStage prepared;
      prepared.stage = &stage;
      prepared.index = index;
      if (!stage.options.empty()) {
        const std::string inputs = Option(stage.options[0], "inputs");
        prepared.from_original =
            inputs == "original" || (inputs != "quantized" && !plan_.pipeline.inputs_quantized);
      }
      if (table == QM_EXT_BLOCK_TRANSFORM) {
        QM_RETURN_IF_ERROR(PrepareTransform(&prepared));
      } else if (table == QM_EXT_QUANTIZE_LINEAR) {
        QM_RETURN_IF_ERROR(PrepareQuantizer(&prepared));
      } else if (table == QM_EXT_BLOCK_TUNE && stage.packs) {
        QM_RETURN_IF_ERROR(PrepareTuning(&prepared));
        if (prepared.parts.empty()) continue;
      } else if (table == QM_EXT_REPARAMETRIZE) {
        QM_RETURN_IF_ERROR(PrepareTraining(&prepared));
      } else {
        return absl::UnimplementedError(ErrorText(
            absl::StrCat(stage.location.ToString(), ": stage '", stage.name, "' needs ", table),
            "this version runs methods that transform blocks, quantize linears or train",
            "use a method such as ptq or gptq"));
      }
      set_.stages.push_back(std::move(prepared));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status PrepareQuantizer(PreparedStage* prepared) {
    const PlannedStage& stage = *prepared->stage;
    QM_ASSIGN_OR_RETURN(prepared->method, Bind(stage, stage.method, nullptr));
    if (stage.on_error.action == OnError::Action::kUse) {
      QM_ASSIGN_OR_RETURN(prepared->fallback,
                          Bind(stage, stage.fallback_method, &stage.fallback_options));
    }
    if (!stage.options.empty()) {
      prepared->sequential = Option(stage.options[0], "sequential") == "true";
    }
    Redirect(prepared, &prepared->method);
    if (prepared->fallback) Redirect(prepared, &*prepared->fallback);
    return RefuseHeadStatistics(*prepared);
  }

  // Sorts the stage's slots into blocks and asks the method about each.
  absl::Status PrepareTransform(PreparedStage* prepared) {
    const PlannedStage& stage = *prepared->stage;
    QM_ASSIGN_OR_RETURN(BoundMethod bound, Find(stage, stage.method));
    prepared->transforms = true;
    std::map<int64_t, size_t> first;  // slot index that gives a block's options
    for (size_t i = 0; i < stage.slots.size(); ++i) {
      const size_t index = static_cast<size_t>(stage.slots[i]);
      const LinearSlot& slot = plan_.slots[index];
      if (slot.block < 0) return RefuseHead(stage, slot);
      const auto [found, fresh] = first.emplace(slot.block, i);
      if (stage.options[found->second] != stage.options[i]) return RefuseMixedOptions(stage, slot);
      TransformBlock& block = AddToBlock(index, prepared);
      block.next_roundings.push_back(NextRounding(*prepared, stage.slots[i]));
    }
    for (auto& [block, part] : prepared->parts) {
      part.block.sites = SitesAmong(plan_.config, part.block);
      QM_ASSIGN_OR_RETURN(part.plan, transforms_.Plan(bound.loaded, stage.name, part.block,
                                                      stage.options[first.at(block)]));
      for (const LinearSlot& slot : part.block.slots) {
        SlotPlan& plan = bound.plans.emplace_back();
        plan.stats = part.plan.stats;
        for (SlotPlan::Stat& stat : plan.stats) stat.request.input_group = slot.input_group;
      }
    }
    prepared->method = std::move(bound);
    Redirect(prepared, &prepared->method);
    for (auto& [block, part] : prepared->parts) {
      for (SlotPlan::Stat& stat : part.plan.stats) AddDefaultStream(*prepared, &stat);
    }
    if (plan_.pipeline.calibration && !prepared->needs_statistics) {
      prepared->needs_statistics = true;
      (prepared->from_original ? prepared->uses_original_stream : prepared->uses_quantized_stream) =
          true;
    }
    return absl::OkStatus();
  }

  // Puts a slot of the plan into the part that its block is.
  TransformBlock& AddToBlock(size_t index, PreparedStage* prepared) const {
    const LinearSlot& slot = plan_.slots[index];
    TransformBlock& block = prepared->parts[slot.block].block;
    block.block = slot.block;
    block.name = BlockName(slot.block);
    block.slots.push_back(slot);
    block.weight_dtypes.push_back(set_.weight_dtypes[index]);
    block.scale_dtype = set_.scale_dtype;
    return block;
  }

  // Asks the method about every block with slots of the stage, and forgets those where it wants no
  // tuning.
  absl::Status PrepareTuning(PreparedStage* prepared) {
    const PlannedStage& stage = *prepared->stage;
    QM_ASSIGN_OR_RETURN(prepared->method, Find(stage, stage.method));
    prepared->method.plans.resize(stage.slots.size());
    prepared->tunes = true;
    std::map<int64_t, std::set<size_t>> options;  // per block: indices with differing options
    for (size_t i = 0; i < stage.slots.size(); ++i) {
      const size_t index = static_cast<size_t>(stage.slots[i]);
      const int64_t block = plan_.slots[index].block;
      if (block < 0) continue;
      AddToBlock(index, prepared);
      std::set<size_t>& differing = options[block];
      const bool known = std::any_of(differing.begin(), differing.end(), [&](size_t other) {
        return stage.options[other] == stage.options[i];
      });
      if (!known) differing.insert(i);
    }
    for (const auto& [block, differing] : options) {
      QM_RETURN_IF_ERROR(PlanTuning(block, differing, prepared));
    }
    prepared->needs_statistics = prepared->uses_quantized_stream = !prepared->parts.empty();
    return absl::OkStatus();
  }

  absl::Status PlanTuning(int64_t block, const std::set<size_t>& differing,
                          PreparedStage* prepared) {
    const PlannedStage& stage = *prepared->stage;
    PreparedStage::Part& part = prepared->parts.at(block);
    bool wanted = false;
    for (size_t i : differing) {
      QM_ASSIGN_OR_RETURN(
          const std::optional<TunePlan> plan,
          tuning_.Plan(prepared->method.loaded, stage.name, part.block, stage.options[i]));
      wanted = wanted || plan.has_value();
      if (plan) part.tuning = *plan;
    }
    if (!wanted) {
      prepared->parts.erase(block);
      return absl::OkStatus();
    }
    if (differing.size() > 1) return RefuseMixedOptions(stage, part.block.slots[0]);
    return CheckTunable(stage, block);
  }

  absl::Status CheckTunable(const PlannedStage& stage, int64_t block) const {
    const std::string what = absl::StrCat(stage.location.ToString(), ": stage '", stage.name,
                                          "' cannot tune ", BlockName(block));
    const std::vector<bool>& experts = plan_.config.moe_layer;
    if (static_cast<size_t>(block) < experts.size() && experts[static_cast<size_t>(block)]) {
      return absl::FailedPreconditionError(
          ErrorText(what, "it is a mixture of experts, which has no gradients yet",
                    "switch tuning off in the stage's options"));
    }
    if (plan_.pipeline.calibration) return absl::OkStatus();
    return absl::FailedPreconditionError(
        ErrorText(what, "tuning runs the block on calibration text, and there is none",
                  "give calibration.text, or switch tuning off in the stage's options"));
  }

  // Asks the method about every slot in both phases.
  absl::Status PrepareTraining(PreparedStage* prepared) {
    const PlannedStage& stage = *prepared->stage;
    QM_ASSIGN_OR_RETURN(prepared->method, Find(stage, stage.method));
    prepared->trains = true;
    prepared->method.plans.resize(stage.slots.size());
    for (size_t i = 0; i < stage.slots.size(); ++i) {
      const LinearSlot& slot = plan_.slots[static_cast<size_t>(stage.slots[i])];
      if (slot.block < 0) {
        return absl::FailedPreconditionError(
            ErrorText(absl::StrCat(stage.location.ToString(), ": stage '", stage.name,
                                   "' cannot train ", slot.name),
                      "only linears inside blocks are trained", "leave it out of its layers"));
      }
      prepared->bases.push_back(BaseOf(stage.slots[i]));
      for (const qm_reparam_phase phase : {QM_PHASE_BLOCK, QM_PHASE_END_TO_END}) {
        ReparamSubject subject = prepared->SubjectOf(plan_, set_, i);
        subject.phase = phase;
        QM_ASSIGN_OR_RETURN(std::optional<ReparamPlan> plan, training_.Plan(subject));
        // Adapters train on what the whole model should say, not on what a block did.
        if (plan && phase == QM_PHASE_BLOCK && plan->kind != QM_REPARAM_WEIGHT) plan.reset();
        (phase == QM_PHASE_BLOCK ? prepared->block_plans : prepared->model_plans)
            .push_back(std::move(plan));
      }
      QM_RETURN_IF_ERROR(CheckPhases(*prepared, i));
      if (const ReparamPlan* plan = prepared->AnyPlan(i)) {
        SlotPlan& slot_plan = prepared->method.plans[i];
        slot_plan.format_id = plan->format_id;
        slot_plan.format_json = plan->format_json;
        slot_plan.bits_per_weight = plan->bits_per_weight;
        slot_plan.scratch_bytes = plan->scratch_bytes;
      }
    }
    if (prepared->HasPhase(QM_PHASE_BLOCK) || prepared->HasPhase(QM_PHASE_END_TO_END)) {
      return absl::OkStatus();
    }
    return absl::FailedPreconditionError(ErrorText(
        absl::StrCat(stage.location.ToString(), ": stage '", stage.name, "' trains nothing"),
        "its options leave every layer alone", "name layers in its target option"));
  }

  // What the slot's last packing before this stage makes of it.
  std::shared_ptr<const PackedWeight> BaseOf(int slot) const {
    for (auto earlier = set_.stages.rbegin(); earlier != set_.stages.rend(); ++earlier) {
      if (earlier->transforms || earlier->tunes || !earlier->stage->packs) continue;
      const std::vector<int>& slots = earlier->stage->slots;
      const auto found = std::lower_bound(slots.begin(), slots.end(), slot);
      if (found == slots.end() || *found != slot) continue;
      const SlotPlan& plan = earlier->method.plans[static_cast<size_t>(found - slots.begin())];
      auto base = std::make_shared<PackedWeight>();
      base->format_id = plan.format_id;
      base->format_json = plan.format_json.empty() ? "{}" : plan.format_json;
      base->out_features = plan_.slots[static_cast<size_t>(slot)].out_features;
      base->in_features = plan_.slots[static_cast<size_t>(slot)].in_features;
      return base;
    }
    return nullptr;
  }

  // Parameters are the same in both phases, and packed is packed.
  absl::Status CheckPhases(const PreparedStage& prepared, size_t index) const {
    const std::optional<ReparamPlan>&block = prepared.block_plans[index],
          &model = prepared.model_plans[index];
    const std::string what = absl::StrCat("stage '", prepared.stage->name, "', plugin ",
                                          prepared.method.loaded.method->id);
    if (block && model) {
      bool same = block->kind == model->kind && block->params.size() == model->params.size() &&
                  block->format_id == model->format_id;
      for (size_t i = 0; same && i < block->params.size(); ++i) {
        same = block->params[i].name == model->params[i].name &&
               block->params[i].shape == model->params[i].shape;
      }
      if (!same) {
        return absl::InternalError(absl::StrCat(what, ": its two phases have other parameters"));
      }
    }
    const ReparamPlan* plan = prepared.AnyPlan(index);
    if (plan == nullptr) return absl::OkStatus();
    const bool packs = plan->kind == QM_REPARAM_WEIGHT && !plan->format_id.empty();
    if (packs == prepared.stage->packs) return absl::OkStatus();
    return absl::InternalError(absl::StrCat(what, ": its flags say that it ",
                                            prepared.stage->packs ? "packs" : "does not pack",
                                            " what it trains, its plan says otherwise"));
  }

  // Of the next stage that packs the slot, this one included; bits 0 if there is none, or its grid
  // is not told by bits.
  qm_next_rounding NextRounding(const PreparedStage& prepared, int slot) const {
    qm_next_rounding next = {0, 0, -1};
    for (size_t s = static_cast<size_t>(prepared.index); s < plan_.stages.size(); ++s) {
      const PlannedStage& stage = plan_.stages[s];
      const auto found = std::lower_bound(stage.slots.begin(), stage.slots.end(), slot);
      if (!stage.packs || found == stage.slots.end() || *found != slot) continue;
      const ResolvedOptions& options =
          stage.options[static_cast<size_t>(found - stage.slots.begin())];
      int64_t value = 0;
      if (!absl::SimpleAtoi(Option(options, "bits"), &value)) return next;
      next.bits = static_cast<int32_t>(value);
      next.symmetric = Option(options, "symmetric") == "true" ? 1 : 0;
      if (absl::SimpleAtoi(Option(options, "group_size"), &value)) next.group_size = value;
      return next;
    }
    return next;
  }

  static absl::Status RefuseHead(const PlannedStage& stage, const LinearSlot& slot) {
    return absl::FailedPreconditionError(
        ErrorText(absl::StrCat(stage.location.ToString(), ": stage '", stage.name,
                               "' cannot transform ", slot.name),
                  "transforms work inside blocks", "leave it out of the stage's layers"));
  }

  static absl::Status RefuseMixedOptions(const PlannedStage& stage, const LinearSlot& slot) {
    return absl::FailedPreconditionError(ErrorText(
        absl::StrCat(stage.location.ToString(), ": stage '", stage.name, "' has options for ",
                     slot.name, " that differ from those of its block"),
        "transforms and tuning work on a block as a whole", "let overrides name whole blocks"));
  }

  absl::StatusOr<BoundMethod> Find(const PlannedStage& stage, const std::string& id) const {
    const LoadedMethod* loaded = FindLoaded(methods_, id);
    const PluginInfo* info = catalog_.FindPlugin(id);
    if (loaded == nullptr || info == nullptr) {
      return absl::NotFoundError(
          absl::StrCat("method '", id, "' of stage '", stage.name, "' is in no loaded plugin"));
    }
    return BoundMethod{*loaded, info->sha256, {}};
  }

  absl::StatusOr<BoundMethod> Bind(const PlannedStage& stage, const std::string& id,
                                   const ResolvedOptions* fallback_options) {
    QM_ASSIGN_OR_RETURN(BoundMethod bound, Find(stage, id));
    for (size_t i = 0; i < stage.slots.size(); ++i) {
      const size_t slot = static_cast<size_t>(stage.slots[i]);
      const ResolvedOptions& options = fallback_options ? *fallback_options : stage.options[i];
      QM_ASSIGN_OR_RETURN(SlotPlan plan,
                          runner_.Plan(bound.loaded, stage.name, plan_.slots[slot], options,
                                       set_.weight_dtypes[slot], set_.scale_dtype));
      bound.plans.push_back(std::move(plan));
    }
    return bound;
  }

  static void AddDefaultStream(const PreparedStage& prepared, SlotPlan::Stat* stat) {
    if (stat->request.kind == StatKind::kCross) return;
    stat->request.from_original = stat->request.from_original || prepared.from_original;
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
        AddDefaultStream(*prepared, &stat);
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
  TransformRunner& transforms_;
  TuneRunner& tuning_;
  ReparamCalls& training_;
  StageSet& set_;
};

}  // namespace

std::vector<StatRequest> PreparedStage::Requests(const std::vector<size_t>& indices) const {
  std::set<StatRequest> requests;
  auto add = [&requests, this](const SlotPlan& plan) {
    for (const SlotPlan::Stat& stat : plan.stats) {
      requests.insert(stat.request);
      if (transforms || tunes) continue;
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

bool StageSet::Transforms() const {
  return std::any_of(stages.begin(), stages.end(),
                     [](const PreparedStage& stage) { return stage.transforms; });
}

bool StageSet::Trains() const {
  return std::any_of(stages.begin(), stages.end(),
                     [](const PreparedStage& stage) { return stage.trains; });
}

const ReparamPlan* PreparedStage::AnyPlan(size_t index) const {
  if (model_plans[index]) return &*model_plans[index];
  return block_plans[index] ? &*block_plans[index] : nullptr;
}

bool PreparedStage::HasPhase(qm_reparam_phase phase) const {
  const auto& plans = phase == QM_PHASE_BLOCK ? block_plans : model_plans;
  return std::any_of(plans.begin(), plans.end(),
                     [](const std::optional<ReparamPlan>& plan) { return plan.has_value(); });
}

ReparamSubject PreparedStage::SubjectOf(const PipelinePlan& plan, const StageSet& stages,
                                        size_t index) const {
  const size_t slot = static_cast<size_t>(stage->slots[index]);
  ReparamSubject subject;
  subject.method = &method.loaded;
  subject.stage = stage->name;
  subject.slot = &plan.slots[slot];
  subject.options = &stage->options[index];
  subject.weight_dtype = stages.weight_dtypes[slot];
  subject.scale_dtype = stages.scale_dtype;
  subject.base = bases[index];
  subject.seed = SlotSeed(plan.pipeline.seed, stage->name, plan.slots[slot].name);
  return subject;
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
  if (target == "gptq" || target == "gptq_v2" || target == "awq" || target == "eetq" ||
      target == "gguf" || target == "aqlm") {
    return DType::kF16;
  }
  if (target == "compressed-tensors") return model_dtype;
  return model_dtype == DType::kF32 ? DType::kF32 : DType::kF16;
}

absl::StatusOr<StageSet> PrepareStages(const PipelinePlan& plan, const Catalog& catalog,
                                       const std::vector<LoadedMethod>& methods,
                                       const Checkpoint& checkpoint, MethodRunner& runner,
                                       TransformRunner& transforms, TuneRunner& tuning,
                                       ReparamCalls& training) {
  StageSet set;
  for (const LinearSlot& slot : plan.slots) {
    const CheckpointTensor* tensor = checkpoint.Find(slot.name + ".weight");
    set.weight_dtypes.push_back(tensor != nullptr && tensor->entry->dtype ? *tensor->entry->dtype
                                                                          : plan.config.dtype);
  }
  const DType model_dtype =
      set.weight_dtypes.empty() ? plan.config.dtype : set.weight_dtypes.front();
  set.scale_dtype = ScaleDType(plan.pipeline.export_format, model_dtype);
  Preparer preparer(plan, catalog, methods, runner, transforms, tuning, training, &set);
  for (size_t s = 0; s < plan.stages.size(); ++s) {
    QM_RETURN_IF_ERROR(preparer.Add(plan.stages[s], static_cast<int>(s)));
  }
  return set;
}

}  // namespace quantmill
