// Training stages that change weights: what they gain, that they repeat and continue to the same
// bytes, and how they end when training fails.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

namespace fs = std::filesystem;

constexpr char kGrid[] = "bits: 3, group_size: 64";

// A few steps of 2 x 64 tokens.
std::string Train(const std::string& more, int steps = 8) {
  return "train: {data: calib.txt, batch: 2, sequence_length: 64, block_batch: 2, steps: " +
         std::to_string(steps) + more + "}";
}

std::string Qat(const std::string& train, const std::string& options = "") {
  return std::string("  - {use: qat, options: {") + kGrid + options + "}, " + train + "}\n";
}

class TrainTest : public RunFixture {
 protected:
  std::string Content(const std::string& name) {
    std::ifstream file(Path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  nlohmann::json Json(const std::string& name) {
    return nlohmann::json::parse(Content(name), nullptr, false);
  }
  // Runs a pipeline of these stages and returns the KL of its own evaluation.
  double Divergence(const std::string& name, const std::string& stages,
                    const std::string& more = "") {
    const ProgramResult result = RunPipeline(
        Pipeline(name, stages, "gptq_v2", kShortEvaluate + more), {"--json", Path(name + ".json")});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const nlohmann::json report = Json(name + ".json");
    return result.exit_code == 0 ? report["evaluation"]["kl_mean"].get<double>() : -1;
  }
  // What a window of 64 tokens takes while it is drawn.
  double DrawnWindowBytes() {
    const nlohmann::json config = nlohmann::json::parse(std::ifstream(model_ + "/config.json"));
    const double kv =
        config["num_key_value_heads"].get<double>() * config["head_dim"].get<double>();
    return 2 * 4 * kv * 64 * 4 + 4 * 2048;
  }
  // What `plan` says of a qat stage.
  nlohmann::json Planned(const std::string& name, const std::string& train) {
    const ProgramResult result =
        Program({"plan", Pipeline(name, Qat(Train(train))), "--json", Path(name + ".json")});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return Json(name + ".json");
  }
  // Starts `run NAME.yaml`, kills all of it once its loss curve holds `text`; false when it was
  // finished before.
  bool RunAndKill(const std::string& name, const std::string& text) {
    const pid_t child = fork();
    if (child == 0) {
      setpgid(0, 0);
      if (freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
      if (freopen("/dev/null", "w", stdout) == nullptr) _exit(1);
      execl(QM_PROGRAM, QM_PROGRAM, "run", Path(name + ".yaml").c_str(), "--resume",
            static_cast<char*>(nullptr));
      _exit(127);
    }
    const std::string curve = name + ".work/training/qat.jsonl";
    int status = 0;
    for (int i = 0; i < 30000; ++i) {
      if (waitpid(child, &status, WNOHANG) == child) return false;
      if (Content(curve).find(text) != std::string::npos) break;
      usleep(1000);
    }
    kill(-child, SIGKILL);
    return waitpid(child, &status, 0) == child && WIFSIGNALED(status);
  }
  // Files of saved states.
  int States(const std::string& name) {
    int count = 0;
    for (const auto& [file, content] : Tree(Path(name + ".work/training"))) {
      count += fs::path(file).extension() == ".safetensors" ? 1 : 0;
    }
    return count;
  }
};

TEST_F(TrainTest, QatIsNearerThanTheRoundingItStartsFrom) {
  const std::string stages = Qat(Train(", block_tokens: 512, lr: 3e-4"));
  const double rounded =
      Divergence("ptq", std::string("  - {use: ptq, options: {variant: mse, ") + kGrid + "}}\n");
  const double trained = Divergence("a", stages);
  // It is 0.38 to 0.55.
  EXPECT_LT(trained, 0.85 * rounded);
  EXPECT_GT(trained, 0);
  EXPECT_EQ(Divergence("b", stages), trained);
  EXPECT_EQ(Tree(Path("a.out")), Tree(Path("b.out")));
  EXPECT_EQ(Content("a.work/training/qat.jsonl"), Content("b.work/training/qat.jsonl"));
  const nlohmann::json report = Json("a.json");
  EXPECT_GT(report["stages"][0]["loss_first"], 0.0);
  EXPECT_EQ(report["stages"][0]["slots"], 28);
  EXPECT_EQ(States("a"), 0) << "a finished training leaves its state behind";
}

// Drawing thousands of windows takes more than this training: keys and values in f32 of 4 layers
// and logits of 2048 tokens for each window, and 4 bytes per token on disk.
TEST_F(TrainTest, PlansCountTextThatTheModelWrites) {
  const double window = DrawnWindowBytes();
  const nlohmann::json few = Planned("few", ", block_tokens: 0, sampled_tokens: 128000");
  const nlohmann::json many = Planned("many", ", block_tokens: 0, sampled_tokens: 256000");
  const auto more = [&](const char* key) {
    return many[key].get<double>() - few[key].get<double>();
  };
  EXPECT_NEAR(more("peak_host_bytes"), 2000 * window, 0.05 * 2000 * window);
  EXPECT_EQ(more("work_bytes"), 4 * 128000);
}

// The same for calibration text, whose hidden states alone are a quarter of that.
TEST_F(TrainTest, PlansCountCalibrationTextThatTheModelWrites) {
  const auto planned = [&](const std::string& name, int samples) {
    const std::string path =
        Pipeline(name, "  - {use: gptq, options: {bits: 4, group_size: 64}}\n");
    const ProgramResult result =
        Program({"plan", path, "--json", Path(name + ".json"), "--set", "calibration.text=self",
                 "--set", "calibration.sequence_length=64", "--set",
                 "calibration.samples=" + std::to_string(samples)});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return Json(name + ".json")["peak_host_bytes"].get<double>();
  };
  EXPECT_GT(planned("many", 4000) - planned("few", 2000), 2000 * DrawnWindowBytes());
}

TEST_F(TrainTest, ThreadsDoNotMatter) {
  const std::string stages = Qat(Train(", block_tokens: 256", 3));
  ASSERT_EQ(RunPipeline(Pipeline("a", stages)).exit_code, 0);
  ASSERT_EQ(RunPipeline(Pipeline("b", stages), {}, {"taskset -c 0"}).exit_code, 0);
  EXPECT_EQ(Tree(Path("a.out")), Tree(Path("b.out")));
}

TEST_F(TrainTest, KilledAndContinuedEndsInTheSameBytes) {
  const std::string stages = Qat(Train(", block_tokens: 512, save_seconds: 0, average: 0.5", 12));
  ASSERT_EQ(RunPipeline(Pipeline("whole", stages, "gptq_v2")).exit_code, 0);
  Pipeline("cut", stages, "gptq_v2");
  // In the middle of a block, behind the first saved step, and later.
  for (const char* moment :
       {R"("blocks","block":2)", R"("end_to_end","step":2)", R"("end_to_end","step":8)"}) {
    EXPECT_TRUE(RunAndKill("cut", moment)) << "finished before " << moment;
    EXPECT_EQ(States("cut"), 1) << moment;
    EXPECT_FALSE(fs::exists(Path("cut.out")));
  }
  const ProgramResult last =
      RunPipeline(Path("cut.yaml"), {"--resume", "--json", Path("cut.json")});
  ASSERT_EQ(last.exit_code, 0) << last.err;
  EXPECT_EQ(Tree(Path("cut.out")), Tree(Path("whole.out")));
  EXPECT_EQ(Content("cut.work/training/qat.jsonl"), Content("whole.work/training/qat.jsonl"));
  for (const auto& [file, content] : Tree(Path("cut.work/training"))) {
    EXPECT_EQ(file, "qat.jsonl") << "left behind";
  }
  // Finished: nothing is trained again.
  const ProgramResult again =
      RunPipeline(Path("cut.yaml"), {"--resume", "--json", Path("cut.json")});
  ASSERT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(Json("cut.json")["reused_units"], Json("cut.json")["units"]);
  EXPECT_EQ(Tree(Path("cut.out")), Tree(Path("whole.out")));
}

// Text that the model writes is drawn once, beside the state, and gone with it.
TEST_F(TrainTest, TextThatTheModelWroteIsKeptUntilTheEnd) {
  const std::string stages =
      Qat(Train(", block_tokens: 0, save_seconds: 0, sampled_tokens: 640", 12));
  ASSERT_EQ(RunPipeline(Pipeline("whole", stages)).exit_code, 0);
  Pipeline("cut", stages);
  ASSERT_TRUE(RunAndKill("cut", R"("end_to_end","step":4)"));
  std::string text;
  for (const auto& entry : fs::directory_iterator(Path("cut.work/training"))) {
    if (entry.path().string().find(".text.safetensors") != std::string::npos) text = entry.path();
  }
  ASSERT_NE(text, "");
  const auto drawn = fs::last_write_time(text);
  ASSERT_TRUE(RunAndKill("cut", R"("end_to_end","step":8)"));
  EXPECT_EQ(fs::last_write_time(text), drawn);
  const ProgramResult last = RunPipeline(Path("cut.yaml"), {"--resume"});
  ASSERT_EQ(last.exit_code, 0) << last.err;
  EXPECT_EQ(Tree(Path("cut.out")), Tree(Path("whole.out")));
  EXPECT_EQ(Content("cut.work/training/qat.jsonl"), Content("whole.work/training/qat.jsonl"));
  EXPECT_EQ(States("cut"), 0);
  // Another text is another training.
  Pipeline("plain", Qat(Train(", block_tokens: 0, save_seconds: 0", 12)));
  ASSERT_EQ(RunPipeline(Path("plain.yaml")).exit_code, 0);
  EXPECT_NE(Content("plain.work/training/qat.jsonl"), Content("whole.work/training/qat.jsonl"));
}

TEST_F(TrainTest, AStateThatIsCutOffIsRefusedWithWhatToDo) {
  const std::string stages = Qat(Train(", block_tokens: 0, save_seconds: 0", 12));
  Pipeline("cut", stages);
  ASSERT_TRUE(RunAndKill("cut", R"("end_to_end","step":4)"));
  std::string state;
  for (const auto& entry : fs::directory_iterator(Path("cut.work/training"))) {
    if (entry.path().extension() == ".safetensors") state = entry.path();
  }
  ASSERT_NE(state, "");
  fs::resize_file(state, fs::file_size(state) / 2);
  const ProgramResult refused = RunPipeline(Path("cut.yaml"), {"--resume"});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.err, AllOf(HasSubstr(state), HasSubstr("remove")));
  fs::remove(state);
  EXPECT_EQ(RunPipeline(Path("cut.yaml"), {"--resume"}).exit_code, 0);
}

TEST_F(TrainTest, AnotherRateIsAnotherTraining) {
  const std::string pipeline = Pipeline("p", Qat(Train(", block_tokens: 0", 2)));
  ASSERT_EQ(RunPipeline(pipeline).exit_code, 0);
  const auto before = Tree(Path("p.out"));
  const ProgramResult more = RunPipeline(
      pipeline, {"--resume", "--json", Path("r.json"), "--set", "stages.0.train.lr=1e-3"});
  ASSERT_EQ(more.exit_code, 0) << more.err;
  EXPECT_EQ(Json("r.json")["reused_units"], 0);
  EXPECT_NE(Tree(Path("p.out"))["model.safetensors"], before.at("model.safetensors"));
  // However little it differs.
  const ProgramResult close = RunPipeline(
      pipeline, {"--resume", "--json", Path("c.json"), "--set", "stages.0.train.lr=1.00000001e-3"});
  ASSERT_EQ(close.exit_code, 0) << close.err;
  EXPECT_EQ(Json("c.json")["reused_units"], 0);
  // What it costs does not matter.
  const ProgramResult cheaper = RunPipeline(
      pipeline, {"--resume", "--json", Path("d.json"), "--set", "stages.0.train.lr=1.00000001e-3",
                 "--set", "stages.0.train.checkpointing=false"});
  ASSERT_EQ(cheaper.exit_code, 0) << cheaper.err;
  EXPECT_EQ(Json("d.json")["reused_units"], Json("d.json")["units"]);
  for (const char* change : {"average=0.9", "beta1=0.5", "sampled_tokens=64"}) {
    const ProgramResult other = RunPipeline(
        pipeline, {"--resume", "--json", Path("e.json"), "--set", "stages.0.train.lr=1.00000001e-3",
                   "--set", std::string("stages.0.train.") + change});
    ASSERT_EQ(other.exit_code, 0) << other.err;
    EXPECT_EQ(Json("e.json")["reused_units"], 0) << change;
  }
}

TEST_F(TrainTest, StartsFromAnotherStage) {
  const std::string gptq = std::string("  - {use: gptq, options: {") + kGrid + "}}\n";
  const double before = Divergence("gptq", gptq, kCalibration);
  std::string qat = Qat(Train(", block_tokens: 0, lr: 1e-4", 16), ", init: gptq");
  qat.insert(qat.find('{') + 1, "requantize: true, ");
  const double after = Divergence("both", gptq + qat, kCalibration);
  EXPECT_LT(after, 0.9 * before);  // 0.45 to 0.54
  // No step: what gptq left.
  std::string none = Qat(Train(", block_tokens: 0", 0), ", init: gptq");
  none.insert(none.find('{') + 1, "requantize: true, ");
  EXPECT_NEAR(Divergence("none", gptq + none, kCalibration), before, 1e-6);
  // Another grid than that of the stage before.
  std::string other = qat;
  other.replace(other.find("bits: 3"), 7, "bits: 4");
  const ProgramResult refused =
      RunPipeline(Pipeline("other", gptq + other, "gptq_v2", kCalibration));
  EXPECT_NE(refused.exit_code, 0);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("bits"), HasSubstr("error: ")));
  EXPECT_FALSE(fs::exists(Path("other.out")));
  // Nothing to start from.
  const ProgramResult alone = RunPipeline(Pipeline("alone", qat, "gptq_v2"));
  EXPECT_NE(alone.exit_code, 0);
  EXPECT_THAT(alone.err, HasSubstr("init"));
}

