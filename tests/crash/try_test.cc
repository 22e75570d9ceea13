// quantmill try: a plugin on made-up layers, which it may crash on, hang on or refuse.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>

#include "gmock/gmock.h"
#include "tests/crash/run_fixture.h"

namespace quantmill::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class TryTest : public RunFixture {
 protected:
  ProgramResult Try(std::vector<std::string> more, const std::string& plugin = QM_OFFENDER) {
    std::vector<std::string> arguments = {"try", plugin, "--json", Path("t.json")};
    const auto has = [&more](const char* option) {
      return std::find(more.begin(), more.end(), option) != more.end();
    };
    if (!has("--shape")) arguments.insert(arguments.end(), {"--shape", "64x128"});
    if (!has("--device")) arguments.insert(arguments.end(), {"--device", "cpu"});
    arguments.insert(arguments.end(), more.begin(), more.end());
    const ProgramResult result = Program(arguments);
    std::ifstream file(Path("t.json"));
    rows_ = file ? nlohmann::json::parse(file, nullptr, false)["rows"] : nlohmann::json();
    std::remove(Path("t.json").c_str());
    return result;
  }
  nlohmann::json Row(const std::string& method, const std::string& layer) const {
    for (const auto& row : rows_) {
      if (row["method"] == method && row["layer"] == layer) return row;
    }
    return nullptr;
  }

  nlohmann::json rows_;
};

TEST_F(TryTest, MeasuresEveryLayerBesideOtherMethods) {
  const ProgramResult result = Try({"--beside", "ptq,gptq"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("WEIGHT NMSE"), HasSubstr("correlated-inputs")));
  EXPECT_EQ(rows_.size(), 9u);
  for (const std::string layer : {"gaussian", "outlier-channels", "correlated-inputs"}) {
    const auto row = Row("org.example.offender", layer);
    EXPECT_EQ(row["outcome"], "ok");
    // One byte per weight and one f32 scale per row of 128.
    EXPECT_DOUBLE_EQ(row["bits_per_weight"], 8.25);
    EXPECT_EQ(row["format"], "qm.fmt.affine-int/1");
    EXPECT_GT(row["seconds"], 0.0);
    EXPECT_GT(row["scratch_bytes"], 0);
    // gptq lowers the error of the output with the Hessian it asks for.
    EXPECT_LT(Row("gptq", layer)["output_nmse"], Row("ptq", layer)["output_nmse"]);
  }
  // Rounding to steps of max/127: an error of step^2/12 per weight, in the mean over rows.
  // max of 128 normal weights is about 2.6 deviations.
  const double expected = std::pow(2.6 / 127, 2) / 12;
  EXPECT_NEAR(Row("org.example.offender", "gaussian")["weight_nmse"], expected, expected / 2);
}

TEST_F(TryTest, EqualSeedsGiveEqualFigures) {
  auto errors = [this] {
    std::string text;
    for (const auto& row : rows_) text += row["weight_nmse"].dump() + row["output_nmse"].dump();
    return text;
  };
  ASSERT_EQ(Try({"--seed", "7"}).exit_code, 0);
  const std::string first = errors();
  ASSERT_EQ(Try({"--seed", "7", "--in-process"}).exit_code, 0);
  EXPECT_EQ(errors(), first);
  ASSERT_EQ(Try({"--seed", "8"}).exit_code, 0);
  EXPECT_NE(errors(), first);
}

TEST_F(TryTest, CrashesHangsAndErrorsAreRows) {
  struct Case {
    const char* how;
    const char* outcome;
    const char* text;
  };
  for (const Case& c :
       {Case{"segfault", "crashed",
             "died (SIGSEGV) in quantize-linear.run of org.example.offender"},
        Case{"crash-in-plan", "crashed", "died (SIGSEGV) in quantize-linear.plan"},
        Case{"exit-clean", "crashed", "exited with code 0 in quantize-linear.run"},
        Case{"hang", "hung", "hung (no progress for 0.5 s) in quantize-linear.run"},
        Case{"fail", "failed", "the moon is full"}, Case{"refuse", "failed", "not to my taste"},
        Case{"bad-scale", "failed", "scale"}, Case{"short-codes", "failed", "codes"}}) {
    const ProgramResult result = Try(
        {"--option", std::string("misbehave=") + c.how, "--time-limit", "0.5", "--beside", "ptq"});
    EXPECT_EQ(result.exit_code, 1) << c.how << result.err;
    for (const std::string layer : {"gaussian", "outlier-channels", "correlated-inputs"}) {
      const auto row = Row("org.example.offender", layer);
      EXPECT_EQ(row["outcome"], c.outcome) << c.how;
      EXPECT_THAT(row.value("text", ""),
                  AllOf(HasSubstr(c.text), HasSubstr(c.outcome[0] == 'f' ? "org.example" : layer)))
          << c.how;
      EXPECT_EQ(Row("ptq", layer)["outcome"], "ok") << c.how;
    }
    EXPECT_THAT(result.out, AllOf(HasSubstr(c.text), HasSubstr("gdb --args quantmill try")));
  }
}

TEST_F(TryTest, OptionsReachThoseBeside) {
  const std::string ptq = QM_PLUGINS "/libqm_ptq.so";
  ASSERT_EQ(
      Try({"--option", "bits=3", "--option", "group_size=64", "--beside", "gptq"}, ptq).exit_code,
      0);
  EXPECT_EQ(Row("ptq", "gaussian")["bits_per_weight"], Row("gptq", "gaussian")["bits_per_weight"]);
  EXPECT_LT(Row("ptq", "gaussian")["bits_per_weight"], 4.0);
}

TEST_F(TryTest, WrongInput) {
  struct Case {
    std::vector<std::string> arguments;
    const char* text;
  };
  for (const Case& c :
       {Case{{"--option", "misbehav=none"}, "did you mean 'misbehave'?"},
        Case{{"--option", "misbehave"}, "NAME=VALUE"},
        Case{{"--option", "misbehave=dance"}, "misbehave"},
        Case{{"--method", "other"}, "has no method 'other'"},
        Case{{"--beside", "nobody"}, "no method 'nobody'"}, Case{{"--shape", "64"}, "OUTxIN"},
        Case{{"--shape", "0x64"}, "OUTxIN"}, Case{{"--time-limit", "0"}, "--time-limit"},
        Case{{"--device", "toaster"}, "toaster"}}) {
    const ProgramResult result = Try(c.arguments);
    EXPECT_EQ(result.exit_code, 2) << c.arguments[0] << result.err;
    EXPECT_THAT(result.err, HasSubstr(c.text));
  }
  EXPECT_EQ(Try({}, Path("none.so")).exit_code, 2);
  const ProgramResult kernels = Try({}, QM_PLUGINS "/libqm_affine.so");
  EXPECT_EQ(kernels.exit_code, 2);
  EXPECT_THAT(kernels.err, HasSubstr("offers nothing to try"));
  std::ofstream(Path("text.so")) << "no plugin";
  const ProgramResult text = Try({}, Path("text.so"));
  EXPECT_NE(text.exit_code, 0);
  EXPECT_THAT(text.err, AllOf(HasSubstr("text.so"), Not(HasSubstr("LAYER"))));
}

}  // namespace
}  // namespace quantmill::testing
