// The "post_processor" of tokenizer.json: special tokens around a text.
#ifndef QUANTMILL_CORE_TEXT_POST_PROCESSOR_H_
#define QUANTMILL_CORE_TEXT_POST_PROCESSOR_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct PostProcessor {
  // Types TemplateProcessing (its form for a single text), ByteLevel (which only moves offsets) and
  // Sequence; null = nothing is added. UNIMPLEMENTED names any other.
  static absl::StatusOr<PostProcessor> FromJson(const nlohmann::json& json);

  std::vector<int32_t> before, after;  // ids added to a text
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_POST_PROCESSOR_H_
