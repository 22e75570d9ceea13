// One decoder layer while its stages run: its weights as they were, as edited and as packed so far,
// and the statistics measured on it.
//
//   untouched   as in the checkpoint
//   original    untouched, with the edits that preserve the function: what the untouched model
//               computes, in the scaled channels of today
//   dense       with all edits: what transforms and quantizers work on
//   current     dense, with what is packed so far dequantized in its place
//
// All four share tensors as long as they are equal. Edited tensors are F32 until the end of the
// block (Finish), so that a quantizer rounds the exact product.
//
// Statistics stay true: rescaling inputs divides them exactly, and what an edit makes stale is
// forgotten, so that it is measured again before it is used.
#ifndef QUANTMILL_HOST_RUN_BLOCK_STATE_H_
#define QUANTMILL_HOST_RUN_BLOCK_STATE_H_

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "core/calib/statistics.h"
#include "core/model/block_edits.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"

namespace quantmill {

class BlockState {
 public:
  // A block that is not loaded yet; index == config.layers: the head, whose only weight is head().
  BlockState(const ModelConfig& config, int64_t index, Backend& backend)
      : config_(config), index_(index), backend_(backend) {}

  void SetWeights(BlockWeights weights);

  int64_t index() const { return index_; }
  bool is_head() const { return index_ == config_.layers; }
  const BlockWeights& untouched() const { return untouched_; }
  const BlockWeights& original() const { return original_; }
  BlockWeights& dense() { return dense_; }
  BlockWeights& current() { return current_; }
  LinearWeight& head() { return head_; }
  Statistics& statistics() { return statistics_; }
  // Null before SetWeights.
  const BlockEditor* editor() const { return editor_ ? &*editor_ : nullptr; }

  // Applies a transform's edits, which have been checked, to weights and statistics.
  absl::Status Apply(absl::Span<const BlockEdit> edits);
  // Puts a slot's packed weight (PutPacked; its bias is ignored) into `current`; without a dense
  // tensor: the slot is dense (again).
  absl::Status Put(const LinearSlot& slot, LinearWeight weight);
  // Rounds what is edited and not packed to the stored dtypes in `current`, which is then what an
  // export holds.
  absl::Status Finish();

 private:
  absl::Status UpdateStatistics(const BlockEdit& applied);
  void CopyToCurrent(const std::set<std::string>& names);

  const ModelConfig& config_;
  int64_t index_;
  Backend& backend_;
  std::optional<BlockEditor> editor_;
  BlockWeights untouched_, original_, dense_, current_;
  LinearWeight head_;
  Statistics statistics_;
  std::set<std::string> edited_;  // names of tensors
  std::set<std::string> packed_;  // names of the weights that `current` has dequantized
};

// What an export of a block holds besides packed weights: `weights` as loaded, with the edits
// applied and rounded to the stored dtypes; the names of edited tensors go to *changed.
absl::Status ApplyFinally(const ModelConfig& config, int64_t block,
                          absl::Span<const BlockEdit> edits, Backend& backend,
                          BlockWeights* weights, std::set<std::string>* changed);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_BLOCK_STATE_H_
