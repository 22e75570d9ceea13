#include "host/run/train/training.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/formats/distortion.h"
#include "core/model/graph.h"
#include "host/run/fingerprint.h"
#include "host/run/train/phases.h"

namespace quantmill {
namespace {

class Trainer {
 public:
  explicit Trainer(const TrainingInputs& in)
      : in_(in), backend_(*in.backend), options_(*in.stage->stage->train), state_(in.state_file) {}

  absl::StatusOr<TrainingResult> Run() {
    const auto start = Clock::now();
    QM_ASSIGN_OR_RETURN(ops_, MakeTrainingOps(backend_));
    QM_ASSIGN_OR_RETURN(student_,
                        LoadTrainedModel(*in_.current, options_.sequence_length, backend_));
    slots_ = std::make_unique<TrainedSlots>(*in_.calls, student_);
    QM_RETURN_IF_ERROR(AddSlots());
    if (in_.stage->HasPhase(QM_PHASE_BLOCK) || options_.distill) {
      QM_ASSIGN_OR_RETURN(teacher_,
                          LoadTrainedModel(*in_.original, options_.sequence_length, backend_));
    }
    TrainingRun run;
    run.in = &in_;
    run.options = &options_;
    run.ops = ops_.get();
    run.student = &student_;
    run.teacher = &teacher_;
    run.slots = slots_.get();
    run.state = &state_;
    QM_RETURN_IF_ERROR(Continue(&run.position));
    const int64_t before = run.position.step;
    QM_ASSIGN_OR_RETURN(LossLog log, LossLog::Open(in_.loss_file, run.position));
    run.log = &log;
    if (in_.stage->HasPhase(QM_PHASE_BLOCK)) {
      QM_RETURN_IF_ERROR(TrainBlocks(Plans(in_.stage->block_plans), &run));
    }
    if (in_.stage->HasPhase(QM_PHASE_END_TO_END)) {
      QM_RETURN_IF_ERROR(TrainEndToEnd(Plans(in_.stage->model_plans), &run));
    }
    TrainingResult result;
    result.first_loss = run.position.first_loss;
    result.last_loss = run.position.recent_loss;
    result.tokens = (run.position.step - before) * options_.StepTokens();
    QM_RETURN_IF_ERROR(Finish(&result));
    result.seconds = SecondsSince(start);
    return result;
  }

 private:
  // Per trained slot the plan of a phase; null: it has none there.
  std::vector<const ReparamPlan*> Plans(
      const std::vector<std::optional<ReparamPlan>>& of_stage) const {
    std::vector<const ReparamPlan*> plans;
    for (size_t index : indices_) {
      plans.push_back(of_stage[index] ? &*of_stage[index] : nullptr);
    }
    return plans;
  }

  const LinearSlot& SlotAt(size_t index) const {
    return in_.plan->slots[static_cast<size_t>(in_.stage->stage->slots[index])];
  }

  absl::StatusOr<std::shared_ptr<const PackedWeight>> BaseOf(const std::string& slot) {
    QM_ASSIGN_OR_RETURN(const std::shared_ptr<const PackedWeight> host, in_.packed(slot));
    if (host == nullptr) return host;
    auto device = std::make_shared<PackedWeight>(*host);
    for (NamedTensor& named : device->tensors) {
      QM_ASSIGN_OR_RETURN(named.tensor, backend_.ToDevice(named.tensor));
    }
    return std::shared_ptr<const PackedWeight>(std::move(device));
  }

  absl::Status AddSlots() {
    int64_t block = -1;
    BlockWeights dense;
    bool weights = false;
    for (size_t index = 0; index < in_.stage->stage->slots.size(); ++index) {
      const ReparamPlan* plan = in_.stage->AnyPlan(index);
      if (plan == nullptr) continue;
      const LinearSlot& slot = SlotAt(index);
      if (slot.block != block) {
        if (block >= 0 && weights && options_.norms) {
          QM_RETURN_IF_ERROR(slots_->AddNorms(block));
        }
        weights = false;
        block = slot.block;
        QM_ASSIGN_OR_RETURN(dense, in_.dense->LoadBlock(block, backend_));
      }
      ReparamSubject subject = in_.stage->SubjectOf(*in_.plan, *in_.stages, index);
      subject.key = in_.key;
      subject.bundle = absl::StrCat(in_.crash_dir, "/", slot.name);
      subject.save_first = in_.crashed(slot.name);
      QM_ASSIGN_OR_RETURN(subject.base, BaseOf(slot.name));
      weights = weights || plan->kind == QM_REPARAM_WEIGHT;
      const bool wants_dense = plan->kind == QM_REPARAM_WEIGHT || subject.base == nullptr;
      QM_RETURN_IF_ERROR(
          slots_->Add(subject, *plan, wants_dense ? dense.At(slot)->dense : Tensor()));
      indices_.push_back(index);
    }
    if (block >= 0 && weights && options_.norms) QM_RETURN_IF_ERROR(slots_->AddNorms(block));
    return TrainsEnds(*in_.stage) ? slots_->AddEnds() : absl::OkStatus();
  }

