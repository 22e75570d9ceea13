#include "core/eval/evaluate.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

// Sums over one window's scored positions.
struct WindowScore {
  double positions = 0;
  double nll = 0;
  double reference_nll = 0;
  double kl = 0;
  double agreements = 0;
};

struct Scores {
  std::vector<WindowScore> windows;
  std::vector<float> kl;  // of every position
};

// Per-row results of one tile of logits.
struct TileScore {
  Tensor nll, argmax;
};

absl::StatusOr<TileScore> ScoreTile(Backend& backend, const Tensor& logits, const Tensor& targets) {
  TileScore score;
  QM_ASSIGN_OR_RETURN(score.nll, Tensor::Host(DType::kF32, {targets.dim(0)}));
  QM_ASSIGN_OR_RETURN(score.argmax, Tensor::Host(DType::kI32, {targets.dim(0)}));
  QM_RETURN_IF_ERROR(backend.ScoreRows(logits, targets, &score.nll, &score.argmax));
  return score;
}

// Hidden states behind the last block, and the head, of one model.
struct Finished {
  WindowStates states;
  OutputHead head;
};

class Evaluation {
 public:
  Evaluation(Backend& backend, const Tensor& windows, const EvalOptions& options)
      : backend_(backend), windows_(windows), options_(options) {}

  absl::StatusOr<Scores> Run(WeightSource& model, WeightSource* reference);

 private:
  absl::StatusOr<Finished> RunModel(WeightSource& model, std::string_view stage);
  absl::Status ScoreWindow(const Finished& model, const Finished* reference, int64_t window,
                           Scores* scores);
  absl::Status Compare(const Tensor& logits, const TileScore& score, const Finished& reference,
                       const Tensor& hidden, const Tensor& targets, const int32_t* counted,
                       WindowScore* window, std::vector<float>* kl);
  // Which tokens of a window are scored, from this one on; null: all.
  const int32_t* Counted(int64_t window, int64_t token) const {
    if (options_.scored == nullptr) return nullptr;
    return options_.scored->as<int32_t>() + window * windows_.dim(1) + token;
  }
  absl::Status Progress(std::string_view stage, int64_t done, int64_t total) const {
    return options_.progress ? options_.progress(stage, done, total) : absl::OkStatus();
  }

  Backend& backend_;
  const Tensor& windows_;
  const EvalOptions& options_;
};

absl::StatusOr<Finished> Evaluation::RunModel(WeightSource& model, std::string_view stage) {
  Finished finished;
  QM_ASSIGN_OR_RETURN(finished.states, RunWindows(backend_, model, windows_, options_.stream,
                                                  [&](int64_t done, int64_t total) {
                                                    return Progress(stage, done, total);
                                                  }));
  QM_ASSIGN_OR_RETURN(finished.head, OutputHead::Load(backend_, model));
  return finished;
}

absl::Status Evaluation::Compare(const Tensor& logits, const TileScore& score,
                                 const Finished& reference, const Tensor& hidden,
                                 const Tensor& targets, const int32_t* counted, WindowScore* window,
                                 std::vector<float>* kl) {
  QM_ASSIGN_OR_RETURN(const Tensor original, reference.head.Logits(backend_, hidden));
  QM_ASSIGN_OR_RETURN(const TileScore original_score, ScoreTile(backend_, original, targets));
  QM_ASSIGN_OR_RETURN(Tensor divergence, Tensor::Host(DType::kF32, {targets.dim(0)}));
  QM_RETURN_IF_ERROR(backend_.KlRows(original, logits, &divergence));
  for (int64_t i = 0; i < targets.dim(0); ++i) {
    if (counted != nullptr && counted[i] == 0) continue;
    window->reference_nll += original_score.nll.as<float>()[i];
    window->kl += divergence.as<float>()[i];
    window->agreements +=
        score.argmax.as<int32_t>()[i] == original_score.argmax.as<int32_t>()[i] ? 1.0 : 0.0;
    kl->push_back(divergence.as<float>()[i]);
  }
  return absl::OkStatus();
}

