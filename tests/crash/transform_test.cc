// Stages that transform blocks: chained, refused, cut off and continued.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

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

// Two transforms of which the second clips, between them and behind them stages with statistics.
constexpr char kChain[] =
    "  - {name: smooth, use: ptq.smooth}\n"
    "  - {name: values, use: gptq, layers: ['*.v_proj'], options: {group_size: 64}}\n"
    "  - {name: clip, use: org.example.transformer, layers: ['*.mlp.*'], "
    "options: {clip: true, statistics: true, service: true}}\n"
    "  - {name: rest, use: gptq, layers: ['*.q_proj', '*.k_proj', '*.o_proj', '*.mlp.*'], "
    "options: {group_size: 64}}\n";

class TransformTest : public RunFixture {
 protected:
  ProgramResult Run(const std::string& pipeline, std::vector<std::string> more = {},
                    const std::vector<std::string>& environment = {}) {
    more.insert(more.end(), {"--plugin", QM_TRANSFORMER});
    return RunPipeline(pipeline, more, environment);
  }
  nlohmann::json Json(const std::string& name) {
    std::ifstream file(Path(name));
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

TEST_F(TransformTest, SmoothedModelRoundsBetter) {
  const std::string stages =
      "  - {use: ptq.smooth}\n"
      "  - {use: ptq, options: {bits: 8, group_size: -1, symmetric: true}}\n";
  const ProgramResult result =
      Run(Pipeline("p", stages, "compressed-tensors", std::string(kCalibration) + kEvaluate),
          {"--json", Path("r.json")});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const auto json = Json("r.json");
  EXPECT_THAT(json["checks"].dump(), HasSubstr("agree with the model in memory"));
  EXPECT_LT(json["evaluation"]["kl_mean"], 0.01);
  EXPECT_EQ(json["stages"][0]["slots"], 20);  // q, k, v, gate and up of four blocks
  EXPECT_EQ(json["stages"][1]["slots"], 28);
  const auto slots = Provenance("p.out");
  const auto& entry = slots["model.layers.0.mlp.up_proj"][0];
  EXPECT_EQ(entry["method"], "ptq.smooth");
  EXPECT_EQ(entry["edits"][0], "scale model.layers.0.post_attention_layernorm");
  EXPECT_EQ(slots["model.layers.0.mlp.up_proj"].size(), 2u);
  for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
    const std::string name = std::string("model.layers.2.") + norm + ".weight";
    EXPECT_NE(Stored(Path("p.out"), name), Stored(model_, name)) << name;
  }
}

// Dense in, dense out: the same function, within the 16 bits of the checkpoint.
TEST_F(TransformTest, DenseExportComputesTheSame) {
  for (const std::string calibration : {kCalibration, ""}) {
    const std::string name = calibration.empty() ? "bare" : "calibrated";
    const ProgramResult result = Run(
        Pipeline(name, "  - {use: org.example.transformer}\n", "dense", calibration + kEvaluate),
        {"--json", Path("r.json")});
    ASSERT_EQ(result.exit_code, 0) << result.err;
    EXPECT_LT(Json("r.json")["evaluation"]["kl_mean"], 1e-3);
    EXPECT_GT(Json("r.json")["evaluation"]["top1_agreement"], 0.98);
    const std::string up = "model.layers.1.mlp.up_proj.weight";
    EXPECT_NE(Stored(Path(name + ".out"), up), Stored(model_, up));
  }
}

TEST_F(TransformTest, EveryUnitBoundaryGivesTheSameBytes) {
  const std::string pipeline = Pipeline("p", kChain, "compressed-tensors", kCalibration);
  const ProgramResult whole = Run(pipeline, {"--json", Path("r.json")});
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  const auto expected = Tree(Path("p.out"));
  const std::string journal = Tree(Path("p.work"))["journal.jsonl"];
  const size_t lines = static_cast<size_t>(std::count(journal.begin(), journal.end(), '\n'));
  ASSERT_GE(lines, 32u);
  // Every boundary of two blocks, and every fifth after them.
  for (size_t kept = 0; kept < lines; kept += kept < 16 ? 2 : 10) {
    fs::remove_all(Path("p.out"));
    std::istringstream in(journal);
    std::ofstream out(Path("p.work/journal.jsonl"));
    std::string line;
    for (size_t i = 0; i < kept && std::getline(in, line); ++i) out << line << "\n";
    out.close();
    const ProgramResult resumed = Run(pipeline, {"--resume", "--json", Path("r.json")});
    ASSERT_EQ(resumed.exit_code, 0) << kept << resumed.err;
    EXPECT_EQ(Json("r.json")["reused_units"], kept / 2);
    EXPECT_EQ(Tree(Path("p.out")), expected) << "after " << kept << " lines";
  }
}

TEST_F(TransformTest, KilledAtRandomMomentsEndsInTheSameBytes) {
  std::string stages = kChain;
  stages.replace(stages.find("clip: true"), 10, "clip: true, misbehave: slow");
  const std::string extra = std::string(kCalibration);
  ASSERT_EQ(Run(Pipeline("a", stages, "quantmill", extra)).exit_code, 0);
  const std::string other = Pipeline("b", stages, "quantmill", extra);
  for (int delay_ms = 150; delay_ms < 1300; delay_ms += 190) {
    const pid_t child = fork();
    if (child == 0) {
      setpgid(0, 0);
      if (freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
      if (freopen("/dev/null", "w", stdout) == nullptr) _exit(1);
      execl(QM_PROGRAM, QM_PROGRAM, "run", other.c_str(), "--plugin", QM_OFFENDER, "--plugin",
            QM_TRANSFORMER, "--resume", static_cast<char*>(nullptr));
      _exit(1);
    }
    usleep(static_cast<useconds_t>(delay_ms) * 1000);
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    usleep(50 * 1000);  // the worker dies with its supervisor
  }
  const ProgramResult last = Run(other, {"--resume"});
  ASSERT_EQ(last.exit_code, 0) << last.err;
  EXPECT_EQ(Tree(Path("a.out")), Tree(Path("b.out")));
}

// A damaged transform unit is made again, and what follows it stays.
TEST_F(TransformTest, DamagedTransformIsMadeAgain) {
  const std::string pipeline = Pipeline("p", kChain, "quantmill", kCalibration);
  ASSERT_EQ(Run(pipeline).exit_code, 0);
  const auto expected = Tree(Path("p.out"));
  fs::remove_all(Path("p.out"));
  for (const auto& [name, content] : Tree(Path("p.work/units"))) {
    if (fs::path(name).filename() != "unit.json") continue;
    const auto unit = nlohmann::json::parse(content);
    if (unit["stage"] == "smooth" && unit["block"] == 1) {
      fs::remove(fs::path(Path("p.work/units")) / fs::path(name).parent_path() / "out.safetensors");
    }
  }
  const ProgramResult resumed = Run(pipeline, {"--resume", "--json", Path("r.json")});
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_THAT(resumed.err, HasSubstr("computed again"));
  EXPECT_EQ(Tree(Path("p.out")), expected);
}

TEST_F(TransformTest, StreamOfTheUntouchedModel) {
  const std::string stages =
      "  - {use: org.example.transformer, options: {original: true, service: true}}\n"
      "  - {use: gptq, options: {group_size: 64, asymmetric_error: 0.25}}\n";
  const std::string pipeline = Pipeline("p", stages, "quantmill", kCalibration);
  const ProgramResult result = Run(pipeline);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const auto expected = Tree(Path("p.out"));
  const std::string again = Pipeline("q", stages, "quantmill", kCalibration);
  ASSERT_EQ(Run(again, {"--in-process"}).exit_code, 0);
  EXPECT_EQ(Tree(Path("q.out")), expected);
}

// A Hessian that is not that of the scaled inputs would show: gptq after the transform must do as
// well as gptq on the transformed checkpoint.
TEST_F(TransformTest, StatisticsFollowTheEdits) {
  const std::string gptq =
      "  - {use: gptq, options: {group_size: -1}, layers: ['*.self_attn.*', '*.mlp.*']}\n";
  ASSERT_EQ(Run(Pipeline("dense", "  - {use: org.example.transformer}\n", "dense")).exit_code, 0);
  ASSERT_EQ(Run(Pipeline("chain", "  - {use: ptq.smooth, options: {alpha: 0.0}}\n" + gptq,
                         "quantmill", kCalibration),
                {"--json", Path("chain.json")})
                .exit_code,
            0);
  ASSERT_EQ(Run(Pipeline("both",
                         "  - {use: org.example.transformer, options: {statistics: true}}\n" + gptq,
                         "quantmill", kCalibration),
                {"--json", Path("both.json")})
                .exit_code,
            0);
  model_ = Path("dense.out");
  ASSERT_EQ(Run(Pipeline("apart", gptq, "quantmill", kCalibration), {"--json", Path("apart.json")})
                .exit_code,
            0);
  const double both = Json("both.json")["stages"][1]["output_nmse"];
  const double apart = Json("apart.json")["stages"][0]["output_nmse"];
  EXPECT_NEAR(both / apart, 1, 0.05);
}

// A method with both tables: one stage, two units per block.
TEST_F(TransformTest, TransformAndRoundInOneStage) {
  const std::string stages =
      "  - {name: all, use: org.example.transformer.rounding, options: {expect_bits: 8, "
      "service: true}}\n";
  const std::string pipeline = Pipeline("p", stages, "compressed-tensors", kCalibration);
  const ProgramResult plan = Program({"plan", pipeline, "--plugin", QM_TRANSFORMER});
  EXPECT_EQ(plan.exit_code, 0) << plan.err;
  EXPECT_THAT(plan.out, AllOf(HasSubstr("28 packed, 0 dense"), Not(HasSubstr("dense   "))));
  const ProgramResult result = Run(pipeline, {"--json", Path("r.json")});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(Json("r.json")["units"], 8);
  EXPECT_EQ(Json("r.json")["stages"][0]["slots"], 28);
  EXPECT_EQ(Provenance("p.out")["model.layers.0.mlp.up_proj"].size(), 2u);
  const auto expected = Tree(Path("p.out"));
  fs::remove_all(Path("p.out"));
  const std::string journal = Tree(Path("p.work"))["journal.jsonl"];
  std::istringstream in(journal);
  std::ofstream out(Path("p.work/journal.jsonl"));
  std::string line;
  for (int i = 0; i < 6 && std::getline(in, line); ++i) out << line << "\n";
  out.close();
  ASSERT_EQ(Run(pipeline, {"--resume"}).exit_code, 0);
  EXPECT_EQ(Tree(Path("p.out")), expected);
}

TEST_F(TransformTest, NextRoundingIsThatOfTheNextPackingStage) {
  const std::string stages =
      "  - {use: org.example.transformer, layers: ['*.self_attn.*'], options: {expect_bits: 3}}\n"
      "  - {name: none, use: org.example.transformer, layers: ['*.mlp.*'], options: {expect_bits: "
      "0}}\n"
      "  - {use: ptq, layers: ['*.self_attn.*'], options: {bits: 3}}\n";
  const ProgramResult result = Run(Pipeline("p", stages, "quantmill", kCalibration));
  EXPECT_EQ(result.exit_code, 0) << result.err;
}

struct Offence {
  const char* misbehave;
  const char* options;
  const char* text;
  const char* layers = "*";
};

TEST_F(TransformTest, WrongEditsAreRefused) {
  const Offence offences[] = {
      {"nan", "", "NaN"},
      {"zero", "", "channel 0 is 0"},
      {"huge", "", "changes what the block computes"},
      {"unknown-site", "", "no scale site"},
      {"short", "", "channels"},
      {"unknown-kind", "", "unknown kind 9"},
      {"rotate", "", "cannot be rotated"},
      {"negative", ", scale: false, clip: true", "negative limit"},
      {"foreign", ", scale: false, clip: true", "layers do not name", "*.self_attn.*"},
      {"null-target", "", "names no target"},
      {"null-value", "", "null tensor"},
      {"null-edits", "", "none listed"},
      {"fail", "", "the tide is out"},
      {"bad-override", ", service: true", "overrides were counted"},
      {"bad-window", ", service: true", "the calibration has 4"},
  };
  int index = 0;
  for (const Offence& offence : offences) {
    const std::string name = "p" + std::to_string(index++);
    const std::string stage = std::string("  - {use: org.example.transformer, layers: ['") +
                              offence.layers + "'], options: {misbehave: " + offence.misbehave +
                              offence.options + "}}\n";
    const ProgramResult result = Run(Pipeline(name, stage, "dense", kCalibration));
    EXPECT_EQ(result.exit_code, 1) << offence.misbehave << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr(offence.text), HasSubstr("org.example.transformer"),
                                  HasSubstr("model.layers.0")))
        << offence.misbehave;
    EXPECT_FALSE(fs::exists(Path(name + ".out")));
    const std::string how = offence.misbehave;
    if (how == "fail" || how == "bad-override" || how == "bad-window") continue;  // told the host
    const ProgramResult strict =
        Run(Pipeline("s" + name, stage, "dense", kCalibration), {}, {"QM_STRICT=1"});
    EXPECT_THAT(strict.err, HasSubstr("this breaks QM-C-007, see plugin_api/RULES.md#qm-c-007"))
        << how;
  }
}

