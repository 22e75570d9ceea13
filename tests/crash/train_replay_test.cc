// quantmill replay of calls of a training: they crash, fail, hang or give nothing, in a run and
// made again alone.
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kTrainedLinear[] = "model.layers.1.mlp.down_proj";

class TrainReplayTest : public RunFixture {
 protected:
  // A run in which calls for one linear misbehave, over packed linears or dense ones.
  ProgramResult RunTrainer(const std::string& misbehave, const std::string& more = "",
                           bool packed = false) {
    const std::string options = "{misbehave: " + misbehave + more + "}";
    const std::string stages =
        std::string(packed ? "  - {use: ptq, options: {group_size: 64}}\n" : "") +
        "  - {name: main, use: org.example.trainer, options: {merge: true}, overrides: [{layers: "
        "['" +
        kTrainedLinear + "'], options: " + options +
        "}], train: {data: calib.txt, loss: lm, batch: 1, sequence_length: 32, steps: 3}}\n";
    return RunPipeline(Pipeline(misbehave, stages, "dense"), {"--plugin", QM_TRAINER},
                       {"QM_HANG_SECONDS=2"});
  }
  // The folder that run left, which its message names.
  std::string TrainedBundle(const std::string& misbehave, const ProgramResult& run) {
    EXPECT_EQ(run.exit_code, 1) << run.err;
    return BundleLeftBy(misbehave, run);
  }
  ProgramResult Mended(const std::string& bundle) {
    SetOption(bundle, "misbehave", "none");
    return Program({"replay", bundle, "--json", Path("r.json")});
  }
};

TEST_F(TrainReplayTest, CrashesComeBackUntilTheirCauseIsGone) {
  for (const std::string function : {"plan", "init", "forward", "vjp", "finalize"}) {
    SCOPED_TRACE(function);
    const std::string bundle =
        TrainedBundle("crash-" + function, RunTrainer("crash-" + function, ", merge: true"));
    const ProgramResult crashed = Program({"replay", bundle});
    EXPECT_EQ(crashed.exit_code, 1);
    EXPECT_THAT(crashed.out,
                AllOf(HasSubstr("reparametrize." + function + " of org.example.trainer"),
                      HasSubstr(std::string("layer    ") + kTrainedLinear),
                      HasSubstr("crashed: died (SIGSEGV) in reparametrize." + function)));
    EXPECT_EQ(Program({"replay", bundle, "--in-process"}).exit_code, 128 + 11);
    const ProgramResult mended = Mended(bundle);
    EXPECT_EQ(mended.exit_code, 0) << mended.out << mended.err;
    EXPECT_THAT(mended.out, HasSubstr(function == "plan" ? "outcome  succeeded"
                                                         : "succeeded: results are finite"));
  }
}

// The fourth call of a function, which has parameters that have been trained.
TEST_F(TrainReplayTest, LaterCallsHaveTheirOwnInputs) {
  const std::string bundle =
      TrainedBundle("crash-vjp", RunTrainer("crash-vjp", ", after: 2, saved: 3"));
  const ProgramResult crashed = Program({"replay", bundle});
  EXPECT_THAT(crashed.out, HasSubstr("32 rows"));
  const auto call = nlohmann::json::parse(Tree(bundle)["call.json"]);
  EXPECT_EQ(call["wanted"], nlohmann::json::array({"gain"}));
  EXPECT_EQ(call["wants_d_in"], 1);
  EXPECT_EQ(Mended(bundle).exit_code, 0);
  // A plugin built anew that keeps other bytes.
  SetOption(bundle, "saved", "4");
  const ProgramResult other = Program({"replay", bundle});
  EXPECT_EQ(other.exit_code, 1);
  EXPECT_THAT(other.out, HasSubstr("the failed call had"));
}

TEST_F(TrainReplayTest, FailuresAndHangsComeBackToo) {
  for (const std::string misbehave : {"fail-init", "fail-forward", "fail-vjp", "fail-finalize"}) {
    SCOPED_TRACE(misbehave);
    const std::string bundle = TrainedBundle(misbehave, RunTrainer(misbehave, ", merge: true"));
    const ProgramResult failed = Program({"replay", bundle});
    EXPECT_EQ(failed.exit_code, 1);
    EXPECT_THAT(failed.out, AllOf(HasSubstr("outcome  failed"), HasSubstr("the tide is out")));
    EXPECT_EQ(Mended(bundle).exit_code, 0);
  }
  const std::string nothing =
      TrainedBundle("nothing-emitted", RunTrainer("nothing-emitted", ", merge: true"));
  EXPECT_THAT(Program({"replay", nothing}).out, HasSubstr("emitted no F32 'weight'"));
  const std::string hung = TrainedBundle("hang-vjp", RunTrainer("hang-vjp"));
  const ProgramResult hangs = Program({"replay", hung}, {"QM_HANG_SECONDS=2"});
  EXPECT_EQ(hangs.exit_code, 1);
  EXPECT_THAT(hangs.out, HasSubstr("hung"));
}

// The base's format is told, and its tensors where a plugin sees them.
TEST_F(TrainReplayTest, OverAPackedBase) {
  const std::string init =
      TrainedBundle("fail-init", RunTrainer("fail-init", ", merge: true", /*packed=*/true));
  EXPECT_THAT(Program({"replay", init}).out, HasSubstr("packed as qm.fmt.affine-int/1"));
  EXPECT_EQ(nlohmann::json::parse(Tree(init)["call.json"])["base_tensors"].size(), 3u);
  EXPECT_EQ(Mended(init).exit_code, 0);
  const std::string vjp =
      TrainedBundle("crash-vjp", RunTrainer("crash-vjp", ", merge: true", /*packed=*/true));
  EXPECT_TRUE(nlohmann::json::parse(Tree(vjp)["call.json"])["base_tensors"].empty());
  EXPECT_EQ(Mended(vjp).exit_code, 0);
}

TEST_F(TrainReplayTest, TrainingThatEndsWellLeavesNone) {
  const ProgramResult run = RunTrainer("none");
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.err, Not(HasSubstr("replay")));
  EXPECT_FALSE(std::filesystem::exists(Path("none.work/crash")));
}

TEST_F(TrainReplayTest, RefusesWhatIsDamaged) {
  const std::string bundle = TrainedBundle("fail-vjp", RunTrainer("fail-vjp"));
  const std::string json = Tree(bundle)["call.json"];
  const auto call = nlohmann::json::parse(json);
  for (const auto& [key, value] : call.items()) {
    if (key == "version" || key == "stage" || key == "plugin_sha256") continue;
    nlohmann::json damaged = call;
    damaged[key] = nlohmann::json::object();
    if (key == "options") damaged[key] = 7;
    std::ofstream(bundle + "/call.json") << damaged;
    const ProgramResult result = Program({"replay", bundle});
    EXPECT_EQ(result.exit_code, 2) << key << result.out << result.err;
  }
  std::ofstream(bundle + "/call.json") << json;
  std::filesystem::remove(bundle + "/inputs.safetensors");
  EXPECT_EQ(Program({"replay", bundle}).exit_code, 2);
}

}  // namespace
}  // namespace quantmill::testing
