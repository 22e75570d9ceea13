// The configuration of a model in a GGUF file, as the config.json it would have
// (llama.cpp: gguf-py/gguf/constants.py, conversion/*.py), and the other way around.
#ifndef QUANTMILL_CORE_MODEL_GGUF_CONFIG_H_
#define QUANTMILL_CORE_MODEL_GGUF_CONFIG_H_

#include <vector>

#include "absl/status/statusor.h"
#include "core/io/gguf_file.h"
#include "core/io/gguf_tensors.h"
#include "core/io/gguf_writer.h"
#include "core/model/config.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// INVALID_ARGUMENT names the key that is missing; UNIMPLEMENTED what the forward pass lacks.
absl::StatusOr<nlohmann::ordered_json> ConfigFromGguf(const GgufFile& file);

// Divisors of the rotation's frequencies, one per pair of channels; empty where there are none.
std::vector<float> RopeDivisors(const ModelConfig& config);

// The keys under general. and the architecture's name, without the tokenizer's. UNIMPLEMENTED for a
// model that llama.cpp would compute otherwise (a sliding window).
absl::StatusOr<GgufMetadata> GgufConfig(const ModelConfig& config);
// What names and the order of rows depend on.
absl::StatusOr<GgufModel> GgufModelOf(const ModelConfig& config);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_GGUF_CONFIG_H_
