#include "core/eval/generate.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

absl::Status CheckOptions(const GenerateOptions& options, absl::Span<const int32_t> prompt) {
  if (prompt.empty()) {
    return absl::InvalidArgumentError(ErrorText("the prompt has no tokens",
                                                "generation continues something",
                                                "give a prompt that is not empty"));
  }
  const SamplingOptions& sampling = options.sampling;
  if (!(sampling.temperature >= 0) || !std::isfinite(sampling.temperature)) {
    return absl::InvalidArgumentError(absl::StrCat("temperature ", sampling.temperature,
                                                   " is not possible; it must be 0 or more"));
  }
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "top-p ", sampling.top_p, " is not possible; it must be above 0 and at most 1"));
  }
  if (options.max_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.max_tokens, " tokens cannot be generated; ask for at least 1"));
  }
  return absl::OkStatus();
}

bool Contains(const std::vector<int64_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

absl::StatusOr<GenerateResult> Continue(const ResidentModel& model, DecodeSession& session,
                                        absl::Span<const int32_t> prompt,
                                        const GenerateOptions& options) {
  QM_RETURN_IF_ERROR(CheckOptions(options, prompt));
  GenerateResult result;
  Sampler sampler(options.sampling);
  const Clock::time_point start = Clock::now();
  QM_ASSIGN_OR_RETURN(Tensor logits, session.Append(prompt));
  result.prompt_seconds = SecondsSince(start);
  const Clock::time_point first = Clock::now();
  int64_t steps = 0;
  while (true) {
    const int32_t token =
        sampler.Next(absl::MakeConstSpan(logits.as<float>(), static_cast<size_t>(logits.dim(1))));
    if (options.stop_at_eos &&
        (Contains(model.config().eos_ids, token) || Contains(options.more_eos, token))) {
      result.reached_end = true;
      break;
    }
    result.tokens.push_back(token);
    if (options.on_token && options.on_token(token)) break;
    if (static_cast<int64_t>(result.tokens.size()) >= options.max_tokens ||
        session.length() >= session.capacity()) {
      break;
    }
    QM_ASSIGN_OR_RETURN(logits, session.Append({token}));
    ++steps;
  }
  result.generation_seconds = SecondsSince(first);
  result.prompt_tokens_per_second = static_cast<double>(prompt.size()) / result.prompt_seconds;
  if (steps > 0) result.tokens_per_second = static_cast<double>(steps) / result.generation_seconds;
  return result;
}

absl::StatusOr<GenerateResult> Generate(const ResidentModel& model,
                                        absl::Span<const int32_t> prompt,
                                        const GenerateOptions& options) {
  QM_RETURN_IF_ERROR(CheckOptions(options, prompt));
  const int64_t length = static_cast<int64_t>(prompt.size());
  const int64_t limit = model.config().max_positions;
  if (limit > 0 && length > limit) {
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", length,
                                                   " tokens; the model was made for ", limit,
                                                   "; shorten the prompt"));
  }
  // The last token chosen need not be run.
  const int64_t wanted = length + options.max_tokens - 1;
  QM_ASSIGN_OR_RETURN(DecodeSession session,
                      DecodeSession::Create(model, limit > 0 ? std::min(limit, wanted) : wanted));
  return Continue(model, session, prompt, options);
}

}  // namespace quantmill
