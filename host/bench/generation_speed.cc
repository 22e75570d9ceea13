#include "host/bench/generation_speed.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/base/clock.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

constexpr int kRepetitions = 5;
constexpr double kSecondsForRepetitions = 20;

struct Pass {
  double prompt_seconds = 0, step_seconds = 0;
  std::vector<std::vector<int32_t>> ids;
};

absl::Status ChooseAll(const Tensor& logits, std::vector<std::vector<int32_t>>* ids,
                       std::vector<int32_t>* next) {
  const int64_t vocabulary = logits.dim(1);
  for (size_t b = 0; b < ids->size(); ++b) {
    const float* row = logits.as<const float>() + static_cast<int64_t>(b) * vocabulary;
    const float* top = std::max_element(row, row + vocabulary);
    if (!std::isfinite(*top)) {
      return absl::DataLossError("generation gave logits that are not finite");
    }
    (*next)[b] = static_cast<int32_t>(top - row);
    (*ids)[b].push_back((*next)[b]);
  }
  return absl::OkStatus();
}

absl::StatusOr<Pass> RunOnce(const ResidentModel& model,
                             const std::vector<std::vector<int32_t>>& prompts, int64_t new_tokens) {
  const int64_t batch = static_cast<int64_t>(prompts.size());
  const int64_t length = static_cast<int64_t>(prompts[0].size());
  QM_ASSIGN_OR_RETURN(DecodeSession session,
                      DecodeSession::Create(model, length + new_tokens - 1, batch));
  Pass pass;
  pass.ids = prompts;
  std::vector<int32_t> all, next(prompts.size());
  for (const auto& prompt : prompts) all.insert(all.end(), prompt.begin(), prompt.end());
  const auto start = Clock::now();
  QM_ASSIGN_OR_RETURN(Tensor logits, session.Append(all));
  pass.prompt_seconds = SecondsSince(start);
  const auto first = Clock::now();
  QM_RETURN_IF_ERROR(ChooseAll(logits, &pass.ids, &next));
  for (int64_t step = 1; step < new_tokens; ++step) {
    QM_ASSIGN_OR_RETURN(logits, session.Append(next));
    QM_RETURN_IF_ERROR(ChooseAll(logits, &pass.ids, &next));
  }
  pass.step_seconds = SecondsSince(first);
  return pass;
}

}  // namespace

absl::StatusOr<GenerationSpeed> MeasureGeneration(const ResidentModel& model,
                                                  const std::vector<std::vector<int32_t>>& prompts,
                                                  int64_t new_tokens,
                                                  const std::function<void()>& after_each) {
  const double batch = static_cast<double>(prompts.size());
  const double length = static_cast<double>(prompts.at(0).size());
  // Fills caches, loads kernels and picks their variants.
  QM_RETURN_IF_ERROR(RunOnce(model, prompts, std::min<int64_t>(new_tokens, 8)).status());
  std::vector<double> prompt_rates, rates;
  GenerationSpeed speed;
  const auto start = Clock::now();
  for (int i = 0; i < kRepetitions; ++i) {
    QM_ASSIGN_OR_RETURN(Pass pass, RunOnce(model, prompts, new_tokens));
    prompt_rates.push_back(batch * length / pass.prompt_seconds);
    rates.push_back(batch * static_cast<double>(new_tokens - 1) / pass.step_seconds);
    speed.ids = std::move(pass.ids);
    if (after_each) after_each();
    if (SecondsSince(start) > kSecondsForRepetitions) break;
  }
  speed.prompt_tokens_per_second = EstimateFromWindows(prompt_rates);
  speed.tokens_per_second = EstimateFromWindows(rates);
  return speed;
}

absl::Status CheckGreedy(absl::Span<const int32_t> ids, int64_t prompt, const Tensor& logits,
                         double tolerance) {
  const int64_t count = static_cast<int64_t>(ids.size()), vocabulary = logits.dim(1);
  for (int64_t i = prompt; i < count; ++i) {
    const float* row = logits.as<const float>() + (i - 1) * vocabulary;
    const auto [low, high] = std::minmax_element(row, row + vocabulary);
    const double largest =
        std::max(std::abs(static_cast<double>(*low)), std::abs(static_cast<double>(*high)));
    const double lacking = static_cast<double>(*high) - row[ids[static_cast<size_t>(i)]];
    if (lacking <= tolerance * largest) continue;
    return absl::DataLossError(ErrorText(
        "the text that was generated is not that of the model that was evaluated",
        absl::StrFormat("token %d behind the prompt has a logit %g below the largest, of %g",
                        i - prompt + 1, lacking, largest),
        "no speed is shown; a kernel that multiplies packed weights is the likely cause: compare "
        "quantmill generate with a dense export"));
  }
  return absl::OkStatus();
}

double GreedyTolerance(DType activations) {
  switch (activations) {
    case DType::kBF16:
      return 16.0 / 256;
    case DType::kF16:
      return 16.0 / 2048;
    default:
      return 1.0 / 1024;
  }
}

}  // namespace quantmill
