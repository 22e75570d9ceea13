// Plugins that break one rule each: the checker must see it, and name that rule.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "sdk/check/runner.h"
#include "tests/sdk/check/offences.h"

namespace quantmill::check {
namespace {

// An offender, one of the cases', or one of the loader's.
std::string FakePlugin(const std::string& name) {
  for (const std::string directory : {QM_OFFENDER_DIR, QM_CASE_PLUGIN_DIR}) {
    const std::string file = directory + "/libqm_" + name + ".so";
    if (std::filesystem::exists(file)) return file;
  }
  return QM_FAKE_PLUGIN_DIR "/libqm_" + name + ".so";
}

CheckRequest RequestFor(const std::string& name, const std::string& only) {
  CheckRequest request;
  request.plugin = FakePlugin(name);
  request.only = only;
  request.program = QM_PROGRAM;
  return request;
}

std::string Text(const CheckReport& report) {
  std::string text = report.rejected + "\n";
  for (const CaseResult& r : report.results) {
    text += r.name + " " + std::string(StateName(r.verdict.state)) + " " + r.verdict.rule + " " +
            r.verdict.text + "\n";
  }
  return text;
}

class OffendersTest : public testing::TestWithParam<Offence> {};

TEST_P(OffendersTest, IsCaughtWithItsRule) {
  const Offence& offence = GetParam();
  CheckRequest request = RequestFor(offence.plugin, absl::StrCat("^", offence.name, "$"));
  if (offence.state == State::kTimedOut) request.limit_seconds = 2;
  const auto report = CheckPlugin(request, nullptr);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->results.size(), 1u) << Text(*report);
  const Verdict& verdict = report->results[0].verdict;
  EXPECT_EQ(StateName(verdict.state), StateName(offence.state)) << verdict.text;
  EXPECT_EQ(verdict.rule, offence.rule) << verdict.text;
  EXPECT_THAT(verdict.text, testing::HasSubstr(offence.text));
  EXPECT_EQ(report->ok(), offence.state == State::kWarning);
}

INSTANTIATE_TEST_SUITE_P(Process, OffendersTest, testing::ValuesIn(kProcessOffences));

TEST(CheckTest, APluginThatKeepsTheRulesPassesAllCases) {
  const auto report = CheckPlugin(RequestFor("rounding", ""), nullptr);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->ok()) << Text(*report);
  EXPECT_GT(report->Count(State::kPassed), 30) << Text(*report);
  EXPECT_EQ(report->Count(State::kWarning), 0) << Text(*report);
  EXPECT_EQ(report->device, "cpu");
}

TEST(CheckTest, InProcessGivesTheSameVerdict) {
  CheckRequest request = RequestFor("too_little_scratch", "^memory.scratch_bound$");
  request.in_process = true;
  const auto report = CheckPlugin(request, nullptr);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->results.at(0).verdict.rule, "QM-P-015") << Text(*report);
}

TEST(CheckTest, APluginThatDoesNotLoadIsNotOkWhateverWasAskedFor) {
  const auto report = CheckPlugin(RequestFor("wrong_major", "^memory"), nullptr);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_FALSE(report->ok());
  EXPECT_TRUE(report->results.empty());
  EXPECT_THAT(report->rejected, testing::HasSubstr("major"));
}

TEST(CheckTest, SaysWhenNoCaseApplies) {
  const std::string output = testing::TempDir() + "/no_case_applies";
  const std::string command = "'" QM_PROGRAM "' check '" + FakePlugin("rounding") +
                              "' --only '^(kernel|tune)' >'" + output + "'";
  EXPECT_EQ(std::system(command.c_str()), 0);
  std::ifstream file(output);
  std::string first;
  std::getline(file, first);
  EXPECT_THAT(first, testing::HasSubstr("no case was made"));
}

TEST(CheckTest, WrongRequestsAreErrors) {
  CheckRequest request = RequestFor("rounding", "");
  request.plugin = "/nowhere.so";
  EXPECT_TRUE(absl::IsInvalidArgument(CheckPlugin(request, nullptr).status()));
  const auto unreadable = CheckPlugin(RequestFor("rounding", "("), nullptr);
  EXPECT_THAT(std::string(unreadable.status().message()), testing::HasSubstr("pattern '('"));
  const auto nothing = CheckPlugin(RequestFor("rounding", "^nonsense$"), nullptr);
  EXPECT_THAT(std::string(nothing.status().message()), testing::HasSubstr("no case matches"));
}

TEST(CheckTest, ADeviceThatIsNotThereIsAnErrorAndNoPass) {
  CheckRequest request = RequestFor("rounding", "^memory.fences$");
  request.device = "cuda:97";
  EXPECT_TRUE(absl::IsUnavailable(CheckPlugin(request, nullptr).status()));
  request.in_process = true;
  EXPECT_TRUE(absl::IsUnavailable(CheckPlugin(request, nullptr).status()));
}

// A case nothing offends may have lost its teeth.
TEST(CheckTest, EveryCaseFindsAnOffender) {
  std::set<std::string> found(std::begin(kCasesWithoutOffence), std::end(kCasesWithoutOffence));
  for (const Offence& offence : kProcessOffences) found.insert(offence.name);
  for (const Offence& offence : kCallOffences) found.insert(offence.name);
  for (const Case& item : AllCases()) {
    EXPECT_EQ(found.erase(item.name), 1u)
        << "no plugin of tests/fake_plugins offends " << item.name;
  }
  EXPECT_THAT(found, testing::IsEmpty()) << "there are no such cases";
}

TEST(CheckTest, EveryCaseHasAGroupRulesAndASentence) {
  for (const Case& item : AllCases()) {
    EXPECT_NE(item.name.find('.'), std::string::npos) << item.name;
    EXPECT_FALSE(item.rules.empty()) << item.name;
    EXPECT_EQ(item.asserts.empty() ? ' ' : item.asserts.back(), '.') << item.name;
  }
}

}  // namespace
}  // namespace quantmill::check
