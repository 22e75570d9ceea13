// The linears that a stage trains, inside the model they are trained in: parameters, the weights or
// adapters they stand for, and the way from gradients of those to gradients of the parameters.
#ifndef QUANTMILL_HOST_RUN_TRAIN_TRAINED_SLOTS_H_
#define QUANTMILL_HOST_RUN_TRAIN_TRAINED_SLOTS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/model/weights.h"
#include "core/train/adamw.h"
#include "core/train/model_gradients.h"
#include "host/run/train/plugin_adapter.h"
#include "host/run/train/reparam_calls.h"

namespace quantmill {

// One linear under the stage's method.
struct TrainedSlot {
  ReparamSubject subject;
  ReparamPlan plan;
  std::vector<NamedTensor> params;  // F32 on the device, in the plan's order
  // WEIGHT: the weight that is trained, F32; what the model computes with (the activation dtype),
  // and the gradient of that.
  Tensor weight, effective, d_effective, saved;
  std::shared_ptr<PluginAdapter> adapter;  // INPUT, DELTA
  // Of the optimizer of the running phase; empty: not trained.
  Tensor d_weight;
  std::vector<NamedTensor> d_params;

  bool is_weight() const { return plan.kind == QM_REPARAM_WEIGHT; }
  const std::string& name() const { return subject.slot->name; }
};

class TrainedSlots {
 public:
  // All must outlive this object. `model` gets the slots' weights and adapters.
  TrainedSlots(ReparamCalls& calls, TrainedModel& model)
      : calls_(calls), backend_(calls.backend()), model_(model) {}

  // Initialises a slot. weight: [out, in], any model float on the device, its dense weight; empty
  // for INPUT and DELTA over a packed base.
  absl::Status Add(const ReparamSubject& subject, const ReparamPlan& plan, const Tensor& weight);
  // Makes the norms of a block parameters, too: copies that training may write to.
  absl::Status AddNorms(int64_t block);
  // The same for what is outside of the blocks: embedding, last norm, and head where it is dense.
  absl::Status AddEnds();

  std::vector<TrainedSlot>& slots() { return slots_; }

  // Registers what the plans of a phase train in block `block` (-1: everywhere) with an optimizer.
  // `plans`: one per slot, of that phase; null entries are left alone.
  absl::Status Register(const std::vector<const ReparamPlan*>& plans, int64_t block,
                        double parameter_rate, qm_reparam_phase phase, AdamW* optimizer);

  // Gradients that a backward pass through the model has to fill.
  std::vector<NamedTensor> WantedGradients() const;
  // The model's weights from the parameters as they are now.
  absl::Status Refresh();
  // Takes the gradients of the weights to those of the parameters, and zeroes them.
  absl::Status PullBack();

  // Every tensor that training may change, by a name unique in the model.
  std::vector<NamedTensor> State() const;

  // A tensor that is trained as it is.
  struct Plain {
    std::string name;
    int64_t block = 0;  // number of layers for one outside of the blocks
    Tensor value;       // in its stored dtype, on the device
    Tensor gradient;
  };
  const std::vector<Plain>& plain() const { return plain_; }

 private:
  absl::Status AddPlain(const std::string& name, int64_t block, Tensor* place);
  absl::Status StartWeight(const Tensor& weight, TrainedSlot* slot);
  bool InPhase(const TrainedSlot& slot) const {
    return phase_block_ < 0 || slot.subject.slot->block == phase_block_;
  }

  ReparamCalls& calls_;
  Backend& backend_;
  TrainedModel& model_;
  std::vector<TrainedSlot> slots_;
  std::vector<Plain> plain_;
  int64_t phase_block_ = -1;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_TRAINED_SLOTS_H_
