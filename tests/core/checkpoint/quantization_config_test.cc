#include "core/checkpoint/quantization_config.h"

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

std::shared_ptr<const QuantizationConfig> Parsed(const std::string& text) {
  auto config = ParseQuantizationConfig(Json::parse(text));
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : nullptr;
}

// config_json of a slot, or "dense".
std::string Storage(const QuantizationConfig& config, const std::string& slot) {
  const auto storage = config.Find(slot);
  EXPECT_TRUE(storage.ok()) << storage.status();
  return storage.ok() && *storage ? (*storage)->config_json : "dense";
}

void ExpectRefused(const std::string& text, absl::StatusCode code, const char* message) {
  const auto status = ParseQuantizationConfig(Json::parse(text)).status();
  EXPECT_EQ(status.code(), code) << text;
  EXPECT_THAT(std::string(status.message()), HasSubstr(message)) << text;
}

TEST(GptqConfig, ReadsWhatGptqmodelWrites) {
  const auto config = Parsed(R"({"bits":4,"dynamic":{"-:model\\.layers\\.0\\.":{},
      "+:.*down_proj":{"bits":8,"group_size":32},"lm_head":{"sym":false}},
      "group_size":128,"desc_act":true,"sym":true,"lm_head":true,"quant_method":"gptq",
      "checkpoint_format":"gptq","pack_dtype":"int32","meta":{"quantizer":["gptqmodel:5.0.0"]}})");
  ASSERT_NE(config, nullptr);
  EXPECT_EQ(config->target(), "gptq");
  EXPECT_EQ(Storage(*config, "model.layers.1.self_attn.q_proj"),
            R"({"bits":4,"desc_act":true,"group_size":128,"sym":true})");
  EXPECT_EQ(Storage(*config, "model.layers.1.mlp.down_proj"),
            R"({"bits":8,"desc_act":true,"group_size":32,"sym":true})");
  EXPECT_EQ(Storage(*config, "model.layers.0.mlp.down_proj"), "dense");
  EXPECT_EQ(Storage(*config, "lm_head"),
            R"({"bits":4,"desc_act":true,"group_size":128,"sym":false})");
  const auto storage = *config->Find("model.layers.1.self_attn.q_proj");
  EXPECT_THAT(storage->required, ElementsAre("qweight", "qzeros", "scales"));
}

TEST(GptqConfig, TakesDefaultsAliasesAndVersionTwo) {
  const auto plain = Parsed(R"({"quant_method":"gptq","bits":4})");
  ASSERT_NE(plain, nullptr);
  EXPECT_EQ(plain->target(), "gptq");
  EXPECT_EQ(Storage(*plain, "x"), R"({"bits":4,"desc_act":false,"group_size":128,"sym":true})");
  EXPECT_EQ(Storage(*plain, "lm_head"), "dense");
  const auto two = Parsed(
      R"({"quant_method":"gptq","wbits":3,"q_group_size":-1,"checkpoint_format":"gptq_v2"})");
  ASSERT_NE(two, nullptr);
  EXPECT_EQ(two->target(), "gptq_v2");
  EXPECT_EQ(Storage(*two, "x"), R"({"bits":3,"desc_act":false,"group_size":-1,"sym":true})");
}

TEST(GptqConfig, FollowsModulesInBlock) {
  const auto config = Parsed(R"({"quant_method":"gptq","bits":4,
      "modules_in_block_to_quantize":[["self_attn.q_proj"],["mlp.up_proj","mlp.gate_proj"]]})");
  ASSERT_NE(config, nullptr);
  EXPECT_NE(Storage(*config, "model.layers.0.self_attn.q_proj"), "dense");
  EXPECT_NE(Storage(*config, "model.layers.0.mlp.gate_proj"), "dense");
  EXPECT_EQ(Storage(*config, "model.layers.0.self_attn.k_proj"), "dense");
}

TEST(GptqConfig, RefusesWhatItCannotRead) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto unimplemented = absl::StatusCode::kUnimplemented;
  ExpectRefused(R"({"quant_method":"gptq"})", invalid, "'bits' is missing");
  ExpectRefused(R"({"quant_method":"gptq","bits":5})", invalid, "is 5");
  ExpectRefused(R"({"quant_method":"gptq","bits":"4"})", invalid, "integer");
  ExpectRefused(R"({"quant_method":"gptq","bits":4,"group_size":0})", invalid, "group_size");
  ExpectRefused(R"({"quant_method":"gptq","bits":4,"sym":1})", invalid, "'sym'");
  ExpectRefused(R"({"quant_method":"gptq","bits":4,"checkpoint_format":"marlin"})", unimplemented,
                "marlin");
  ExpectRefused(R"({"quant_method":"gptq","bits":4,"is_marlin_format":true})", unimplemented,
                "is_marlin_format");
  ExpectRefused(R"({"quant_method":"gptq","bits":4,"dynamic":[]})", invalid, "dynamic");
  ExpectRefused(R"json({"quant_method":"gptq","bits":4,"dynamic":{"(?!x)":{}}})json", unimplemented,
                "look-around");
  ExpectRefused(R"({"quant_method":"gptq","bits":4,"modules_in_block_to_quantize":[1]})", invalid,
                "list of names");
}