TEST_F(TransformTest, KeepDenseLeavesTheBlock) {
  const std::string stages =
      "  - {use: org.example.transformer, on_error: keep-dense, overrides: [{layers: "
      "['model.layers.1.*'], options: {misbehave: nan}}]}\n";
  const ProgramResult result =
      Run(Pipeline("p", stages, "dense", kCalibration), {"--json", Path("r.json")});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("model.layers.1 stays as it was"));
  const std::string up = "mlp.up_proj.weight";
  EXPECT_EQ(Stored(Path("p.out"), "model.layers.1." + up), Stored(model_, "model.layers.1." + up));
  EXPECT_NE(Stored(Path("p.out"), "model.layers.2." + up), Stored(model_, "model.layers.2." + up));
  EXPECT_THAT(Provenance("p.out")["model.layers.1.mlp.up_proj"][0]["error"].dump(),
              HasSubstr("NaN"));
}

TEST_F(TransformTest, CrashIsLaidToTheBlock) {
  const std::string stages =
      "  - {use: org.example.transformer, overrides: [{layers: ['model.layers.1.*'], "
      "options: {misbehave: crash}}]}\n";
  const ProgramResult result = Run(Pipeline("p", stages, "dense", kCalibration));
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("block-transform.run"), HasSubstr("model.layers.1"),
                                HasSubstr("SIGSEGV")));
  std::string kept = stages;
  kept.insert(kept.find("overrides"), "on_error: keep-dense, ");
  const ProgramResult second = Run(Pipeline("q", kept, "dense", kCalibration));
  ASSERT_EQ(second.exit_code, 0) << second.err;
  EXPECT_THAT(second.err, HasSubstr("twice; not tried again"));
}