TEST_F(TrainTest, AHugeRateIsAnErrorAndLeavesNothing) {
  for (const char* phase : {"blocks", "end_to_end"}) {
    const bool blocks = phase == std::string("blocks");
    const std::string name = std::string("p-") + phase;
    const ProgramResult result =
        RunPipeline(Pipeline(name, Qat(Train(blocks ? ", block_tokens: 3840, block_lr: 1"
                                                    : ", block_tokens: 0, lr: 1, warmup: 0",
                                             30),
                                       std::string(", scale_lr: 1000, phases: ") + phase)));
    EXPECT_EQ(result.exit_code, 1) << phase << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr("error: "), HasSubstr("stage qat"),
                                  ::testing::AnyOf(HasSubstr("the training failed at step "),
                                                   HasSubstr("the training diverged at step ")),
                                  HasSubstr("use a smaller train.lr")))
        << phase;
    EXPECT_FALSE(fs::exists(Path(name + ".out")));
    EXPECT_FALSE(fs::exists(Path(name + ".out.tmp")));
  }
}

TEST_F(TrainTest, RefusedBeforeAnyWork) {
  const auto refused = [&](const std::string& stages, const std::string& format,
                           const std::vector<std::string>& texts) {
    const ProgramResult result = RunPipeline(Pipeline("p", stages, format));
    EXPECT_EQ(result.exit_code, 3) << result.err;
    for (const std::string& text : texts) EXPECT_THAT(result.err, HasSubstr(text));
    EXPECT_FALSE(fs::exists(Path("p.out")));
    EXPECT_FALSE(fs::exists(Path("p.work/units")));
  };
  std::string nowhere = Qat(Train(""));
  nowhere.replace(nowhere.find("calib.txt"), 9, "gone.txt");
  refused(nowhere, "gptq_v2", {"p.yaml:5:5: 'train.data' does not exist: " + Path("gone.txt")});
  refused(Qat(Train("")), "peft",
          {"stage 'qat' cannot be written as peft", "leaves no adapter", "another export format"});
  refused(Qat(Train(", tokens: 100")), "gptq_v2",
          {"p.yaml:5:5: stage 'qat': 'train' has both 'steps' and 'tokens'"});
  std::ofstream(Path("short.txt")) << "A few words.";
  std::string few = Qat(Train(""));
  few.replace(few.find("calib.txt"), 9, "short.txt");
  refused(few, "gptq_v2", {"short.txt", "token"});
  std::ofstream(Path("lines.jsonl")) << "{\"body\": \"a text under another key\"}\n";
  std::string key = Qat(Train(""));
  key.replace(key.find("calib.txt"), 9, "lines.jsonl");
  refused(key, "gptq_v2", {"lines.jsonl", "text"});
  const std::string adapter = "  - {use: oftq, " + Train(", loss: lm");
  refused(adapter + "}\n", "dense",
          {"a dense file cannot hold the adapters of stage 'oftq'", "merge: true"});
  for (const char* format : {"peft", "quantmill"}) {
    refused("  - {use: ptq, options: {group_size: 64}}\n" + adapter +
                ", overrides: [{layers: [\"*.q_proj\"], options: {block: 16}}]}\n",
            format, {"its options differ from layer to layer", "the same options"});
  }
}

TEST_F(TrainTest, NothingToLearnIsSaid) {
  const ProgramResult result =
      RunPipeline(Pipeline("p", "  - {use: oftq, " + Train("", 1) + "}\n", "peft"));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err + result.out, HasSubstr("stage 'oftq' has nothing to learn"));
}

}  // namespace
}  // namespace quantmill::testing