TEST(BitsAndBytesConfig, LetsTheTensorsDecide) {
  const auto config = Parsed(R"({"_load_in_4bit":true,"_load_in_8bit":false,
      "bnb_4bit_compute_dtype":"bfloat16","bnb_4bit_quant_storage":"uint8",
      "bnb_4bit_quant_type":"nf4","bnb_4bit_use_double_quant":true,
      "llm_int8_skip_modules":null,"llm_int8_threshold":6.0,"load_in_4bit":true,
      "load_in_8bit":false,"quant_method":"bitsandbytes"})");
  ASSERT_NE(config, nullptr);
  EXPECT_EQ(config->target(), "bitsandbytes");
  const auto storage = *config->Find("lm_head");
  EXPECT_EQ(storage->marker, "weight.absmax");
  EXPECT_THAT(storage->required, ElementsAre("weight", "weight.absmax", "weight.quant_map"));
}

TEST(BitsAndBytesConfig, RefusesWhatItCannotRead) {
  ExpectRefused(R"({"quant_method":"bitsandbytes","load_in_8bit":true})",
                absl::StatusCode::kUnimplemented, "8 bits");
  ExpectRefused(R"({"quant_method":"bitsandbytes","_load_in_8bit":true})",
                absl::StatusCode::kUnimplemented, "8 bits");
  const auto invalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(R"({"quant_method":"bitsandbytes"})", invalid, "load_in_4bit");
  ExpectRefused(R"({"quant_method":"bitsandbytes","load_in_4bit":1})", invalid, "load_in_4bit");
  ExpectRefused(R"({"quant_method":"bitsandbytes","load_in_4bit":true,
      "bnb_4bit_quant_type":"int4"})",
                invalid, "int4");
}

constexpr char kHqq[] = R"({"quant_method":"hqq","skip_modules":["lm_head","mlp.gate"],
    "quant_config":{"weight_quant_params":{"nbits":4,"channel_wise":true,"group_size":64,
    "optimize":true,"round_zero":true,"axis":1,"view_as_float":false},
    "scale_quant_params":null,"zero_quant_params":null,"offload_meta":false}})";

TEST(HqqConfig, ReadsOneSettingForAllOrOnePerTag) {
  const auto config = Parsed(kHqq);
  ASSERT_NE(config, nullptr);
  EXPECT_EQ(config->target(), "hqq");
  const char* four = R"({"axis":1,"group_size":64,"nbits":4})";
  EXPECT_EQ(Storage(*config, "model.layers.3.mlp.gate_proj"), four);
  EXPECT_EQ(Storage(*config, "model.layers.3.mlp.gate"), "dense");
  EXPECT_EQ(Storage(*config, "lm_head"), "dense");
  const auto tags = Parsed(R"({"quant_method":"hqq","quant_config":{
      "self_attn.q_proj":{"weight_quant_params":{"nbits":3,"group_size":null,"axis":0}}}})");
  ASSERT_NE(tags, nullptr);
  EXPECT_EQ(Storage(*tags, "model.layers.11.self_attn.q_proj"),
            R"({"axis":0,"group_size":-1,"nbits":3})");
  EXPECT_EQ(Storage(*tags, "model.layers.11.self_attn.k_proj"), "dense");
}

TEST(HqqConfig, RefusesWhatItCannotRead) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(R"({"quant_method":"hqq"})", invalid, "quant_config");
  ExpectRefused(R"({"quant_method":"hqq","quant_config":{"a":1}})", invalid, "quant_config");
  ExpectRefused(R"({"quant_method":"hqq","skip_modules":"a","quant_config":{"a":{}}})", invalid,
                "skip_modules");
  ExpectRefused(R"({"quant_method":"hqq","skip_modules":[1],"quant_config":{"a":{}}})", invalid,
                "skip_modules");
  ExpectRefused(R"({"quant_method":"hqq","quant_config":{"weight_quant_params":{"nbits":"4"}}})",
                invalid, "nbits");
  ExpectRefused(R"({"quant_method":"hqq","quant_config":{"weight_quant_params":{"nbits":4},
                    "scale_quant_params":{"nbits":8}}})",
                absl::StatusCode::kUnimplemented, "scale_quant_params");
}

