#include "core/model/config.h"

#include <string>

#include "core/io/files.h"
#include "core/io/json.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::ordered_json;

// The keys without which no file is complete.
Json Minimal(const std::string& model_type) {
  Json json = {{"model_type", model_type}, {"hidden_size", 64},         {"intermediate_size", 96},
               {"num_hidden_layers", 4},   {"num_attention_heads", 32}, {"vocab_size", 100}};
  if (model_type == "mixtral") json["num_local_experts"] = 8;
  if (model_type == "qwen3_moe") json["num_experts"] = 16;
  return json;
}

Json With(Json json, const Json& changes) {
  for (const auto& [key, value] : changes.items()) json[key] = value;
  return json;
}

ModelConfig Parse(const Json& json) {
  const auto config = ParseModelConfig(json);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : ModelConfig{};
}

std::string ErrorOf(const Json& json) {
  const auto config = ParseModelConfig(json);
  return config.ok() ? "" : std::string(config.status().message());
}

// Defaults: transformers src/transformers/models/*/configuration_*.py.
TEST(ConfigTest, LlamaDefaults) {
  const ModelConfig config = Parse(Minimal("llama"));
  EXPECT_EQ(config.architecture, Architecture::kLlama);
  EXPECT_EQ(config.kv_heads, 32);
  EXPECT_EQ(config.head_dim, 2);
  EXPECT_EQ(config.max_positions, 2048);
  EXPECT_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_EQ(config.rope.theta, 1e4);
  EXPECT_EQ(config.rope.type, RopeConfig::Type::kDefault);
  EXPECT_FALSE(config.tied_embeddings || config.qkv_bias || config.o_bias || config.mlp_bias);
  EXPECT_FALSE(config.qk_norm);
  EXPECT_THAT(config.sliding_window, ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(config.moe_layer, ElementsAre(false, false, false, false));
  EXPECT_THAT(config.bos_ids, ElementsAre(1));
  EXPECT_THAT(config.eos_ids, ElementsAre(2));
}

TEST(ConfigTest, LlamaFields) {
  const ModelConfig config = Parse(With(Minimal("llama"), {{"num_attention_heads", 4},
                                                           {"num_key_value_heads", nullptr},
                                                           {"head_dim", nullptr},
                                                           {"attention_bias", true},
                                                           {"mlp_bias", true},
                                                           {"tie_word_embeddings", true},
                                                           {"rms_norm_eps", 1e-5},
                                                           {"torch_dtype", "float16"},
                                                           {"eos_token_id", {5, 6}},
                                                           {"bos_token_id", nullptr},
                                                           {"sliding_window", 7}}));
  EXPECT_EQ(config.kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_TRUE(config.qkv_bias && config.o_bias && config.mlp_bias && config.tied_embeddings);
  EXPECT_EQ(config.dtype, DType::kF16);
  EXPECT_THAT(config.eos_ids, ElementsAre(5, 6));
  EXPECT_THAT(config.bos_ids, IsEmpty());
  EXPECT_THAT(config.sliding_window, Each(0));  // a Llama has none, whatever the file says
}

TEST(ConfigTest, ClassDefaultsOfTheOthers) {
  EXPECT_EQ(Parse(Minimal("mistral")).kv_heads, 8);
  EXPECT_EQ(Parse(Minimal("mistral")).max_positions, 131072);
  EXPECT_EQ(Parse(Minimal("qwen2")).kv_heads, 32);
  EXPECT_THAT(Parse(Minimal("qwen2")).eos_ids, IsEmpty());
  EXPECT_EQ(Parse(Minimal("qwen3")).head_dim, 128);
  EXPECT_EQ(Parse(With(Minimal("qwen3"), {{"head_dim", nullptr}})).head_dim, 2);
  EXPECT_EQ(Parse(Minimal("mixtral")).rms_norm_eps, 1e-5);
  EXPECT_EQ(Parse(Minimal("mixtral")).rope.theta, 1e6);
  EXPECT_EQ(Parse(Minimal("qwen3_moe")).kv_heads, 4);
}

TEST(ConfigTest, BiasesAndNorms) {
  const ModelConfig qwen2 = Parse(With(Minimal("qwen2"), {{"attention_bias", false}}));
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.o_bias || qwen2.mlp_bias || qwen2.qk_norm);
  const ModelConfig qwen3 = Parse(With(Minimal("qwen3"), {{"attention_bias", true}}));
  EXPECT_TRUE(qwen3.qkv_bias && qwen3.o_bias && qwen3.qk_norm);
  EXPECT_FALSE(Parse(With(Minimal("mistral"), {{"attention_bias", true}})).qkv_bias);
}

TEST(ConfigTest, SlidingWindows) {
  const auto windows = [](const char* type, const Json& changes) {
    return Parse(With(Minimal(type), changes)).sliding_window;
  };
  EXPECT_THAT(windows("mistral", {{"sliding_window", 7}}), ElementsAre(7, 7, 7, 7));
  EXPECT_THAT(windows("mistral", Json::object()), Each(4096));
  EXPECT_THAT(windows("mistral", {{"sliding_window", nullptr}}), Each(0));
  EXPECT_THAT(windows("mixtral", Json::object()), Each(0));
  EXPECT_THAT(windows("qwen2", {{"sliding_window", 7}, {"max_window_layers", 1}}), Each(0));
  EXPECT_THAT(windows("qwen2", {{"use_sliding_window", true}, {"sliding_window", 7}}), Each(0));
  EXPECT_THAT(
      windows("qwen2",
              {{"use_sliding_window", true}, {"sliding_window", 7}, {"max_window_layers", 1}}),
      ElementsAre(0, 7, 7, 7));
  EXPECT_THAT(
      windows("qwen3",
              {{"use_sliding_window", true},
               {"sliding_window", 7},
               {"max_window_layers", 1},
               {"layer_types",
                {"sliding_attention", "full_attention", "full_attention", "sliding_attention"}}}),
      ElementsAre(7, 0, 0, 7));
}

TEST(ConfigTest, MixtureOfExperts) {
  const ModelConfig mixtral = Parse(With(Minimal("mixtral"), {{"num_experts_per_tok", 3}}));
  EXPECT_EQ(mixtral.experts, 8);
  EXPECT_EQ(mixtral.experts_per_token, 3);
  EXPECT_EQ(mixtral.expert_intermediate_size, 96);
  EXPECT_TRUE(mixtral.normalize_expert_weights);
  EXPECT_THAT(mixtral.moe_layer, Each(true));

  const Json moe = With(Minimal("qwen3_moe"), {{"moe_intermediate_size", 32}});
  EXPECT_EQ(Parse(moe).experts, 16);
  EXPECT_EQ(Parse(moe).expert_intermediate_size, 32);
  EXPECT_EQ(Parse(moe).experts_per_token, 8);
  EXPECT_FALSE(Parse(moe).normalize_expert_weights);
  EXPECT_TRUE(Parse(With(moe, {{"norm_topk_prob", true}})).normalize_expert_weights);
  EXPECT_THAT(Parse(With(moe, {{"decoder_sparse_step", 2}})).moe_layer,
              ElementsAre(false, true, false, true));
  EXPECT_THAT(Parse(With(moe, {{"mlp_only_layers", {0, 3, 99}}})).moe_layer,
              ElementsAre(false, true, true, false));
  Json other_name = moe;
  other_name.erase("num_experts");
  EXPECT_THAT(ErrorOf(other_name), HasSubstr("num_local_experts is missing"));
  other_name["num_local_experts"] = 12;
  EXPECT_EQ(Parse(other_name).experts, 12);
}

TEST(ConfigTest, RopeInBothSpellings) {
  const Json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 8192}};
  const Json changes[] = {
      {{"rope_theta", 5e5}, {"rope_scaling", llama3}},
      {{"rope_parameters", With(llama3, {{"rope_theta", 5e5}})}},
      {{"rope_parameters", {{"full_attention", With(llama3, {{"rope_theta", 5e5}})}}}},
      {{"rope_theta", 5e5}, {"rope_parameters", llama3}},
  };
  for (const Json& change : changes) {
    const RopeConfig rope = Parse(With(Minimal("llama"), change)).rope;
    EXPECT_EQ(rope.type, RopeConfig::Type::kLlama3) << change;
    EXPECT_EQ(rope.theta, 5e5);
    EXPECT_EQ(rope.factor, 8.0);
    EXPECT_EQ(rope.high_freq_factor, 4.0);
    EXPECT_EQ(rope.original_positions, 8192);
  }
  const RopeConfig linear =
      Parse(With(Minimal("llama"), {{"rope_scaling", {{"type", "linear"}, {"factor", 2}}}})).rope;
  EXPECT_EQ(linear.type, RopeConfig::Type::kLinear);
  EXPECT_EQ(linear.factor, 2.0);
  EXPECT_EQ(Parse(With(Minimal("llama"), {{"rope_scaling", nullptr}})).rope.type,
            RopeConfig::Type::kDefault);
}