absl::Status Evaluation::ScoreWindow(const Finished& model, const Finished* reference,
                                     int64_t window, Scores* scores) {
  const int64_t scored = windows_.dim(1) - 1;
  const Tensor ids = windows_.Rows(window, window + 1).Reshaped({windows_.dim(1)});
  QM_ASSIGN_OR_RETURN(const Tensor hidden, model.states.Load(backend_, {window, window + 1}));
  Tensor reference_hidden;
  if (reference != nullptr) {
    QM_ASSIGN_OR_RETURN(reference_hidden, reference->states.Load(backend_, {window, window + 1}));
  }
  const int64_t tile = model.head.TileRows();
  WindowScore& sums = scores->windows[static_cast<size_t>(window)];
  for (int64_t begin = 0; begin < scored; begin += tile) {
    const int64_t end = std::min(scored, begin + tile);
    const Tensor targets = ids.Rows(begin + 1, end + 1);
    QM_ASSIGN_OR_RETURN(const Tensor logits, model.head.Logits(backend_, hidden.Rows(begin, end)));
    QM_ASSIGN_OR_RETURN(const TileScore score, ScoreTile(backend_, logits, targets));
    const int32_t* counted = Counted(window, begin + 1);
    for (int64_t i = 0; i < end - begin; ++i) {
      if (counted != nullptr && counted[i] == 0) continue;
      sums.nll += score.nll.as<float>()[i];
      ++sums.positions;
    }
    if (reference != nullptr) {
      QM_RETURN_IF_ERROR(Compare(logits, score, *reference, reference_hidden.Rows(begin, end),
                                 targets, counted, &sums, &scores->kl));
    }
  }
  if (std::isfinite(sums.nll) && std::isfinite(sums.reference_nll) && std::isfinite(sums.kl)) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(ErrorText(
      absl::StrCat("the output for window ", window, " is not finite"),
      std::isfinite(sums.reference_nll) ? "the model's weights or activations hold NaN or infinity"
                                        : "the reference model's weights or activations do",
      "check the checkpoint, or compute in f32"));
}

absl::StatusOr<Scores> Evaluation::Run(WeightSource& model, WeightSource* reference) {
  QM_ASSIGN_OR_RETURN(const Finished finished, RunModel(model, "model"));
  std::optional<Finished> original;
  if (reference != nullptr) {
    QM_ASSIGN_OR_RETURN(original, RunModel(*reference, "reference"));
  }
  Scores scores;
  scores.windows.resize(static_cast<size_t>(windows_.dim(0)));
  for (int64_t window = 0; window < windows_.dim(0); ++window) {
    QM_RETURN_IF_ERROR(ScoreWindow(finished, original ? &*original : nullptr, window, &scores));
    QM_RETURN_IF_ERROR(Progress("score", window + 1, windows_.dim(0)));
  }
  return scores;
}

template <typename Value>
std::vector<double> WindowMeans(const std::vector<WindowScore>& windows, Value value) {
  std::vector<double> means;
  means.reserve(windows.size());
  for (const WindowScore& window : windows) means.push_back(value(window) / window.positions);
  return means;
}

// Mean over positions; evaluate.h has the formula of its error.
template <typename Value>
Estimate EstimateOf(const std::vector<WindowScore>& windows, Value value) {
  double sum = 0, positions = 0;
  for (const WindowScore& window : windows) {
    sum += value(window);
    positions += window.positions;
  }
  Estimate estimate;
  estimate.value = sum / positions;
  if (windows.size() < 2) return estimate;
  double squares = 0;
  for (const WindowScore& window : windows) {
    const double residual = value(window) - estimate.value * window.positions;
    squares += residual * residual;
  }
  const double count = static_cast<double>(windows.size());
  estimate.standard_error = std::sqrt(squares * count / (count - 1)) / positions;
  return estimate;
}

// exp of an estimate, by the delta method.
Estimate Exponential(const Estimate& log) {
  Estimate result;
  result.value = std::exp(log.value);
  if (log.standard_error) result.standard_error = result.value * *log.standard_error;
  return result;
}

// Nearest rank: the smallest value that at least `share` of all values do not exceed.
double Percentile(std::vector<float>* values, double share) {
  const double rank = std::ceil(share * static_cast<double>(values->size()));
  const int64_t index = std::max<int64_t>(1, static_cast<int64_t>(rank)) - 1;
  std::nth_element(values->begin(), values->begin() + index, values->end());
  return (*values)[static_cast<size_t>(index)];
}

EvalResult::Comparison Summarize(Scores* scores) {
  EvalResult::Comparison comparison;
  comparison.kl_mean = EstimateOf(scores->windows, [](const WindowScore& w) { return w.kl; });
  comparison.top1_agreement =
      EstimateOf(scores->windows, [](const WindowScore& w) { return w.agreements; });
  comparison.ppl_ratio = Exponential(
      EstimateOf(scores->windows, [](const WindowScore& w) { return w.nll - w.reference_nll; }));
  comparison.kl_median = Percentile(&scores->kl, 0.5);
  comparison.kl_p99 = Percentile(&scores->kl, 0.99);
  return comparison;
}

