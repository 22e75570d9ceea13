// What a block computes with some of its tensors replaced, and how far that is from what it
// computes now: the trial runs of methods that search (qm.host.block/1 in quantmill/host_ext.h).
#ifndef QUANTMILL_CORE_CALIB_BLOCK_TRIALS_H_
#define QUANTMILL_CORE_CALIB_BLOCK_TRIALS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/model/config.h"
#include "core/model/decoder.h"
#include "core/model/graph.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "core/train/training_ops.h"

namespace quantmill {

struct TensorOverride {
  std::string name;  // "model.layers.3.self_attn.q_proj.weight"
  Tensor value;      // F32, F16 or BF16, on the host or the backend's device; the tensor's shape
};

class BlockTrials {
 public:
  // The block's input on one window of calibration text: [length, hidden] in the activation dtype,
  // a copy on the device.
  using Inputs = std::function<absl::StatusOr<Tensor>(int64_t window)>;

  // backend and config must outlive this object. Inputs and reference outputs of the submodule that
  // is compared are kept up to `cache_bytes`; windows beyond are computed each time.
  BlockTrials(Backend& backend, const ModelConfig& config, int64_t block, BlockWeights weights,
              int64_t windows, Inputs inputs, int64_t cache_bytes);

  int64_t windows() const { return windows_; }

  // The block's output on one window: [length, hidden] on the device. NOT_FOUND for a tensor the
  // block has not, INVALID_ARGUMENT for a wrong shape or a window out of range.
  absl::StatusOr<Tensor> Forward(int64_t window, absl::Span<const TensorOverride> overrides);

  // Mean squared difference of a submodule's output to that without overrides, over windows [first,
  // first + count). submodule: "self_attn" or "mlp" (behind the norm, before the residual is
  // added), one linear's module name, or "" for the whole block. An expert's linear is compared on
  // the rows that are routed to it without overrides; 0 where there are none. Errors as Forward.
  absl::StatusOr<double> Loss(std::string_view submodule, int64_t first, int64_t count,
                              absl::Span<const TensorOverride> overrides);

  // Adds the gradients of <d_out, Forward(window, overrides)> with respect to the named tensors of
  // the block, at their overrides, to `gradients` (F32, on the device, of the tensors' shapes).
  // d_out: F32, F16 or BF16, of the output's shape, on the device. UNIMPLEMENTED for a mixture of
  // experts; errors as Forward.
  absl::Status Vjp(int64_t window, absl::Span<const TensorOverride> overrides, const Tensor& d_out,
                   absl::Span<const NamedTensor> gradients);

 private:
  enum class Part { kBlock, kAttention, kMlp, kLinear };
  struct Target {
    Part part = Part::kBlock;
    LinearSlot slot;  // kLinear
  };
  // Where in the order of execution a tensor takes part.
  enum Depth { kInputNorm, kQueries, kOutput, kMlpNorm, kRouter, kInner };
  struct Place {
    Depth depth = kInputNorm;
    int group = -1;  // kInner: the input group of the linear
  };
  // One window's reference.
  struct Entry {
    Tensor input;   // of the submodule
    Tensor middle;  // kBlock: hidden states behind the attention
    Tensor output;
    Routing routing;
    int64_t bytes() const { return input.bytes() + middle.bytes() + output.bytes(); }
  };

  absl::StatusOr<Target> Resolve(std::string_view submodule) const;
  absl::StatusOr<BlockWeights> Apply(absl::Span<const TensorOverride> overrides,
                                     std::vector<Place>* places) const;
  absl::StatusOr<Place> PlaceOf(const std::string& name) const;
  static bool TouchesInput(const Target& target, const std::vector<Place>& places);
  absl::StatusOr<Tensor> WindowInput(int64_t window);
  absl::StatusOr<Tensor> Attend(const BlockWeights& weights, const Tensor& normed) const;
  absl::StatusOr<Tensor> BehindAttention(const BlockWeights& weights, const Tensor& hidden) const;
  absl::StatusOr<Tensor> RunMlpOn(const BlockWeights& weights, const Tensor& x,
                                  Routing* routing) const;
  // The input of the target when the block runs on `hidden`; fills *routing if it is empty.
  absl::StatusOr<Tensor> InputOf(const Target& target, const BlockWeights& weights,
                                 const Tensor& hidden, Routing* routing) const;
  absl::StatusOr<Tensor> OutputOf(const Target& target, const BlockWeights& weights,
                                  const Tensor& input, Routing* routing) const;
  absl::StatusOr<Tensor> BlockFromMiddle(const BlockWeights& weights, const Tensor& middle,
                                         Routing* routing) const;
  absl::StatusOr<Entry> Reference(const Target& target, int64_t window);
  absl::StatusOr<Tensor> Trial(const Target& target, int64_t window, const Entry& entry,
                               const BlockWeights& weights, const std::vector<Place>& places);
  // Sum of squared differences of two outputs, both in the activation dtype.
  absl::StatusOr<double> Difference(const Tensor& a, const Tensor& b);
  absl::Status StartTraining();

  Backend& backend_;
  const ModelConfig& config_;
  int64_t block_;
  BlockWeights weights_;
  std::vector<LinearSlot> slots_;
  int64_t windows_;
  Inputs inputs_;
  int64_t cache_bytes_;
  RopeTables rope_;
  std::unique_ptr<TrainingOps> training_;  // made at first use
  std::string cached_submodule_;
  std::map<int64_t, Entry> cache_;  // by window
  int64_t cached_bytes_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CALIB_BLOCK_TRIALS_H_
