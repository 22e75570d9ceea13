// The gate of ABI stability: the headers against golden/v1.layout and against every released
// layout. Only appends to GROWABLE structs and new names pass, and each needs a line in
// plugin_api/CHANGELOG.md.
#include "tests/abi/layout.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/abi/gate.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string Read(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Golden() { return Read(SourcePath("tests/abi/golden/v1.layout")); }

// Folders of tests/abi/released, oldest first: their names are versions.
std::vector<fs::path> Releases() {
  std::vector<fs::path> releases;
  for (const auto& entry : fs::directory_iterator(SourcePath("tests/abi/released"))) {
    if (entry.is_directory()) releases.push_back(entry.path());
  }
  const auto version = [](const fs::path& path) {
    const std::string name = path.filename().string();
    return std::pair(std::stoi(name), std::stoi(name.substr(name.find('.') + 1)));
  };
  std::sort(releases.begin(), releases.end(),
            [&](const fs::path& a, const fs::path& b) { return version(a) < version(b); });
  return releases;
}

TEST(AbiLayout, GoldenFileIsUpToDate) {
  EXPECT_EQ(Golden(), CurrentLayout())
      << "the ABI changed: add a line to plugin_api/CHANGELOG.md, then run scripts/abi_update";
}

TEST(AbiLayout, EveryReleasedLayoutIsStillServed) {
  ASSERT_FALSE(Releases().empty());
  for (const fs::path& release : Releases()) {
    const Layout old = ParseLayout(Read(release / "layout"));
    ASSERT_GT(old.structs.size(), 20u) << release;
    EXPECT_THAT(Breaks(old, ParseLayout(CurrentLayout())), IsEmpty()) << release;
  }
}

TEST(AbiLayout, ChangelogSaysWhatWasAddedSinceTheLastRelease) {
  const Layout released = ParseLayout(Read(Releases().back() / "layout"));
  EXPECT_THAT(ChangelogFaults(released, ParseLayout(CurrentLayout()),
                              Read(SourcePath("plugin_api/CHANGELOG.md"))),
              IsEmpty());
}

TEST(AbiLayout, KeepsItsOwnRules) {
  const Layout layout = ParseLayout(CurrentLayout());
  EXPECT_GT(layout.structs.size(), 20u);
  EXPECT_THAT(RuleFaults(layout), IsEmpty());
}

TEST(AbiLayout, HoldsEverythingInTheHeaders) {
  const Layout layout = ParseLayout(CurrentLayout());
  int headers = 0;
  for (const auto& entry : fs::directory_iterator(SourcePath("plugin_api/include/quantmill"))) {
    if (entry.path().extension() != ".h") continue;
    ++headers;
    EXPECT_THAT(MissingFrom(layout, Read(entry.path())), IsEmpty())
        << entry.path() << ": add it to tests/abi/layout.cc";
  }
  EXPECT_GE(headers, 9);
}

