// What the file system can do to a run: folders that cannot be written, disks that fill, files that
// vanish or shrink. Each ends in one error, with nothing half-written under the final name.
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

// A stage of some seconds, so that something can happen while it runs.
constexpr char kSlow[] =
    "  - {use: org.example.offender, layers: ['model.layers.0.*', 'model.layers.1.mlp.*'], "
    "options: {misbehave: slow}}\n";
constexpr char kQuick[] = "  - {use: ptq}\n";
constexpr int kNoMount = 77;  // of the scripts below: this machine does not let tests mount

class FileFaultsTest : public RunFixture {
 protected:
  // Runs shell text in DIR with a file system of `size` mounted at DIR/small, seen by it alone.
  ProgramResult OnSmallDisk(const std::string& size, const std::string& text) {
    fs::create_directories(Path("small"));
    std::ofstream(Path("script")) << "cd '" << directory_ << "'\nmount -t tmpfs -o size=" << size
                                  << " none small || exit " << kNoMount << "\n"
                                  << text;
    ProgramResult result = Shell("unshare -m bash " + Path("script"));
    if (result.err.find("unshare") != std::string::npos) result.exit_code = kNoMount;
    return result;
  }
  static std::string Command(const std::string& arguments) {
    return std::string("'") + QM_PROGRAM + "' run p.yaml --plugin '" + QM_OFFENDER + "' " +
           arguments;
  }
  // The program, and `then` when its first unit has begun.
  static std::string RunAnd(const std::string& journal, const std::string& then) {
    return Command("&") + "\nprogram=$!\nwhile ! grep -qs begin " + journal +
           "; do kill -0 $program 2>/dev/null || break; sleep 0.02; done\n" + then +
           "\nwait $program\n";
  }
  ProgramResult InFolder(const std::string& text) {
    std::ofstream(Path("script")) << "cd '" << directory_ << "'\n" << text;
    return Shell("bash " + Path("script"));
  }
  // A copy of the model that a test may damage.
  void CopyModel() {
    const std::string original = model_;
    model_ = Path("model");
    fs::copy(original, model_);
  }
};

constexpr char kFill[] = "dd if=/dev/zero of=small/fill bs=4k 2>/dev/null";

TEST_F(FileFaultsTest, FolderThatCannotBeMadeIsRefusedBeforeWork) {
  // Root may write anywhere, but not here.
  const std::string pipeline = Pipeline("p", kQuick);
  for (const std::string set : {"export.path=/proc/quantmill-out", "run.work_dir=/proc/work"}) {
    const ProgramResult result = RunPipeline(pipeline, {"--set", set});
    EXPECT_EQ(result.exit_code, 3) << result.err;
    EXPECT_THAT(result.err, HasSubstr("cannot be made in /proc: "));
    EXPECT_FALSE(fs::exists(Path("p.work")));
    EXPECT_FALSE(fs::exists(Path("p.out")));
  }
  for (const auto& entry : fs::directory_iterator(directory_)) {
    EXPECT_THAT(entry.path().filename().string(), Not(HasSubstr(".quantmill-")));
  }
}

TEST_F(FileFaultsTest, DiskThatFillsDuringTheRunLeavesNoOutput) {
  Pipeline("p", kSlow);
  const ProgramResult result =
      OnSmallDisk("4m", "sed -i 's#path: p.out#path: small/p.out#' p.yaml\n" +
                            RunAnd("p.work/journal.jsonl", kFill) +
                            "echo \"exit $?\"; ls -A small; rm small/fill\n" + Command("--resume") +
                            "\necho \"resumed $?\"\n");
  if (result.exit_code == kNoMount) GTEST_SKIP() << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("exit 1\nfill\n"), HasSubstr("resumed 0"))) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("No space left on device"), HasSubstr("--resume")));
}

