#include "core/train/training_data.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/split_mix.h"
#include "core/base/status.h"

namespace quantmill {
absl::StatusOr<TrainingData> TrainingData::Read(const Tokenizer& tokenizer, const std::string& path,
                                                const TrainingDataOptions& options) {
  if (options.length < 1) return absl::InvalidArgumentError("windows need at least one token");
  QM_ASSIGN_OR_RETURN(const std::vector<std::string> documents, ReadDocuments(path, options.text));
  TrainingData data;
  data.length_ = options.length;
  data.seed_ = options.seed;
  for (const std::string& document : documents) {
    const bool joined = options.eos < 0 && &document != &documents.back();
    QM_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                        tokenizer.Encode(joined ? document + options.text.join : document, false));
    size_t masked = 0;
    if (const size_t bytes = options.mask_prompts ? PromptBytes(document) : 0; bytes > 0) {
      QM_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt,
                          tokenizer.Encode(document.substr(0, bytes), false));
      masked = std::min(prompt.size(), ids.size());
    }
    if (options.bos >= 0) data.ids_.push_back(options.bos);
    data.ids_.insert(data.ids_.end(), ids.begin(), ids.end());
    data.counted_.resize(data.ids_.size() - ids.size() + masked, 0);
    data.counted_.resize(data.ids_.size(), 1);
    if (options.eos < 0) continue;
    data.ids_.push_back(options.eos);
    data.counted_.push_back(1);
  }
  if (data.ids_.empty() || data.windows() < 1) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("cannot train on ", path),
                  absl::StrCat("its ", data.ids_.size(), " tokens do not fill a window of ",
                               options.length, " and the token behind it"),
                  "use more text or a shorter sequence length"));
  }
  return data;
}

absl::StatusOr<Tensor> TrainingData::Excerpts(int64_t count, int64_t length, uint64_t seed) const {
  if (count < 1 || length < 1 || length > length_) {
    return absl::InvalidArgumentError(
        absl::StrCat(count, " excerpts of ", length, " tokens from windows of ", length_));
  }
  QM_ASSIGN_OR_RETURN(Tensor excerpts, Tensor::Host(DType::kI32, {count, length}));
  SplitMix64 random(seed);
  const uint64_t places = ids_.size() - static_cast<size_t>(length) + 1;
  for (int64_t i = 0; i < count; ++i) {
    const auto begin = ids_.begin() + static_cast<std::ptrdiff_t>(random.Next() % places);
    std::copy_n(begin, length, excerpts.as<int32_t>() + i * length);
  }
  return excerpts;
}

absl::StatusOr<TrainingData> TrainingData::With(const Tensor& more) const {
  if (more.dtype() != DType::kI32 || more.rank() != 2 || more.dim(1) != length_ ||
      !more.device().is_cpu()) {
    return absl::InvalidArgumentError(absl::StrCat("further windows are I32 [count, ", length_,
                                                   "] on the host, not ", more.shape().ToString()));
  }
  TrainingData data = *this;
  data.ids_.resize(static_cast<size_t>(windows() * length_));
  data.counted_.resize(data.ids_.size());
  const int32_t* ids = more.as<const int32_t>();
  data.ids_.insert(data.ids_.end(), ids, ids + more.elements());
  data.counted_.resize(data.ids_.size(), 1);
  // The first token of such a window does not follow from the window before it.
  for (int64_t i = 0; i < more.dim(0); ++i) {
    data.counted_[static_cast<size_t>((windows() + i) * length_)] = 0;
  }
  data.ids_.push_back(0);  // behind the last window, no target
  data.counted_.push_back(0);
  return data;
}

std::vector<int64_t> TrainingData::Order(int64_t epoch) const {
  std::vector<int64_t> order(static_cast<size_t>(windows()));
  std::iota(order.begin(), order.end(), 0);
  SplitMix64 random(seed_ ^ (static_cast<uint64_t>(epoch) * 0xD1B54A32D192ED03u));
  for (size_t i = order.size() - 1; i > 0; --i) {  // Fisher and Yates
    std::swap(order[i], order[random.Next() % (i + 1)]);
  }
  return order;
}

TrainingData::Windows TrainingData::Batch(int64_t first, int64_t count) const {
  std::vector<int32_t> ids, targets;
  std::vector<int64_t> order;
  int64_t epoch = -1;
  for (int64_t i = first; i < first + count; ++i) {
    if (i / windows() != epoch) order = Order(epoch = i / windows());
    const size_t begin = static_cast<size_t>(order[static_cast<size_t>(i % windows())] * length_);
    for (size_t at = begin; at < begin + static_cast<size_t>(length_); ++at) {
      ids.push_back(ids_[at]);
      targets.push_back(counted_[at + 1] ? ids_[at + 1] : -1);
    }
  }
  return {Tensor::FromI32({count, length_}, ids), Tensor::FromI32({count, length_}, targets)};
}

}  // namespace quantmill
