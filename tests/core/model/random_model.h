// Small models with random weights, in memory.
#ifndef QUANTMILL_TESTS_CORE_MODEL_RANDOM_MODEL_H_
#define QUANTMILL_TESTS_CORE_MODEL_RANDOM_MODEL_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/model/weights.h"
#include "nlohmann/json.hpp"
#include "tests/core/model/slow_reference.h"

namespace quantmill::testing {

// A config.json of a two-block model with everything spelled out: hidden 32, 4 heads of 16 (2 for
// keys and values), vocabulary 64. `changes` is merged over it.
nlohmann::ordered_json SmallConfig(const std::string& model_type,
                                   const nlohmann::ordered_json& changes = {});

// A model made of tensors in memory (F32, on the host).
class MemorySource : public WeightSource {
 public:
  MemorySource(ModelConfig config, std::map<std::string, Tensor> tensors)
      : config_(std::move(config)), tensors_(std::move(tensors)) {}

  const ModelConfig& config() const override { return config_; }
  absl::StatusOr<BlockWeights> LoadBlock(int64_t block, Backend& backend) override;
  absl::StatusOr<Tensor> Embedding() override { return tensors_.at("model.embed_tokens.weight"); }
  absl::StatusOr<Tensor> FinalNorm(Backend&) override { return tensors_.at("model.norm.weight"); }
  absl::StatusOr<LinearWeight> Head(Backend& backend) override;
  void ReleaseBlock(int64_t block) override { released_.push_back(block); }

  std::map<std::string, Tensor>& tensors() { return tensors_; }
  const std::vector<int64_t>& released() const { return released_; }
  // The same tensors for the slow reference.
  NamedMatrices Matrices() const;

 private:
  LinearWeight Linear(const std::string& module) const;

  ModelConfig config_;
  std::map<std::string, Tensor> tensors_;
  std::vector<int64_t> released_;
};

// Random weights for every required tensor: norms around 1, the rest around 0, from `seed`.
std::unique_ptr<MemorySource> MakeRandomModel(const nlohmann::ordered_json& config, uint64_t seed);

// Token ids in [0, vocab).
std::vector<int32_t> RandomIds(int64_t count, int64_t vocab, uint64_t seed);

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_MODEL_RANDOM_MODEL_H_