TEST(AqlmConfig, ReadsWhatPublishedFilesSay) {
  const auto config = Parsed(R"({"quant_method":"aqlm","nbits_per_codebook":16,"num_codebooks":1,
      "out_group_size":1,"in_group_size":8,"linear_weights_not_to_quantize":[
      "model.layers.0.input_layernorm.weight","lm_head.weight","model.layers.3.mlp.gate.weight"]})");
  ASSERT_NE(config, nullptr);
  EXPECT_EQ(config->target(), "aqlm");
  EXPECT_EQ(Storage(*config, "model.layers.3.mlp.gate_proj"),
            R"({"codebooks":1,"group_size":8,"index_bits":16})");
  EXPECT_EQ(Storage(*config, "model.layers.3.mlp.gate"), "dense");
  EXPECT_EQ(Storage(*config, "lm_head"), "dense");
}

TEST(AqlmConfig, RefusesWhatItCannotRead) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(R"({"quant_method":"aqlm","num_codebooks":0})", invalid, "num_codebooks");
  ExpectRefused(R"({"quant_method":"aqlm","nbits_per_codebook":256})", invalid,
                "nbits_per_codebook");
  ExpectRefused(R"({"quant_method":"aqlm","in_group_size":"8"})", invalid, "in_group_size");
  ExpectRefused(R"({"quant_method":"aqlm","linear_weights_not_to_quantize":"a"})", invalid,
                "list of names");
  ExpectRefused(R"({"quant_method":"aqlm","linear_weights_not_to_quantize":[1]})", invalid,
                "list of names");
  ExpectRefused(R"({"quant_method":"aqlm","out_group_size":2})", absl::StatusCode::kUnimplemented,
                "out_group_size");
}

constexpr char kCompressed[] = R"({"quant_method":"compressed-tensors","format":"pack-quantized",
    "quantization_status":"compressed","ignore":["lm_head","re:.*layers\\.1\\.mlp.*"],
    "config_groups":{
      "group_0":{"targets":["Linear"],"weights":{"num_bits":4,"type":"int","symmetric":true,
                 "strategy":"group","group_size":128,"actorder":null}},
      "group_1":{"targets":["model.layers.0.mlp.down_proj"],"format":"int-quantized",
                 "weights":{"num_bits":8,"type":"int","symmetric":false,"strategy":"channel"}}}})";

TEST(CompressedTensorsConfig, PrefersNamesToClassesAndHonoursIgnore) {
  const auto config = Parsed(kCompressed);
  ASSERT_NE(config, nullptr);
  EXPECT_EQ(Storage(*config, "model.layers.0.mlp.up_proj"),
            R"({"actorder":null,"format":"pack-quantized","group_size":128,"num_bits":4,)"
            R"("strategy":"group","symmetric":true})");
  EXPECT_EQ(Storage(*config, "model.layers.0.mlp.down_proj"),
            R"({"actorder":null,"format":"int-quantized","group_size":null,"num_bits":8,)"
            R"("strategy":"channel","symmetric":false})");
  EXPECT_EQ(Storage(*config, "lm_head"), "dense");
  EXPECT_EQ(Storage(*config, "model.layers.1.mlp.up_proj"), "dense");
  const auto bytes = *config->Find("model.layers.0.mlp.down_proj");
  EXPECT_THAT(bytes->required, ElementsAre("weight", "weight_scale", "weight_zero_point"));
}

TEST(CompressedTensorsConfig, RefusesWhatItCannotRead) {
  const auto with = [](const char* from, const char* to) {
    std::string text = kCompressed;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, std::string(from).size(), to);
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto unimplemented = absl::StatusCode::kUnimplemented;
  ExpectRefused(with("\"type\":\"int\"", "\"type\":\"float\""), unimplemented, "float");
  ExpectRefused(with("\"pack-quantized\"", "\"marlin-24\""), unimplemented, "marlin-24");
  ExpectRefused(with("\"strategy\":\"group\"", "\"strategy\":\"tensor\""), unimplemented, "tensor");
  ExpectRefused(with("\"group_size\":128", "\"group_size\":null"), invalid, "group_size");
  ExpectRefused(with("\"actorder\":null", "\"actorder\":\"up\""), invalid, "actorder");
  ExpectRefused(with("\"compressed\",", "\"frozen\","), unimplemented, "frozen");
  ExpectRefused(with("[\"Linear\"]", "\"Linear\""), invalid, "targets");
  ExpectRefused(R"({"quant_method":"compressed-tensors","format":"pack-quantized"})", invalid,
                "config_groups");
}

