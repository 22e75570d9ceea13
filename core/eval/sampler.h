// Choice of the next token, reproducible from a seed on every machine.
#ifndef QUANTMILL_CORE_EVAL_SAMPLER_H_
#define QUANTMILL_CORE_EVAL_SAMPLER_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "core/base/split_mix.h"

namespace quantmill {

// An independent stream for one of many things that share a seed.
SplitMix64 StreamOf(uint64_t seed, uint64_t index);

struct SamplingOptions {
  double temperature = 0;  // 0: always the most probable token (lowest id on ties)
  double top_p = 1;        // tokens in order of probability until their sum reaches this
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options) : options_(options), random_(options.seed) {}
  Sampler(const SamplingOptions& options, SplitMix64 random) : options_(options), random_(random) {}

  // One token id from logits over the vocabulary; -infinity excludes a token. Probabilities are
  // computed in f64; one random number is used per call, none when greedy.
  int32_t Next(absl::Span<const float> logits);

 private:
  int32_t Draw(absl::Span<const float> logits);
  int32_t DrawTopP(double total);

  SamplingOptions options_;
  SplitMix64 random_;
  std::vector<double> weights_;
  std::vector<int32_t> order_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_EVAL_SAMPLER_H_
