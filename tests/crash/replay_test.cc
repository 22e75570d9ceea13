// quantmill replay: the call of a crash bundle, with the plugin as it was and as it is now.
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class ReplayTest : public RunFixture {
 protected:
  // Runs a pipeline whose bad layer has these options; returns its bundle.
  std::string BundleOf(const std::string& options, const std::string& extra = "") {
    const ProgramResult run =
        RunPipeline(Pipeline("p",
                             "  - {name: main, use: org.example.offender, overrides: [{layers: ['" +
                                 std::string(kBadLayer) + "'], options: {" + options + "}}]}\n",
                             "quantmill", extra),
                    {}, {"QM_HANG_SECONDS=1"});
    EXPECT_EQ(run.exit_code, 1) << run.err;
    return BundleLeftBy("p", run);
  }
};

TEST_F(ReplayTest, CrashComesBackUntilItsCauseIsGone) {
  const std::string bundle = BundleOf("misbehave: segfault");
  const ProgramResult crashed = Program({"replay", bundle, "--json", Path("r.json")});
  EXPECT_EQ(crashed.exit_code, 1);
  EXPECT_THAT(
      crashed.out,
      AllOf(HasSubstr("quantize-linear.run of org.example.offender, stage main"),
            HasSubstr(kBadLayer), HasSubstr("crashed: died (SIGSEGV) in quantize-linear.run"),
            HasSubstr("gdb --args quantmill replay"), Not(HasSubstr("built anew"))));
  std::ifstream file(Path("r.json"));
  const auto json = nlohmann::json::parse(file);
  EXPECT_EQ(json["outcome"], "crashed");
  EXPECT_EQ(json["slot"], kBadLayer);

  // The file of a plugin that was mended: here, told to behave.
  auto call = nlohmann::json::parse(Tree(bundle)["call.json"]);
  call["options"]["misbehave"] = "none";
  call["plugin_sha256"] = "0";
  std::ofstream(bundle + "/call.json") << call;
  const ProgramResult mended = Program({"replay", bundle});
  EXPECT_EQ(mended.exit_code, 0) << mended.out << mended.err;
  EXPECT_THAT(mended.out, AllOf(HasSubstr("succeeded: qm.fmt.affine-int/1"),
                                HasSubstr("bits per weight"), HasSubstr("built anew since")));
}

TEST_F(ReplayTest, InProcessDiesOfTheCrashItself) {
  const std::string bundle = BundleOf("misbehave: abort");
  const ProgramResult result = Program({"replay", bundle, "--in-process"});
  EXPECT_EQ(result.exit_code, 128 + 6);  // as the shell says it: SIGABRT
  EXPECT_THAT(result.out, HasSubstr("quantize-linear.run"));
}

TEST_F(ReplayTest, FailuresAndHangsComeBackToo) {
  const std::string failed = BundleOf("misbehave: fail, statistics: true", kCalibration);
  for (const bool in_process : {false, true}) {
    std::vector<std::string> arguments = {"replay", failed};
    if (in_process) arguments.push_back("--in-process");
    const ProgramResult result = Program(arguments);
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_THAT(result.out, AllOf(HasSubstr("outcome  failed"), HasSubstr("the moon is full")));
  }
  auto call = nlohmann::json::parse(Tree(failed)["call.json"]);
  call["options"]["misbehave"] = "hang";
  std::ofstream(failed + "/call.json") << call;
  const ProgramResult hung = Program({"replay", failed}, {"QM_HANG_SECONDS=1"});
  EXPECT_EQ(hung.exit_code, 1);
  EXPECT_THAT(hung.out, HasSubstr("hung: hung (no progress for 1 s) in quantize-linear.run"));
  // A result that the format's check refuses is a failure as well.
  call["options"]["misbehave"] = "short-codes";
  std::ofstream(failed + "/call.json") << call;
  const ProgramResult lie = Program({"replay", failed});
  EXPECT_EQ(lie.exit_code, 1);
  EXPECT_THAT(lie.out, AllOf(HasSubstr("outcome  failed"), HasSubstr("codes")));
}

TEST_F(ReplayTest, RefusesWhatIsNoBundle) {
  const ProgramResult nothing = Program({"replay", Path("nowhere")});
  EXPECT_EQ(nothing.exit_code, 2);
  EXPECT_THAT(nothing.err, AllOf(HasSubstr("no failed call in"), HasSubstr("call.json")));
  const std::string bundle = BundleOf("misbehave: fail");
  EXPECT_EQ(Program({"replay", bundle, "--device", "toaster"}).exit_code, 2);
  EXPECT_EQ(Program({"replay", bundle, "--plugin", Path("none.so")}).exit_code, 2);

  const std::string json = Tree(bundle)["call.json"];
  auto call = nlohmann::json::parse(json);
  for (const auto& [key, value] : call.items()) {
    if (key == "version" || key == "stage" || key == "plugin_sha256") continue;
    nlohmann::json damaged = call;
    damaged[key] = nlohmann::json::array();
    std::ofstream(bundle + "/call.json") << damaged;
    const ProgramResult result = Program({"replay", bundle});
    EXPECT_EQ(result.exit_code, 2) << key << result.out << result.err;
  }
  std::ofstream(bundle + "/call.json") << "{";
  EXPECT_EQ(Program({"replay", bundle}).exit_code, 2);
  call["out_features"] = 7;
  std::ofstream(bundle + "/call.json") << call;
  const ProgramResult shape = Program({"replay", bundle});
  EXPECT_EQ(shape.exit_code, 2);
  EXPECT_THAT(shape.err, HasSubstr("weight.safetensors"));
  std::ofstream(bundle + "/call.json") << json;
  fs::remove(bundle + "/weight.safetensors");
  EXPECT_EQ(Program({"replay", bundle}).exit_code, 2);
}

}  // namespace
}  // namespace quantmill::testing