// The published preset FP8_DYNAMIC, and W8A8 beside it, each group with its own format.
constexpr char kActivations[] = R"({"quant_method":"compressed-tensors","format":"mixed-precision",
    "ignore":["lm_head"],"config_groups":{
      "group_0":{"targets":["Linear"],"format":"float-quantized",
        "weights":{"num_bits":8,"type":"float","symmetric":true,"strategy":"channel"},
        "input_activations":{"num_bits":8,"type":"float","symmetric":true,"strategy":"token",
                             "dynamic":true}},
      "group_1":{"targets":["re:.*down_proj"],"format":"int-quantized",
        "weights":{"num_bits":8,"type":"int","symmetric":true,"strategy":"channel"},
        "input_activations":{"num_bits":8,"type":"int","symmetric":true,"strategy":"token",
                             "dynamic":true}},
      "group_2":{"targets":["re:.*up_proj"],"format":"naive-quantized",
        "weights":{"num_bits":8,"type":"float","symmetric":true,"strategy":"tensor"},
        "input_activations":null}}})";

TEST(CompressedTensorsConfig, ReadsFloatsAndQuantizedActivations) {
  const auto config = Parsed(kActivations);
  ASSERT_NE(config, nullptr);
  EXPECT_EQ(Storage(*config, "model.layers.0.self_attn.q_proj"),
            R"({"activations":"fp8","actorder":null,"format":"float-quantized","group_size":null,)"
            R"("num_bits":8,"strategy":"channel","symmetric":true,"type":"float"})");
  EXPECT_EQ(Storage(*config, "model.layers.0.mlp.down_proj"),
            R"({"activations":"int8","actorder":null,"format":"int-quantized","group_size":null,)"
            R"("num_bits":8,"strategy":"channel","symmetric":true})");
  EXPECT_EQ(Storage(*config, "model.layers.0.mlp.up_proj"),
            R"({"actorder":null,"format":"naive-quantized","group_size":null,"num_bits":8,)"
            R"("strategy":"tensor","symmetric":true,"type":"float"})");
}

// Scales fixed beforehand, other strategies and types would be computed otherwise: refused, not
// left out.
TEST(CompressedTensorsConfig, RefusesActivationsOfOtherKinds) {
  for (const auto& [from, to] : {std::pair{R"("dynamic":true)", R"("dynamic":false)"},
                                 {R"("strategy":"token")", R"("strategy":"tensor")"},
                                 {R"("num_bits":8,"type":"float","symmetric":true,"strategy":"t)",
                                  R"("num_bits":8,"type":"int","symmetric":true,"strategy":"t)"}}) {
    std::string text = kActivations;
    const size_t at = text.find(from, text.find("input_activations"));
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, std::string(from).size(), to);
    ExpectRefused(text, absl::StatusCode::kUnimplemented, "input_activations");
  }
}

TEST(EetqConfig, ReadsWhatTransformersAndTheEngineWrite) {
  const auto config =
      Parsed(R"({"quant_method":"eetq","weights":"int8","modules_to_not_convert":null})");
  ASSERT_NE(config, nullptr);
  EXPECT_EQ(config->target(), "eetq");
  EXPECT_EQ(Storage(*config, "model.layers.3.mlp.gate_proj"), R"({"weights":"int8"})");
  EXPECT_EQ(Storage(*config, "lm_head"), "dense");
  EXPECT_EQ((*config->Find("model.layers.3.mlp.gate_proj"))->marker, "weight_scales");
  const auto some = Parsed(R"({"quant_method":"eetq","zero_point":false,"bits":8,
      "modules_to_not_convert":["lm_head","mlp","model.layers.0.self_attn.q_proj"]})");
  ASSERT_NE(some, nullptr);
  EXPECT_EQ(Storage(*some, "model.layers.3.mlp.gate_proj"), "dense");
  EXPECT_EQ(Storage(*some, "model.layers.0.self_attn.q_proj"), "dense");
  EXPECT_NE(Storage(*some, "model.layers.1.self_attn.q_proj"), "dense");
}

TEST(EetqConfig, RefusesWhatItCannotRead) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(R"({"quant_method":"eetq","weights":"int4"})", invalid, "'weights'");
  ExpectRefused(R"({"quant_method":"eetq","bits":4})", invalid, "'bits'");
  ExpectRefused(R"({"quant_method":"eetq","modules_to_not_convert":"lm_head"})", invalid,
                "modules_to_not_convert");
  ExpectRefused(R"({"quant_method":"eetq","modules_to_not_convert":[1]})", invalid,
                "modules_to_not_convert");
}

TEST(QuantizationConfig, RefusesOtherMethods) {
  ExpectRefused(R"({"quant_method":"other"})", absl::StatusCode::kUnimplemented, "'other'");
  ExpectRefused(R"({})", absl::StatusCode::kInvalidArgument, "quant_method");
  ExpectRefused(R"([])", absl::StatusCode::kInvalidArgument, "object");
  ExpectRefused(R"({"quant_method":"quantmill","version":2,"slots":{}})",
                absl::StatusCode::kUnimplemented, "version 2");
  ExpectRefused(R"({"quant_method":"quantmill","version":1})", absl::StatusCode::kInvalidArgument,
                "slots");
  ExpectRefused(R"({"quant_method":"quantmill","version":1,"slots":{"a":{"format":1}}})",
                absl::StatusCode::kInvalidArgument, "'a'");
}

