#include "core/eval/self_text.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/eval/sampler.h"
#include "core/threads/thread_pool.h"

namespace quantmill {
namespace {

// Sequences that run together: the weights are read once for all of them.
constexpr int64_t kBatch = 32;

class SelfText {
 public:
  SelfText(const ResidentModel& model, int64_t samples, int64_t length, uint64_t seed,
           const StepProgress& progress)
      : model_(model), samples_(samples), length_(length), progress_(progress) {
    SamplingOptions options;
    options.temperature = 1.0;
    for (int64_t i = 0; i < samples; ++i) {
      streams_.push_back(StreamOf(seed, static_cast<uint64_t>(i)));
      samplers_.emplace_back(options, SplitMix64(streams_.back().Next()));
    }
    for (const auto* ids : {&model.config().bos_ids, &model.config().eos_ids}) {
      for (int64_t id : *ids) {
        if (id >= 0 && id < model.config().vocab_size) excluded_.push_back(id);
      }
    }
  }

  // Windows [begin, begin + batch) of `windows`.
  absl::Status SampleBatch(int64_t begin, int64_t batch, Tensor* windows);

 private:
  int32_t FirstToken(int64_t window);
  void SampleStep(int64_t begin, int64_t position, Tensor& logits, std::vector<int32_t>* next,
                  Tensor* windows);

  const ResidentModel& model_;
  int64_t samples_, length_;
  const StepProgress& progress_;
  std::vector<SplitMix64> streams_;
  std::vector<Sampler> samplers_;
  std::vector<int64_t> excluded_;
};

int32_t SelfText::FirstToken(int64_t window) {
  const ModelConfig& config = model_.config();
  if (!config.bos_ids.empty()) {
    return static_cast<int32_t>(config.bos_ids.front());  // checked by Append
  }
  const double uniform = streams_[static_cast<size_t>(window)].NextUniform();
  return static_cast<int32_t>(uniform * static_cast<double>(config.vocab_size));
}

void SelfText::SampleStep(int64_t begin, int64_t position, Tensor& logits,
                          std::vector<int32_t>* next, Tensor* windows) {
  const int64_t vocab = logits.dim(1);
  model_.backend().threads().ParallelFor(logits.dim(0), 1, [&](int64_t first, int64_t last, int) {
    for (int64_t b = first; b < last; ++b) {
      float* row = logits.as<float>() + b * vocab;
      for (int64_t id : excluded_) row[id] = -std::numeric_limits<float>::infinity();
      const int32_t token = samplers_[static_cast<size_t>(begin + b)].Next(
          absl::MakeConstSpan(row, static_cast<size_t>(vocab)));
      (*next)[static_cast<size_t>(b)] = token;
      windows->as<int32_t>()[(begin + b) * length_ + position] = token;
    }
  });
}

absl::Status SelfText::SampleBatch(int64_t begin, int64_t batch, Tensor* windows) {
  QM_ASSIGN_OR_RETURN(DecodeSession session, DecodeSession::Create(model_, length_, batch));
  std::vector<int32_t> next(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    next[static_cast<size_t>(b)] = FirstToken(begin + b);
    windows->as<int32_t>()[(begin + b) * length_] = next[static_cast<size_t>(b)];
  }
  for (int64_t position = 1; position < length_; ++position) {
    QM_ASSIGN_OR_RETURN(Tensor logits, session.Append(next));
    SampleStep(begin, position, logits, &next, windows);
    if (progress_) {
      QM_RETURN_IF_ERROR(progress_(begin * length_ + batch * (position + 1), samples_ * length_));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Tensor> SampleSelfText(const ResidentModel& model, int64_t samples, int64_t length,
                                      uint64_t seed, const StepProgress& progress) {
  if (samples < 1 || length < 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        samples, " windows of ", length, " tokens cannot be drawn; ask for at least one of each"));
  }
  QM_ASSIGN_OR_RETURN(Tensor windows, Tensor::Host(DType::kI32, {samples, length}));
  SelfText text(model, samples, length, seed, progress);
  for (int64_t begin = 0; begin < samples; begin += kBatch) {
    QM_RETURN_IF_ERROR(text.SampleBatch(begin, std::min(kBatch, samples - begin), &windows));
  }
  return windows;
}

}  // namespace quantmill