TEST_F(FileFaultsTest, FullWorkDirectoryIsAnErrorAndNoCrash) {
  Pipeline("p", kSlow);
  // Full before the run begins, and while it goes on.
  const ProgramResult result =
      OnSmallDisk("4m", std::string("sed -i 's#work_dir: p.work#work_dir: small/kept#' p.yaml\n") +
                            kFill + "\n" + Command("") + "\necho \"full $?\"; rm small/fill\n" +
                            RunAnd("small/kept/journal.jsonl", kFill) +
                            "echo \"exit $?\"; ls p.out; rm small/fill\n" + Command("--resume") +
                            "\necho \"resumed $?\"\n");
  if (result.exit_code == kNoMount) GTEST_SKIP() << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("full 1"), HasSubstr("exit 1\n"), HasSubstr("resumed 0"),
                                Not(HasSubstr("config.json"))))
      << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("No space left on device"), Not(HasSubstr("SIGBUS")),
                                Not(HasSubstr("Bus error"))));
}

TEST_F(FileFaultsTest, ReadOnlyDiskIsRefused) {
  Pipeline("p", kQuick);
  const ProgramResult result = OnSmallDisk(
      "4m", "sed -i 's#path: p.out#path: small/p.out#' p.yaml; mount -o remount,ro small\n" +
                Command("") + "\necho \"exit $?\"\n");
  if (result.exit_code == kNoMount) GTEST_SKIP() << result.err;
  EXPECT_THAT(result.out, HasSubstr("exit 3"));
  EXPECT_THAT(result.err, HasSubstr("is not writable"));
  EXPECT_FALSE(fs::exists(Path("p.work")));
}

TEST_F(FileFaultsTest, ModelThatVanishesDuringTheRunIsNamed) {
  CopyModel();
  Pipeline("p", kSlow);
  const ProgramResult result =
      InFolder(RunAnd("p.work/journal.jsonl", "mv model/model.safetensors kept"));
  EXPECT_THAT(result.exit_code, AnyOf(1, 3)) << result.err;
  EXPECT_THAT(result.err, HasSubstr("neither model.safetensors nor model.safetensors.index.json"));
  EXPECT_FALSE(fs::exists(Path("p.out")));
  fs::rename(Path("kept"), Path("model/model.safetensors"));
  const ProgramResult resumed = RunPipeline(Path("p.yaml"), {"--resume"});
  EXPECT_EQ(resumed.exit_code, 0) << resumed.err;
}

TEST_F(FileFaultsTest, ModelThatShrinksDuringTheRunIsNamedAsTheCause) {
  CopyModel();
  Pipeline("p", kSlow);
  const ProgramResult result =
      InFolder(RunAnd("p.work/journal.jsonl", "truncate -s 100000 model/model.safetensors"));
  EXPECT_THAT(result.exit_code, AnyOf(1, 3)) << result.err;
  EXPECT_THAT(result.err, AnyOf(HasSubstr("became shorter"), HasSubstr("the file holds only")));
  EXPECT_FALSE(fs::exists(Path("p.out")));
}

// Nothing to be learnt from it, but nothing that breaks either: damping and the treatment of dead
// inputs carry it.
TEST_F(FileFaultsTest, TextWithoutContentIsUsedWithAWarning) {
  std::ofstream text(Path("dead.txt"));
  for (int i = 0; i < 2000; ++i) text << "a ";
  text.close();
  const std::string calibration =
      "calibration: {text: dead.txt, samples: 2, sequence_length: 64}\n";
  const ProgramResult result = RunPipeline(
      Pipeline("p", "  - {use: gptq, options: {damp: 0.0}}\n", "quantmill", calibration),
      {"--json", Path("r.json")});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("different tokens in 128"), HasSubstr("needed damp")));
  std::ifstream file(Path("r.json"));
  const auto json = nlohmann::json::parse(file);
  EXPECT_THAT(json["warnings"].dump(), HasSubstr("different tokens"));
  EXPECT_LT(json["stages"][0]["weight_nmse"], 0.1);
}

TEST_F(FileFaultsTest, TypeThatTheDeviceDoesNotComputeInIsAWarning) {
  const ProgramResult result = RunPipeline(Pipeline("p", kQuick), {"--set", "model.dtype=bf16"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("model.dtype has no effect on cpu; it computes in F32"));
}

}  // namespace
}  // namespace quantmill::testing
