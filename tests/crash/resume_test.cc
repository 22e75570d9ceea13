// Runs that are cut off and continued, refused runs, and runs end to end.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

namespace fs = std::filesystem;

constexpr char kTwoStages[] =
    "  - {name: att, use: ptq, layers: ['*.self_attn.*'], options: {bits: 8, group_size: -1}}\n"
    "  - {name: mlp, use: gptq, layers: ['*.mlp.*'], options: {bits: 4, group_size: 64}}\n";

class ResumeTest : public RunFixture {
 protected:
  nlohmann::json Json(const std::string& name) {
    std::ifstream file(Path(name));
    return nlohmann::json::parse(file, nullptr, false);
  }
  // The journal cut after its first `lines` lines, and whatever `tail` follows.
  void CutJournal(const std::string& name, size_t lines, const std::string& tail) {
    std::ifstream in(Path(name));
    std::string line, kept;
    for (size_t i = 0; i < lines && std::getline(in, line); ++i) kept += line + "\n";
    in.close();
    std::ofstream(Path(name)) << kept << tail;
  }
};

TEST_F(ResumeTest, EveryUnitBoundaryGivesTheSameBytes) {
  const std::string pipeline = Pipeline("p", kTwoStages, "compressed-tensors", kCalibration);
  const ProgramResult whole = RunPipeline(pipeline, {"--json", Path("r.json")});
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  const auto expected = Tree(Path("p.out"));
  const std::string journal = Tree(Path("p.work"))["journal.jsonl"];
  const size_t lines = static_cast<size_t>(std::count(journal.begin(), journal.end(), '\n'));
  ASSERT_GE(lines, 8u);
  for (size_t kept = 0; kept < lines; kept += 2) {
    fs::remove_all(Path("p.out"));
    std::ofstream(Path("p.work/journal.jsonl")) << journal;
    CutJournal("p.work/journal.jsonl", kept, kept % 4 == 0 ? "{\"type\":\"en" : "");
    const ProgramResult resumed = RunPipeline(pipeline, {"--resume", "--json", Path("r.json")});
    ASSERT_EQ(resumed.exit_code, 0) << kept << resumed.err;
    EXPECT_EQ(Tree(Path("p.out")), expected) << "after " << kept << " lines";
    EXPECT_EQ(Json("r.json")["reused_units"], kept / 2);
  }
}

