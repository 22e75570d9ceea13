// Every file of configs/recipes, from the command line to the checkpoint and back.
#include <algorithm>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

namespace fs = std::filesystem;

std::vector<std::string> Recipes() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(SourcePath("configs/recipes"))) {
    if (entry.path().extension() == ".yaml") names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> Keys(const nlohmann::ordered_json& json) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  return keys;
}

bool IsFlat(const nlohmann::ordered_json& json) {
  return std::all_of(json.begin(), json.end(), [](const nlohmann::ordered_json& value) {
    if (value.is_number() || value.is_string()) return true;
    return value.is_array() && std::all_of(value.begin(), value.end(), [](const auto& item) {
             return item.is_number() || item.is_string();
           });
  });
}

const std::vector<std::string> kScores = {
    "perplexity", "perplexity_stderr", "nll",     "nll_stderr",       "tokens",
    "context",    "windows",           "seconds", "tokens_per_second"};
const std::vector<std::string> kComparison = {
    "kl_mean",        "kl_mean_stderr",        "kl_median", "kl_p99",
    "top1_agreement", "top1_agreement_stderr", "ppl_ratio", "ppl_ratio_stderr"};

class ProgramTest : public RunFixture {
 protected:
  // Runs the recipe into DIR/NAME; the result from stdout, which must be JSON and nothing else.
  nlohmann::ordered_json RunRecipe(const std::string& recipe, const std::string& name,
                                   std::vector<std::string> more = {},
                                   const std::vector<std::string>& environment = {}) {
    std::vector<std::string> arguments = {
        "run",        SourcePath("configs/recipes/" + recipe + ".yaml"),
        "--set",      "export.path=" + Path(name),
        "--work-dir", Path(name + ".work"),
        "--device",   "cpu",
        "--json",     "-"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Json(arguments, environment);
  }

  // What a command with --json - writes to stdout.
  nlohmann::ordered_json Json(const std::vector<std::string>& arguments,
                              const std::vector<std::string>& environment = {}) {
    const ProgramResult result = Program(arguments, environment);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    auto json = nlohmann::ordered_json::parse(result.out, nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(json.is_object()) << result.out;
    return json;
  }

  void CheckEvaluation(const nlohmann::ordered_json& json) {
    EXPECT_TRUE(IsFlat(json)) << json;
    std::vector<std::string> expected = kScores;
    expected.insert(expected.end(), kComparison.begin(), kComparison.end());
    EXPECT_THAT(Keys(json), ::testing::UnorderedElementsAreArray(expected));
  }
};

class RecipeTest : public ProgramTest, public ::testing::WithParamInterface<std::string> {};

TEST_P(RecipeTest, GivesAModelThatEveryCommandReads) {
  const nlohmann::ordered_json run = RunRecipe(GetParam(), "out");
  std::vector<std::string> keys = Keys(run);
  ASSERT_GE(keys.size(), 9u);
  keys.resize(9);
  EXPECT_THAT(
      keys, ElementsAreArray({"output", "format", "bits_per_weight", "size_bytes", "original_bytes",
                              "seconds", "peak_rss_bytes", "peak_device_bytes", "stages"}));
  for (const auto& stage : run["stages"]) {
    EXPECT_TRUE(IsFlat(stage));
    std::vector<std::string> stage_keys = Keys(stage);
    std::vector<std::string> expected = {"name", "method", "slots", "seconds"};
    // A transform that changes nothing the model computes has no error.
    // So has an adapter, which leaves the weights alone.
    const bool preserves = stage["method"] == "ptq.smooth" || stage["method"] == "awq.scale" ||
                           stage["method"] == "oftq";
    if (!preserves) expected.push_back("weight_nmse");
    stage_keys.resize(expected.size());
    EXPECT_THAT(stage_keys, ElementsAreArray(expected));
  }
  CheckEvaluation(run["evaluation"]);

  const std::string original = SourcePath("configs/quickstart/tiny-llama");
  std::vector<std::string> arguments = {
      "eval",      Path("out"), "--reference", original, "--text", Path("calib.txt"),
      "--context", "256",       "--device",    "cpu",    "--json", "-"};
  if (fs::exists(Path("out/adapter"))) {
    arguments.insert(arguments.end(), {"--adapter", Path("out/adapter")});
  }
  const nlohmann::ordered_json eval = Json(arguments);
  CheckEvaluation(eval);
  // Read from the files it is the model that the run measured in memory.
  EXPECT_EQ(eval["windows"], run["evaluation"]["windows"]);
  EXPECT_NEAR(eval["perplexity"], run["evaluation"]["perplexity"],
              1e-5 * run["evaluation"]["perplexity"].get<double>());

  const nlohmann::ordered_json verify = Json({"verify", Path("out"), "--json", "-"});
  EXPECT_TRUE(IsFlat(verify));
  EXPECT_EQ(verify["size_bytes"], run["size_bytes"]);
  EXPECT_EQ(verify["bits_per_weight"], run["bits_per_weight"]);

  const nlohmann::ordered_json inspect = Json({"inspect", Path("out"), "--json", "-"});
  EXPECT_EQ(inspect["packed_linears"], 28);
  // Both count what is stored: codes, scales, zero points, indices.
  EXPECT_NEAR(inspect["bits_per_weight"], run["bits_per_weight"], 1e-6);

  const nlohmann::ordered_json generate =
      Json({"generate", Path("out"), "--prompt", "Once", "--max-tokens", "8", "--json", "-"});
  EXPECT_TRUE(IsFlat(generate));
  EXPECT_EQ(generate["tokens"], 8);
}

INSTANTIATE_TEST_SUITE_P(All, RecipeTest, ::testing::ValuesIn(Recipes()), [](const auto& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST_F(ProgramTest, SameBytesHoweverItIsRun) {
  const std::string recipe = "mixed-by-layer";
  RunRecipe(recipe, "first");
  const auto expected = Tree(Path("first"));
  ASSERT_FALSE(expected.empty());
  RunRecipe(recipe, "again");
  EXPECT_EQ(Tree(Path("again")), expected);
  RunRecipe(recipe, "in_process", {"--in-process"});
  EXPECT_EQ(Tree(Path("in_process")), expected);
  RunRecipe(recipe, "one_thread", {}, {"taskset", "-c", "0"});
  EXPECT_EQ(Tree(Path("one_thread")), expected);
}

TEST_F(ProgramTest, PluginsListsItsKeys) {
  const nlohmann::ordered_json json = Json({"plugins", "--json", "-"});
  ASSERT_FALSE(json["plugins"].empty());
  for (const auto& plugin : json["plugins"]) {
    EXPECT_THAT(Keys(plugin), ElementsAreArray({"file", "vendor", "methods", "formats", "kernels",
                                                "abi", "status", "reason"}));
    EXPECT_TRUE(IsFlat(plugin));
    EXPECT_EQ(plugin["status"], "ok") << plugin;
  }
}

TEST_F(ProgramTest, EveryCommandHasHelpWithExamples) {
  for (const char* command :
       {"run", "plan", "plugins", "describe", "eval", "generate", "inspect", "verify"}) {
    const ProgramResult result = Program({command, "--help"});
    EXPECT_EQ(result.exit_code, 0);
    EXPECT_EQ(result.err, "");
    EXPECT_THAT(result.out, HasSubstr("\nExamples:\n  quantmill " + std::string(command)));
    EXPECT_TRUE(std::islower(static_cast<unsigned char>(result.out[0]))) << result.out;
  }
}

}  // namespace
}  // namespace quantmill::testing