// What the scan of header texts finds, on a layout that lacks it.
TEST(HeaderScan, FindsWhatTheLayoutLacks) {
  const Layout golden = ParseLayout(Golden());
  const auto missing = [&](const std::string& header) { return MissingFrom(golden, header); };
  EXPECT_THAT(missing("#define QM_NEW 3\n"), ElementsAre("constant QM_NEW"));
  EXPECT_THAT(missing("#define QM_NEW (UINT64_C(1) << 3)\n"), ElementsAre("constant QM_NEW"));
  EXPECT_THAT(missing("#define QM_NEW \\\n  2u /* why */\n"), ElementsAre("constant QM_NEW"));
  EXPECT_THAT(missing("#define QM_EXT_NEW \"qm.new/1\"\n"), ElementsAre("constant QM_EXT_NEW"));
  EXPECT_THAT(missing("enum { QM_OK = 0, QM_A = 99, /* x, y */ QM_B };\n"),
              ElementsAre("constant QM_A", "constant QM_B"));
  EXPECT_THAT(missing("typedef int32_t qm_new;\n"), ElementsAre("type qm_new"));
  EXPECT_THAT(missing("typedef void* qm_new;\n"), ElementsAre("type qm_new"));
  EXPECT_THAT(missing("typedef qm_status (*qm_new_fn)(void* a, int64_t b) QM_NOEXCEPT;\n"),
              ElementsAre("type qm_new_fn"));
  EXPECT_THAT(missing("typedef struct qm_new { /* FROZEN */\n  int64_t a;\n} qm_new;\n"),
              ElementsAre("struct qm_new"));
  EXPECT_THAT(missing("typedef union qm_new {\n  int64_t a;\n} qm_new;\n"),
              ElementsAre("struct qm_new"));
  EXPECT_THAT(missing("struct qm_call { /* FROZEN */\n  int64_t a;\n};\n"),
              ElementsAre("the word GROWABLE after struct qm_call {"));
  EXPECT_THAT(missing("/* #define QM_NEW 3, struct qm_new { */\n#define QM_MACRO(x) x\n"),
              IsEmpty());
}

// A change to the text of the oldest release, which itself never changes, and what the gate says.
struct Mutation {
  const char* name;
  const char* from;
  const char* to;
  const char* reason;  // part of the first break; "" = accepted
};

std::string Oldest() { return Read(Releases().front() / "layout"); }

std::string Mutated(const Mutation& mutation) {
  std::string text = Oldest();
  const size_t at = text.find(mutation.from);
  EXPECT_NE(at, std::string::npos) << mutation.from;
  return text.replace(at, std::string(mutation.from).size(), mutation.to);
}

class MutationTest : public ::testing::TestWithParam<Mutation> {};

TEST_P(MutationTest, IsJudged) {
  const Layout next = ParseLayout(Mutated(GetParam()));
  ASSERT_THAT(next.faults, IsEmpty());
  const std::vector<std::string> breaks = Breaks(ParseLayout(Oldest()), next);
  if (std::string(GetParam().reason).empty()) {
    EXPECT_THAT(breaks, IsEmpty());
  } else {
    ASSERT_FALSE(breaks.empty());
    EXPECT_THAT(breaks[0], HasSubstr(GetParam().reason));
  }
}

constexpr char kThreads[] =
    "GROWABLE qm_host_threads size 24 align 8\n"
    "  qm_host_threads.struct_size offset 0 size 8 type uint64_t\n"
    "  qm_host_threads.worker_count offset 8 size 8 type int32_t (*)(qm_call*) noexcept\n";
constexpr char kDevice[] =
    "FROZEN qm_device size 8 align 4\n"
    "  qm_device.kind offset 0 size 4 type int32_t\n"
    "  qm_device.index offset 4 size 4 type int32_t\n";
constexpr char kStats[] = "  qm_stats.row_count offset 24 size 8 type int64_t\n";

INSTANTIATE_TEST_SUITE_P(
    Accepted, MutationTest,
    ::testing::Values(Mutation{"same", "", "", ""},
                      Mutation{"minor", "QM_ABI_MINOR ", "QM_ABI_MINOR 9", ""},
                      Mutation{"append", kStats,
                               "  qm_stats.row_count offset 24 size 8 type int64_t\n"
                               "  qm_stats.more offset 32 size 8 type int64_t\n",
                               ""},
                      Mutation{"constant", "constant QM_OK 0", "constant QM_OK 0\nconstant QM_X 7",
                               ""},
                      Mutation{"id", "id QM_EXT_FORMAT qm.format/1",
                               "id QM_EXT_FORMAT qm.format/1\nid QM_EXT_FORMAT_2 qm.format/2", ""},
                      Mutation{"new_struct", "constant QM_OK 0",
                               "FROZEN qm_x size 4 align 4\n"
                               "  qm_x.a offset 0 size 4 type int32_t\nconstant QM_OK 0",
                               ""}),
    [](const auto& info) { return std::string(info.param.name); });

