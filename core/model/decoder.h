// The decoder's forward pass, one block at a time, over any backend.
#ifndef QUANTMILL_CORE_MODEL_DECODER_H_
#define QUANTMILL_CORE_MODEL_DECODER_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/model/config.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"

namespace quantmill {

// Cosine and sine of all positions, on the backend's device. Formulas: transformers
// src/transformers/modeling_rope_utils.py.
struct RopeTables {
  Tensor cosine, sine;  // F32 [positions, head_dim / 2]
};
absl::StatusOr<RopeTables> MakeRopeTables(const ModelConfig& config, int64_t positions,
                                          Backend& backend);

// Keys and values of one block for `batch` sequences of equal length (BlockRun::batch); sequence b
// starts at row b * capacity.
struct KvCache {
  Tensor keys, values;  // [batch * capacity, kv_heads * head_dim], activation dtype
  int64_t length = 0;   // positions filled
};

// Sees the inputs of linears during a forward pass.
class BlockObserver {
 public:
  virtual ~BlockObserver() = default;
  // Called once per input group, before its linears run. x: [rows, in_features]; it is not changed
  // afterwards, so that a copy of the handle may be kept. For an expert, the rows routed to it
  // (possibly none: then x has 0 rows).
  virtual absl::Status OnInput(int input_group, const Tensor& x) = 0;
};

// Experts chosen per row, on the host.
struct Routing {
  Tensor experts;  // I32 [rows, top_k]; empty: not chosen yet
  Tensor weights;  // F32 [rows, top_k]
};

struct BlockRun {
  int64_t batch = 1;           // sequences of equal length in `hidden`
  int64_t first_position = 0;  // of the first row of each sequence
  // Extended by the new positions; always used with the same `batch`, and first_position equal to
  // its length.
  KvCache* cache = nullptr;
  BlockObserver* observer = nullptr;
  // Stop right after OnInput of this group: `hidden` is then left undefined.
  int stop_after_group = std::numeric_limits<int>::max();
  // Mixture of experts: if set, the router's choice is stored here, or, when it is not empty, taken
  // from here instead of asking the router.
  Routing* routing = nullptr;
};

// hidden [batch * length, hidden_size] is replaced by the block's output.
absl::Status RunBlock(Backend& backend, const ModelConfig& config, const BlockWeights& weights,
                      int64_t block, const RopeTables& rope, const BlockRun& run, Tensor* hidden);

// logits [rows, vocab] in `logits`' dtype (the activation dtype, or F32) from the last block's
// output.
absl::Status RunHead(Backend& backend, const ModelConfig& config, const Tensor& final_norm,
                     const LinearWeight& head, const Tensor& hidden, Tensor* logits);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_DECODER_H_