TEST(ConfigTest, RefusesUnsupportedRope) {
  for (const char* type : {"yarn", "dynamic", "longrope", "su"}) {
    EXPECT_THAT(ErrorOf(With(Minimal("llama"), {{"rope_scaling", {{"rope_type", type}}}})),
                HasSubstr(std::string("rope_scaling.rope_type \"") + type + "\" is not supported"));
  }
  const Json rope = {{"rope_type", "llama3"},
                     {"factor", 8.0},
                     {"low_freq_factor", 4.0},
                     {"high_freq_factor", 4.0},
                     {"original_max_position_embeddings", 8192}};
  EXPECT_THAT(ErrorOf(With(Minimal("llama"), {{"rope_parameters", rope}})),
              HasSubstr("high_freq_factor is not larger"));
  Json incomplete = rope;
  incomplete.erase("factor");
  EXPECT_THAT(ErrorOf(With(Minimal("llama"), {{"rope_parameters", incomplete}})),
              HasSubstr("rope_parameters.factor is missing"));
  EXPECT_THAT(ErrorOf(With(Minimal("llama"), {{"rope_parameters",
                                               {{"full_attention", {{"rope_theta", 1.0}}},
                                                {"sliding_attention", {{"rope_theta", 2.0}}}}}})),
              HasSubstr("differ between kinds of layers"));
  EXPECT_THAT(
      ErrorOf(With(Minimal("llama"), {{"rope_parameters", {{"partial_rotary_factor", 0.5}}}})),
      HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(ErrorOf(With(Minimal("llama"), {{"rope_scaling", 3}})), HasSubstr("not an object"));
  EXPECT_THAT(ErrorOf(With(Minimal("llama"), {{"rope_parameters", 3}})),
              HasSubstr("not an object"));
}

TEST(ConfigTest, NamesTheWrongKey) {
  const auto error = [](const Json& changes, const char* type = "llama") {
    return ErrorOf(With(Minimal(type), changes));
  };
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "vocab_size"}) {
    Json json = Minimal("llama");
    json.erase(key);
    EXPECT_THAT(ErrorOf(json), HasSubstr(std::string(key) + " is missing"));
    for (const Json& bad : {Json(0), Json(-1), Json("4"), Json(1.5), Json(1u << 31), Json(true),
                            Json(UINT64_MAX), Json::array()}) {
      EXPECT_THAT(error({{key, bad}}), HasSubstr(key)) << bad;
    }
  }
  EXPECT_THAT(error({{"num_key_value_heads", 5}}),
              HasSubstr("not a multiple of num_key_value_heads"));
  EXPECT_THAT(error({{"num_attention_heads", 7}}), HasSubstr("heads do not divide"));
  EXPECT_THAT(error({{"head_dim", 3}}), HasSubstr("even"));
  EXPECT_THAT(error({{"hidden_act", "gelu"}}), HasSubstr("only silu"));
  EXPECT_THAT(error({{"rms_norm_eps", 0}}), HasSubstr("rms_norm_eps"));
  EXPECT_THAT(error({{"tie_word_embeddings", "yes"}}), HasSubstr("tie_word_embeddings"));
  EXPECT_THAT(error({{"dtype", "float8"}}), HasSubstr("bfloat16, float16 and float32"));
  EXPECT_THAT(error({{"eos_token_id", "</s>"}}), HasSubstr("eos_token_id"));
  EXPECT_THAT(error({{"layer_types", {"full_attention"}}}), HasSubstr("list of 4 entries"));
  EXPECT_THAT(error({{"layer_types", Json::array({"a", "a", "a", "a"})}}), HasSubstr("layer 0"));
  EXPECT_THAT(error({{"layer_types", Json::array({"sliding_attention", "full_attention",
                                                  "full_attention", "full_attention"})}}),
              HasSubstr("no sliding_window"));
  EXPECT_THAT(error({{"num_experts_per_tok", 9}}, "mixtral"), HasSubstr("more than the 8 experts"));
  EXPECT_THAT(error({{"mlp_only_layers", {-1}}}, "qwen3_moe"), HasSubstr("mlp_only_layers"));
  EXPECT_THAT(error({{"model_type", "gpt2"}}),
              HasSubstr("\"gpt2\" is not supported; supported are llama, mistral, qwen2"));
  EXPECT_THAT(ErrorOf(Json::object()), HasSubstr("model_type is missing"));
  EXPECT_THAT(ErrorOf(Json::array()), HasSubstr("not a JSON object"));
}