  // What an earlier process saved. Of the phase `blocks` that is the parameters; the phase
  // end-to-end loads them with its optimizer's.
  absl::Status Continue(TrainPosition* position) {
    if (!state_.Exists()) return absl::OkStatus();
    QM_ASSIGN_OR_RETURN(*position, state_.Position());
    in_.sink(
        {{"type", "log"},
         {"severity", 1},
         {"text", absl::StrCat("stage ", in_.stage->stage->name, " continues behind ",
                               position->step > 0 ? absl::StrCat("step ", position->step)
                                                  : absl::StrCat("block ", position->blocks))}});
    return state_.Load(backend_, slots_->State());
  }

  absl::StatusOr<Tensor> ToHost(const Tensor& tensor) {
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, tensor.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(tensor, &host));
    return host;
  }

  absl::Status Finish(TrainingResult* result) {
    int64_t block = -1;
    BlockWeights dense;
    for (size_t i = 0; i < indices_.size(); ++i) {
      TrainedSlot& slot = slots_->slots()[i];
      if (slot.subject.slot->block != block) {
        block = slot.subject.slot->block;
        QM_ASSIGN_OR_RETURN(dense, in_.dense->LoadBlock(block, backend_));
      }
      TrainedResult one;
      one.index = indices_[i];
      QM_RETURN_IF_ERROR(FinishSlot(dense.At(*slot.subject.slot)->dense, &slot, &one));
      if (!one.folded.empty()) {
        result->edits[block].push_back({EditKind::kReplace, slot.name() + ".weight", one.folded});
      }
      result->slots.push_back(std::move(one));
    }
    for (const TrainedSlots::Plain& one : slots_->plain()) {
      QM_ASSIGN_OR_RETURN(Tensor value, ToHost(one.value));
      result->edits[one.block].push_back({EditKind::kReplace, one.name, std::move(value)});
    }
    return absl::OkStatus();
  }

  absl::Status FinishSlot(const Tensor& original, TrainedSlot* slot, TrainedResult* result) {
    if (!slot->is_weight() && !slot->plan.fold) {
      for (const NamedTensor& param : slot->params) {
        NamedTensor& kept = result->adapter.emplace_back();
        kept.name = param.name;
        QM_ASSIGN_OR_RETURN(kept.tensor, ToHost(param.tensor));
      }
      return absl::OkStatus();
    }
    Tensor weight = slot->weight;
    if (!slot->is_weight()) {
      QM_ASSIGN_OR_RETURN(weight, BaseWeight(original, *slot));
    }
    QM_ASSIGN_OR_RETURN(ReparamCalls::Folded folded,
                        in_.calls->Finalize(slot->subject, slot->plan, weight, slot->params));
    QM_ASSIGN_OR_RETURN(const Tensor reference, ToHost(original));
    if (!folded.packed) {
      result->folded = std::move(folded.dense);
      QM_ASSIGN_OR_RETURN(const Distortion distortion,
                          MeasureDistortion(reference, result->folded));
      result->weight_nmse = distortion.nmse();
      return absl::OkStatus();
    }
    result->packed = std::make_shared<const PackedWeight>(*std::move(folded.packed));
    return Measure(reference, *result->packed, &result->weight_nmse);
  }

  absl::StatusOr<Tensor> BaseWeight(const Tensor& original, const TrainedSlot& slot) {
    if (slot.subject.base != nullptr) {
      QM_ASSIGN_OR_RETURN(const std::shared_ptr<const PackedWeight> host, in_.packed(slot.name()));
      return DequantizeOn(backend_, *in_.formats, *host, DType::kF32);
    }
    QM_ASSIGN_OR_RETURN(Tensor f32, backend_.Allocate(DType::kF32, original.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(original, &f32));
    return f32;
  }

  absl::Status Measure(const Tensor& reference, const PackedWeight& packed, double* nmse) {
    QM_ASSIGN_OR_RETURN(const Tensor values,
                        DequantizeOn(backend_, *in_.formats, packed, DType::kF32));
    QM_ASSIGN_OR_RETURN(const Tensor host, ToHost(values));
    QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(reference, host));
    if (!distortion.finite) {
      return absl::InternalError("a trained weight dequantizes to values that are not finite");
    }
    *nmse = distortion.nmse();
    return absl::OkStatus();
  }

  const TrainingInputs& in_;
  Backend& backend_;
  const TrainOptions& options_;
  TrainState state_;
  std::unique_ptr<TrainingOps> ops_;
  TrainedModel student_, teacher_;
  std::unique_ptr<TrainedSlots> slots_;
  std::vector<size_t> indices_;  // per trained slot: of it in the stage
};

}  // namespace

bool TrainsEnds(const PreparedStage& stage) {
  if (!stage.stage->train->embeddings) return false;
  for (const std::optional<ReparamPlan>& plan : stage.model_plans) {
    if (plan && plan->kind == QM_REPARAM_WEIGHT && plan->weight_rate > 0) return true;
  }
  return false;
}

absl::StatusOr<TrainingResult> RunTraining(const TrainingInputs& inputs) {
  return Trainer(inputs).Run();
}

}  // namespace quantmill
