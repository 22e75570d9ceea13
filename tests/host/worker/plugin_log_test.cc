#include "host/worker/plugin_log.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;

TEST(PluginLogTest, EqualLinesStopAfterTheThird) {
  std::vector<std::string> lines;
  PluginLog log([&lines](int32_t severity, const std::string& text) {
    lines.push_back(std::to_string(severity) + " " + text);
  });
  for (const char* layer : {"a", "b", "c", "d"}) log.Line(layer, 2, "damped twice");
  log.Line("d", 1, "another");
  EXPECT_THAT(
      lines, ElementsAre("2 a: damped twice", "2 b: damped twice",
                         "2 c: damped twice (more lines like this are not shown)", "1 d: another"));
}

TEST(PluginLogTest, OnlyWarningsArePrinted) {
  ::testing::internal::CaptureStderr();
  PrintWarning(0, "debug");
  PrintWarning(1, "info");
  PrintWarning(2, "careful");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "warning: careful\n");
}

}  // namespace
}  // namespace quantmill
