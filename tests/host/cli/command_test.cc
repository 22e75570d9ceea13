#include "host/cli/command.h"

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Records what it was called with; "fail" as MODEL makes it fail, "refuse" refuse.
struct Recorder {
  Arguments seen;
  Command command() {
    return {.name = "score",
            .summary = "score a model",
            .arguments = {{"MODEL", "a directory"}, {"OTHER", "another", false}},
            .options = {{.name = "text", .value = "FILE", .doc = "what to read", .required = true},
                        {.name = "windows",
                         .value = "N",
                         .doc = "how many",
                         .default_value = "7",
                         .kind = CommandOption::Kind::kInteger},
                        {.name = "top-p", .value = "P", .kind = CommandOption::Kind::kReal},
                        {.name = "task", .value = "NAME", .repeatable = true},
                        {.name = "resume", .doc = "go on"}},
            .examples = {"quantmill score ./m --text t.txt"},
            .run = [this](const Arguments& args) -> absl::StatusOr<int> {
              seen = args;
              if (args.Text("MODEL") == "fail") return absl::InternalError("it broke; badly");
              if (args.Text("MODEL") == "refuse") {
                return RefusedError(absl::InternalError("line one\nline two"));
              }
              if (absl::Status s = args.WriteJson({{"score", 1}}); !s.ok()) return s;
              return args.Text("MODEL") == "five" ? 5 : 0;
            }};
  }
  struct Result {
    int code;
    std::string out, err;
  };
  Result Run(const std::vector<std::string>& args) {
    ::testing::internal::CaptureStdout();
    ::testing::internal::CaptureStderr();
    const int code = RunCommandLine({command()}, args);
    std::string out = ::testing::internal::GetCapturedStdout();
    return {code, std::move(out), ::testing::internal::GetCapturedStderr()};
  }
};

TEST(CommandTest, ParsesValuesDefaultsAndLists) {
  Recorder recorder;
  EXPECT_EQ(recorder
                .Run({"score", "m", "--text=t.txt", "--task", "a", "--task", "b", "--top-p", "-0.5",
                      "--resume"})
                .code,
            0);
  const Arguments& args = recorder.seen;
  EXPECT_EQ(args.Text("MODEL"), "m");
  EXPECT_FALSE(args.Has("OTHER"));
  EXPECT_EQ(args.Text("text"), "t.txt");
  EXPECT_EQ(args.Integer("windows"), 7);
  EXPECT_FALSE(args.Has("windows"));
  EXPECT_EQ(args.Real("top-p"), -0.5);
  EXPECT_THAT(args.List("task"), ElementsAre("a", "b"));
  EXPECT_TRUE(args.Flag("resume"));
  EXPECT_FALSE(args.WantsJson());
}

TEST(CommandTest, ExitCodesAndErrors) {
  Recorder recorder;
  EXPECT_EQ(recorder.Run({"score", "five", "--text", "t"}).code, 5);
  const auto failed = recorder.Run({"score", "fail", "--text", "t"});
  EXPECT_EQ(failed.code, 1);
  EXPECT_EQ(failed.err, "error: it broke; badly\n");
  const auto refused = recorder.Run({"score", "refuse", "--text", "t"});
  EXPECT_EQ(refused.code, 3);
  EXPECT_EQ(refused.err, "error: line one\nerror: line two\n");
}

TEST(CommandTest, UsageErrors) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"scor", "m"}, "error: unknown command 'scor'; did you mean 'score'?"},
      {{"--text"}, "error: unknown option --text; options follow a command"},
      {{"score", "m", "--txt", "t"}, "error: unknown option --txt; did you mean --text?"},
      {{"score", "m", "--tex", "t"}, "error: unknown option --tex; did you mean --text?"},
      {{"score", "m", "-t", "t"}, "error: unknown option --t"},
      {{"score", "m"}, "error: --text FILE is missing; what to read"},
      {{"score", "--text", "t"}, "error: MODEL is missing; usage: quantmill score MODEL [OTHER]"},
      {{"score", "a", "b", "c", "--text", "t"}, "error: unexpected argument 'c'"},
      {{"score", "m", "--text"}, "error: --text needs a value; write --text FILE"},
      {{"score", "m", "--text", "--resume"}, "error: --text needs a value"},
      {{"score", "m", "--resume=1", "--text", "t"}, "error: --resume takes no value"},
      {{"score", "m", "--text", "t", "--text", "u"}, "error: --text is given twice"},
      {{"score", "m", "--text", "t", "--windows", "x"},
       "error: --windows wants a whole number, not 'x'"},
      {{"score", "m", "--text", "t", "--top-p", "x"}, "error: --top-p wants a number, not 'x'"}};
  for (const auto& [args, expected] : cases) {
    const auto result = Recorder().Run(args);
    EXPECT_EQ(result.code, 2) << expected;
    EXPECT_THAT(result.err, ::testing::StartsWith(expected));
    EXPECT_EQ(result.out, "");
  }
}

TEST(CommandTest, Help) {
  EXPECT_THAT(Recorder().Run({}).out, HasSubstr("score       score a model"));
  for (const std::vector<std::string>& args :
       {std::vector<std::string>{"score", "--help"}, {"score", "m", "-h"}, {"help", "score"}}) {
    const auto result = Recorder().Run(args);
    EXPECT_EQ(result.code, 0);
    EXPECT_THAT(result.out, HasSubstr("Usage: quantmill score MODEL [OTHER] --text FILE"));
    EXPECT_THAT(result.out, HasSubstr("how many (default 7)"));
    EXPECT_THAT(result.out, HasSubstr("--json FILE|-"));
    EXPECT_THAT(result.out, HasSubstr("quantmill score ./m --text t.txt"));
  }
  EXPECT_EQ(Recorder().Run({"help", "scor"}).code, 2);
  const std::string version = Recorder().Run({"--version"}).out;
  EXPECT_THAT(version, ::testing::StartsWith("quantmill "));
  EXPECT_THAT(version, HasSubstr("\nplugin ABI 1."));
  EXPECT_THAT(version, HasSubstr("\nCUDA "));
}

TEST(CommandTest, JsonGoesWhereItIsSent) {
  const std::string path = testing::MakeTempDir() + "/r.json";
  EXPECT_EQ(Recorder().Run({"score", "m", "--text", "t", "--json", path}).code, 0);
  EXPECT_EQ(ReadFile(path).value(), "{\n  \"score\": 1\n}\n");
  EXPECT_EQ(Recorder().Run({"score", "m", "--text", "t", "--json", "-"}).out,
            "{\n  \"score\": 1\n}\n");
  const auto bad = Recorder().Run({"score", "m", "--text", "t", "--json", "/nonexistent/r.json"});
  EXPECT_EQ(bad.code, 2);  // before the work
  EXPECT_EQ(bad.out, "");
  EXPECT_THAT(bad.err, HasSubstr("--json /nonexistent/r.json cannot be written"));
}

}  // namespace
}  // namespace quantmill
