// Perplexity of a model on token windows, and, against a reference model on the same windows, KL
// divergence, agreement of the most probable token and ratio of perplexities.
//
// Every window is scored on its own, without a token put before it: positions 1 .. T-1 given those
// before them, so T-1 scored positions per window, or those of them that the caller names.
// perplexity = exp(mean nll). Means are over positions. KL is that of original || quantized: sum_v
// p_reference (log p_reference - log p_model), in nats.
//
// Standard errors treat windows as independent and positions within one as not: with s_w the sum
// over window w, n_w its positions, W windows and the mean r = sum s / sum n, the variance of r is
// W / (W - 1) sum (s_w - r n_w)^2 / (sum n)^2 (Cochran, "Sampling Techniques", 1977, 2.11 and 6.4);
// with equal n_w the sample variance of the window means over W. Those of perplexity and ppl_ratio
// follow by the delta method (value times the error of its logarithm). Median and 99th percentile
// have none.
#ifndef QUANTMILL_CORE_EVAL_EVALUATE_H_
#define QUANTMILL_CORE_EVAL_EVALUATE_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/eval/stream.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct EvalOptions {
  StreamOptions stream;
  // I32 like the windows on the host, 0 = this token is not scored. null: all but the first are.
  const Tensor* scored = nullptr;
  // stage: "model" and "reference" count blocks, "score" counts windows. May be null.
  std::function<absl::Status(std::string_view stage, int64_t done, int64_t total)> progress;
};

// A mean with its standard error; none with a single window.
struct Estimate {
  double value = 0;
  std::optional<double> standard_error;
};

struct EvalResult {
  Estimate perplexity, nll;
  int64_t tokens = 0;   // scored positions
  int64_t context = 0;  // T
  int64_t windows = 0;
  double seconds = 0;
  double tokens_per_second = 0;  // scored positions per second
  struct Comparison {
    Estimate kl_mean, top1_agreement, ppl_ratio;
    double kl_median = 0, kl_p99 = 0;  // smallest value not exceeded by 50 and 99 % of positions
  };
  std::optional<Comparison> comparison;
  // Per window, for comparing two models on the same windows: mean nll of a position, and, against
  // a reference, mean KL (else empty). Not part of ToJson.
  std::vector<double> window_nll, window_kl;
};

// The keys of `eval --json`; standard errors as KEY_stderr.
nlohmann::ordered_json ToJson(const EvalResult& result);

// windows: I32 [windows, T] on the host, T >= 2. `reference` may be null; it must have the model's
// vocabulary. At most a tile of one window's logits is in memory. FAILED_PRECONDITION naming the
// window if the output is not finite. INVALID_ARGUMENT if a window has no scored position.
absl::StatusOr<EvalResult> Evaluate(Backend& backend, WeightSource& model, WeightSource* reference,
                                    const Tensor& windows, const EvalOptions& options);

// Mean and standard error over window means.
Estimate EstimateFromWindows(const std::vector<double>& window_means);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_EVAL_EVALUATE_H_
