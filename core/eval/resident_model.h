// A whole model kept in memory, for generation.
#ifndef QUANTMILL_CORE_EVAL_RESIDENT_MODEL_H_
#define QUANTMILL_CORE_EVAL_RESIDENT_MODEL_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/eval/stream.h"
#include "core/model/decoder.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"

namespace quantmill {

// Loads every block once. Packed weights stay as the source hands them out (open the checkpoint
// with PackedMode::kKeepPacked to have them packed and in the kernel's own layout).
class ResidentModel {
 public:
  // backend and source must outlive the result.
  static absl::StatusOr<ResidentModel> Load(Backend& backend, WeightSource& source,
                                            const StepProgress& progress = nullptr);

  Backend& backend() const { return *backend_; }
  const ModelConfig& config() const { return *config_; }
  const BlockWeights& block(int64_t index) const { return blocks_[static_cast<size_t>(index)]; }
  const Tensor& embedding() const { return embedding_; }
  const OutputHead& head() const { return head_; }

 private:
  Backend* backend_ = nullptr;
  const ModelConfig* config_ = nullptr;
  Tensor embedding_;
  std::vector<BlockWeights> blocks_;
  OutputHead head_;
};

// One or several sequences of equal length in progress: their keys and values.
class DecodeSession {
 public:
  // capacity: most positions per sequence. INVALID_ARGUMENT if the model has fewer.
  static absl::StatusOr<DecodeSession> Create(const ResidentModel& model, int64_t capacity,
                                              int64_t batch = 1);

  // Runs the next ids of every sequence: ids holds batch * n of them, sequence by sequence. Returns
  // the logits behind each sequence's last one, F32 [batch, vocab] on the host. OUT_OF_RANGE when
  // the capacity is reached.
  absl::StatusOr<Tensor> Append(absl::Span<const int32_t> ids);
  // The same with the logits left on the backend's device.
  absl::StatusOr<Tensor> AppendOnDevice(absl::Span<const int32_t> ids);

  int64_t length() const { return length_; }
  int64_t capacity() const { return capacity_; }

 private:
  absl::StatusOr<Tensor> RunBlocks(absl::Span<const int32_t> ids);
  absl::StatusOr<Tensor> LastRows(const Tensor& hidden);

  const ResidentModel* model_ = nullptr;
  RopeTables rope_;
  std::vector<KvCache> caches_;
  int64_t batch_ = 1;
  int64_t capacity_ = 0;
  int64_t length_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_EVAL_RESIDENT_MODEL_H_