void PutEstimate(const std::string& key, const Estimate& estimate, nlohmann::ordered_json* json) {
  (*json)[key] = estimate.value;
  if (estimate.standard_error) (*json)[key + "_stderr"] = *estimate.standard_error;
}

absl::Status CheckModels(const WeightSource& model, const WeightSource* reference,
                         const Tensor& windows) {
  if (windows.rank() != 2 || windows.dim(1) < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("windows ", windows.shape().ToString(),
                     " cannot be scored; a window needs at least two tokens"));
  }
  if (reference != nullptr && reference->config().vocab_size != model.config().vocab_size) {
    return absl::InvalidArgumentError(
        ErrorText("the models cannot be compared",
                  absl::StrCat("their vocabularies have ", model.config().vocab_size, " and ",
                               reference->config().vocab_size, " tokens"),
                  "give the original of this model as reference"));
  }
  return absl::OkStatus();
}

absl::Status CheckScored(const Tensor* scored, const Tensor& windows) {
  if (scored == nullptr) return absl::OkStatus();
  if (scored->dtype() != DType::kI32 || scored->shape() != windows.shape()) {
    return absl::InvalidArgumentError(absl::StrCat("scored is ", scored->shape().ToString(),
                                                   " for windows ", windows.shape().ToString(),
                                                   "; it needs an I32 for every token"));
  }
  const int64_t length = windows.dim(1);
  for (int64_t window = 0; window < windows.dim(0); ++window) {
    const int32_t* row = scored->as<int32_t>() + window * length;
    if (std::all_of(row + 1, row + length, [](int32_t counted) { return counted == 0; })) {
      return absl::InvalidArgumentError(absl::StrCat("no token of window ", window, " is scored"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

Estimate EstimateFromWindows(const std::vector<double>& window_means) {
  Estimate estimate;
  const double count = static_cast<double>(window_means.size());
  double sum = 0;
  for (double mean : window_means) sum += mean;
  estimate.value = sum / count;
  if (window_means.size() < 2) return estimate;
  double squares = 0;
  for (double mean : window_means) {
    squares += (mean - estimate.value) * (mean - estimate.value);
  }
  estimate.standard_error = std::sqrt(squares / (count - 1) / count);
  return estimate;
}

nlohmann::ordered_json ToJson(const EvalResult& result) {
  nlohmann::ordered_json json;
  PutEstimate("perplexity", result.perplexity, &json);
  PutEstimate("nll", result.nll, &json);
  json["tokens"] = result.tokens;
  json["context"] = result.context;
  json["windows"] = result.windows;
  json["seconds"] = result.seconds;
  json["tokens_per_second"] = result.tokens_per_second;
  if (result.comparison) {
    PutEstimate("kl_mean", result.comparison->kl_mean, &json);
    json["kl_median"] = result.comparison->kl_median;
    json["kl_p99"] = result.comparison->kl_p99;
    PutEstimate("top1_agreement", result.comparison->top1_agreement, &json);
    PutEstimate("ppl_ratio", result.comparison->ppl_ratio, &json);
  }
  return json;
}

absl::StatusOr<EvalResult> Evaluate(Backend& backend, WeightSource& model, WeightSource* reference,
                                    const Tensor& windows, const EvalOptions& options) {
  QM_RETURN_IF_ERROR(CheckModels(model, reference, windows));
  QM_RETURN_IF_ERROR(CheckScored(options.scored, windows));
  const auto start = Clock::now();
  QM_ASSIGN_OR_RETURN(Scores scores, Evaluation(backend, windows, options).Run(model, reference));
  const double seconds = SecondsSince(start);
  EvalResult result;
  result.windows = windows.dim(0);
  result.context = windows.dim(1);
  for (const WindowScore& window : scores.windows) {
    result.tokens += static_cast<int64_t>(window.positions);
  }
  result.window_nll = WindowMeans(scores.windows, [](const WindowScore& w) { return w.nll; });
  result.nll = EstimateOf(scores.windows, [](const WindowScore& w) { return w.nll; });
  result.perplexity = Exponential(result.nll);
  result.seconds = seconds;
  result.tokens_per_second = static_cast<double>(result.tokens) / seconds;
  if (reference == nullptr) return result;
  result.window_kl = WindowMeans(scores.windows, [](const WindowScore& w) { return w.kl; });
  result.comparison = Summarize(&scores);
  return result;
}

}  // namespace quantmill
