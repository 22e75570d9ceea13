// quantmill bench: the table, what is kept, interruptions, rows that fail, wrong input.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "gmock/gmock.h"
#include "quantmill/all.h"
#include "tests/crash/run_fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr char kOffender[] = "{use: org.example.offender, options: {misbehave: ";

std::string Content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

class BenchTest : public RunFixture {
 protected:
  std::string Bench(const std::string& rows, const std::string& more = "",
                    const std::string& models = "") {
    const std::string path = Path("bench.yaml");
    std::ofstream(path) << "version: 1\nmodels: ["
                        << (models.empty() ? "{name: tiny, path: " + model_ + "}" : models)
                        << "]\nrun: {device: cpu}\n"
                           "calibration: {text: calib.txt, samples: 4, sequence_length: 64}\n"
                           "evaluate: {text: calib.txt, context: 128, windows: 6}\n"
                        << more << "rows:\n"
                        << rows;
    return path;
  }
  ProgramResult Run(std::vector<std::string> more = {},
                    const std::vector<std::string>& environment = {}) {
    std::vector<std::string> arguments = {"bench",     Path("bench.yaml"), "--out",
                                          Path("out"), "--plugin",         QM_OFFENDER};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Program(arguments, environment);
  }
  Json Results() { return Json::parse(Content(Path("out/results.json")), nullptr, false); }
  Json Row(const std::string& name) {
    const Json results = Results();
    for (const Json& row : results["rows"]) {
      if (row["row"] == name) return row;
    }
    return Json::object();
  }
  // What of a row another run of the same bench repeats: all but times and memory.
  static Json Repeatable(Json row) {
    for (const char* key :
         {"quantize_seconds", "resumed", "peak_rss_bytes", "evaluation_seconds", "measured"}) {
      row.erase(key);
    }
    return row;
  }
  Json Table() {
    Json rows = Json::array();
    const Json results = Results();
    for (const Json& row : results["rows"]) rows.push_back(Repeatable(row));
    return rows;
  }
  bool OnlyTrains(const std::string& method) {
    const ProgramResult described = Program({"describe", method, "--json", "-"});
    const Json found = Json::parse(described.out, nullptr, false);
    return found.is_object() && found["capabilities"] == Json({QM_EXT_REPARAMETRIZE});
  }
  void ExpectRefused(int exit_code, const std::string& text, std::vector<std::string> more = {}) {
    const auto before = Tree(directory_);
    const ProgramResult result = Run(more);
    EXPECT_EQ(result.exit_code, exit_code) << result.err;
    EXPECT_EQ(result.out, "");
    EXPECT_THAT(result.err, AllOf(StartsWith("error: "), HasSubstr(text)));
    auto after = Tree(directory_);
    for (const char* name : {"stdout", "stderr"}) after.erase(name);
    auto expected = before;
    for (const char* name : {"stdout", "stderr"}) expected.erase(name);
    EXPECT_EQ(after, expected) << "something was written";
  }
};

constexpr char kRtn[] = "  - {name: rtn, stages: [{use: ptq, options: {bits: 8}}]}\n";
constexpr char kRtn3[] =
    "  - {name: rtn3, stages: [{use: ptq, options: {bits: 3, group_size: 64}}], export: {format: "
    "dense}}\n";

