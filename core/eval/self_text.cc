#include "core/eval/self_text.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/eval/sampler.h"

namespace quantmill {
namespace {

// Of one sequence; at least 1.
int64_t CacheBytes(const ModelConfig& config, int64_t length, DType kv) {
  return std::max<int64_t>(1, 2 * config.layers * config.kv_features() * length * ElementSize(kv));
}
int64_t LogitBytes(const ModelConfig& config) {
  return std::max<int64_t>(1, config.vocab_size * ElementSize(DType::kF32));
}

class SelfText {
 public:
  SelfText(const ResidentModel& model, int64_t samples, int64_t length, uint64_t seed,
           const StepProgress& progress)
      : model_(model), samples_(samples), length_(length), seed_(seed), progress_(progress) {
    for (const auto* ids : {&model.config().bos_ids, &model.config().eos_ids}) {
      for (int64_t id : *ids) {
        if (id >= 0 && id < model.config().vocab_size) {
          excluded_.push_back(static_cast<int32_t>(id));
        }
      }
    }
  }

  // The one token that a window without a given beginning starts with.
  int32_t FirstToken(int64_t window) const;
  // Continues windows [begin, begin + batch) of `windows` behind their first `given` tokens.
  absl::Status SampleBatch(int64_t begin, int64_t batch, int64_t given, Tensor* windows);

 private:
  // One stream per window of the batch.
  std::vector<SplitMix64> Streams(int64_t begin, int64_t batch) const;

  const ResidentModel& model_;
  int64_t samples_, length_;
  uint64_t seed_;
  const StepProgress& progress_;
  std::vector<int32_t> excluded_;
};

int32_t SelfText::FirstToken(int64_t window) const {
  const ModelConfig& config = model_.config();
  if (!config.bos_ids.empty()) {
    return static_cast<int32_t>(config.bos_ids.front());  // checked by Append
  }
  SplitMix64 stream = StreamOf(seed_, static_cast<uint64_t>(window));
  stream.Next();  // the sampler's seed
  const double uniform = stream.NextUniform();
  return static_cast<int32_t>(uniform * static_cast<double>(config.vocab_size));
}

std::vector<SplitMix64> SelfText::Streams(int64_t begin, int64_t batch) const {
  std::vector<SplitMix64> streams;
  for (int64_t b = 0; b < batch; ++b) {
    streams.emplace_back(StreamOf(seed_, static_cast<uint64_t>(begin + b)).Next());
  }
  return streams;
}

absl::Status SelfText::SampleBatch(int64_t begin, int64_t batch, int64_t given, Tensor* windows) {
  QM_ASSIGN_OR_RETURN(DecodeSession session, DecodeSession::Create(model_, length_, batch));
  std::vector<SplitMix64> streams = Streams(begin, batch);
  const Tensor excluded = Tensor::FromI32({static_cast<int64_t>(excluded_.size())}, excluded_);
  QM_ASSIGN_OR_RETURN(Tensor uniforms, Tensor::Host(DType::kF64, {batch}));
  QM_ASSIGN_OR_RETURN(Tensor tokens, Tensor::Host(DType::kI32, {batch}));
  std::vector<int32_t> next;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* window = windows->as<int32_t>() + (begin + b) * length_;
    next.insert(next.end(), window, window + given);
  }
  for (int64_t position = given; position < length_; ++position) {
    QM_ASSIGN_OR_RETURN(const Tensor logits, session.AppendOnDevice(next));
    for (int64_t b = 0; b < batch; ++b) {
      uniforms.as<double>()[b] = streams[static_cast<size_t>(b)].NextUniform();
    }
    QM_RETURN_IF_ERROR(model_.backend().DrawRows(logits, excluded, uniforms, &tokens));
    next.assign(tokens.as<int32_t>(), tokens.as<int32_t>() + batch);
    for (int64_t b = 0; b < batch; ++b) {
      windows->as<int32_t>()[(begin + b) * length_ + position] = next[static_cast<size_t>(b)];
    }
    if (progress_) {
      QM_RETURN_IF_ERROR(progress_(begin * length_ + batch * (position + 1), samples_ * length_));
    }
  }
  return absl::OkStatus();
}

absl::Status SampleAll(const ResidentModel& model, SelfText& text, int64_t given, Tensor* windows) {
  const int64_t samples = windows->dim(0);
  const int64_t at_once =
      WindowsAtOnce(model.config(), windows->dim(1), DrawingDevice::Of(model.backend()));
  for (int64_t begin = 0; begin < samples; begin += at_once) {
    QM_RETURN_IF_ERROR(text.SampleBatch(begin, std::min(at_once, samples - begin), given, windows));
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
  for (int64_t i = 0; i < samples; ++i) {
    windows.as<int32_t>()[i * length] = text.FirstToken(i);
  }
  QM_RETURN_IF_ERROR(SampleAll(model, text, 1, &windows));
  return windows;
}

absl::StatusOr<Tensor> ContinueText(const ResidentModel& model, const Tensor& beginnings,
                                    int64_t length, uint64_t seed, const StepProgress& progress) {
  if (beginnings.dtype() != DType::kI32 || beginnings.rank() != 2 ||
      !beginnings.device().is_cpu() || beginnings.elements() == 0 || beginnings.dim(1) > length) {
    return absl::InvalidArgumentError(
        absl::StrCat("beginnings of windows of ", length, " tokens are I32 [samples, 1 .. ", length,
                     "] on the host, not ", AbslView(DTypeName(beginnings.dtype())), " ",
                     beginnings.shape().ToString()));
  }
  const int64_t samples = beginnings.dim(0), given = beginnings.dim(1);
  QM_ASSIGN_OR_RETURN(Tensor windows, Tensor::Host(DType::kI32, {samples, length}));
  for (int64_t i = 0; i < samples; ++i) {
    std::copy_n(beginnings.as<const int32_t>() + i * given, given,
                windows.as<int32_t>() + i * length);
  }
  SelfText text(model, samples, length, seed, progress);
  QM_RETURN_IF_ERROR(SampleAll(model, text, given, &windows));
  return windows;
}

int64_t WindowsAtOnce(const ModelConfig& config, int64_t length, DrawingDevice device) {
  constexpr int64_t kLeast = 32, kCacheBytes = int64_t{1} << 30, kLogitBytes = int64_t{64} << 20;
  const int64_t times = device.on_gpu ? 4 : 1;
  return std::max(kLeast,
                  std::min(times * kCacheBytes / CacheBytes(config, length, device.activation),
                           times * kLogitBytes / LogitBytes(config)));
}

int64_t DrawingBytes(const ModelConfig& config, int64_t windows, int64_t length,
                     DrawingDevice device) {
  return std::min(windows, WindowsAtOnce(config, length, device)) *
         (CacheBytes(config, length, device.activation) + LogitBytes(config));
}

}  // namespace quantmill
