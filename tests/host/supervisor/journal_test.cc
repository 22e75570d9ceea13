#include "host/supervisor/journal.h"

#include <fstream>

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

class JournalTest : public ::testing::Test {
 protected:
  void Append(const std::string& text) { std::ofstream(path_, std::ios::app) << text; }
  const std::string path_ = testing::MakeTempDir() + "/journal.jsonl";
};

TEST_F(JournalTest, MissingFileIsEmpty) {
  const auto state = ReadJournal(path_);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(state->empty());
}

TEST_F(JournalTest, RemembersUnitsAndCrashes) {
  {
    const auto journal = Journal::Open(path_);
    ASSERT_TRUE(journal.ok()) << journal.status();
    ASSERT_TRUE((*journal)->Begin("k1", "main", 0).ok());
    ASSERT_TRUE((*journal)->End("k1", "d1").ok());
    ASSERT_TRUE((*journal)->Begin("k2", "main", 1).ok());
    ASSERT_TRUE((*journal)->Crash({"k2", "a.q_proj,a.k_proj", "died"}).ok());
    EXPECT_EQ((*journal)->state().finished.at("k1"), "d1");
  }
  const auto state = ReadJournal(path_);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->finished.size(), 1u);
  ASSERT_EQ(state->crashes.size(), 1u);
  EXPECT_TRUE(state->crashes[0].Covers("a.k_proj"));
  EXPECT_FALSE(state->crashes[0].Covers("k_proj"));
}

TEST_F(JournalTest, TornLastLineIsCutOff) {
  Append("{\"type\":\"end\",\"key\":\"k1\",\"digest\":\"d1\"}\n{\"type\":\"end\",\"ke");
  const auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok()) << journal.status();
  ASSERT_TRUE((*journal)->End("k2", "d2").ok());
  const auto state = ReadJournal(path_);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->finished.size(), 2u);
}

TEST_F(JournalTest, LastLineOfZerosIsCutOff) {
  Append("{\"type\":\"end\",\"key\":\"k1\",\"digest\":\"d1\"}\n" + std::string(40, '\0') + "\n");
  const auto state = ReadJournal(path_);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->finished.size(), 1u);
}

TEST_F(JournalTest, DamageInTheMiddleIsAnErrorWithItsLine) {
  Append("nonsense\n{\"type\":\"done\"}\n");
  const auto state = ReadJournal(path_);
  ASSERT_FALSE(state.ok());
  EXPECT_THAT(std::string(state.status().message()), HasSubstr("journal.jsonl:1"));
}

TEST_F(JournalTest, OneRunAtATime) {
  const auto first = Journal::Open(path_);
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = Journal::Open(path_);
  EXPECT_TRUE(absl::IsFailedPrecondition(second.status())) << second.status();
}

}  // namespace
}  // namespace quantmill
