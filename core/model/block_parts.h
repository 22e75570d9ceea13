// Pieces of the forward pass: shared by decoder.cc and moe.cc, and run alone where only a part of a
// block is compared (core/calib/block_trials.h).
#ifndef QUANTMILL_CORE_MODEL_BLOCK_PARTS_H_
#define QUANTMILL_CORE_MODEL_BLOCK_PARTS_H_

#include "absl/status/status.h"
#include "core/model/decoder.h"

namespace quantmill {

// Shows x to the observer; sets *stopped when the run ends at this group.
absl::Status ObserveInput(const BlockRun& run, int input_group, const Tensor& x, bool* stopped);

// x normalised by rows, times `weight`.
absl::StatusOr<Tensor> Normalized(Backend& backend, const ModelConfig& config, const Tensor& weight,
                                  const Tensor& x);

// Attention of `batch` sequences of `length` new positions behind `past` in block `block`.
AttentionShape BlockAttention(const ModelConfig& config, int64_t block, int64_t batch,
                              int64_t length, int64_t past);

// The two halves of a block, without norm and residual: x [batch * length, hidden_size] is what the
// norm before it returned, `out` has its shape. `*stopped` is set when run.stop_after_group was
// reached; `out` is then undefined.
absl::Status RunAttention(Backend& backend, const ModelConfig& config, const BlockWeights& weights,
                          int64_t block, const RopeTables& rope, const BlockRun& run,
                          const Tensor& x, Tensor* out, bool* stopped);
absl::Status RunMlp(Backend& backend, const ModelConfig& config, const BlockWeights& weights,
                    const BlockRun& run, const Tensor& x, Tensor* out, bool* stopped);

// out = down(silu(gate(x)) * up(x)); `group` is the input group of gate and up, `group` + 1 that of
// down. With no rows the observer is called and nothing else happens.
absl::Status RunGatedMlp(Backend& backend, const LinearWeight& gate, const LinearWeight& up,
                         const LinearWeight& down, int64_t intermediate_size, int group,
                         const BlockRun& run, const Tensor& x, Tensor* out, bool* stopped);

// Mixture of experts: routes every row of x to its experts, in the order of expert indices.
absl::Status RunExperts(Backend& backend, const ModelConfig& config, const MoeWeights& weights,
                        const BlockRun& run, const Tensor& x, Tensor* out, bool* stopped);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_BLOCK_PARTS_H_
