// Text as batches of token windows to train on.
#ifndef QUANTMILL_CORE_TRAIN_TRAINING_DATA_H_
#define QUANTMILL_CORE_TRAIN_TRAINING_DATA_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/tensor/tensor.h"
#include "core/text/documents.h"
#include "core/text/tokenizer.h"

namespace quantmill {

struct TrainingDataOptions {
  int64_t length = 512;        // tokens of a window
  bool mask_prompts = true;    // of alpaca records only the answers are targets
  int32_t bos = -1, eos = -1;  // around every document; negative: none
  uint64_t seed = 1;           // of the order of windows
  TextOptions text;
};

// The documents of a file (core/text/documents.h says which kinds), one behind the other (without
// an end-of-text token with TextOptions::join between them), cut into windows of equal length; what
// remains at the end is left out. Windows come in an order that depends on the seed and the epoch
// alone.
class TrainingData {
 public:
  // INVALID_ARGUMENT when the text does not fill one window; other errors as ReadDocuments.
  static absl::StatusOr<TrainingData> Read(const Tokenizer& tokenizer, const std::string& path,
                                           const TrainingDataOptions& options);

  int64_t windows() const { return (static_cast<int64_t>(ids_.size()) - 1) / length_; }
  int64_t length() const { return length_; }

  struct Windows {
    Tensor ids, targets;  // I32 [count, length] on the host; targets: the next id, or -1
  };
  // Windows first .. first + count - 1 of the endless sequence epoch 0, epoch 1, ...
  Windows Batch(int64_t first, int64_t count) const;

  // Pieces of `length` neighbouring tokens from places drawn uniformly, I32 [count, length] on the
  // host. INVALID_ARGUMENT for lengths outside 1 .. that of a window.
  absl::StatusOr<Tensor> Excerpts(int64_t count, int64_t length, uint64_t seed) const;
  // This text and further windows, I32 [count, length()] on the host. What does not fill a window
  // at its end is gone. INVALID_ARGUMENT for another shape or dtype.
  absl::StatusOr<TrainingData> With(const Tensor& more) const;

 private:
  std::vector<int64_t> Order(int64_t epoch) const;

  std::vector<int32_t> ids_;
  std::vector<char> counted_;  // per id: is it a target?
  int64_t length_ = 0;
  uint64_t seed_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TRAIN_TRAINING_DATA_H_