TEST(AwqConfig, ReadsWhatAutoAwqWrites) {
  const auto config = Parsed(R"({"quant_method":"awq","zero_point":true,"group_size":64,"bits":4,
      "version":"gemm","modules_to_not_convert":["visual","layers.1.mlp"]})");
  ASSERT_NE(config, nullptr);
  EXPECT_EQ(config->target(), "awq");
  EXPECT_EQ(Storage(*config, "model.layers.0.mlp.up_proj"),
            R"({"bits":4,"group_size":64,"zero_point":true})");
  EXPECT_EQ(Storage(*config, "model.layers.1.mlp.up_proj"), "dense");
  EXPECT_EQ(Storage(*config, "lm_head"), "dense");
  const auto storage = *config->Find("model.layers.0.mlp.up_proj");
  EXPECT_THAT(storage->required, ElementsAre("qweight", "qzeros", "scales"));
  EXPECT_EQ(storage->marker, "qweight");
  // Names of older files, and of newer ones of transformers.
  const auto old = Parsed(
      R"({"quant_method":"awq","zero_point":true,"q_group_size":32,"w_bit":4,"version":"GEMM"})");
  ASSERT_NE(old, nullptr);
  EXPECT_EQ(Storage(*old, "x"), R"({"bits":4,"group_size":32,"zero_point":true})");
  const auto plain = Parsed(R"({"quant_method":"awq","format":"gemm"})");
  ASSERT_NE(plain, nullptr);
  EXPECT_EQ(Storage(*plain, "x"), R"({"bits":4,"group_size":128,"zero_point":true})");
}

TEST(AwqConfig, RefusesWhatItCannotRead) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto unimplemented = absl::StatusCode::kUnimplemented;
  for (const char* version : {"gemv", "gemv_fast", "marlin", "llm-awq"}) {
    const std::string name = version;
    ExpectRefused(R"({"quant_method":"awq","version":")" + name + "\"}", unimplemented, version);
    ExpectRefused(R"({"quant_method":"awq","format":")" + name + "\"}", unimplemented, version);
  }
  ExpectRefused(R"({"quant_method":"awq","bits":3})", invalid, "is 3");
  ExpectRefused(R"({"quant_method":"awq","bits":"4"})", invalid, "integer");
  ExpectRefused(R"({"quant_method":"awq","group_size":0})", invalid, "group_size");
  ExpectRefused(R"({"quant_method":"awq","zero_point":1})", invalid, "zero_point");
  ExpectRefused(R"({"quant_method":"awq","modules_to_not_convert":"a"})", invalid, "list");
  ExpectRefused(R"({"quant_method":"awq","modules_to_not_convert":[1]})", invalid, "list");
}

// What is composed reads back as what was put in.
void ExpectRoundTrip(const std::string& target, const std::vector<SlotEntry>& slots) {
  const auto json = ComposeQuantizationConfig(target, slots);
  ASSERT_TRUE(json.ok()) << json.status();
  const auto config = ParseQuantizationConfig(*json);
  ASSERT_TRUE(config.ok()) << config.status() << json->dump(2);
  EXPECT_EQ((*config)->target(), target);
  for (const SlotEntry& slot : slots) {
    EXPECT_EQ(Storage(**config, slot.name), slot.packed ? slot.config_json : "dense") << slot.name;
  }
}

std::vector<SlotEntry> Slots(const std::string& a, const std::string& b,
                             const std::string& format) {
  std::vector<SlotEntry> slots;
  for (int block = 0; block < 2; ++block) {
    const std::string prefix = "model.layers." + std::to_string(block) + ".";
    for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}) {
      slots.push_back({prefix + name, true, block == 0 ? a : b, format});
    }
    slots.push_back({prefix + "self_attn.o_proj", true, a, format});
    slots.push_back({prefix + "mlp.down_proj", false, "", ""});
    slots.push_back({prefix + "mlp.up_proj", true, a, format});
  }
  slots.push_back({"lm_head", false, "", ""});
  return slots;
}