TEST(ConfigTest, ReadsFilesAndKeepsTheirKeys) {
  const std::string directory = testing::MakeTempDir();
  EXPECT_EQ(ReadModelConfig(directory).status().code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteFile(directory + "/config.json", R"({"model_type":"x","b":1,"a":2})").ok());
  EXPECT_THAT(std::string(ReadModelConfig(directory).status().message()), HasSubstr(directory));
  const Json json = With(Minimal("llama"), {{"unknown_key", {{"z", 1}, {"a", 2}}}});
  ASSERT_TRUE(WriteFile(directory + "/config.json", json.dump()).ok());
  EXPECT_EQ(ReadModelConfig(directory)->json.dump(), json.dump());
}

TEST(ConfigTest, RealModels) {
  QM_SHARED_OR_SKIP(models, "models");
  EXPECT_EQ(ReadModelConfig(models + "/small-llama")->kv_heads, 2);
  EXPECT_EQ(ReadModelConfig(models + "/arch/llama3-rope")->rope.type, RopeConfig::Type::kLlama3);
  EXPECT_EQ(ReadModelConfig(models + "/arch/mixtral")->experts, 4);
  EXPECT_TRUE(ReadModelConfig(models + "/arch/qwen2")->qkv_bias);
}

}  // namespace
}  // namespace quantmill