// A block transform that fails leaves its inputs, and they are enough to make the call again.
class TransformReplayTest : public TransformTest {
 protected:
  // Runs a pipeline that misbehaves in block 1, behind another transform; returns its bundle.
  std::string BundleOf(const std::string& name, const std::string& options,
                       const std::string& extra = kCalibration) {
    const std::string stages =
        "  - {name: first, use: org.example.transformer}\n"
        "  - {name: main, use: org.example.transformer, overrides: [{layers: "
        "['model.layers.1.*'], options: {" +
        options + "}}]}\n";
    const ProgramResult run =
        Run(Pipeline(name, stages, "dense", extra), {}, {"QM_HANG_SECONDS=1"});
    EXPECT_EQ(run.exit_code, 1) << run.err;
    return BundleLeftBy(name, run);
  }
};

TEST_F(TransformReplayTest, CrashComesBackUntilItsCauseIsGone) {
  const std::string bundle =
      BundleOf("p", "misbehave: crash, service: true, statistics: true, clip: true");
  const ProgramResult crashed = Program({"replay", bundle, "--json", Path("r.json")});
  EXPECT_EQ(crashed.exit_code, 1);
  EXPECT_THAT(crashed.out,
              AllOf(HasSubstr("block-transform.run of org.example.transformer, stage main"),
                    HasSubstr("block    model.layers.1, 7 linears, 4 of 4 windows of text"),
                    HasSubstr("crashed: died (SIGSEGV) in block-transform.run"),
                    HasSubstr("gdb --args quantmill replay")));
  EXPECT_EQ(Json("r.json")["outcome"], "crashed");
  EXPECT_EQ(Json("r.json")["slot"], "model.layers.1");
  EXPECT_EQ(Program({"replay", bundle, "--in-process"}).exit_code, 128 + 11);

  SetOption(bundle, "misbehave", "none");
  for (const bool in_process : {false, true}) {
    std::vector<std::string> arguments = {"replay", bundle, "--json", Path("r.json")};
    if (in_process) arguments.push_back("--in-process");
    const ProgramResult mended = Program(arguments);
    EXPECT_EQ(mended.exit_code, 0) << mended.out << mended.err;
    EXPECT_THAT(mended.out, HasSubstr("succeeded: 11 edits"));
    EXPECT_EQ(Json("r.json")["result"]["edits"], 11);  // four sites, seven clips
  }
}

