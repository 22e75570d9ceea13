// Pieces of the forward pass shared by decoder.cc and moe.cc.
#ifndef QUANTMILL_CORE_MODEL_BLOCK_PARTS_H_
#define QUANTMILL_CORE_MODEL_BLOCK_PARTS_H_

#include "absl/status/status.h"
#include "core/model/decoder.h"

namespace quantmill {

// Shows x to the observer; sets *stopped when the run ends at this group.
absl::Status ObserveInput(const BlockRun& run, int input_group, const Tensor& x, bool* stopped);

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
