// Adapters in PEFT's files: names, round trip, files that are none.
#include "core/checkpoint/peft_adapter.h"

#include <filesystem>
#include <fstream>

#include "core/io/files.h"
#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "gmock/gmock.h"
#include "tests/core/cpu/support.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

namespace fs = std::filesystem;

ModelConfig TwoBlocks() {
  ModelConfig config;
  config.model_type = "llama";
  config.hidden_size = 8;
  config.intermediate_size = 16;
  config.layers = 2;
  config.heads = config.kv_heads = 2;
  config.head_dim = 4;
  config.vocab_size = 32;
  config.sliding_window = {0, 0};
  config.moe_layer = {false, false};
  return config;
}

TEST(PeftTargetsTest, LastPartsWhereTheySayIt) {
  const ModelConfig config = TwoBlocks();
  EXPECT_THAT(
      PeftTargets(config, {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj",
                           "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}),
      ElementsAre("up_proj", "v_proj"));
  // Not of every block: whole names.
  EXPECT_THAT(PeftTargets(config, {"model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj",
                                   "model.layers.1.mlp.up_proj"}),
              ElementsAre("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj",
                          "model.layers.1.self_attn.v_proj"));
}

class PeftAdapterTest : public ::testing::Test {
 protected:
  void SetUp() override {
    adapter_.config = {{"peft_type", "LORA"}, {"r", 2}};
    adapter_.modules["model.layers.0.self_attn.q_proj"] = {{"lora_A", RandomTensor({2, 8}, 1)},
                                                           {"lora_B", RandomTensor({8, 2}, 2)}};
    adapter_.modules["model.layers.1.mlp.down_proj"] = {
        {"lora_A", RandomTensor({2, 16}, 3, DType::kBF16)}};
  }
  void ExpectRefused(absl::StatusCode code, const std::string& text) {
    const auto read = ReadPeftAdapter(directory_);
    ASSERT_FALSE(read.ok());
    EXPECT_EQ(read.status().code(), code) << read.status();
    EXPECT_THAT(std::string(read.status().message()), HasSubstr(text));
  }
  void WriteTensors(const std::vector<std::string>& names) {
    std::vector<TensorDeclaration> declarations;
    for (const std::string& name : names) declarations.push_back({name, DType::kF32, {2}});
    auto writer =
        SafetensorsWriter::Create(directory_ + "/adapter_model.safetensors", declarations).value();
    for (const std::string& name : names) {
      ASSERT_TRUE(writer->Write(name, RandomTensor({2}, 1)).ok());
    }
    ASSERT_TRUE(writer->Finish().ok());
  }

  std::string directory_ = MakeTempDir();
  PeftAdapter adapter_;
};

TEST_F(PeftAdapterTest, RoundTrip) {
  ASSERT_TRUE(WritePeftAdapter(directory_, adapter_).ok());
  // The names that PEFT reads.
  const auto file = SafetensorsFile::Open(directory_ + "/adapter_model.safetensors").value();
  std::vector<std::string> names;
  for (const auto& entry : file->entries()) names.push_back(entry.name);
  EXPECT_THAT(names, ::testing::UnorderedElementsAre(
                         "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                         "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
                         "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"));
  const auto read = ReadPeftAdapter(directory_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->config, adapter_.config);
  ASSERT_EQ(read->modules.size(), 2u);
  for (const auto& [module, parameters] : adapter_.modules) {
    const auto& other = read->modules.at(module);
    ASSERT_EQ(other.size(), parameters.size());
    for (const NamedTensor& named : parameters) {
      const auto found = std::find_if(other.begin(), other.end(),
                                      [&](const NamedTensor& t) { return t.name == named.name; });
      ASSERT_NE(found, other.end()) << named.name;
      EXPECT_EQ(found->tensor.dtype(), named.tensor.dtype());
      EXPECT_TRUE(SameBytes(found->tensor, named.tensor));
    }
  }
}

TEST_F(PeftAdapterTest, MissingFiles) {
  ExpectRefused(absl::StatusCode::kNotFound, directory_ + " holds no adapter_config.json");
  ASSERT_TRUE(WritePeftAdapter(directory_, adapter_).ok());
  fs::remove(directory_ + "/adapter_model.safetensors");
  ExpectRefused(absl::StatusCode::kNotFound, directory_ + " holds no adapter_model.safetensors");
}

TEST_F(PeftAdapterTest, ForeignTensors) {
  ASSERT_TRUE(WritePeftAdapter(directory_, adapter_).ok());
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A", "base_model.model..weight",
        ".weight", "x"}) {
    WriteTensors({name});
    ExpectRefused(absl::StatusCode::kInvalidArgument,
                  std::string("tensor '") + name + "' is no parameter of a module");
  }
  WriteTensors({});
  ExpectRefused(absl::StatusCode::kInvalidArgument, "holds no tensors");
}

TEST_F(PeftAdapterTest, BrokenFiles) {
  ASSERT_TRUE(WritePeftAdapter(directory_, adapter_).ok());
  for (const char* text : {"[1]", "5", "\"LORA\""}) {
    ASSERT_TRUE(WriteFile(directory_ + "/adapter_config.json", text).ok());
    ExpectRefused(absl::StatusCode::kInvalidArgument, "adapter_config.json is no JSON object");
  }
  ASSERT_TRUE(WriteFile(directory_ + "/adapter_config.json", "{\"r\":").ok());
  EXPECT_THAT(std::string(ReadPeftAdapter(directory_).status().message()),
              HasSubstr("adapter_config.json"));
  ASSERT_TRUE(WriteFile(directory_ + "/adapter_config.json", "{}").ok());
  fs::resize_file(directory_ + "/adapter_model.safetensors", 50);
  EXPECT_THAT(std::string(ReadPeftAdapter(directory_).status().message()),
              HasSubstr("adapter_model.safetensors"));
}

}  // namespace
}  // namespace quantmill::testing
