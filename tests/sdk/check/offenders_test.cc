// Plugins that break one rule each: the checker must see it, and name that rule.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "sdk/check/runner.h"

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

struct Offence {
  std::string plugin;
  std::string only;  // the case that must see it
  State state;
  std::string rule;
  std::string text;  // part of what is said
};

void PrintTo(const Offence& offence, std::ostream* out) { *out << offence.plugin; }

class OffendersTest : public testing::TestWithParam<Offence> {};

TEST_P(OffendersTest, IsCaughtWithItsRule) {
  const Offence& offence = GetParam();
  CheckRequest request = RequestFor(offence.plugin, "^" + offence.only + "$");
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

INSTANTIATE_TEST_SUITE_P(
    Load, OffendersTest,
    testing::Values(
        Offence{"exports_too_much", "load.symbols", State::kFailed, "QM-A-001", "rounding_version"},
        Offence{"no_symbol", "load.opens", State::kFailed, "QM-A-001", "qm_plugin_entry_v1"},
        Offence{"null_descriptor", "load.opens", State::kFailed, "QM-P-002", "NULL"},
        Offence{"crash_in_constructor", "load.opens", State::kCrashed, "QM-P-001", "SIG"},
        Offence{"hang_at_load", "load.opens", State::kTimedOut, "QM-P-001", "2 s"},
        Offence{"wrong_major", "load.version", State::kFailed, "QM-H-001", "major"},
        Offence{"newer_minor", "load.version", State::kFailed, "QM-H-001", "newer"},
        Offence{"bad_text", "load.descriptor", State::kFailed, "QM-P-002", "UTF-8"},
        Offence{"bad_default", "load.descriptor", State::kFailed, "QM-P-016", "option"},
        Offence{"short_table", "load.descriptor", State::kFailed, "QM-P-002", "too short"},
        Offence{"tune_half_table", "load.descriptor", State::kFailed, "QM-P-002", "block-tune"},
        Offence{"opens_file", "load.pure", State::kFailed, "QM-P-001", "opens /etc/passwd"},
        Offence{"prints_in_entry", "load.pure", State::kFailed, "QM-P-001", "prints"},
        Offence{"starts_thread", "load.pure", State::kFailed, "QM-P-001", "thread"},
        Offence{"starts_cuda", "load.pure", State::kFailed, "QM-P-001", "starts CUDA"},
        Offence{"slow_to_load", "load.scan_time", State::kWarning, "QM-P-001", "more than 100 ms"},
        Offence{"deletable", "load.nodelete", State::kFailed, "QM-H-003", "nodelete"}));

INSTANTIATE_TEST_SUITE_P(Tune, OffendersTest,
                         testing::Values(Offence{"tune_overwrite", "tune.results_fit",
                                                 State::kFailed, "QM-P-004", "'scale'"}));

INSTANTIATE_TEST_SUITE_P(Reparam, OffendersTest,
                         testing::Values(Offence{"reparam_needs_gradient",
                                                 "reparam.unwanted_gradients", State::kCrashed,
                                                 "QM-P-014", "SIGSEGV"}));

INSTANTIATE_TEST_SUITE_P(
    Abi, OffendersTest,
    testing::Values(
        Offence{"changes_descriptor", "abi.constant", State::kFailed, "QM-P-002", "second time"},
        Offence{"wrong_table_size", "abi.table_sizes", State::kFailed, "QM-A-003", "sizeof"},
        Offence{"matches_prefix", "abi.unknown_ids", State::kFailed, "QM-A-007", "whole ids"},
        Offence{"reads_newer_field", "abi.oldest_host", State::kFailed, "QM-A-005",
                "behind the end of the qm_linear_info"},
        Offence{"compares_sizes", "abi.newer_host", State::kFailed, "QM-A-005", "another struct"},
        Offence{"needs_threads", "abi.no_services", State::kFailed, "QM-P-018", "INTERNAL"}));

INSTANTIATE_TEST_SUITE_P(Options, OffendersTest,
                         testing::Values(Offence{"refuses_late", "options.defaults", State::kFailed,
                                                 "QM-P-012", "not today"},
                                         Offence{"bare_code", "memory.refuses_with_text",
                                                 State::kFailed, "QM-P-005", "without a message"},
                                         Offence{"unknown_code", "memory.refuses_with_text",
                                                 State::kFailed, "QM-P-005", "99"}));

INSTANTIATE_TEST_SUITE_P(
    Memory, OffendersTest,
    testing::Values(
        Offence{"writes_past_end", "memory.fences", State::kFailed, "QM-P-014",
                "behind the end of the emitted tensor 'zero'"},
        Offence{"changes_input", "memory.fences", State::kFailed, "QM-P-004", "the weight"},
        Offence{"lists_scratch", "memory.fences", State::kFailed, "QM-P-009", "not emitted"},
        Offence{"throws", "memory.fences", State::kFailed, "QM-P-007", "exception"},
        Offence{"exits", "memory.fences", State::kCrashed, "QM-P-007", "exit()"},
        Offence{"segfaults", "memory.fences", State::kCrashed, "QM-P-014", "SIGSEGV"},
        Offence{"hangs", "memory.fences", State::kTimedOut, "QM-P-008", "2 s"},
        Offence{"keeps_pointers", "memory.nothing_kept", State::kFailed, "QM-P-003", "the weight"},
        Offence{"too_little_scratch", "memory.scratch_bound", State::kFailed, "QM-P-015",
                "at most 8"},
        Offence{"forgets_why", "memory.scratch_fails", State::kFailed, "QM-P-017", "INTERNAL"},
        Offence{"forgets_why", "memory.emit_fails", State::kFailed, "QM-P-017", "INTERNAL"},
        Offence{"ignores_cancel", "memory.cancel", State::kFailed, "QM-P-008", "returned OK"}));

INSTANTIATE_TEST_SUITE_P(Quantize, OffendersTest,
                         testing::Values(Offence{"wrong_names", "quantize.result_is_in_its_format",
                                                 State::kFailed, "QM-P-010", ""},
                                         Offence{"accepts_nan", "quantize.not_finite_weights",
                                                 State::kFailed, "QM-C-001", ""},
                                         Offence{"not_the_same_twice", "quantize.same_bytes_twice",
                                                 State::kFailed, "QM-P-011", ""},
                                         Offence{"clips", "quantize.not_worse_than_plain_rounding",
                                                 State::kFailed, "QM-C-002", ""}));

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

TEST(CheckTest, EveryCaseHasAGroupRulesAndASentence) {
  for (const Case& item : AllCases()) {
    EXPECT_NE(item.name.find('.'), std::string::npos) << item.name;
    EXPECT_FALSE(item.rules.empty()) << item.name;
    EXPECT_EQ(item.asserts.empty() ? ' ' : item.asserts.back(), '.') << item.name;
  }
}

}  // namespace
}  // namespace quantmill::check