TEST_F(TransformReplayTest, FailuresWrongEditsAndHangsComeBackToo) {
  const std::string bundle = BundleOf("p", "misbehave: fail");
  const ProgramResult failed = Program({"replay", bundle});
  EXPECT_EQ(failed.exit_code, 1);
  EXPECT_THAT(failed.out, AllOf(HasSubstr("outcome  failed"), HasSubstr("the tide is out")));
  // Refused by the host's checks.
  const std::string wrong = BundleOf("q", "misbehave: huge", "");
  const ProgramResult refused = Program({"replay", wrong});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.out, AllOf(HasSubstr("changes what the block computes"),
                                 HasSubstr("model.layers.1, 7 linears, seed")));
  SetOption(wrong, "misbehave", "none");
  EXPECT_EQ(Program({"replay", wrong}).exit_code, 0);
  SetOption(wrong, "service", "true");  // there was no text
  EXPECT_THAT(Program({"replay", wrong}).out, HasSubstr("no qm.host.block/1"));
  SetOption(bundle, "misbehave", "none");
  SetOption(bundle, "statistics", "true");  // were not asked for in the run
  EXPECT_THAT(Program({"replay", bundle}).out, HasSubstr("the failed call did not have it"));
}

TEST_F(TransformReplayTest, KeepDenseNamesTheBundleAndGoesOn) {
  const std::string stages =
      "  - {name: main, use: org.example.transformer, on_error: keep-dense, overrides: [{layers: "
      "['model.layers.1.*'], options: {misbehave: crash}}]}\n";
  const ProgramResult result = Run(Pipeline("p", stages, "dense", kCalibration));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("quantmill replay " + Path("p.work/crash")),
                                HasSubstr("model.layers.1 stays as it was")));
}

