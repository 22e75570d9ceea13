// make_random_model DIR LAYERS HIDDEN INTERMEDIATE: a bf16 Llama checkpoint with random weights,
// and DIR/ids.safetensors with one short window of token ids.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/safetensors_writer.h"
#include "core/model/graph.h"

namespace quantmill {
namespace {

constexpr int64_t kVocabulary = 32000;
constexpr int64_t kTile = 1 << 20;

absl::Status WriteModel(const std::string& directory, const ModelConfig& config) {
  std::vector<TensorDeclaration> declarations;
  for (const TensorSpec& spec : RequiredTensors(config)) {
    declarations.push_back({spec.name, DType::kBF16, spec.shape});
  }
  QM_ASSIGN_OR_RETURN(auto writer, CheckpointWriter::Create(directory, declarations, 1 << 30));
  // One tile of normal numbers, used over and over from changing offsets.
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<uint16_t> tile(kTile), ones(kTile, F32ToBF16(1.0f));
  for (uint16_t& value : tile) value = F32ToBF16(normal(random));
  for (const TensorDeclaration& tensor : declarations) {
    const std::vector<uint16_t>& values = tensor.shape.rank() == 1 ? ones : tile;
    for (int64_t left = tensor.shape.elements(); left > 0;) {
      const int64_t offset = static_cast<int64_t>(random() % (kTile / 2));
      const int64_t count = std::min(left, kTile - offset);
      QM_RETURN_IF_ERROR(writer->Append(
          tensor.name,
          {reinterpret_cast<const char*>(values.data() + offset), static_cast<size_t>(count) * 2}));
      left -= count;
    }
  }
  QM_RETURN_IF_ERROR(writer->Finish());
  std::vector<int32_t> ids;
  for (int i = 0; i < 64; ++i) ids.push_back(i * 397 % kVocabulary);
  QM_ASSIGN_OR_RETURN(auto window,
                      SafetensorsWriter::Create(directory + "/ids.safetensors",
                                                {{"input_ids", DType::kI32, Shape({1, 64})}}));
  QM_RETURN_IF_ERROR(window->Write("input_ids", Tensor::FromI32(Shape({1, 64}), ids)));
  return window->Finish();
}

absl::Status Make(const std::string& directory, int64_t layers, int64_t hidden,
                  int64_t intermediate) {
  std::filesystem::create_directories(directory);
  const nlohmann::ordered_json json = {{"architectures", {"LlamaForCausalLM"}},
                                       {"model_type", "llama"},
                                       {"hidden_size", hidden},
                                       {"intermediate_size", intermediate},
                                       {"num_hidden_layers", layers},
                                       {"num_attention_heads", hidden / 128},
                                       {"num_key_value_heads", hidden / 128},
                                       {"head_dim", 128},
                                       {"vocab_size", kVocabulary},
                                       {"max_position_embeddings", 2048},
                                       {"rms_norm_eps", 1e-5},
                                       {"rope_theta", 10000.0},
                                       {"tie_word_embeddings", false},
                                       {"torch_dtype", "bfloat16"}};
  QM_RETURN_IF_ERROR(WriteFile(directory + "/config.json", json.dump(1)));
  QM_ASSIGN_OR_RETURN(const ModelConfig config, ParseModelConfig(json));
  return WriteModel(directory, config);
}

}  // namespace
}  // namespace quantmill

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: make_random_model DIR LAYERS HIDDEN INTERMEDIATE\n");
    return 2;
  }
  const absl::Status status =
      quantmill::Make(argv[1], std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4]));
  if (!status.ok()) std::fprintf(stderr, "error: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
