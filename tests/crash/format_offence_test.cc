// Formats and kernels that crash, hang or refuse in a run of several blocks: named with what they
// were at, and nothing finished is lost.
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

constexpr const char* kHows[] = {"crash", "hang", "fail"};
// The first linear that is packed in the plugin's format.
constexpr char kFirst[] = "model.layers.1.self_attn.q_proj";

struct FormatFunction {
  const char* name;    // for the plugin
  const char* spoken;  // in messages
};

class FormatOffenceTest : public RunFixture {
 protected:
  // Block 0 by ptq; 1 and 2 in the format of the plugin; 3 by ptq.
  std::string Stages(const std::string& on_error = "stop") {
    return "  - {name: around, use: ptq, layers: ['model.layers.0.*', 'model.layers.3.*']}\n"
           "  - {name: main, use: org.example.rows, on_error: " +
           on_error + ", layers: ['model.layers.1.*', 'model.layers.2.*']}\n";
  }
  ProgramResult RunRows(const std::string& pipeline, const std::vector<std::string>& more = {},
                        const std::string& in = "", const std::string& how = "") {
    std::vector<std::string> environment = {"QM_HANG_SECONDS=1"};
    if (!in.empty()) {
      environment.push_back("QM_TEST_IN=" + in);
      environment.push_back("QM_TEST_HOW=" + how);
    }
    std::vector<std::string> arguments = {"run", pipeline, "--plugin", QM_FORMATS};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Program(arguments, environment);
  }
  static std::string Spoken(const std::string& how) {
    return how == "crash"  ? "died (SIGSEGV)"
           : how == "hang" ? "hung (no progress for 1 s)"
                           : "the moon is full";
  }
  nlohmann::json ReadJson(const std::string& name) {
    std::ifstream file(Path(name));
    return nlohmann::json::parse(file, nullptr, false);
  }
};

constexpr FormatFunction kOfAResult[] = {{"check", "format.check"},
                                         {"dequantize", "linear-kernel.dequantize"}};

TEST_F(FormatOffenceTest, KeepDenseKeepsTheLayersOfTheFormat) {
  for (const FormatFunction& function : kOfAResult) {
    for (const std::string how : kHows) {
      SCOPED_TRACE(function.name + (" " + how));
      // Each bad call of a hang takes two seconds: one linear of them is enough.
      const std::string stages =
          "  - {name: around, use: ptq, layers: ['*.self_attn.*']}\n"
          "  - {name: main, use: org.example.rows, on_error: keep-dense, layers: ['" +
          std::string(kBadLayer) + "']}\n";
      const std::string name = function.name + how;
      const ProgramResult run = RunRows(Pipeline(name, stages, "quantmill", kCalibration),
                                        {"--json", Path("r.json")}, function.name, how);
      ASSERT_EQ(run.exit_code, 0) << run.err;
      EXPECT_THAT(run.err, AllOf(HasSubstr(Spoken(how)), HasSubstr(function.spoken),
                                 HasSubstr(kBadLayer), HasSubstr("stays dense")));
      EXPECT_THAT(ReadJson("r.json")["unquantized"].dump(), HasSubstr(kBadLayer));
      const auto slots =
          nlohmann::json::parse(Tree(Path(name + ".out"))["quantmill_provenance.json"])["slots"];
      EXPECT_EQ(slots.size(), 4u * 4 + 1);
    }
  }
}

TEST_F(FormatOffenceTest, StopKeepsWhatIsFinishedAndReplayMakesTheCallAgain) {
  const std::vector<std::string> mended = {"--set", "stages.1.options.rounding=down"};
  const std::string plain = Pipeline("plain", Stages(), "quantmill", kCalibration);
  ASSERT_EQ(RunRows(plain, mended).exit_code, 0);
  for (const FormatFunction& function : kOfAResult) {
    for (const std::string how : kHows) {
      SCOPED_TRACE(function.name + (" " + how));
      const std::string name = function.name + how;
      const std::string pipeline = Pipeline(name, Stages(), "quantmill", kCalibration);
      const ProgramResult stopped = RunRows(pipeline, {}, function.name, how);
      EXPECT_EQ(stopped.exit_code, 1) << stopped.err;
      EXPECT_THAT(stopped.err, AllOf(HasSubstr(Spoken(how)), HasSubstr(function.spoken),
                                     HasSubstr(kFirst), HasSubstr("1 finished units are kept")));
      EXPECT_FALSE(fs::exists(Path(name + ".out")));
      const std::string bundle = BundleLeftBy(name, stopped);
      const ProgramResult again = Program(
          {"replay", bundle, "--plugin", QM_FORMATS},
          {"QM_HANG_SECONDS=1", std::string("QM_TEST_IN=") + function.name, "QM_TEST_HOW=" + how});
      EXPECT_EQ(again.exit_code, 1) << again.err;
      EXPECT_THAT(again.out, AllOf(HasSubstr(Spoken(how)), HasSubstr(function.spoken)));
      EXPECT_EQ(Program({"replay", bundle, "--plugin", QM_FORMATS}).exit_code, 0);
      if (how != "crash") continue;
      std::vector<std::string> resume = {"--resume", "--json", Path("r.json")};
      resume.insert(resume.end(), mended.begin(), mended.end());
      const ProgramResult resumed = RunRows(pipeline, resume);
      ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
      EXPECT_EQ(ReadJson("r.json")["reused_units"], 1);
      EXPECT_EQ(Tree(Path(name + ".out"))["model.safetensors"],
                Tree(Path("plain.out"))["model.safetensors"]);
    }
  }
}

// What goes wrong when all is packed costs the scores, and they can be had later.
TEST_F(FormatOffenceTest, AfterTheLastUnitEverythingIsKept) {
  constexpr FormatFunction kOfTheModel[] = {{"prepack", "linear-kernel.prepack"},
                                            {"matmul", "linear-kernel.matmul"}};
  for (const FormatFunction& function : kOfTheModel) {
    for (const std::string how : kHows) {
      SCOPED_TRACE(function.name + (" " + how));
      const std::string name = function.name + how;
      const std::string pipeline =
          Pipeline(name, Stages(), "quantmill", std::string(kCalibration) + kShortEvaluate);
      const ProgramResult stopped = RunRows(pipeline, {}, function.name, how);
      EXPECT_EQ(stopped.exit_code, 1) << stopped.err;
      EXPECT_THAT(stopped.err, AllOf(HasSubstr(Spoken(how)), HasSubstr(function.spoken),
                                     HasSubstr("4 finished units are kept")));
      const bool lost = how != "fail";
      EXPECT_EQ(stopped.err.find("retrying once") != std::string::npos, lost) << stopped.err;
      const ProgramResult resumed = RunRows(pipeline, {"--resume", "--json", Path("r.json")});
      ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
      EXPECT_EQ(ReadJson("r.json")["reused_units"], 4);
      EXPECT_GT(ReadJson("r.json")["evaluation"]["perplexity"], 1);
    }
  }
}

TEST_F(FormatOffenceTest, TryNamesTheFunction) {
  const ProgramResult tried = Program({"try", QM_FORMATS, "--shape", "16x32", "--beside", "ptq"},
                                      {"QM_TEST_IN=dequantize", "QM_TEST_HOW=crash"});
  EXPECT_EQ(tried.exit_code, 1) << tried.err;
  EXPECT_THAT(tried.out, AllOf(HasSubstr("crashed"), HasSubstr("linear-kernel.dequantize"),
                               Not(HasSubstr("outside of"))));
}

}  // namespace
}  // namespace quantmill::testing