TEST_F(TransformReplayTest, RefusesWhatIsDamaged) {
  const std::string bundle = BundleOf("p", "misbehave: fail, statistics: true");
  const std::string json = Tree(bundle)["call.json"];
  const auto call = nlohmann::json::parse(json);
  for (const auto& [key, value] : call.items()) {
    if (key == "version" || key == "stage" || key == "plugin_sha256" || key == "config") continue;
    nlohmann::json damaged = call;
    damaged[key] = nlohmann::json::object();
    if (key == "options") damaged[key] = 7;
    std::ofstream(bundle + "/call.json") << damaged;
    const ProgramResult result = Program({"replay", bundle});
    EXPECT_EQ(result.exit_code, 2) << key << result.out << result.err;
  }
  nlohmann::json other = call;
  other["linears"][0] = "model.layers.0.mlp.up_proj";
  std::ofstream(bundle + "/call.json") << other;
  EXPECT_EQ(Program({"replay", bundle}).exit_code, 2);
  std::ofstream(bundle + "/call.json") << json;
  for (const char* file : {"config.json", "model.safetensors", "windows.safetensors"}) {
    fs::rename(bundle + "/" + file, Path("away"));
    EXPECT_EQ(Program({"replay", bundle}).exit_code, 2) << file;
    fs::rename(Path("away"), bundle + "/" + file);
  }
  EXPECT_EQ(Program({"replay", bundle}).exit_code, 1);
}

