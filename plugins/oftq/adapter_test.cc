// Configurations of adapters: as PEFT 0.21.2 wrote them, round trips, and what is refused.
#include <gtest/gtest.h>

#include "oftq_test_util.h"
#include "quantmill/sdk/json.hpp"

namespace quantmill::oftq::testing {
namespace {

struct Read {
  qm_status code = QM_OK;
  std::string options, error, log;
};

Read From(const std::string& config, const char* target = "peft") {
  FakeCall call;
  call.Defaults(Method());
  const char* options = nullptr;
  Read out;
  out.code = Table().from_adapter(call.get(), target, config.c_str(), &options);
  if (out.code == QM_OK) out.options = options;
  out.error = call.error();
  for (const auto& line : call.logs()) out.log += line.second;
  return out;
}

std::string To(const Setting& s) {
  FakeCall call;
  Apply(s, &call);
  const char* config = nullptr;
  EXPECT_EQ(Table().to_adapter(call.get(), "peft", &config), QM_OK) << call.error();
  return config == nullptr ? "" : config;
}

// What from_adapter gives: every option of the method.
std::string OftOptions(int block, int terms) {
  return R"({"alpha":"16","block":")" + std::to_string(block) +
         R"(","merge":"false","method":"oft","neumann_terms":")" + std::to_string(terms) +
         R"(","rank":"8","target":"*"})";
}
std::string LoraOptions(const std::string& alpha, int rank) {
  return R"({"alpha":")" + alpha +
         R"(","block":"32","merge":"false","method":"lora","neumann_terms":"5","rank":")" +
         std::to_string(rank) + R"(","target":"*"})";
}

// Of PeftModel.save_pretrained.
constexpr char kPeftOft[] = R"({
  "auto_mapping": {"base_model_class": "M", "parent_library": "__main__"},
  "base_model_name_or_path": null,
  "bias": "none",
  "block_share": false,
  "coft": false,
  "eps": 6e-05,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_weights": true,
  "layers_pattern": null,
  "layers_to_transform": null,
  "module_dropout": 0.0,
  "modules_to_save": null,
  "num_cayley_neumann_terms": 5,
  "oft_block_size": 4,
  "peft_type": "OFT",
  "peft_version": "0.21.2",
  "r": 0,
  "revision": null,
  "target_modules": ["q_proj"],
  "task_type": null,
  "use_cayley_neumann": true
})";

constexpr char kPeftLora[] = R"({
  "alora_invocation_tokens": null,
  "alpha_pattern": {},
  "arrow_config": null,
  "auto_mapping": {"base_model_class": "M", "parent_library": "__main__"},
  "base_model_name_or_path": null,
  "bias": "none",
  "corda_config": null,
  "ensure_weight_tying": false,
  "eva_config": null,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "kasa_config": null,
  "layer_replication": null,
  "layers_pattern": null,
  "layers_to_transform": null,
  "loftq_config": {},
  "lora_alpha": 6,
  "lora_bias": false,
  "lora_dropout": 0.1,
  "lora_ga_config": null,
  "megatron_config": null,
  "megatron_core": "megatron.core",
  "modules_to_save": null,
  "monteclora_config": null,
  "peft_type": "LORA",
  "peft_version": "0.21.2",
  "qalora_group_size": 16,
  "r": 3,
  "rank_pattern": {},
  "revision": null,
  "target_modules": ["q_proj"],
  "target_parameters": null,
  "task_type": null,
  "trainable_token_indices": null,
  "use_bdlora": null,
  "use_dora": false,
  "use_qalora": false,
  "use_rslora": false,
  "velora_config": null
})";

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(Adapter, ReadsWhatPeftWrote) {
  const Read oft = From(kPeftOft);
  ASSERT_EQ(oft.code, QM_OK) << oft.error;
  EXPECT_EQ(oft.options, OftOptions(4, 5));
  EXPECT_EQ(oft.log, "");
  const Read lora = From(kPeftLora);
  ASSERT_EQ(lora.code, QM_OK) << lora.error;
  EXPECT_EQ(lora.options, LoraOptions("6", 3));
}

TEST(Adapter, ExactTransform) {
  const Read got =
      From(Replaced(kPeftOft, R"("use_cayley_neumann": true)", R"("use_cayley_neumann": false)"));
  EXPECT_EQ(got.options, OftOptions(4, 0));
}

TEST(Adapter, DefaultsOfAbsentKeys) {
  EXPECT_EQ(From(R"({"peft_type":"LORA"})").options, LoraOptions("8", 8));
  const Read oft = From(R"({"peft_type":"OFT","oft_block_size":32})");
  EXPECT_EQ(oft.options, OftOptions(32, 5));
  EXPECT_NE(oft.log.find("0.18"), std::string::npos) << oft.log;
}

TEST(Adapter, RootOfTheRankIsPutIntoAlpha) {  // 6 / sqrt(4) = 12 / 4
  const std::string root =
      Replaced(Replaced(kPeftLora, R"("use_rslora": false)", R"("use_rslora": true)"), R"("r": 3)",
               R"("r": 4)");
  EXPECT_EQ(From(root).options, LoraOptions("12", 4));
}

TEST(Adapter, WarnsOfWhatMayDiffer) {
  const Read old = From(Replaced(kPeftOft, "0.21.2", "0.17.1"));
  EXPECT_EQ(old.code, QM_OK);
  EXPECT_NE(old.log.find("0.18"), std::string::npos);
  const Read projected = From(Replaced(kPeftOft, R"("coft": false)", R"("coft": true)"));
  EXPECT_EQ(projected.code, QM_OK);
  EXPECT_NE(projected.log.find("coft"), std::string::npos);
  EXPECT_EQ(From(Replaced(kPeftOft, "0.21.2", "1.0.0@ab")).log, "");
}

