// Text generation, one token after another.
#ifndef QUANTMILL_CORE_EVAL_GENERATE_H_
#define QUANTMILL_CORE_EVAL_GENERATE_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/eval/resident_model.h"
#include "core/eval/sampler.h"

namespace quantmill {

struct GenerateOptions {
  int64_t max_tokens = 128;
  SamplingOptions sampling;
  bool stop_at_eos = true;
  std::vector<int64_t> more_eos;  // ends the text beside the config's own (stop_at_eos)
  // Called with every token as soon as it is chosen, not with the end-of-text token; true stops.
  // May be null.
  std::function<bool(int32_t token)> on_token;
};

struct GenerateResult {
  std::vector<int32_t> tokens;  // without the prompt and without the end-of-text token
  bool reached_end = false;     // the model ended the text
  double prompt_seconds = 0, generation_seconds = 0;
  double prompt_tokens_per_second = 0, tokens_per_second = 0;  // 0 when there were none
};

// Continues `prompt` (at least one token). Stops at max_tokens, at an end-of-text token, or when
// the model's positions are used up. INVALID_ARGUMENT for bad ids, sampling options or a prompt
// that leaves no room.
absl::StatusOr<GenerateResult> Generate(const ResidentModel& model,
                                        absl::Span<const int32_t> prompt,
                                        const GenerateOptions& options);

// Continues a session: as Generate, on top of what `session` has seen. The last token chosen is not
// part of the session yet.
absl::StatusOr<GenerateResult> Continue(const ResidentModel& model, DecodeSession& session,
                                        absl::Span<const int32_t> prompt,
                                        const GenerateOptions& options);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_EVAL_GENERATE_H_