TEST(Compose, ReadsBackAsWhatWasPutIn) {
  const std::string gptq4 = R"({"bits":4,"desc_act":false,"group_size":128,"sym":true})";
  const std::string gptq8 = R"({"bits":8,"desc_act":true,"group_size":-1,"sym":false})";
  for (const char* target : {"gptq", "gptq_v2"}) {
    ExpectRoundTrip(target, Slots(gptq4, gptq8, ""));
    ExpectRoundTrip(target, Slots(gptq4, gptq4, ""));
    std::vector<SlotEntry> with_head = Slots(gptq4, gptq8, "");
    with_head.back() = {"lm_head", true, gptq8, ""};
    ExpectRoundTrip(target, with_head);
  }
  const std::string ct4 =
      R"({"actorder":null,"format":"pack-quantized","group_size":128,"num_bits":4,)"
      R"("strategy":"group","symmetric":true})";
  const std::string ct8 =
      R"({"actorder":"group","format":"pack-quantized","group_size":64,"num_bits":8,)"
      R"("strategy":"group","symmetric":false})";
  ExpectRoundTrip("compressed-tensors", Slots(ct4, ct8, ""));
  ExpectRoundTrip("compressed-tensors", Slots(ct4, ct4, ""));
  const std::string awq4 = R"({"bits":4,"group_size":128,"zero_point":true})";
  ExpectRoundTrip("awq", Slots(awq4, awq4, ""));
  const std::string w8a8 =
      R"({"activations":"int8","actorder":null,"format":"int-quantized","group_size":null,)"
      R"("num_bits":8,"strategy":"channel","symmetric":true})";
  const std::string fp8 =
      R"({"activations":"fp8","actorder":null,"format":"float-quantized","group_size":null,)"
      R"("num_bits":8,"strategy":"channel","symmetric":true,"type":"float"})";
  const std::string naive =
      R"({"actorder":null,"format":"naive-quantized","group_size":null,"num_bits":8,)"
      R"("strategy":"tensor","symmetric":true,"type":"float"})";
  for (const std::string& one : {ct4, w8a8, fp8, naive}) {
    for (const std::string& other : {ct4, w8a8, fp8, naive}) {
      ExpectRoundTrip("compressed-tensors", Slots(one, other, ""));
    }
  }
  const std::string eetq = R"({"weights":"int8"})";
  ExpectRoundTrip("eetq", Slots(eetq, eetq, ""));
  const std::string hqq4 = R"({"axis":1,"group_size":64,"nbits":4})";
  ExpectRoundTrip("hqq", Slots(hqq4, hqq4, ""));
  std::vector<SlotEntry> by_kind = Slots(hqq4, hqq4, "");
  for (SlotEntry& slot : by_kind) {
    if (slot.name.find("v_proj") != std::string::npos) {
      slot.config_json = R"({"axis":0,"group_size":16,"nbits":2})";
    }
  }
  ExpectRoundTrip("hqq", by_kind);
  const std::string codebooks = R"({"codebooks":2,"group_size":8,"index_bits":8})";
  ExpectRoundTrip("aqlm", Slots(codebooks, codebooks, ""));
  ExpectRoundTrip("quantmill",
                  Slots(R"({"bits":4,"group_size":128,"zero":"int"})",
                        R"({"bits":2,"group_size":-1,"zero":"none"})", "qm.fmt.affine-int/1"));
}

TEST(Compose, WritesTheKeysReadersInsistOn) {
  const std::string four = R"({"bits":4,"desc_act":false,"group_size":128,"sym":true})";
  const std::string eight = R"({"bits":8,"desc_act":false,"group_size":128,"sym":true})";
  const auto gptq = ComposeQuantizationConfig("gptq", Slots(four, eight, ""));
  ASSERT_TRUE(gptq.ok());
  EXPECT_EQ(
      gptq->dump(),
      R"({"bits":4,"group_size":128,"desc_act":false,"sym":true,"quant_method":"gptq",)"
      R"("checkpoint_format":"gptq","damp_percent":0.01,"lm_head":false,)"
      R"("pack_dtype":"int32","dynamic":{)"
      R"("-:^(?:model\\.layers\\.0\\.mlp\\.down_proj|model\\.layers\\.1\\.mlp\\.down_proj)$":)"
      R"({},"+:^(?:model\\.layers\\.1\\.self_attn\\.q_proj|)"
      R"(model\\.layers\\.1\\.self_attn\\.k_proj|model\\.layers\\.1\\.self_attn\\.v_proj|)"
      R"(model\\.layers\\.1\\.self_attn\\.qkv_proj)$":)"
      R"({"bits":8,"desc_act":false,"group_size":128,"sym":true}}})");

  const std::string ct =
      R"({"actorder":null,"format":"pack-quantized","group_size":null,"num_bits":4,)"
      R"("strategy":"channel","symmetric":true})";
  const auto compressed = ComposeQuantizationConfig("compressed-tensors", Slots(ct, ct, ""));
  ASSERT_TRUE(compressed.ok());
  EXPECT_EQ((*compressed)["config_groups"]["group_0"]["targets"].dump(), R"(["Linear"])");
  EXPECT_EQ((*compressed)["ignore"].dump(),
            R"(["model.layers.0.mlp.down_proj","model.layers.1.mlp.down_proj","lm_head"])");
  EXPECT_EQ((*compressed)["config_groups"]["group_0"]["weights"].dump(),
            R"({"actorder":null,"block_structure":null,"dynamic":false,"group_size":null,)"
            R"("num_bits":4,"observer":"minmax","observer_kwargs":{},"strategy":"channel",)"
            R"("symmetric":true,"type":"int"})");
}

