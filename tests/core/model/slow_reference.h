// A decoder written straight from the formulas, in f64 and one position at a time, as the oracle of
// the forward pass. It shares no code with core/: names, routing and rope are spelled out again.
// Formulas: transformers src/transformers/models/{llama,qwen3,mixtral,qwen3_moe}/modeling_*.py.
#ifndef QUANTMILL_TESTS_CORE_MODEL_SLOW_REFERENCE_H_
#define QUANTMILL_TESTS_CORE_MODEL_SLOW_REFERENCE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace quantmill::testing {

using Matrix = std::vector<std::vector<double>>;  // row by row; vectors have one row

// Tensors of the checkpoint by name.
using NamedMatrices = std::map<std::string, Matrix>;

struct SlowResult {
  Matrix logits;               // [positions, vocab]
  std::vector<Matrix> hidden;  // 0 = embeddings, then after every block
  // Inputs of linears, by module name without ".weight"; rows in order of position.
  std::map<std::string, Matrix> inputs;
};

// json: the config.json in its plain 4.x spelling, every key used given.
SlowResult RunSlowReference(const nlohmann::json& config, const NamedMatrices& tensors,
                            const std::vector<int32_t>& ids);

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_MODEL_SLOW_REFERENCE_H_
