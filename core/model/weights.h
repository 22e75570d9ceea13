// The weights of a decoder as the forward pass wants them, and where they come from.
#ifndef QUANTMILL_CORE_MODEL_WEIGHTS_H_
#define QUANTMILL_CORE_MODEL_WEIGHTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/model/config.h"
#include "core/model/graph.h"
#include "core/tensor/backend.h"

namespace quantmill {

// What stands around a linear y = L(x) without changing its weight.
class LinearAdapter {
 public:
  enum class Kind {
    kInput,  // y = L(g(x))
    kDelta,  // y = L(x) + h(x)
  };
  virtual ~LinearAdapter() = default;
  virtual Kind kind() const = 0;
  // *out = g(x) or h(x), [rows, in] or [rows, out] in x's dtype. What Backward needs goes to *saved
  // (null: it will not be called).
  virtual absl::Status Forward(const Tensor& x, Tensor* saved, Tensor* out) = 0;
  // For the gradient of *out, F32: adds that with respect to x to *d_x (F32; null: not wanted), and
  // those of the adapter's own parameters to sums it keeps. UNIMPLEMENTED without gradients.
  virtual absl::Status Backward(const Tensor& x, const Tensor& saved, const Tensor& d_out,
                                Tensor* d_x) = 0;
};

// One linear: dense, or packed with a kernel. `dense` wins, but not over quantized activations.
struct LinearWeight {
  Tensor dense;  // [out, in], any model float dtype; empty when packed
  std::shared_ptr<const PackedWeight> packed;
  std::shared_ptr<PackedKernel> kernel;
  Tensor bias;  // [out] or empty
  // Around it: the first one next to the weight, every other around those before it.
  std::vector<std::shared_ptr<LinearAdapter>> adapters;
};

struct MoeWeights {
  LinearWeight router;  // [experts, hidden], never packed
  struct Expert {
    LinearWeight gate, up, down;
  };
  std::vector<Expert> experts;
};

struct BlockWeights {
  Tensor input_norm, post_attention_norm;  // [hidden]
  Tensor q_norm, k_norm;                   // [head_dim] or empty
  LinearWeight q, k, v, o;
  LinearWeight gate, up, down;  // empty in a mixture of experts
  MoeWeights moe;               // no experts in a dense block
  // The linear of one of this block's own slots, by role and expert; null if there is no place for
  // it.
  LinearWeight* At(const LinearSlot& slot);
};

// An opened checkpoint, original or quantized, whose tensors are loaded block by block.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual const ModelConfig& config() const = 0;
  // Loads block `block` to the backend's device. Dense tensors keep their stored dtype (on the CPU
  // they are views of the mapped file).
  virtual absl::StatusOr<BlockWeights> LoadBlock(int64_t block, Backend& backend) = 0;
  // Embedding table [vocab, hidden], on the host (mapped).
  virtual absl::StatusOr<Tensor> Embedding() = 0;
  virtual absl::StatusOr<Tensor> FinalNorm(Backend& backend) = 0;
  virtual absl::StatusOr<LinearWeight> Head(Backend& backend) = 0;
  // The block's file pages will not be needed soon (keeps resident memory at about one block).
  virtual void ReleaseBlock(int64_t block) = 0;
};

// What the adapters of a linear keep for a backward pass, and what reaches the weight through them.
struct LinearTape {
  struct Step {
    Tensor in, saved;  // of an adapter
  };
  std::vector<Step> steps;  // one per adapter, the outermost first
  Tensor weight_in;
};

// out = x W^T (+ bias), through the dense product, the packed kernel, or dequantizing into scratch;
// with its adapters around it. `tape` may be null: no backward pass follows.
absl::Status ApplyLinear(Backend& backend, const LinearWeight& weight, const Tensor& x, Tensor* out,
                         LinearTape* tape = nullptr);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_WEIGHTS_H_