TEST(Adapter, RoundTrip) {
  Setting s;
  s.block = 16;
  s.terms = 7;
  EXPECT_EQ(From(Replaced(To(s), "{", R"({"peft_version":"0.21.2",)")).options, OftOptions(16, 7));
  s.terms = 0;
  EXPECT_EQ(From(To(s)).options, OftOptions(16, 0));
  s.method = "lora";
  s.rank = 5;
  s.alpha = 2.5;
  EXPECT_EQ(From(To(s)).options, LoraOptions("2.5", 5));
}

TEST(Adapter, WritesTheKeysOfPeft) {
  Setting s;
  qm::JsonObject oft, lora;
  ASSERT_TRUE(qm::ParseJsonObject(To(s), qm::JsonUnicode::kReplace, &oft));
  EXPECT_EQ(oft["peft_type"].text, "OFT");
  EXPECT_EQ(oft["oft_block_size"].number, 32);
  EXPECT_EQ(oft["r"].number, 0);
  EXPECT_TRUE(oft["use_cayley_neumann"].truth);
  EXPECT_EQ(oft["num_cayley_neumann_terms"].number, 5);
  EXPECT_EQ(oft["task_type"].text, "CAUSAL_LM");
  EXPECT_EQ(oft["bias"].text, "none");
  EXPECT_TRUE(oft["inference_mode"].truth);
  EXPECT_EQ(oft.count("target_modules"), 0u);  // the host's
  s.method = "lora";
  ASSERT_TRUE(qm::ParseJsonObject(To(s), qm::JsonUnicode::kReplace, &lora));
  EXPECT_EQ(lora["peft_type"].text, "LORA");
  EXPECT_EQ(lora["r"].number, 8);
  EXPECT_EQ(lora["lora_alpha"].number, 16);
  EXPECT_FALSE(lora["use_rslora"].truth);
}

TEST(Adapter, RefusesWhatChangesTheFunction) {
  const std::pair<const char*, const char*> kOft[] = {
      {R"("block_share": false)", R"("block_share": true)"},
      {R"("bias": "none")", R"("bias": "all")"},
      {R"("fan_in_fan_out": false)", R"("fan_in_fan_out": true)"},
      {R"("modules_to_save": null)", R"("modules_to_save": ["lm_head"])"},
      {R"("r": 0)", R"("r": 8)"},
      {R"("oft_block_size": 4,)", ""},
      {R"("oft_block_size": 4)", R"("oft_block_size": 0)"},
      {R"("oft_block_size": 4)", R"("oft_block_size": 2.5)"},
      {R"("oft_block_size": 4)", R"("oft_block_size": "4")"},
      {R"("num_cayley_neumann_terms": 5)", R"("num_cayley_neumann_terms": 1)"},
      {R"("use_cayley_neumann": true)", R"("use_cayley_neumann": "yes")"},
  };
  for (const auto& [from, to] : kOft) {
    const Read got = From(Replaced(kPeftOft, from, to));
    EXPECT_EQ(got.code, QM_INVALID_ARGUMENT) << to;
    EXPECT_FALSE(got.error.empty());
  }
  const std::pair<const char*, const char*> kLora[] = {
      {R"("use_dora": false)", R"("use_dora": true)"},
      {R"("lora_bias": false)", R"("lora_bias": true)"},
      {R"("bias": "none")", R"("bias": "lora_only")"},
      {R"("rank_pattern": {})", R"("rank_pattern": {"q_proj": 4})"},
      {R"("alpha_pattern": {})", R"("alpha_pattern": {"q_proj": 4})"},
      {R"("modules_to_save": null)", R"("modules_to_save": ["lm_head"])"},
      {R"("init_lora_weights": true)", R"("init_lora_weights": "pissa_niter_4")"},
      {R"("layer_replication": null)", R"("layer_replication": [[0, 4], [2, 5]])"},
      {R"("use_bdlora": null)", R"("use_bdlora": {"nblocks": 2})"},
      {R"("r": 3)", R"("r": 0)"},
      {R"("lora_alpha": 6)", R"("lora_alpha": null, "x": [1, {"y": "\u0041"}], "lora_alpha": 3)"},
  };
  for (const auto& [from, to] : kLora) {
    EXPECT_EQ(From(Replaced(kPeftLora, from, to)).code, QM_INVALID_ARGUMENT) << to;
  }
}

TEST(Adapter, RefusesOtherAdapters) {
  EXPECT_EQ(From(R"({"peft_type":"IA3"})").code, QM_UNIMPLEMENTED);
  EXPECT_EQ(From("{}").code, QM_UNIMPLEMENTED);
  EXPECT_EQ(From(kPeftOft, "other").code, QM_UNIMPLEMENTED);
  for (const char* text : {"", "[]", "{", R"({"a":nan})", R"({"a":1,"a":2})", R"({"a":1} x)",
                           R"({"a":[1,]})", R"({"a":"\x"})", R"({"a":tru})"}) {
    EXPECT_EQ(From(text).code, QM_INVALID_ARGUMENT) << text;
  }
  EXPECT_EQ(From(R"({"a":)" + std::string(5000, '[')).code, QM_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace quantmill::oftq::testing