TEST_F(BenchTest, ComparesRowsWithTheOriginal) {
  Bench(std::string(kRtn) + kRtn3, "speed: {prompt: 16, new_tokens: 8, batch: [1, 2]}\n");
  const ProgramResult result = Run({"--json", "-"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(Json::parse(result.out, nullptr, false), Results());
  const Json results = Results();
  EXPECT_EQ(results["device"], "cpu");
  EXPECT_EQ(results["speed_batch"], Json({1, 2}));
  ASSERT_EQ(results["rows"].size(), 3u);
  for (const Json& row : results["rows"]) {
    for (const auto& [key, value] : row.items()) {
      EXPECT_TRUE(value.is_number() || value.is_string() || value.is_array()) << key;
    }
    for (const char* key :
         {"bits_per_weight", "size_bytes", "size_ratio", "peak_rss_bytes", "perplexity",
          "perplexity_stderr", "ppl_ratio", "kl_mean", "kl_mean_stderr", "top1_agreement",
          "top1_agreement_stderr", "tokens_per_second_b1", "prompt_tokens_per_second_b2",
          "tokens_per_second_b2_ratio", "measured"}) {
      EXPECT_TRUE(row.contains(key)) << key << " of " << row["row"];
    }
  }
  const Json original = Row("original"), rtn = Row("rtn"), rtn3 = Row("rtn3");
  // The noise floor.
  EXPECT_EQ(original["kl_mean"], 0.0);
  EXPECT_EQ(original["top1_agreement"], 1.0);
  EXPECT_EQ(original["ppl_ratio"], 1.0);
  EXPECT_EQ(original["bits_per_weight"], 16.0);
  EXPECT_EQ(original["tokens_per_second_b1_ratio"], 1.0);
  EXPECT_LT(rtn["kl_mean"], rtn3["kl_mean"]);
  EXPECT_LT(rtn["size_ratio"], 1.0);
  EXPECT_EQ(rtn3["format"], "dense");
  EXPECT_TRUE(rtn["kl_ties"].empty());
  // The figures are those of `run` and of `eval` on what was written.
  const ProgramResult eval = Program({"eval", Path("out/cells/tiny/rtn/out"), "--reference", model_,
                                      "--text", Path("calib.txt"), "--context", "128", "--windows",
                                      "6", "--device", "cpu", "--json", "-"});
  ASSERT_EQ(eval.exit_code, 0) << eval.err;
  const Json scores = Json::parse(eval.out);
  EXPECT_NEAR(scores["kl_mean"], rtn["kl_mean"], 1e-6);
  EXPECT_NEAR(scores["perplexity"], rtn["perplexity"], 1e-5 * rtn["perplexity"].get<double>());
  for (const char* name : {"results.csv", "results.md", "index.html"}) {
    EXPECT_THAT(Content(Path("out/") + name), HasSubstr("rtn3")) << name;
  }
  // The pipeline of a cell can be run by itself.
  const ProgramResult again =
      Program({"run", Path("out/cells/tiny/rtn/pipeline.yaml"), "--set",
               "export.path=" + Path("again"), "--work-dir", Path("again.work")});
  ASSERT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(Tree(Path("again")), Tree(Path("out/cells/tiny/rtn/out")));
  EXPECT_FALSE(fs::exists(Path("out/cells/tiny/rtn/work")));
}

TEST_F(BenchTest, ASecondCallComputesWhatIsMissing) {
  Bench(kRtn);
  ASSERT_EQ(Run().exit_code, 0);
  const Json first = Row("rtn");
  ExpectRefused(3, "holds an earlier bench; add --resume");
  Bench(std::string(kRtn) + kRtn3);
  const ProgramResult more = Run({"--resume"});
  ASSERT_EQ(more.exit_code, 0) << more.err;
  EXPECT_THAT(more.err, AllOf(HasSubstr("original: perplexity"), HasSubstr("rtn: perplexity")));
  EXPECT_EQ(Row("rtn")["measured"], first["measured"]);
  EXPECT_EQ(Row("rtn")["quantize_seconds"], first["quantize_seconds"]);
  EXPECT_TRUE(Row("rtn3").contains("kl_mean"));
  // Another text is another measurement, of all rows.
  const double before = Row("rtn3")["perplexity"];
  std::ofstream(Path("calib.txt"), std::ios::app) << " ";
  std::ofstream(Path("calib.txt"))
      << "Other words. " << Content(SourcePath("configs/quickstart/text.txt"));
  ASSERT_EQ(Run({"--resume"}).exit_code, 0);
  EXPECT_NE(Row("rtn3")["perplexity"], before);
  // A file that was thrown away is not needed; another option is another cell.
  fs::remove_all(Path("out/cells/tiny/rtn3/out"));
  const std::string saved = Content(Path("out/cells/tiny/rtn3/result.json"));
  ASSERT_EQ(Run({"--resume"}).exit_code, 0);
  EXPECT_EQ(Content(Path("out/cells/tiny/rtn3/result.json")), saved);
  EXPECT_FALSE(fs::exists(Path("out/cells/tiny/rtn3/out")));
  Bench("  - {name: rtn3, stages: [{use: ptq, options: {bits: 2, group_size: 64}}]}\n");
  ASSERT_EQ(Run({"--resume"}).exit_code, 0);
  EXPECT_NE(Content(Path("out/cells/tiny/rtn3/result.json")), saved);
}

TEST_F(BenchTest, ARowThatFailsIsARow) {
  Bench(std::string("  - {name: dies, stages: [") + kOffender + "segfault}}]}\n" +
            "  - {name: refused, stages: [" + kOffender + "refuse}}]}\n" + kRtn,
        "speed: {prompt: 4, new_tokens: 2}\n");
  const ProgramResult result = Run();
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.out, AllOf(HasSubstr("tiny/dies failed: plugin org.example.offender"),
                                HasSubstr("SIGSEGV"), HasSubstr("tiny/refused refused: "),
                                HasSubstr("not to my taste")));
  EXPECT_EQ(Row("dies")["status"], "failed");
  EXPECT_FALSE(Row("dies").contains("perplexity"));
  EXPECT_FALSE(Row("dies").contains("tokens_per_second_b1"));
  EXPECT_EQ(Row("refused")["status"], "refused");
  EXPECT_EQ(Row("rtn")["status"], "done");
  EXPECT_TRUE(Row("rtn").contains("tokens_per_second_b1"));
  // It is tried again; what is done stays.
  const Json before = Row("rtn");
  EXPECT_EQ(Run({"--resume"}).exit_code, 1);
  EXPECT_EQ(Row("rtn"), before);
}

TEST_F(BenchTest, KilledAtRandomMomentsEndsInTheSameTable) {
  const std::string rows = std::string("  - {name: slow, stages: [") + kOffender + "slow}}]}\n" +
                           "  - {name: g, stages: [{use: gptq, options: {group_size: 64}}]}\n" +
                           kRtn3;
  Bench(rows);
  ASSERT_EQ(Run().exit_code, 0);
  const Json expected = Table();
  fs::rename(Path("out"), Path("whole"));
  int kills = 0;
  for (int delay_ms = 300; kills < 4 && delay_ms < 20000; delay_ms += 700) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      if (freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
      if (freopen("/dev/null", "w", stdout) == nullptr) _exit(1);
      execl(QM_PROGRAM, QM_PROGRAM, "bench", Path("bench.yaml").c_str(), "--out",
            Path("out").c_str(), "--plugin", QM_OFFENDER, "--resume", static_cast<char*>(nullptr));
      _exit(127);
    }
    usleep(static_cast<useconds_t>(delay_ms) * 1000);
    int status = 0;
    const bool running = waitpid(child, &status, WNOHANG) == 0;
    if (running) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      ++kills;
    } else {
      break;
    }
  }
  EXPECT_GE(kills, 1);
  ASSERT_EQ(Run({"--resume"}).exit_code, 0);
  EXPECT_EQ(Table(), expected);
  for (const char* cell : {"slow", "g", "rtn3"}) {
    const std::string place = std::string("/cells/tiny/") + cell + "/out";
    EXPECT_EQ(Tree(Path("out") + place), Tree(Path("whole") + place)) << cell;
  }
}

