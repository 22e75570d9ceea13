// Every way in which a plugin can go wrong, under every on_error policy: nothing finished is lost,
// the program itself lives, and the call is named.
#include <cctype>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Offence {
  const char* how;        // value of the offender's option
  const char* text;       // of the message
  const char* rule = "";  // that author mode names
};

constexpr Offence kOffences[] = {
    {"segfault", "died (SIGSEGV)", "QM-P-014"},
    {"abort", "died (SIGABRT)", "QM-P-007"},
    {"exit", "exited with code 9", "QM-P-007"},
    {"exit-clean", "exited with code 0", "QM-P-007"},
    {"killed", "died (SIGKILL)"},
    {"recursion", "died (SIGSEGV)", "QM-P-014"},
    {"hang", "hung (no progress for 1 s)", "QM-P-008"},
    {"more-tensors", "died (SIGSEGV)", "QM-P-014"},
    {"fail", "the moon is full"},
    {"bare", "without a message", "QM-P-005"},
    {"bad-scale", "scale", "QM-P-010"},
    {"wrong-shape", "the result is [", "QM-P-010"},
    {"short-codes", "codes", "QM-P-010"},
    {"huge-codes", "cannot allocate"},
};

// One layer for each offence: those of blocks 1 and 2.
std::string LayerOf(size_t index) {
  const char* const names[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                               "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                               "mlp.down_proj"};
  return "model.layers." + std::to_string(1 + index / 7) + "." + names[index % 7];
}

class OffenceTest : public RunFixture {
 protected:
  static std::string Override(const std::string& layer, const std::string& how) {
    return "{layers: ['" + layer + "'], options: {misbehave: " + how + "}}";
  }
  std::string Stage(const std::string& overrides, const std::string& on_error) {
    return "  - {name: main, use: org.example.offender, on_error: " + on_error + ", overrides: [" +
           overrides + "]}\n";
  }
  std::string AllOffences(const std::string& on_error) {
    std::string overrides;
    for (size_t i = 0; i < std::size(kOffences); ++i) {
      if (i > 0) overrides += ", ";
      overrides += Override(LayerOf(i), kOffences[i].how);
    }
    return Stage(overrides, on_error);
  }
  nlohmann::json ReadJson(const std::string& name) {
    std::ifstream file(Path(name));
    return nlohmann::json::parse(file, nullptr, false);
  }
  // Lines of the journal that say a unit is finished.
  int FinishedUnits(const std::string& work_dir) {
    std::istringstream lines(Tree(Path(work_dir))["journal.jsonl"]);
    int count = 0;
    for (std::string line; std::getline(lines, line);) {
      count += nlohmann::json::parse(line).value("type", "") == "end";
    }
    return count;
  }
};

std::vector<std::string> Lines(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> lines;
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

TEST_F(OffenceTest, KeepDenseKeepsEveryBadLayerAndPacksTheOthers) {
  const ProgramResult result = RunPipeline(Pipeline("p", AllOffences("keep-dense")),
                                           {"--json", Path("r.json")}, {"QM_HANG_SECONDS=1"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const std::string unquantized = ReadJson("r.json")["unquantized"].dump();
  const auto slots =
      nlohmann::json::parse(Tree(Path("p.out"))["quantmill_provenance.json"])["slots"];
  for (size_t i = 0; i < std::size(kOffences); ++i) {
    EXPECT_THAT(Lines(result.err),
                ::testing::Contains(AllOf(HasSubstr(kOffences[i].text), HasSubstr(LayerOf(i)),
                                          HasSubstr("stays dense"))))
        << kOffences[i].how;
    EXPECT_THAT(unquantized, HasSubstr(LayerOf(i)));
  }
  EXPECT_THAT(unquantized, Not(HasSubstr("model.layers.0.")));
  EXPECT_THAT(unquantized, Not(HasSubstr("model.layers.3.")));
  EXPECT_EQ(slots.size(), 4u * 7);
}

// In author mode messages say which rule was broken; a plugin that refuses or is killed breaks
// none.
TEST_F(OffenceTest, StrictNamesTheRule) {
  const std::string pipeline = Pipeline("p", AllOffences("keep-dense"));
  const ProgramResult result = RunPipeline(pipeline, {}, {"QM_HANG_SECONDS=1", "QM_STRICT=1"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  for (size_t i = 0; i < std::size(kOffences); ++i) {
    const std::string rule = kOffences[i].rule;
    std::string anchor = rule;
    for (char& c : anchor) c = static_cast<char>(std::tolower(c));
    const std::string note =
        rule.empty() ? "" : "; this breaks " + rule + ", see plugin_api/RULES.md#" + anchor;
    EXPECT_THAT(Lines(result.err),
                ::testing::Contains(AllOf(
                    HasSubstr(kOffences[i].text), HasSubstr(LayerOf(i)), HasSubstr("stays dense"),
                    rule.empty() ? ::testing::Matcher<std::string>(Not(HasSubstr("this breaks")))
                                 : ::testing::Matcher<std::string>(HasSubstr(note)))))
        << kOffences[i].how;
  }
  const ProgramResult usual = RunPipeline(Pipeline("q", AllOffences("keep-dense")), {},
                                          {"QM_HANG_SECONDS=1", "QM_STRICT=0"});
  EXPECT_THAT(usual.err, Not(HasSubstr("this breaks")));
}

TEST_F(OffenceTest, UseGivesEveryBadLayerToTheOtherMethod) {
  const ProgramResult result =
      RunPipeline(Pipeline("p", AllOffences("{use: ptq, options: {bits: 8}}")),
                  {"--json", Path("r.json")}, {"QM_HANG_SECONDS=1"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(ReadJson("r.json")["unquantized"].dump(), Not(HasSubstr("model.layers.")));
  const auto slots =
      nlohmann::json::parse(Tree(Path("p.out"))["quantmill_provenance.json"])["slots"];
  for (size_t i = 0; i < std::size(kOffences); ++i) {
    EXPECT_THAT(Lines(result.err),
                ::testing::Contains(AllOf(HasSubstr(kOffences[i].text), HasSubstr(LayerOf(i)),
                                          HasSubstr("goes to ptq"))))
        << kOffences[i].how;
    EXPECT_THAT(slots[LayerOf(i)].dump(), HasSubstr("\"ptq\"")) << slots[LayerOf(i)];
  }
  EXPECT_THAT(slots["model.layers.0.mlp.up_proj"].dump(), HasSubstr("org.example.offender"));
}

// The block before the bad layer is finished, is kept, and is not computed again.
TEST_F(OffenceTest, StopKeepsWhatIsFinished) {
  ASSERT_EQ(
      RunPipeline(Pipeline("plain", "  - {name: main, use: org.example.offender}\n")).exit_code, 0);
  for (const Offence& offence : kOffences) {
    const std::string name = offence.how;
    const std::string pipeline = Pipeline(name, Stage(Override(LayerOf(2), name), "stop"));
    const ProgramResult stopped = RunPipeline(pipeline, {}, {"QM_HANG_SECONDS=1"});
    EXPECT_EQ(stopped.exit_code, 1) << name << stopped.err;
    EXPECT_THAT(Lines(stopped.err),
                ::testing::Contains(AllOf(HasSubstr("error: "), HasSubstr(offence.text),
                                          HasSubstr(LayerOf(2)), HasSubstr("quantmill replay "))))
        << name;
    EXPECT_THAT(stopped.err, HasSubstr("1 finished units are kept")) << name;
    EXPECT_EQ(FinishedUnits(name + ".work"), 1) << name;
    EXPECT_FALSE(fs::exists(Path(name + ".out"))) << name;
    // The cause mended, a resume takes the finished block as it is.
    const ProgramResult resumed =
        RunPipeline(pipeline, {"--resume", "--set", "stages.0.overrides.0.options.misbehave=none",
                               "--json", Path(name + ".json")});
    ASSERT_EQ(resumed.exit_code, 0) << name << resumed.err;
    EXPECT_EQ(ReadJson(name + ".json")["reused_units"], 1) << name;
    EXPECT_EQ(Tree(Path(name + ".out"))["model.safetensors"],
              Tree(Path("plain.out"))["model.safetensors"])
        << name;
  }
}

// The write hits memory that is the system's again: in the next call, which is in the next block
// and is not to blame. A fresh worker does that block without the bad one.
TEST_F(OffenceTest, WritingThroughAKeptPointerIsSurvived) {
  const ProgramResult plain =
      RunPipeline(Pipeline("plain", "  - {name: main, use: org.example.offender}\n"));
  ASSERT_EQ(plain.exit_code, 0) << plain.err;
  for (const std::string on_error : {"stop", "keep-dense", "{use: ptq}"}) {
    const std::string name = on_error.substr(0, 4) == "{use" ? "use" : on_error;
    const ProgramResult result = RunPipeline(
        Pipeline(name, Stage(Override("model.layers.1.mlp.down_proj", "keep-pointer"), on_error)));
    ASSERT_EQ(result.exit_code, 0) << name << result.err;
    EXPECT_THAT(result.err,
                AllOf(HasSubstr("died (SIGSEGV) in quantize-linear.run"),
                      HasSubstr("model.layers.2.self_attn.q_proj"), HasSubstr("retrying once")));
    EXPECT_EQ(Tree(Path(name + ".out"))["model.safetensors"],
              Tree(Path("plain.out"))["model.safetensors"]);
  }
}

// A thread of the plugin that writes at any time: what is finished stays as it is, and with the
// layer out of the way a resume makes of it what an untroubled run makes.
TEST_F(OffenceTest, LateWritesOfAThreadLoseNothingFinished) {
  const std::string bad = "model.layers.1.mlp.down_proj";
  const ProgramResult plain =
      RunPipeline(Pipeline("plain", "  - {name: main, use: org.example.offender}\n"));
  ASSERT_EQ(plain.exit_code, 0) << plain.err;
  const std::string overrides = "{layers: ['" + bad +
                                "'], options: {misbehave: late-write, flag_file: " + Path("flag") +
                                "}}";
  for (const std::string on_error : {"stop", "keep-dense", "{use: ptq}"}) {
    const std::string name = on_error.substr(0, 4) == "{use" ? "use" : on_error;
    std::error_code error;
    fs::remove(Path("flag"), error);
    const ProgramResult result = RunPipeline(Pipeline(name, Stage(overrides, on_error)));
    EXPECT_EQ(result.exit_code, 0) << name << result.err;  // misbehaves once, then a fresh worker
    EXPECT_EQ(Tree(Path(name + ".out"))["model.safetensors"],
              Tree(Path("plain.out"))["model.safetensors"])
        << name << result.err;
  }
}

TEST_F(OffenceTest, CrashInPlanLeavesABundleToReplay) {
  const ProgramResult result =
      RunPipeline(Pipeline("p", Stage(Override(LayerOf(6), "crash-in-plan"), "stop")));
  EXPECT_EQ(result.exit_code, 1);
  const std::string bundle = Path("p.work/crash/plan/main/" + LayerOf(6));
  EXPECT_THAT(result.err, HasSubstr("quantmill replay " + bundle));
  const ProgramResult replay = Program({"replay", bundle});
  EXPECT_EQ(replay.exit_code, 1) << replay.err;
  EXPECT_THAT(replay.out, HasSubstr("crashed: died (SIGSEGV) in quantize-linear.plan of "
                                    "org.example.offender on model.layers.1.mlp.down_proj"));
}

}  // namespace
}  // namespace quantmill::testing