INSTANTIATE_TEST_SUITE_P(
    Refused, MutationTest,
    ::testing::Values(
        Mutation{"insert_in_the_middle", kThreads,
                 "GROWABLE qm_host_threads size 32 align 8\n"
                 "  qm_host_threads.struct_size offset 0 size 8 type uint64_t\n"
                 "  qm_host_threads.extra offset 8 size 8 type void*\n"
                 "  qm_host_threads.worker_count offset 16 size 8 type int32_t (*)(qm_call*) "
                 "noexcept\n",
                 "qm_host_threads.worker_count is no longer number 1"},
        Mutation{"reorder", kDevice,
                 "FROZEN qm_device size 8 align 4\n"
                 "  qm_device.index offset 0 size 4 type int32_t\n"
                 "  qm_device.kind offset 4 size 4 type int32_t\n",
                 "qm_device.kind is no longer number 0"},
        Mutation{"frozen_growth", kDevice,
                 "FROZEN qm_device size 12 align 4\n"
                 "  qm_device.kind offset 0 size 4 type int32_t\n"
                 "  qm_device.index offset 4 size 4 type int32_t\n"
                 "  qm_device.more offset 8 size 4 type int32_t\n",
                 "qm_device changed its size from 8 to 12"},
        Mutation{"shrunk", kStats, "", "qm_stats.row_count is no longer number 3"},
        Mutation{"renamed", "qm_stats.row_count", "qm_stats.rows", "qm_stats.row_count"},
        Mutation{"type", "row_count offset 24 size 8 type int64_t",
                 "row_count offset 24 size 8 type double", "qm_stats.row_count"},
        Mutation{"size", "qm_stat_request.flags offset 20 size 4 type uint32_t",
                 "qm_stat_request.flags offset 20 size 8 type uint64_t", "qm_stat_request.flags"},
        Mutation{"parameter", "int32_t (*)(qm_call*, double) noexcept",
                 "int32_t (*)(qm_call*, double, double) noexcept", "qm_call.progress"},
        Mutation{"kind", "FROZEN qm_packed", "GROWABLE qm_packed", "qm_packed changed its kind"},
        Mutation{"alignment", "FROZEN qm_packed size 48 align 8",
                 "FROZEN qm_packed size 48 align 16", "qm_packed changed its alignment"},
        Mutation{"constant_value", "constant QM_F16 2", "constant QM_F16 3",
                 "constant QM_F16 was 2, is 3"},
        Mutation{"constant_gone", "constant QM_F16 2\n", "", "constant QM_F16 is gone"},
        Mutation{"id_value", "qm.format/1", "qm.format/2", "id QM_EXT_FORMAT was qm.format/1"},
        Mutation{"typedef_", "type qm_dtype int32_t", "type qm_dtype int64_t", "type qm_dtype"},
        Mutation{"struct_gone", kDevice, "", "struct qm_device is gone"},
        Mutation{"major", "QM_ABI_MAJOR 1", "QM_ABI_MAJOR 2", "QM_ABI_MAJOR was 1"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(AbiGate, MinorMayNotShrink) {
  const Layout zero = ParseLayout("constant QM_ABI_MINOR 0\n");
  const Layout one = ParseLayout("constant QM_ABI_MINOR 1\n");
  EXPECT_THAT(Breaks(one, zero), ElementsAre("constant QM_ABI_MINOR was 1, is 0"));
}

TEST(AbiGate, RuleFaultsAreNamed) {
  const auto faults = [](const std::string& text) { return RuleFaults(ParseLayout(text)); };
  EXPECT_THAT(faults("FROZEN qm_a size 8 align 8\n  qm_a.x offset 0 size 4 type int32_t\n"),
              ElementsAre("qm_a: padding or a field at its end"));
  EXPECT_THAT(faults("GROWABLE qm_a size 8 align 8\n  qm_a.x offset 0 size 8 type int64_t\n"),
              ElementsAre(HasSubstr("qm_a does not start with uint64_t struct_size")));
  EXPECT_THAT(faults("GROWABLE qm_a size 8 align 8\n"
                     "  qm_a.struct_size offset 0 size 8 type uint64_t\n"
                     "FROZEN qm_b size 16 align 8\n  qm_b.a offset 0 size 16 type qm_a[2]\n"),
              ElementsAre("qm_b.a holds a GROWABLE struct by value (QM-A-003)"));
  EXPECT_THAT(faults("something else\n"), ElementsAre("not understood: something else"));
}

class ChangelogTest : public ::testing::Test {
 protected:
  static constexpr char kOld[] =
      "constant QM_ABI_MINOR 0\nconstant QM_A 1\n"
      "GROWABLE qm_t size 8 align 8\n  qm_t.struct_size offset 0 size 8 type uint64_t\n";
  static constexpr char kNew[] =
      "constant QM_ABI_MINOR 1\nconstant QM_A 1\nconstant QM_B 2\n"
      "GROWABLE qm_t size 16 align 8\n  qm_t.struct_size offset 0 size 8 type uint64_t\n"
      "  qm_t.more offset 8 size 8 type int64_t\n";
  static std::vector<std::string> Faults(const std::string& next, const std::string& changelog) {
    return ChangelogFaults(ParseLayout(kOld), ParseLayout(next), changelog);
  }
};

TEST_F(ChangelogTest, AcceptsLinesThatSayIt) {
  EXPECT_THAT(Faults(kOld, "- 1.0 first: all of it\n"), IsEmpty());
  EXPECT_THAT(Faults(kNew,
                     "# Changes\n\n- 1.1 QM-A-004 `qm_t.more`: wanted by all,\n  and by many more\n"
                     "- 1.1 QM-A-008 `QM_B`: a second letter\n- 1.0 first: all of it\n"),
              IsEmpty());
}

TEST_F(ChangelogTest, RefusesSilence) {
  EXPECT_THAT(Faults(kNew, "- 1.1 QM-A-004 `qm_t.more`: why\n"),
              ElementsAre(HasSubstr("lacks a line \"- 1.1 QM-A-008 `QM_B`: why\"")));
  EXPECT_THAT(Faults(kNew, ""), ::testing::SizeIs(2));
}

TEST_F(ChangelogTest, RefusesTheWrongRuleOrMinor) {
  EXPECT_THAT(Faults(kNew, "- 1.1 QM-A-008 `qm_t.more`, `QM_B`: why\n"),
              ElementsAre(HasSubstr("- 1.1 QM-A-004 `qm_t.more`"),
                          HasSubstr("names 'QM-A-008 qm_t.more', but no such change")));
  EXPECT_THAT(Faults(kNew, "- 1.0 QM-A-004 `qm_t.more`: why\n- 1.2 QM-A-008 `QM_B`: why\n"),
              ElementsAre(HasSubstr("a line for minor 2"), HasSubstr("lacks a line")));
}

TEST_F(ChangelogTest, WantsTheMinorRaised) {
  std::string same_minor = kNew;
  same_minor.replace(same_minor.find("MINOR 1"), 7, "MINOR 0");
  EXPECT_THAT(Faults(same_minor, "")[0], HasSubstr("QM_ABI_MINOR 0 was released; set it to 1"));
}

TEST_F(ChangelogTest, NamesLinesOutOfForm) {
  EXPECT_THAT(Faults(kOld, "- 1.0 QM-A-004 qm_t.more: why\n"),
              ElementsAre(HasSubstr("not of the form")));
  EXPECT_THAT(Faults(kOld, "- 1.0 QM-X `qm_t`: why\n"), ElementsAre(HasSubstr("unknown rule")));
  EXPECT_THAT(Faults(kOld, "- 1.0 break: why\n"), ElementsAre(HasSubstr("names nothing")));
}

}  // namespace
}  // namespace quantmill::testing