TEST(Compose, WritesActivationsAndFormatsWhereTheyDiffer) {
  const std::string fp8 =
      R"({"activations":"fp8","actorder":null,"format":"float-quantized","group_size":null,)"
      R"("num_bits":8,"strategy":"channel","symmetric":true,"type":"float"})";
  const auto alike = ComposeQuantizationConfig("compressed-tensors", Slots(fp8, fp8, ""));
  ASSERT_TRUE(alike.ok()) << alike.status();
  EXPECT_EQ((*alike)["format"], "float-quantized");
  const Json& group = (*alike)["config_groups"]["group_0"];
  EXPECT_FALSE(group.contains("format"));
  EXPECT_EQ(group["weights"]["type"], "float");
  EXPECT_EQ(group["input_activations"].dump(),
            R"({"actorder":null,"block_structure":null,"dynamic":true,"group_size":null,)"
            R"("num_bits":8,"observer":null,"observer_kwargs":{},"strategy":"token",)"
            R"("symmetric":true,"type":"float"})");
  const std::string four =
      R"({"actorder":null,"format":"pack-quantized","group_size":null,"num_bits":4,)"
      R"("strategy":"channel","symmetric":true})";
  const auto mixed = ComposeQuantizationConfig("compressed-tensors", Slots(fp8, four, ""));
  ASSERT_TRUE(mixed.ok()) << mixed.status();
  EXPECT_EQ((*mixed)["format"], "mixed-precision");
  EXPECT_EQ((*mixed)["config_groups"]["group_1"]["format"], "pack-quantized");
}

TEST(Compose, WritesTheKeysOfTheEetqReader) {
  const std::string eetq = R"({"weights":"int8"})";
  const auto some = ComposeQuantizationConfig("eetq", Slots(eetq, eetq, ""));
  ASSERT_TRUE(some.ok()) << some.status();
  EXPECT_EQ(some->dump(),
            R"({"quant_method":"eetq","weights":"int8","modules_to_not_convert":)"
            R"(["model.layers.0.mlp.down_proj","model.layers.1.mlp.down_proj","lm_head"]})");
  const std::vector<SlotEntry> all = {{"model.layers.0.mlp.up_proj", true, eetq, ""},
                                      {"lm_head", false, "", ""}};
  EXPECT_EQ((*ComposeQuantizationConfig("eetq", all))["modules_to_not_convert"], nullptr);
}

TEST(Compose, WritesTheKeysOfTheHqqReader) {
  const std::string four = R"({"axis":1,"group_size":64,"nbits":4})";
  const auto hqq = ComposeQuantizationConfig("hqq", Slots(four, four, ""));
  ASSERT_TRUE(hqq.ok()) << hqq.status();
  EXPECT_EQ(hqq->dump(),
            R"({"quant_method":"hqq","skip_modules":["mlp.down_proj","lm_head"],"quant_config":{)"
            R"("weight_quant_params":{"nbits":4,"channel_wise":true,"group_size":64,)"
            R"("optimize":true,"round_zero":true,"axis":1,"view_as_float":false},)"
            R"("scale_quant_params":null,"zero_quant_params":null,"offload_meta":false}})");
  std::vector<SlotEntry> uneven = Slots(four, four, "");
  uneven[0].packed = false;
  const auto refused = ComposeQuantizationConfig("hqq", uneven).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("self_attn.q_proj"));
}

TEST(Compose, WritesTheKeysOfTheAwqReaders) {
  const std::string four = R"({"bits":4,"group_size":128,"zero_point":true})";
  const auto awq = ComposeQuantizationConfig("awq", Slots(four, four, ""));
  ASSERT_TRUE(awq.ok()) << awq.status();
  EXPECT_EQ(awq->dump(),
            R"({"quant_method":"awq","zero_point":true,"group_size":128,"bits":4,)"
            R"("version":"gemm","modules_to_not_convert":["model.layers.0.mlp.down_proj",)"
            R"("model.layers.1.mlp.down_proj"]})");
  // A router is no slot, but readers would take it for packed.
  const std::string experts = "model.layers.0.block_sparse_moe.experts.";
  const auto moe =
      ComposeQuantizationConfig("awq", {{"model.layers.0.self_attn.q_proj", true, four, ""},
                                        {experts + "0.w1", true, four, ""},
                                        {experts + "1.w1", true, four, ""},
                                        {"lm_head", false, "", ""}});
  ASSERT_TRUE(moe.ok()) << moe.status();
  EXPECT_EQ((*moe)["modules_to_not_convert"].dump(), R"(["model.layers.0.block_sparse_moe.gate"])");

  const std::string other = R"({"bits":4,"group_size":64,"zero_point":true})";
  const auto uneven = ComposeQuantizationConfig("awq", Slots(four, other, "")).status();
  EXPECT_EQ(uneven.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(uneven.message()), HasSubstr("one group size"));
  std::vector<SlotEntry> head = Slots(four, four, "");
  head.back() = {"lm_head", true, four, ""};
  EXPECT_THAT(std::string(ComposeQuantizationConfig("awq", head).status().message()),
              HasSubstr("lm_head"));
}