TEST_F(BenchTest, ModelsMayDifferInWhatTheyCanTake) {
  fs::copy(model_, Path("bad"), fs::copy_options::recursive);
  std::string weights = Content(Path("bad/model.safetensors"));
  // NaN in every weight of the model's second half.
  for (size_t i = weights.size() / 2; i + 1 < weights.size(); i += 2) {
    weights[i] = static_cast<char>(0xC0);
    weights[i + 1] = 0x7F;
  }
  std::ofstream(Path("bad/model.safetensors"), std::ios::binary) << weights;
  Bench(kRtn, "", "{name: good, path: " + model_ + "}, {name: bad, path: bad}");
  const ProgramResult result = Run();
  EXPECT_EQ(result.exit_code, 1) << result.err;
  const Json rows = Results()["rows"];
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[1]["status"], "done");
  EXPECT_EQ(rows[2]["status"], "failed");
  EXPECT_EQ(rows[3]["status"], "failed");
  EXPECT_THAT(result.out, AllOf(HasSubstr("good"), HasSubstr("bad/rtn failed: ")));
}

TEST_F(BenchTest, WrongFilesAreRefusedBeforeAnyWork) {
  Bench("  - {name: a, stages: [{use: ptq, option: {}}]}\n");
  ExpectRefused(2, "bench.yaml:7:35: unknown key 'option'");
  Bench(std::string(kRtn) + kRtn);
  ExpectRefused(2, "two rows are named 'rtn'");
  Bench(kRtn, "", "{name: m, path: nowhere}");
  ExpectRefused(3, "bench.yaml:2:26: 'model.path' is no directory");
  Bench(std::string(kRtn) + "  - {name: typo, stages: [{use: gptz}]}\n");
  ExpectRefused(3, "did you mean 'gptq'?");
  Bench("  - {name: a, stages: [{use: ptq, options: {group_size: 100}}]}\n");
  ExpectRefused(3, "group_size 100 does not divide");
  Bench("  - {name: a, stages: [{use: ptq}], export: {format: gptqq}}\n");
  ExpectRefused(3, "did you mean 'gptq'?");
  Bench(kRtn, "speed: {prompt: 2040, new_tokens: 64}\n");
  ExpectRefused(3, "'speed' asks for 2104 tokens; model 'tiny' takes at most 2048");
  Bench(kRtn);
  ExpectRefused(2, "unknown device 'gpu'", {"--device", "gpu"});
  fs::remove(Path("calib.txt"));
  ExpectRefused(3, "'evaluate.text' does not exist");
  fs::remove(Path("bench.yaml"));
  ExpectRefused(2, "bench.yaml");
  const ProgramResult usage = Program({"bench", Path("bench.yaml")});
  EXPECT_EQ(usage.exit_code, 2);
  EXPECT_THAT(usage.err, HasSubstr("--out DIR is missing"));
}

