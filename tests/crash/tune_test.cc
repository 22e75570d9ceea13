// Stages whose method tunes the blocks it packed: better, refused, cut off and continued.
#include <algorithm>
#include <filesystem>
#include <fstream>

#include "core/io/safetensors_reader.h"
#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

namespace fs = std::filesystem;

constexpr char kUp[] = "model.layers.1.mlp.up_proj";

class TuneTest : public RunFixture {
 protected:
  static std::string Stage(const std::string& options, const std::string& more = "") {
    return "  - {name: t, use: org.example.tuner" + more + ", options: {" + options + "}}\n";
  }
  ProgramResult Run(const std::string& pipeline, std::vector<std::string> more = {},
                    const std::vector<std::string>& environment = {}) {
    more.insert(more.end(), {"--plugin", QM_TUNER, "--json", Path("r.json")});
    return RunPipeline(pipeline, more, environment);
  }
  nlohmann::json Result() {
    std::ifstream file(Path("r.json"));
    return nlohmann::json::parse(file, nullptr, false);
  }
  nlohmann::json Provenance(const std::string& output) {
    return nlohmann::json::parse(Tree(Path(output))["quantmill_provenance.json"])["slots"];
  }
  std::string Stored(const std::string& directory, const std::string& tensor) {
    const auto file = SafetensorsFile::Open(directory + "/model.safetensors").value();
    const Tensor value = file->Get(tensor).value();
    return {value.as<const char>(), static_cast<size_t>(value.bytes())};
  }
};

TEST_F(TuneTest, TunedBlocksComeCloserToTheDenseOnes) {
  const std::string extra = std::string(kCalibration) + kEvaluate;
  ASSERT_EQ(Run(Pipeline("plain", Stage("tune: 0"), "quantmill", extra)).exit_code, 0);
  const auto plain = Result();
  EXPECT_FALSE(plain["stages"][0].contains("tuned"));
  const ProgramResult run = Run(Pipeline("tuned", Stage("tune: 8"), "quantmill", extra));
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const auto tuned = Result();
  EXPECT_EQ(tuned["stages"][0]["tuned"], 28);
  EXPECT_EQ(tuned["stages"][0]["slots"], 28);
  EXPECT_THAT(tuned["checks"].dump(), HasSubstr("agree with the model in memory"));
  EXPECT_LT(tuned["evaluation"]["kl_mean"], 0.9 * plain["evaluation"]["kl_mean"].get<double>());
  const auto slots = Provenance("tuned.out");
  ASSERT_EQ(slots[kUp].size(), 2u);
  const auto& entry = slots[kUp][1];
  EXPECT_LT(entry["tuned"]["loss_after"], entry["tuned"]["loss_before"]);
  EXPECT_GT(entry["weight_nmse"], 0);
  const std::string norm = "model.layers.1.input_layernorm.weight";
  EXPECT_NE(Stored(Path("tuned.out"), norm), Stored(model_, norm));
  EXPECT_EQ(Stored(Path("plain.out"), norm), Stored(model_, norm));
}

// Packing, tuning and a stage with statistics behind them, cut off at every unit.
TEST_F(TuneTest, EveryUnitBoundaryGivesTheSameBytes) {
  const std::string stages =
      Stage("tune: 2", ", layers: ['*.mlp.*']") +
      "  - {name: rest, use: ptq, layers: ['*.self_attn.*'], options: {bits: 8}}\n";
  const std::string pipeline = Pipeline("p", stages, "quantmill", kCalibration);
  const ProgramResult whole = Run(pipeline);
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  const auto expected = Tree(Path("p.out"));
  const std::string journal = Tree(Path("p.work"))["journal.jsonl"];
  const auto lines = std::count(journal.begin(), journal.end(), '\n');
  ASSERT_GE(lines, 24);
  for (int kept = 0; kept < lines; kept += kept < 12 ? 2 : 6) {
    fs::remove_all(Path("p.out"));
    std::istringstream in(journal);
    std::ofstream out(Path("p.work/journal.jsonl"));
    std::string line;
    for (int i = 0; i < kept && std::getline(in, line); ++i) out << line << "\n";
    out.close();
    const ProgramResult resumed = Run(pipeline, {"--resume"});
    ASSERT_EQ(resumed.exit_code, 0) << kept << resumed.err;
    EXPECT_EQ(Result()["reused_units"], kept / 2);
    EXPECT_EQ(Tree(Path("p.out")), expected) << "after " << kept << " lines";
  }
}

