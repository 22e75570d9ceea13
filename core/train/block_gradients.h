// Reverse-mode gradients of one decoder block: a forward pass that keeps what the backward pass
// needs, and the backward pass. Dense blocks of all architectures (RMS norms, linears with or
// without bias, rotary embedding, q/k norms, grouped-query attention with or without a sliding
// window, gated MLP); not mixtures of experts.
#ifndef QUANTMILL_CORE_TRAIN_BLOCK_GRADIENTS_H_
#define QUANTMILL_CORE_TRAIN_BLOCK_GRADIENTS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/model/config.h"
#include "core/model/decoder.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "core/train/training_ops.h"

namespace quantmill {

// One decoder block. What the pointers name must outlive it.
struct TrainedBlock {
  const ModelConfig* config = nullptr;
  int64_t index = 0;
  // A packed slot counts as the constant that it dequantizes to: gradients go through it.
  const BlockWeights* weights = nullptr;
  const RopeTables* rope = nullptr;
  int64_t batch = 1;  // sequences of equal length, from position 0
};

// Activations of one run: [batch * length, features] in the activation dtype, on the device.
struct BlockTape {
  Tensor input;         // hidden states before the block
  Tensor attention_in;  // normalised: input of q, k and v
  Tensor q_raw, k_raw;  // before the q/k norms; empty in a block without
  Tensor q, k, v;       // as attention reads them
  Tensor mixed;         // input of o
  Tensor middle;        // hidden states behind the attention
  Tensor mlp_in;        // normalised: input of gate and up
  Tensor gate, up;      // their outputs
  Tensor gated;         // input of down
  struct {
    LinearTape q, k, v, o, gate, up, down;
  } linears;
};

// Bytes of a tape of `rows` rows, without what adapters keep.
int64_t TapeBytes(const ModelConfig& config, int64_t rows, DType activation);

// The block's output on `input` [batch * length, hidden], the same bytes as RunBlock's.
// UNIMPLEMENTED for a mixture of experts; other errors as RunBlock.
absl::StatusOr<Tensor> RunBlockOnTape(Backend& backend, const TrainedBlock& block,
                                      const Tensor& input, BlockTape* tape);

// The places of gradients: F32 tensors on the device where `weights` has the tensor, empty where no
// gradient is wanted. `wanted`: by full name ("model.layers.3.mlp.up_proj.weight"), each of the
// shape of its tensor. NOT_FOUND for a tensor that the block has not (a packed slot has no weight),
// INVALID_ARGUMENT for a wrong shape or dtype or a name given twice.
absl::StatusOr<BlockWeights> PlaceGradients(const ModelConfig& config, int64_t index,
                                            const BlockWeights& weights,
                                            absl::Span<const NamedTensor> wanted);

// Given d_output F32 [batch * length, hidden], adds the gradients of <d_output, output> with
// respect to the block's tensors to `gradients` (PlaceGradients), and writes that with respect to
// the input to *d_input (F32, of the input's shape; null: not wanted; not d_output itself). What
// nobody asks for is not computed.
absl::Status BackwardThroughBlock(TrainingOps& ops, const TrainedBlock& block,
                                  const BlockTape& tape, const Tensor& d_output,
                                  BlockWeights* gradients, Tensor* d_input);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TRAIN_BLOCK_GRADIENTS_H_