TEST_F(TransformTest, RefusedBeforeWork) {
  const auto refused = [&](const std::string& name, const std::string& stages,
                           const std::string& format, const std::string& text,
                           const std::string& extra = kCalibration) {
    const ProgramResult result = Run(Pipeline(name, stages, format, extra));
    EXPECT_EQ(result.exit_code, 3) << result.err;
    EXPECT_THAT(result.err, HasSubstr(text));
  };
  refused("a", "  - {use: gptq}\n  - {use: ptq.smooth}\n", "quantmill", "put the transform first");
  refused("b", "  - {use: ptq.smooth}\n", "compressed-tensors", "dense");
  refused("c", "  - {use: ptq.smooth, layers: ['*.q_proj']}\n", "dense", "q, k and v");
  refused("d", "  - {use: ptq.smoth}\n", "dense", "use ptq or ptq.smooth");
  refused("e", "  - {use: ptq.smooth}\n", "dense", "calibration", "");
  refused("f",
          "  - {use: ptq.smooth, overrides: [{layers: ['*.q_proj'], options: {alpha: 0.1}}]}\n",
          "dense", "whole blocks");
  refused("g", "  - {use: org.example.transformer, options: {misbehave: refuse}}\n", "dense",
          "not this block");
  const ProgramResult crashed =
      Run(Pipeline("h", "  - {use: org.example.transformer, options: {misbehave: crash-in-plan}}\n",
                   "dense", kCalibration));
  EXPECT_EQ(crashed.exit_code, 1);
  const std::string bundle = Path("h.work/crash/plan/org.example.transformer/model.layers.0");
  EXPECT_THAT(crashed.err, AllOf(HasSubstr("died (SIGSEGV) in block-transform.plan"),
                                 HasSubstr("quantmill replay " + bundle)));
  const ProgramResult replay = Program({"replay", bundle});
  EXPECT_EQ(replay.exit_code, 1) << replay.err;
  EXPECT_THAT(replay.out, HasSubstr("crashed: died (SIGSEGV) in block-transform.plan"));
}

TEST_F(TransformTest, PlanShowsTheStage) {
  const std::string pipeline = Pipeline("p", kChain, "compressed-tensors", kCalibration);
  const ProgramResult result = Program({"plan", pipeline, "--plugin", QM_TRANSFORMER});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("smooth: ptq.smooth"), HasSubstr("absmax"),
                                HasSubstr("28 packed, 0 dense")));
}

}  // namespace
}  // namespace quantmill::testing
