// quantmill replay of calls that tune a block.
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class TuneReplayTest : public RunFixture {
 protected:
  // A run in which the tuning of the second block misbehaves.
  ProgramResult RunTuner(const std::string& misbehave, const std::string& more = "") {
    const std::string stages = "  - {name: main, use: org.example.tuner" + more +
                               ", options: {tune: 1}, overrides: [{layers: ['model.layers.1.*'], "
                               "options: {tune: 1, misbehave: " +
                               misbehave + "}}]}\n";
    return RunPipeline(Pipeline(misbehave, stages, "quantmill", kCalibration),
                       {"--plugin", QM_TUNER});
  }
  // Without the offence: as if the plugin had been mended.
  static void Mend(const std::string& bundle) { SetOption(bundle, "misbehave", "none"); }
};

TEST_F(TuneReplayTest, CrashComesBackUntilItsCauseIsGone) {
  const ProgramResult run = RunTuner("crash");
  EXPECT_EQ(run.exit_code, 1) << run.err;
  const std::string bundle = BundleLeftBy("crash", run);
  const ProgramResult crashed = Program({"replay", bundle, "--json", Path("r.json")});
  EXPECT_EQ(crashed.exit_code, 1);
  EXPECT_THAT(crashed.out,
              AllOf(HasSubstr("block-tune.run of org.example.tuner, stage main"),
                    HasSubstr("block    model.layers.1, 7 linears, 4 of 4 windows of text"),
                    HasSubstr("crashed: died (SIGSEGV) in block-tune.run"),
                    HasSubstr("gdb --args quantmill replay")));
  EXPECT_EQ(Program({"replay", bundle, "--in-process"}).exit_code, 128 + 11);

  Mend(bundle);
  for (const bool in_process : {false, true}) {
    std::vector<std::string> arguments = {"replay", bundle, "--json", Path("r.json")};
    if (in_process) arguments.push_back("--in-process");
    const ProgramResult mended = Program(arguments);
    EXPECT_EQ(mended.exit_code, 0) << mended.out << mended.err;
    EXPECT_THAT(mended.out, HasSubstr("7 linears tuned, 2 edits, error of the block"));
    std::ifstream file(Path("r.json"));
    const auto result = nlohmann::json::parse(file)["result"];
    EXPECT_EQ(result["tuned"], 7);
    EXPECT_LT(result["loss_after"], result["loss_before"]);
  }
}

TEST_F(TuneReplayTest, FailuresAndWrongResultsComeBackToo) {
  for (const auto& [misbehave, text] :
       {std::pair("fail", "the tide is out"), std::pair("short", "the tensor it replaces"),
        std::pair("edit-weight", "norms and biases only")}) {
    SCOPED_TRACE(misbehave);
    const ProgramResult run = RunTuner(misbehave);
    EXPECT_EQ(run.exit_code, 1) << run.err;
    const std::string bundle = BundleLeftBy(misbehave, run);
    const ProgramResult failed = Program({"replay", bundle});
    EXPECT_EQ(failed.exit_code, 1);
    EXPECT_THAT(failed.out, AllOf(HasSubstr("outcome  failed"), HasSubstr(text)));
    Mend(bundle);
    EXPECT_EQ(Program({"replay", bundle}).exit_code, 0);
  }
}

TEST_F(TuneReplayTest, KeepDenseNamesTheBundleAndGoesOn) {
  const ProgramResult run = RunTuner("crash", ", on_error: keep-dense");
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.err, HasSubstr("stays as it was packed"));
  BundleLeftBy("crash", run);
}

TEST_F(TuneReplayTest, CallOfThePlan) {
  const ProgramResult run = RunTuner("crash-plan");
  EXPECT_EQ(run.exit_code, 1) << run.err;
  const std::string bundle = BundleLeftBy("crash-plan", run);
  const ProgramResult crashed = Program({"replay", bundle});
  EXPECT_EQ(crashed.exit_code, 1);
  EXPECT_THAT(crashed.out, AllOf(HasSubstr("block-tune.plan of org.example.tuner"),
                                 HasSubstr("crashed: died (SIGSEGV)")));
  Mend(bundle);
  EXPECT_EQ(Program({"replay", bundle}).exit_code, 0);
}

TEST_F(TuneReplayTest, RefusesWhatIsDamaged) {
  const std::string bundle = BundleLeftBy("fail", RunTuner("fail"));
  const std::string json = Tree(bundle)["call.json"];
  for (const char* key : {"packed_formats", "packed_parameters", "packed_tensors"}) {
    auto call = nlohmann::json::parse(json);
    for (const nlohmann::json& wrong : {nlohmann::json(7), nlohmann::json::array({"x"})}) {
      call[key] = wrong;
      std::ofstream(bundle + "/call.json") << call;
      if (std::string(key) == "packed_tensors" && wrong.is_array()) continue;  // nothing packed
      EXPECT_EQ(Program({"replay", bundle}).exit_code, 2) << key << wrong;
    }
  }
  std::ofstream(bundle + "/call.json") << json;
  std::filesystem::remove(bundle + "/packed.safetensors");
  EXPECT_EQ(Program({"replay", bundle}).exit_code, 2);
}

}  // namespace
}  // namespace quantmill::testing