TEST_F(ResumeTest, KilledAtRandomMomentsEndsInTheSameBytes) {
  const std::string stages =
      "  - {name: qkv, use: gptq, layers: ['re:.*[qkv]_proj', '*.mlp.*'], options: {group_size: "
      "64}}\n"
      "  - {name: slow, use: org.example.offender, layers: ['*.o_proj'], "
      "options: {misbehave: slow}}\n";
  const std::string pipeline = Pipeline("a", stages, "quantmill", kCalibration);
  ASSERT_EQ(RunPipeline(pipeline).exit_code, 0);
  const std::string other = Pipeline("b", stages, "quantmill", kCalibration);
  int kills = 0;
  for (int delay_ms = 100; delay_ms < 1300; delay_ms += 130) {
    const pid_t child = fork();
    if (child == 0) {
      setpgid(0, 0);
      if (freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
      if (freopen("/dev/null", "w", stdout) == nullptr) _exit(1);
      execl(QM_PROGRAM, QM_PROGRAM, "run", other.c_str(), "--plugin", QM_OFFENDER, "--resume",
            static_cast<char*>(nullptr));
      _exit(1);
    }
    usleep(static_cast<useconds_t>(delay_ms) * 1000);
    kills += kill(child, SIGKILL) == 0;
    int status = 0;
    waitpid(child, &status, 0);
    usleep(50 * 1000);  // the worker dies with its supervisor
  }
  EXPECT_GT(kills, 0);
  const ProgramResult last = RunPipeline(other, {"--resume"});
  ASSERT_EQ(last.exit_code, 0) << last.err;
  EXPECT_EQ(Tree(Path("a.out")), Tree(Path("b.out")));
}

TEST_F(ResumeTest, InProcessAndWorkerGiveTheSameBytes) {
  ASSERT_EQ(RunPipeline(Pipeline("a", kTwoStages, "quantmill", kCalibration)).exit_code, 0);
  const ProgramResult result =
      RunPipeline(Pipeline("b", kTwoStages, "quantmill", kCalibration), {"--in-process"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(Tree(Path("a.out")), Tree(Path("b.out")));
}

TEST_F(ResumeTest, FinishedRunIsVerifiedAgain) {
  const std::string pipeline = Pipeline("p", kTwoStages, "quantmill", kCalibration);
  ASSERT_EQ(RunPipeline(pipeline, {"--resume"}).exit_code, 0);  // no journal: it starts
  const ProgramResult refused = RunPipeline(pipeline);
  EXPECT_EQ(refused.exit_code, 3);
  EXPECT_THAT(refused.err, HasSubstr("--resume"));
  const ProgramResult again = RunPipeline(pipeline, {"--resume", "--json", Path("r.json")});
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(Json("r.json")["reused_units"], Json("r.json")["units"]);
}

TEST_F(ResumeTest, ChangedOptionsRedoOnlyWhatDependsOnThem) {
  const std::string pipeline = Pipeline("p", kTwoStages, "quantmill", kCalibration);
  ASSERT_EQ(RunPipeline(pipeline).exit_code, 0);
  const ProgramResult changed = RunPipeline(
      pipeline, {"--resume", "--json", Path("r.json"), "--set", "stages.1.options.bits=8"});
  ASSERT_EQ(changed.exit_code, 0) << changed.err;
  // The attention stage needs no statistics: its units stay.
  EXPECT_EQ(Json("r.json")["reused_units"].get<int>() * 2, Json("r.json")["units"].get<int>());
}

TEST_F(ResumeTest, DamagedUnitIsComputedAgain) {
  const std::string pipeline = Pipeline("p", kTwoStages, "quantmill", kCalibration);
  ASSERT_EQ(RunPipeline(pipeline).exit_code, 0);
  const auto expected = Tree(Path("p.out"));
  fs::remove_all(Path("p.out"));
  for (const auto& entry : fs::recursive_directory_iterator(Path("p.work/units"))) {
    if (entry.path().filename() != "unit.json") continue;
    std::ifstream file(entry.path());
    if (nlohmann::json::parse(file)["stage"] != "att") continue;
    fs::resize_file(entry.path().parent_path() / "out.safetensors", 100);
    break;
  }
  const ProgramResult resumed = RunPipeline(pipeline, {"--resume"});
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_EQ(Tree(Path("p.out")), expected);
}

// A unit that needs statistics, damaged before or after the last block that is still measured.
TEST_F(ResumeTest, DamagedUnitWithStatisticsIsMeasuredAndComputedAgain) {
  const std::string pipeline = Pipeline("p", kTwoStages, "quantmill", kCalibration);
  ASSERT_EQ(RunPipeline(pipeline, {"--json", Path("r.json")}).exit_code, 0);
  const auto expected = Tree(Path("p.out"));
  const int units = Json("r.json")["units"];
  const auto work = Tree(Path("p.work/units"));
  int damaged = 0;
  for (const auto& [name, content] : work) {
    if (fs::path(name).filename() != "unit.json") continue;
    const auto unit = nlohmann::json::parse(content);
    if (unit["stage"] != "mlp") continue;
    const fs::path file = fs::path(Path("p.work/units")) / fs::path(name).parent_path();
    if (++damaged % 2 == 0) {
      fs::remove(file / "out.safetensors");
    } else {
      // One bit of the data, which only the digest can notice.
      std::fstream data(file / "out.safetensors", std::ios::in | std::ios::out | std::ios::binary);
      data.seekg(-1, std::ios::end);
      const char flipped = static_cast<char>(data.get() ^ 1);
      data.seekp(-1, std::ios::end);
      data.put(flipped);
    }
    fs::remove_all(Path("p.out"));
    const ProgramResult resumed = RunPipeline(pipeline, {"--resume", "--json", Path("r.json")});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    EXPECT_THAT(resumed.err, HasSubstr("computed again"));
    EXPECT_EQ(Json("r.json")["reused_units"], units - 1);
    EXPECT_EQ(Tree(Path("p.out")), expected) << "block " << unit["block"];
  }
  EXPECT_GE(damaged, 2);
}

// Blocks without a slot of any stage, before and behind one with statistics.
TEST_F(ResumeTest, BlocksWithoutSlotsDoNotMatter) {
  for (const std::string layers : {"model.layers.1.mlp.*", "model.layers.0.mlp.*"}) {
    const std::string name = layers.substr(13, 1);
    const std::string pipeline = Pipeline(
        name, "  - {use: gptq, layers: ['" + layers + "'], options: {bits: 4, group_size: 64}}\n",
        "quantmill", kCalibration);
    ASSERT_EQ(RunPipeline(pipeline).exit_code, 0);
    const auto expected = Tree(Path(name + ".out"));
    const ProgramResult again = RunPipeline(pipeline, {"--resume", "--json", Path("r.json")});
    ASSERT_EQ(again.exit_code, 0) << again.err;
    EXPECT_EQ(Json("r.json")["reused_units"], 1) << layers;
    fs::remove_all(Path(name + ".out"));
    ASSERT_EQ(RunPipeline(pipeline, {"--resume"}).exit_code, 0);
    EXPECT_EQ(Tree(Path(name + ".out")), expected);
  }
}

// The same pipeline with other options puts its new output in the place of its old one.
TEST_F(ResumeTest, OwnOutputIsReplaced) {
  const std::string pipeline = Pipeline("p", kTwoStages, "quantmill", kCalibration);
  ASSERT_EQ(RunPipeline(pipeline).exit_code, 0);
  const auto before = Tree(Path("p.out"));
  const ProgramResult changed =
      RunPipeline(pipeline, {"--resume", "--set", "stages.0.options.bits=4"});
  ASSERT_EQ(changed.exit_code, 0) << changed.err;
  EXPECT_NE(Tree(Path("p.out")), before);
  EXPECT_FALSE(fs::exists(Path("p.out.quantmill-old")));
  ASSERT_EQ(RunPipeline(pipeline, {"--resume"}).exit_code, 0);
  EXPECT_EQ(Tree(Path("p.out")), before);
}

TEST_F(ResumeTest, ThreadsDoNotMatter) {
  const std::string pipeline = Pipeline("p", kTwoStages, "quantmill", kCalibration);
  ASSERT_EQ(RunPipeline(pipeline, {}, {"taskset -c 0"}).exit_code, 0);
  const auto expected = Tree(Path("p.out"));
  const ProgramResult again = RunPipeline(pipeline, {"--resume", "--json", Path("r.json")});
  ASSERT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(Json("r.json")["reused_units"], Json("r.json")["units"]);
  const std::string other = Pipeline("q", kTwoStages, "quantmill", kCalibration);
  ASSERT_EQ(RunPipeline(other).exit_code, 0);
  EXPECT_EQ(Tree(Path("q.out")), expected);
}

// A later stage works on what an earlier one left, and what it gives up is dense again.
TEST_F(ResumeTest, RequantizedSlots) {
  const std::string stages =
      "  - {name: first, use: ptq, layers: ['*.mlp.*'], options: {bits: 8, group_size: 64}}\n"
      "  - {name: second, use: org.example.offender, layers: ['*.down_proj'], requantize: true, "
      "on_error: keep-dense, overrides: [{layers: ['model.layers.0.*'], options: {misbehave: "
      "fail}}]}\n"
      "  - {name: third, use: gptq, layers: ['*.self_attn.*'], options: {bits: 4, group_size: "
      "64}}\n";
  const std::string pipeline = Pipeline("p", stages, "quantmill", kCalibration);
  const ProgramResult whole = RunPipeline(pipeline, {"--json", Path("r.json")});
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  const auto result = Json("r.json");
  EXPECT_THAT(result["unquantized"].dump(), HasSubstr("model.layers.0.mlp.down_proj"));
  EXPECT_THAT(result["checks"].dump(), HasSubstr("agree with the model in memory"));
  const auto slots =
      nlohmann::json::parse(Tree(Path("p.out"))["quantmill_provenance.json"])["slots"];
  EXPECT_EQ(slots["model.layers.1.mlp.down_proj"].size(), 2u);
  const auto expected = Tree(Path("p.out"));
  fs::remove_all(Path("p.out"));
  const std::string journal = Tree(Path("p.work"))["journal.jsonl"];
  CutJournal("p.work/journal.jsonl", 6, "");
  ASSERT_EQ(RunPipeline(pipeline, {"--resume"}).exit_code, 0);
  EXPECT_EQ(Tree(Path("p.out")), expected);
}

TEST_F(ResumeTest, RefusesBeforeWorking) {
  fs::create_directories(Path("p.out"));
  const ProgramResult exists = RunPipeline(Pipeline("p", kTwoStages, "quantmill", kCalibration));
  EXPECT_EQ(exists.exit_code, 3);
  EXPECT_THAT(exists.err, HasSubstr("p.out"));
  EXPECT_EQ(RunPipeline(Path("p.yaml"), {"--resume"}).exit_code, 3);

  const ProgramResult short_text =
      RunPipeline(Pipeline("q", kTwoStages, "quantmill",
                           "calibration: {text: calib.txt, samples: 3000, sequence_length: 64}\n"));
  EXPECT_EQ(short_text.exit_code, 3);
  EXPECT_THAT(short_text.err, AllOf(HasSubstr("calib.txt"), HasSubstr("token")));
  EXPECT_EQ(RunPipeline(Path("nowhere.yaml")).exit_code, 2);
}

TEST_F(ResumeTest, NotANumberIsNamed) {
  // Row 0, column 0 of one weight becomes a NaN.
  fs::copy(model_, Path("model"), fs::copy_options::recursive);
  std::fstream file(Path("model/model.safetensors"),
                    std::ios::in | std::ios::out | std::ios::binary);
  uint64_t header_size = 0;
  file.read(reinterpret_cast<char*>(&header_size), 8);
  std::string header(header_size, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header_size));
  const auto entry = nlohmann::json::parse(header)["model.layers.1.self_attn.k_proj.weight"];
  file.seekp(
      static_cast<std::streamoff>(8 + header_size + entry["data_offsets"][0].get<uint64_t>()));
  file.write("\xff\xff\xff\xff", 4);
  file.close();
  model_ = Path("model");
  const ProgramResult result = RunPipeline(Pipeline("p", kTwoStages, "quantmill", kCalibration));
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("model.layers.1.self_attn.k_proj.weight"),
                                HasSubstr("not a number at row 0, column 0")));
}

TEST_F(ResumeTest, FullDiskLeavesNothingBehind) {
  const std::string pipeline = Pipeline("p", kTwoStages, "quantmill", kCalibration);
  std::ofstream(Path("limited")) << "#!/bin/bash\nulimit -f 200\ntrap '' XFSZ\nexec " << QM_PROGRAM
                                 << " run " << pipeline << " --plugin " << QM_OFFENDER << "\n";
  const int status =
      std::system(("bash " + Path("limited") + " >/dev/null 2>" + Path("err")).c_str());
  EXPECT_EQ(WEXITSTATUS(status), 1);
  std::ifstream file(Path("err"));
  std::stringstream err;
  err << file.rdbuf();
  EXPECT_THAT(err.str(), HasSubstr("error: "));
  EXPECT_FALSE(fs::exists(Path("p.out")));
  EXPECT_FALSE(fs::exists(Path("p.out.tmp")));
  EXPECT_EQ(RunPipeline(pipeline, {"--resume"}).exit_code, 0);
}

}  // namespace
}  // namespace quantmill::testing