TEST_F(TuneTest, ChangedStepsTuneAgainAndKeepThePacking) {
  ASSERT_EQ(Run(Pipeline("p", Stage("tune: 1"), "quantmill", kCalibration)).exit_code, 0);
  const auto once = Tree(Path("p.out"));
  const std::string again = Pipeline("p", Stage("tune: 1"), "quantmill", kCalibration);
  fs::remove_all(Path("p.out"));
  ASSERT_EQ(Run(again, {"--resume"}).exit_code, 0);
  EXPECT_EQ(Result()["reused_units"], 8);
  EXPECT_EQ(Tree(Path("p.out")), once);
}

TEST_F(TuneTest, WorseOrFailedTuningLeavesThePacking) {
  ASSERT_EQ(Run(Pipeline("plain", Stage("tune: 0"), "quantmill", kCalibration)).exit_code, 0);
  const std::string norm = "model.layers.1.input_layernorm.weight";
  for (const std::string offence :
       {"worse", "fail", "nan", "short", "unknown-name", "edit-weight"}) {
    const ProgramResult run =
        Run(Pipeline(offence, Stage("tune: 1, misbehave: " + offence, ", on_error: keep-dense"),
                     "quantmill", kCalibration));
    ASSERT_EQ(run.exit_code, 0) << offence << run.err;
    EXPECT_THAT(run.err, HasSubstr("stays as it was packed")) << offence;
    EXPECT_EQ(Result()["stages"][0]["tuning_dropped"], 28) << offence;
    EXPECT_EQ(Stored(Path(offence + ".out"), norm), Stored(Path("plain.out"), norm));
    EXPECT_EQ(Provenance(offence + ".out")[kUp].size(), 2u);
    EXPECT_FALSE(Provenance(offence + ".out")[kUp][1]["error"].get<std::string>().empty());
  }
  const ProgramResult stopped =
      Run(Pipeline("stop", Stage("tune: 1, misbehave: fail"), "quantmill", kCalibration));
  EXPECT_EQ(stopped.exit_code, 1);
  EXPECT_THAT(stopped.err, AllOf(HasSubstr("the tide is out"), HasSubstr("block-tune.run"),
                                 HasSubstr("model.layers.0")));
}

TEST_F(TuneTest, SlotsLeftDenseAreToldSo) {
  const ProgramResult run =
      Run(Pipeline("p", Stage("tune: 1, misbehave: fail-down", ", on_error: keep-dense"),
                   "quantmill", kCalibration));
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(Result()["stages"][0]["tuned"], 24);
  EXPECT_EQ(Result()["stages"][0]["kept_dense"], 4);
}

TEST_F(TuneTest, CrashesAndHangsAreSurvived) {
  for (const auto& [offence, how] :
       {std::pair("crash", "SIGSEGV"), std::pair("hang", "no progress for 1 s")}) {
    SCOPED_TRACE(offence);
    const std::string options = std::string("tune: 1, misbehave: ") + offence;
    const ProgramResult run =
        Run(Pipeline(offence, Stage(options, ", on_error: keep-dense"), "quantmill", kCalibration),
            {}, {"QM_HANG_SECONDS=1"});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    EXPECT_THAT(run.err, AllOf(HasSubstr("block-tune.run"), HasSubstr(how),
                               HasSubstr("twice; not tried again")));
    EXPECT_EQ(Result()["stages"][0]["tuning_dropped"], 28);
  }
}

TEST_F(TuneTest, PlanKnowsWhatCannotBeTuned) {
  const auto plan = [&](const std::string& name, const std::string& stages,
                        const std::string& extra) {
    return Program({"plan", Pipeline(name, stages, "quantmill", extra), "--plugin", QM_TUNER});
  };
  EXPECT_EQ(plan("fine", Stage("tune: 1"), kCalibration).exit_code, 0);
  const ProgramResult bare = plan("bare", Stage("tune: 1"), "");
  EXPECT_NE(bare.exit_code, 0);
  EXPECT_THAT(bare.err, HasSubstr("there is none"));
  EXPECT_EQ(plan("off", Stage("tune: 0"), "").exit_code, 0);
  const ProgramResult mixed = plan(
      "mixed", Stage("tune: 1", ", overrides: [{layers: ['*.down_proj'], options: {tune: 2}}]"),
      kCalibration);
  EXPECT_NE(mixed.exit_code, 0);
  EXPECT_THAT(mixed.err, HasSubstr("differ from those of its block"));
  const ProgramResult refused = plan("refused", Stage("tune: 1, misbehave: refuse"), kCalibration);
  EXPECT_NE(refused.exit_code, 0);
  EXPECT_THAT(refused.err, HasSubstr("not this block"));
}

}  // namespace
}  // namespace quantmill::testing
