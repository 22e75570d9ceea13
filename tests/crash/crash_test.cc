// Plugins that crash, hang, refuse or lie: named with layer and stage, handled as on_error says.
#include <filesystem>
#include <fstream>

#include "core/io/safetensors_reader.h"
#include "core/tensor/dtype.h"
#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class CrashTest : public RunFixture {
 protected:
  // One stage with the offender, misbehaving on kBadLayer.
  std::string Stage(const std::string& how, const std::string& more = "") {
    return "  - {name: main, use: org.example.offender, " + more + "overrides: [{layers: ['" +
           std::string(kBadLayer) + "'], options: {misbehave: " + how + "}}]}\n";
  }
  std::string ConfigOf(const std::string& output) {
    return Tree(Path(output))["quantmill_provenance.json"];
  }
};

TEST_F(CrashTest, SegfaultIsNamedRetriedOnceAndStopsTheRun) {
  const ProgramResult result = RunPipeline(Pipeline("p", Stage("segfault")));
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      AllOf(HasSubstr("plugin org.example.offender 0.1.0 died (SIGSEGV) in "
                      "quantize-linear.run on model.layers.1.mlp.down_proj [128x"),
            HasSubstr("stage main; retrying once"), HasSubstr("twice"), HasSubstr("--resume")));
  EXPECT_FALSE(std::filesystem::exists(Path("p.out")));
  // The inputs of the failing call are there for its author.
  int bundles = 0;
  for (const auto& [name, content] : Tree(Path("p.work/crash"))) {
    bundles += name.find(std::string(kBadLayer) + "/call.json") != std::string::npos;
    bundles += name.find(std::string(kBadLayer) + "/weight.safetensors") != std::string::npos;
  }
  EXPECT_EQ(bundles, 2);
  // A resume does not try it a third time.
  const ProgramResult again = RunPipeline(Path("p.yaml"), {"--resume"});
  EXPECT_EQ(again.exit_code, 1);
  EXPECT_THAT(again.err, AllOf(HasSubstr("twice; not tried again"), Not(HasSubstr("retrying"))));
}

// All that is needed to make a failed call again: the weight as in the model, the statistics the
// plugin got, its options with their defaults, and the seed.
TEST_F(CrashTest, BundleHoldsTheWholeCall) {
  const std::string stages =
      "  - {name: main, use: org.example.offender, options: {statistics: true}, overrides: "
      "[{layers: ['" +
      std::string(kBadLayer) + "'], options: {statistics: true, misbehave: fail}}]}\n";
  ASSERT_EQ(RunPipeline(Pipeline("p", stages, "quantmill", kCalibration)).exit_code, 1);
  std::string directory;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(Path("p.work/crash"))) {
    if (entry.path().filename() == "call.json") directory = entry.path().parent_path().string();
  }
  ASSERT_FALSE(directory.empty());
  std::ifstream file(directory + "/call.json");
  const auto call = nlohmann::json::parse(file);
  EXPECT_EQ(call["plugin"], "org.example.offender");
  EXPECT_EQ(call["slot"], kBadLayer);
  EXPECT_EQ(call["role"], "mlp.down");
  EXPECT_EQ(call["options"]["misbehave"], "fail");
  EXPECT_EQ(call["options"]["flag_file"], "");
  EXPECT_EQ(call["row_count"], 4 * 64);
  EXPECT_GT(call["seed"].get<uint64_t>(), 0u);
  EXPECT_EQ(call["device"], "cpu");
  const int64_t out = call["out_features"], in = call["in_features"];
  const auto weight = SafetensorsFile::Open(directory + "/weight.safetensors");
  const auto statistics = SafetensorsFile::Open(directory + "/statistics.safetensors");
  const auto model = SafetensorsFile::Open(model_ + "/model.safetensors");
  ASSERT_TRUE(weight.ok() && statistics.ok() && model.ok());
  const Tensor w = (*weight)->Get("weight").value();
  EXPECT_EQ(w.shape(), Shape({out, in}));
  const Tensor stored = (*model)->Get(std::string(kBadLayer) + ".weight").value();
  ASSERT_EQ(stored.dtype(), DType::kBF16);
  for (int64_t i = 0; i < w.elements(); i += 101) {
    EXPECT_EQ(w.as<float>()[i], BF16ToF32(stored.as<uint16_t>()[i]));
  }
  const Tensor hessian = (*statistics)->Get("hessian").value();
  EXPECT_EQ(hessian.shape(), Shape({in, in}));
  EXPECT_GT(hessian.as<float>()[0], 0.0f);
}

