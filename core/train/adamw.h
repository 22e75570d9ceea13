// AdamW over named parameters: f32 master values beside the tensors a model computes with.
#ifndef QUANTMILL_CORE_TRAIN_ADAMW_H_
#define QUANTMILL_CORE_TRAIN_ADAMW_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/train/training_ops.h"

namespace quantmill {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double decay = 0;      // decoupled: times the learning rate
  double clip_norm = 0;  // of all gradients together; 0 = none
  // Steps that a running mean of every parameter looks back over; up to 1 = none is kept. The mean
  // is that of all values so far, from step `average_steps` on an exponential one that keeps
  // 1 - 1 / average_steps of itself.
  double average_steps = 0;
  bool averages() const { return average_steps > 1; }
};

// What Step did.
struct OptimizerStep {
  double gradient_norm = 0;  // before clipping
  bool skipped = false;      // a gradient was not finite: nothing was changed
};

class AdamW {
 public:
  // `ops` must outlive this object.
  AdamW(TrainingOps& ops, const AdamWOptions& options) : ops_(ops), options_(options) {}

  // A parameter that lives in `stored` (any model float, writable, on the device): its value is
  // taken as the first master value, and every step writes the rounded new one there. rate: factor
  // on the learning rate. RESOURCE_EXHAUSTED without memory for master values and moments.
  absl::Status Add(const std::string& name, const Tensor& stored, double rate, bool decays);

  // The accumulated gradients by name, F32, zero at first: what AddModelGradients adds to.
  const std::vector<NamedTensor>& gradients() const { return gradients_; }
  // Divides the gradients by `batches` (accumulated, each with scale 1), clips, updates all
  // parameters and zeroes the gradients.
  absl::StatusOr<OptimizerStep> Step(double learning_rate, int64_t batches = 1);
  int64_t steps() const { return steps_; }

  // Where means are kept: makes them the stored values, as the end of a training. Nothing to do
  // before the first step.
  absl::Status StoreAverages();

  // Master values, moments and means by name ("NAME/master", "NAME/first", "NAME/second",
  // "NAME/average" where kept), F32 on the device: with steps() the whole state between two steps.
  std::vector<NamedTensor> State() const;
  // After the tensors of State() were filled: continues behind step `steps`.
  absl::Status Restore(int64_t steps);

 private:
  struct Parameter {
    Tensor stored, master, first, second, average;
    double rate;
    bool decays;
  };

  TrainingOps& ops_;
  AdamWOptions options_;
  std::vector<Parameter> parameters_;
  std::vector<NamedTensor> gradients_;
  int64_t steps_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TRAIN_ADAMW_H_
