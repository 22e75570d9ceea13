#include "host/cli/progress.h"

#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/cli/table.h"

namespace quantmill {
namespace {

ProgressState State(const std::string& stage, int64_t done, int64_t total) {
  ProgressState state;
  state.stage = stage;
  state.unit = "block";
  state.done = done;
  state.total = total;
  return state;
}

TEST(ProgressTest, PlainLinesAtStartEndAndEveryTenSeconds) {
  std::ostringstream out;
  double now = 0;
  {
    ProgressLine line(out, false, [&now] { return now; });
    for (int done = 0; done <= 30; ++done, now += 1) line.Update(State("gptq", done, 30));
    line.Update(State("ptq", 0, 2));
  }
  EXPECT_EQ(out.str(),
            "gptq: block 0/30\n"
            "gptq: block 10/30, 20s left\n"
            "gptq: block 20/30, 10s left\n"
            "gptq: block 30/30\n"
            "ptq: block 0/2\n");
}

TEST(ProgressTest, TerminalLineIsRewrittenAndCleared) {
  std::ostringstream out;
  double now = 0;
  ProgressLine line(out, true, [&now] { return now; });
  line.Update(State("a", 1, 100));
  now += 0.01;
  line.Update(State("a", 2, 100));  // too soon
  now += 1;
  ProgressState state = State("a", 3, 100);
  state.rate = "5 tokens/s";
  state.seconds_left = 3700;
  line.Update(state);
  const std::string text = "a: block 3/100, 5 tokens/s, 1:01:40 left";
  line.Clear();
  line.Clear();
  EXPECT_EQ(out.str(),
            "\ra: block 1/100\r" + text + "\r" + std::string(text.size(), ' ') + "\r");
}

TEST(ProgressTest, Durations) {
  EXPECT_EQ(FormatDuration(-1), "0s");
  EXPECT_EQ(FormatDuration(59.4), "59s");
  EXPECT_EQ(FormatDuration(65), "1:05");
  EXPECT_EQ(FormatDuration(3661), "1:01:01");
}

TEST(TableTest, AlignsColumns) {
  EXPECT_EQ(FormatTable({{"A", "N"}, {"long", "1"}, {"x", "23"}}, {1}),
            "A      N\n--------\nlong   1\nx     23\n");
  EXPECT_EQ(FormatBytes(999), "999 B");
  EXPECT_EQ(FormatBytes(1234), "1.23 kB");
  EXPECT_EQ(FormatBytes(37800000), "37.8 MB");
  EXPECT_EQ(FormatBytes(983040), "983 kB");
}

}  // namespace
}  // namespace quantmill