TEST_F(CrashTest, CrashThatDoesNotComeBackIsHarmless) {
  const ProgramResult plain =
      RunPipeline(Pipeline("plain", "  - {name: main, use: org.example.offender}\n"));
  ASSERT_EQ(plain.exit_code, 0) << plain.err;
  const ProgramResult once = RunPipeline(Pipeline(
      "once", "  - {name: main, use: org.example.offender, overrides: [{layers: ['" +
                  std::string(kBadLayer) +
                  "'], options: {misbehave: abort, flag_file: " + Path("flag") + "}}]}\n"));
  EXPECT_EQ(once.exit_code, 0) << once.err;
  EXPECT_THAT(once.err, AllOf(HasSubstr("died (SIGABRT)"), HasSubstr("retrying once")));
  EXPECT_EQ(Tree(Path("plain.out"))["model.safetensors"],
            Tree(Path("once.out"))["model.safetensors"]);
}

TEST_F(CrashTest, KeepDenseLeavesTheLayer) {
  const ProgramResult result = RunPipeline(
      Pipeline("p", Stage("segfault", "on_error: keep-dense, ")), {"--json", Path("r.json")});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("stays dense"));
  std::ifstream file(Path("r.json"));
  const auto json = nlohmann::json::parse(file);
  EXPECT_THAT(json["unquantized"].dump(), HasSubstr(kBadLayer));
  EXPECT_THAT(ConfigOf("p.out"), HasSubstr("kept_dense"));
}

TEST_F(CrashTest, UseFallsBackToAnotherMethod) {
  const ProgramResult result =
      RunPipeline(Pipeline("p", Stage("fail", "on_error: {use: ptq, options: {bits: 8}}, ")));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("the moon is full"), HasSubstr("goes to ptq")));
}

TEST_F(CrashTest, HangIsFoundByTheWatchdog) {
  const ProgramResult result = RunPipeline(Pipeline("p", Stage("hang", "on_error: keep-dense, ")),
                                           {}, {"QM_HANG_SECONDS=1"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("hung (no progress for 1 s)"), HasSubstr(kBadLayer)));
}

TEST_F(CrashTest, ExitInsideAPluginIsACrash) {
  const ProgramResult result = RunPipeline(Pipeline("p", Stage("exit")));
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("exited with code 9"), HasSubstr(kBadLayer)));
}

TEST_F(CrashTest, CrashInPlanIsNamed) {
  const ProgramResult result = RunPipeline(Pipeline("p", Stage("crash-in-plan")));
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err,
              AllOf(HasSubstr("died (SIGSEGV) in quantize-linear.plan"), HasSubstr(kBadLayer)));
}

TEST_F(CrashTest, ErrorsOfPluginsAreNamed) {
  struct Case {
    const char* how;
    int exit_code;
    const char* text;
  };
  for (const Case& c :
       {Case{"bare", 1, "returned INTERNAL without a message"},
        Case{"fail", 1, "the moon is full; wait a week"},
        Case{"refuse", 3, "this layer is not to my taste"}, Case{"bad-scale", 1, "scale"},
        Case{"wrong-shape", 1, "the result is [129, "}}) {
    const ProgramResult result = RunPipeline(Pipeline(c.how, Stage(c.how)), {"--in-process"});
    EXPECT_EQ(result.exit_code, c.exit_code) << c.how << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr(c.text), HasSubstr(kBadLayer), HasSubstr("main")))
        << c.how;
    EXPECT_FALSE(std::filesystem::exists(Path(std::string(c.how) + ".out")));
  }
}

}  // namespace
}  // namespace quantmill::testing
