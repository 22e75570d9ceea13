#include "host/run/train/trained_slots.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/block_edits.h"
#include "core/model/graph.h"

namespace quantmill {
namespace {

constexpr char kNormEnd[] = "norm.weight";

bool IsNorm(const std::string& tensor) {
  const std::string end = kNormEnd;
  return tensor.size() > end.size() &&
         tensor.compare(tensor.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

absl::Status TrainedSlots::StartWeight(const Tensor& weight, TrainedSlot* slot) {
  slot->weight = weight;
  QM_ASSIGN_OR_RETURN(slot->effective,
                      backend_.Allocate(backend_.activation_dtype(), weight.shape()));
  QM_ASSIGN_OR_RETURN(slot->d_effective, backend_.Allocate(DType::kF32, weight.shape()));
  QM_RETURN_IF_ERROR(backend_.Zero(&slot->d_effective));
  const int64_t bytes = static_cast<int64_t>(slot->plan.SavedBytes(weight.dim(0)));
  if (bytes > 0) {
    QM_ASSIGN_OR_RETURN(slot->saved, backend_.Allocate(DType::kU8, {bytes}));
  }
  return absl::OkStatus();
}

absl::Status TrainedSlots::Add(const ReparamSubject& subject, const ReparamPlan& plan,
                               const Tensor& weight) {
  TrainedSlot slot;
  slot.subject = subject;
  slot.plan = plan;
  Tensor f32;
  if (!weight.empty()) {
    QM_ASSIGN_OR_RETURN(f32, backend_.Allocate(DType::kF32, weight.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(weight, &f32));
  }
  QM_ASSIGN_OR_RETURN(ReparamCalls::Start start, calls_.Init(subject, plan, f32));
  slot.params = std::move(start.params);
  LinearWeight* place = model_.blocks[static_cast<size_t>(subject.slot->block)].At(*subject.slot);
  if (place == nullptr) {
    return absl::InternalError(absl::StrCat("no place for ", subject.slot->name));
  }
  if (slot.is_weight()) {
    QM_RETURN_IF_ERROR(StartWeight(start.weight.empty() ? f32 : start.weight, &slot));
    place->dense = slot.effective;
    place->packed = nullptr;
    place->kernel = nullptr;
  } else {
    slot.adapter = std::make_shared<PluginAdapter>(calls_, subject, plan, slot.params);
    place->adapters.push_back(slot.adapter);
  }
  slots_.push_back(std::move(slot));
  return absl::OkStatus();
}

absl::Status TrainedSlots::AddPlain(const std::string& name, int64_t block, Tensor* place) {
  QM_ASSIGN_OR_RETURN(Tensor copy, backend_.Allocate(place->dtype(), place->shape()));
  QM_RETURN_IF_ERROR(backend_.Copy(*place, &copy));
  *place = copy;
  plain_.push_back({name, block, copy, {}});
  return absl::OkStatus();
}

absl::Status TrainedSlots::AddNorms(int64_t block) {
  BlockWeights& weights = model_.blocks[static_cast<size_t>(block)];
  const BlockTensors tensors(*model_.config, block, &weights);
  for (const auto& [name, place] : tensors.all()) {
    if (IsNorm(name) && !place->empty()) QM_RETURN_IF_ERROR(AddPlain(name, block, place));
  }
  return absl::OkStatus();
}

absl::Status TrainedSlots::AddEnds() {
  const int64_t ends = model_.config->layers;
  QM_RETURN_IF_ERROR(AddPlain("model.embed_tokens.weight", ends, &model_.embedding));
  QM_RETURN_IF_ERROR(AddPlain("model.norm.weight", ends, &model_.final_norm));
  if (model_.head.dense.empty()) return absl::OkStatus();
  if (model_.config->tied_embeddings) {
    model_.head.dense = model_.embedding;
    return absl::OkStatus();
  }
  return AddPlain(HeadSlot(*model_.config).name + ".weight", ends, &model_.head.dense);
}

absl::Status TrainedSlots::Register(const std::vector<const ReparamPlan*>& plans, int64_t block,
                                    double parameter_rate, qm_reparam_phase phase,
                                    AdamW* optimizer) {
  phase_block_ = block;
  for (size_t i = 0; i < slots_.size(); ++i) {
    TrainedSlot& slot = slots_[i];
    slot.d_weight = Tensor();
    slot.d_params.clear();
    for (const NamedTensor& param : slot.params) slot.d_params.push_back({param.name, {}});
    if (!InPhase(slot) || plans[i] == nullptr) continue;
    slot.plan = *plans[i];
    slot.subject.phase = phase;
    if (slot.is_weight() && slot.plan.weight_rate > 0) {
      QM_RETURN_IF_ERROR(optimizer->Add(slot.name() + ".weight", slot.weight, slot.plan.weight_rate,
                                        /*decays=*/true));
      slot.d_weight = optimizer->gradients().back().tensor;
    }
    for (size_t p = 0; p < slot.params.size(); ++p) {
      const ReparamPlan::Param& param = slot.plan.params[p];
      if (!param.trainable) continue;
      QM_RETURN_IF_ERROR(optimizer->Add(absl::StrCat(slot.name(), ".", param.name),
                                        slot.params[p].tensor, param.rate * parameter_rate,
                                        param.decays));
      slot.d_params[p].tensor = optimizer->gradients().back().tensor;
    }
    if (slot.adapter != nullptr) slot.adapter->SetGradients(slot.d_params);
  }
  for (Plain& one : plain_) {
    one.gradient = Tensor();
    if (block >= 0 && one.block != block) continue;
    QM_RETURN_IF_ERROR(optimizer->Add(one.name, one.value, 1, /*decays=*/false));
    one.gradient = optimizer->gradients().back().tensor;
  }
  return absl::OkStatus();
}

std::vector<NamedTensor> TrainedSlots::WantedGradients() const {
  std::vector<NamedTensor> wanted;
  for (const TrainedSlot& slot : slots_) {
    if (slot.is_weight() && InPhase(slot)) {
      wanted.push_back({slot.name() + ".weight", slot.d_effective});
    }
  }
  for (const Plain& one : plain_) {
    if (!one.gradient.empty()) wanted.push_back({one.name, one.gradient});
  }
  return wanted;
}

absl::Status TrainedSlots::Refresh() {
  for (TrainedSlot& slot : slots_) {
    if (!slot.is_weight() || !InPhase(slot)) continue;
    QM_RETURN_IF_ERROR(
        calls_.Forward(slot.subject, slot.weight, slot.params, &slot.saved, &slot.effective));
  }
  return absl::OkStatus();
}

absl::Status TrainedSlots::PullBack() {
  for (TrainedSlot& slot : slots_) {
    if (!slot.is_weight() || !InPhase(slot)) continue;
    Tensor* d_weight = slot.d_weight.empty() ? nullptr : &slot.d_weight;
    QM_RETURN_IF_ERROR(calls_.Vjp(slot.subject, slot.weight, slot.params, slot.saved,
                                  slot.d_effective, d_weight, slot.d_params));
    QM_RETURN_IF_ERROR(backend_.Zero(&slot.d_effective));
  }
  return absl::OkStatus();
}

std::vector<NamedTensor> TrainedSlots::State() const {
  std::vector<NamedTensor> state;
  for (const TrainedSlot& slot : slots_) {
    if (slot.is_weight()) state.push_back({slot.name() + ".weight", slot.weight});
    for (const NamedTensor& param : slot.params) {
      state.push_back({absl::StrCat(slot.name(), ".", param.name), param.tensor});
    }
  }
  for (const Plain& one : plain_) state.push_back({one.name, one.value});
  return state;
}

}  // namespace quantmill