TEST(Compose, WritesTheKeysOfTheBitsandbytesReader) {
  const std::string plain =
      R"({"compute_dtype":"bfloat16","double_quant":false,"quant_type":"nf4"})";
  const auto config = ComposeQuantizationConfig("bitsandbytes", Slots(plain, plain, ""));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->dump(),
            R"({"quant_method":"bitsandbytes","_load_in_4bit":true,"_load_in_8bit":false,)"
            R"("load_in_4bit":true,"load_in_8bit":false,"bnb_4bit_quant_type":"nf4",)"
            R"("bnb_4bit_compute_dtype":"bfloat16","bnb_4bit_use_double_quant":false,)"
            R"("bnb_4bit_quant_storage":"uint8","llm_int8_threshold":6.0,"llm_int8_skip_modules":)"
            R"(["model.layers.0.mlp.down_proj","model.layers.1.mlp.down_proj","lm_head"],)"
            R"("llm_int8_enable_fp32_cpu_offload":false,"llm_int8_has_fp16_weight":false})");
  const std::string nested =
      R"({"compute_dtype":"bfloat16","double_quant":true,"quant_type":"nf4"})";
  const auto refused = ComposeQuantizationConfig("bitsandbytes", Slots(plain, nested, "")).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("double_quant"));
  const auto moe = ComposeQuantizationConfig(
      "bitsandbytes", {{"model.layers.0.block_sparse_moe.experts.0.w1", true, plain, ""}});
  ASSERT_TRUE(moe.ok()) << moe.status();
  EXPECT_EQ((*moe)["llm_int8_skip_modules"].dump(),
            R"(["model.layers.0.block_sparse_moe.gate","lm_head"])");
}

TEST(Compose, WritesTheKeysOfTheAqlmReader) {
  const std::string scheme = R"({"codebooks":2,"group_size":8,"index_bits":8})";
  const auto aqlm = ComposeQuantizationConfig("aqlm", Slots(scheme, scheme, ""));
  ASSERT_TRUE(aqlm.ok()) << aqlm.status();
  EXPECT_EQ(aqlm->dump(),
            R"({"quant_method":"aqlm","nbits_per_codebook":8,"num_codebooks":2,)"
            R"("out_group_size":1,"in_group_size":8,"linear_weights_not_to_quantize":[)"
            R"("model.layers.0.mlp.down_proj.weight","model.layers.1.mlp.down_proj.weight",)"
            R"("lm_head.weight","model.embed_tokens.weight"]})");
  const auto refused =
      ComposeQuantizationConfig(
          "aqlm", Slots(scheme, R"({"codebooks":1,"group_size":8,"index_bits":8})", ""))
          .status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("one scheme"));
}

TEST(Compose, RefusesUnknownTargetsAndNothingPacked) {
  EXPECT_EQ(ComposeQuantizationConfig("gptq", {{"lm_head", false, "", ""}}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ComposeQuantizationConfig("nothing", {{"a", true, "{}", ""}}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ReadQuantizationConfig, TakesTheOlderFileOfAwq) {
  const std::string directory = testing::MakeTempDir();
  ASSERT_TRUE(WriteFile(directory + "/config.json", "{}").ok());
  ASSERT_TRUE(WriteFile(directory + "/quant_config.json",
                        R"({"zero_point":true,"q_group_size":64,"w_bit":4,"version":"GEMM"})")
                  .ok());
  const auto found = ReadQuantizationConfig(directory);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ((*found)->target(), "awq");
  EXPECT_EQ(Storage(**found, "x"), R"({"bits":4,"group_size":64,"zero_point":true})");
}

TEST(ReadQuantizationConfig, FallsBackToQuantizeConfig) {
  const std::string directory = testing::MakeTempDir();
  ASSERT_TRUE(WriteFile(directory + "/config.json", "{}").ok());
  const auto none = ReadQuantizationConfig(directory);
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(*none, nullptr);
  ASSERT_TRUE(WriteFile(directory + "/quantize_config.json", R"({"bits":4,"group_size":64})").ok());
  const auto found = ReadQuantizationConfig(directory);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ((*found)->target(), "gptq");
  ASSERT_TRUE(WriteFile(directory + "/config.json",
                        R"({"quantization_config":{"quant_method":"gptq","bits":7}})")
                  .ok());
  EXPECT_THAT(std::string(ReadQuantizationConfig(directory).status().message()),
              HasSubstr("config.json"));
}

}  // namespace
}  // namespace quantmill