TEST_F(BenchTest, OtherDirectoriesAreLeftAlone) {
  Bench(kRtn);
  fs::create_directory(Path("out"));
  std::ofstream(Path("out/letter.txt")) << "dear all";
  ExpectRefused(3, "it holds something else than a bench");
  ExpectRefused(3, "it holds something else than a bench", {"--resume"});
  std::ofstream(Path("out/bench.json")) << "{}";
  ExpectRefused(3, "it holds something else than a bench", {"--resume"});
  fs::remove_all(Path("out"));
  std::ofstream(Path("out")) << "a file";
  ExpectRefused(3, "it is no directory");
}

TEST_F(BenchTest, AFullDiskIsTheRowsError) {
  Bench(std::string(kRtn));
  // No file may grow beyond 200 blocks of 1 KiB; the checkpoint needs more.
  std::ofstream(Path("limited")) << "#!/bin/bash\nulimit -f 200\ntrap '' XFSZ\nexec " << QM_PROGRAM
                                 << " \"$@\"\n";
  fs::permissions(Path("limited"), fs::perms::owner_all);
  const ProgramResult result =
      Shell(Path("limited") + " bench " + Path("bench.yaml") + " --out " + Path("out"));
  EXPECT_EQ(result.exit_code, 1) << result.err;
  EXPECT_EQ(Row("original")["status"], "done");
  EXPECT_EQ(Row("rtn")["status"], "failed");
  EXPECT_THAT(Row("rtn")["error"].get<std::string>(), HasSubstr("model.safetensors"));
  ASSERT_EQ(Run({"--resume"}).exit_code, 0);
  EXPECT_EQ(Row("rtn")["status"], "done");
}

TEST_F(BenchTest, TheQuickstartsBenchHasEveryMethod) {
  const auto start = std::chrono::steady_clock::now();
  const ProgramResult result = Program({"bench", SourcePath("configs/bench/quickstart.yaml"),
                                        "--out", Path("out"), "--device", "cpu"});
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  ASSERT_EQ(result.exit_code, 0) << result.err << result.out;
  RecordProperty("seconds", std::to_string(seconds.count()));
  const Json results = Results();
  EXPECT_GE(results["rows"].size(), 9u);
  std::string methods = Content(SourcePath("configs/bench/quickstart.yaml"));
  const ProgramResult plugins = Program({"plugins", "--json", "-"});
  const Json found = Json::parse(plugins.out);
  for (const Json& plugin : found["plugins"]) {
    for (const Json& method : plugin["methods"]) {
      const std::string text = method;
      const std::string name = text.substr(0, text.find('.'));  // parts go with the whole
      // Training takes too long on a CPU for a quickstart.
      if (OnlyTrains(name)) continue;
      EXPECT_THAT(methods, HasSubstr("use: " + name)) << "add a row for it";
    }
  }
  EXPECT_EQ(Row("original")["kl_mean"], 0.0);
  for (const Json& row : results["rows"]) {
    EXPECT_GT(row["tokens_per_second_b1"], 0.0) << row["row"];
    if (row["row"] != "original") {
      EXPECT_GT(row["kl_mean"], 0.0) << row["row"];
    }
  }
  EXPECT_LT(Row("gptq-int4-best")["kl_mean"], Row("ptq-int4")["kl_mean"]);
}

TEST_F(BenchTest, Help) {
  const ProgramResult result = Program({"bench", "--help"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_THAT(result.out, AllOf(HasSubstr("\nExamples:\n  quantmill bench "), HasSubstr("--resume"),
                                HasSubstr("--device")));
}

}  // namespace
}  // namespace quantmill::testing
