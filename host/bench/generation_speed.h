// The time generation takes, with the text it made checked against the model that is evaluated.
#ifndef QUANTMILL_HOST_BENCH_GENERATION_SPEED_H_
#define QUANTMILL_HOST_BENCH_GENERATION_SPEED_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/eval/evaluate.h"
#include "core/eval/resident_model.h"

namespace quantmill {

struct GenerationSpeed {
  Estimate prompt_tokens_per_second;  // of all sequences together, as the next
  Estimate tokens_per_second;
  // Prompt and continuation of every sequence, [batch][prompt + new_tokens].
  std::vector<std::vector<int32_t>> ids;
};

// Runs `prompts` (equal lengths) through the model, then new_tokens - 1 further steps, each with
// the most probable token of every sequence. Once without a clock, then up to 5 times within a time
// limit, at least once; the standard error is that over the repetitions.
absl::StatusOr<GenerationSpeed> MeasureGeneration(const ResidentModel& model,
                                                  const std::vector<std::vector<int32_t>>& prompts,
                                                  int64_t new_tokens,
                                                  const std::function<void()>& after_each);

// Whether `ids`, behind the first `prompt` of them, are what a model chooses whose logits F32
// [ids, vocabulary] at these ids are given: each the most probable, or less so than it by no more
// than `tolerance` times the largest logit. DATA_LOSS names the position.
absl::Status CheckGreedy(absl::Span<const int32_t> ids, int64_t prompt, const Tensor& logits,
                         double tolerance);

// For CheckGreedy: rounding of activations of this type, collected over a model. 16 units of a
// 16-bit type; F32 is compared at 2^-10, since packed weights may be multiplied in another order.
double GreedyTolerance(DType activations);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_GENERATION_SPEED_H_
