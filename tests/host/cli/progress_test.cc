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

TEST(ProgressTest, PlainLinesEveryFiveSecondsAndAtTheEnd) {
  std::ostringstream out;
  double now = 0;
  {
    ProgressLine line(out, false, [&now] { return now; });
    for (int done = 0; done <= 12; ++done, now += 1) line.Update(State("gptq", done, 12));
    line.Update(State("gptq", 12, 12));  // said already
    line.Update(State("ptq", 0, 2));
  }
  EXPECT_EQ(out.str(),
            "gptq: block 0/12\n"
            "gptq: block 5/12, 1 blocks/s, 7s left\n"
            "gptq: block 10/12, 1 blocks/s, 2s left\n"
            "gptq: block 12/12, 1 blocks/s\n");
}

TEST(ProgressTest, ShortWorkHasOneLinePerStage) {
  std::ostringstream out;
  double now = 0;
  ProgressLine line(out, false, [&now] { return now; });
  line.Update(State("load", 1, 2));
  for (int block = 0; block < 2; ++block, now += 0.5) {
    for (const std::string stage : {"att", "mlp"}) {  // stages take turns
      line.Update(State(stage, block, 2));
      ProgressState part = State(stage + ": statistics", 100, 100);
      part.unit = "percent";
      line.Update(part);
      line.Update(State(stage, block + 1, 2));
    }
  }
  EXPECT_EQ(out.str(), "load: block 1/2\natt: block 2/2\nmlp: block 2/2\n");
}

TEST(ProgressTest, PartsShowTheTimeOfTheirStage) {
  std::ostringstream out;
  double now = 0;
  ProgressLine line(out, false, [&now] { return now; });
  line.Update(State("gptq", 0, 10));
  now = 40;
  line.Update(State("gptq", 2, 10));
  now = 50;
  ProgressState part = State("gptq: block 3/10, statistics", 25, 100);
  part.unit = "percent";
  line.Update(part);
  EXPECT_EQ(out.str(),
            "gptq: block 0/10\n"
            "gptq: block 2/10, 20.0 s/block, 2:40 left\n"
            "gptq: block 3/10, statistics 25 %, 20.0 s/block, 2:30 left\n");
}

TEST(ProgressTest, TerminalLineIsRewrittenAndCleared) {
  std::ostringstream out;
  double now = 0;
  ProgressLine line(out, true, [&now] { return now; });
  line.Update(State("a", 1, 100));
  now += 0.01;
  line.Update(State("a", 2, 100));  // too soon
  now += 10;
  line.Update(State("a", 3, 100));
  const std::string text = "a: block 3/100, 5.0 s/block, 8:05 left";
  line.Clear();
  line.Clear();
  EXPECT_EQ(out.str(), "\ra: block 1/100\r" + text + "\r" + std::string(text.size(), ' ') + "\r");
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
