// tests/pipeline/NAME.yaml is parsed and checked against the made-up catalog and model of
// fixture.h; NAME.expected holds the lines of the error, or "ok".
#include <algorithm>
#include <filesystem>

#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "core/io/files.h"
#include "gtest/gtest.h"
#include "host/pipeline/check.h"
#include "tests/host/pipeline/fixture.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

std::vector<std::string> Cases() {
  std::vector<std::string> names;
  const std::string folder = testing::SourcePath("tests/pipeline");
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    if (file.path().extension() == ".yaml") names.push_back(file.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class PipelineCase : public ::testing::TestWithParam<std::string> {};

TEST_P(PipelineCase, SaysWhatIsExpected) {
  const std::string base = testing::SourcePath("tests/pipeline/" + GetParam());
  const auto text = ReadFile(base + ".yaml"), expected = ReadFile(base + ".expected");
  ASSERT_TRUE(text.ok() && expected.ok());
  const auto pipeline = ParsePipelineText(*text, "/p/" + GetParam() + ".yaml");
  absl::Status status = pipeline.status();
  if (status.ok()) {
    status = CheckPipeline(*pipeline, testing::FakeCatalog(), testing::FakeModel()).status();
  }
  const std::string actual = absl::StrReplaceAll(status.ok() ? "ok" : std::string(status.message()),
                                                 {{"/p/" + GetParam() + ".yaml:", ""}});
  EXPECT_EQ(actual, std::string(absl::StripSuffix(*expected, "\n")));
}

INSTANTIATE_TEST_SUITE_P(Files, PipelineCase, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace quantmill
