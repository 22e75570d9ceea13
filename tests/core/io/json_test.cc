#include "core/io/json.h"

#include <string>

#include "core/io/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

std::string JsonError(const std::string& text) {
  const auto json = ParseJson(text, "model/config.json");
  return json.ok() ? "" : std::string(json.status().message());
}

TEST(JsonTest, ParsesAndKeepsOrder) {
  EXPECT_EQ(ParseJson(R"({"b": [1, 2.5], "a": "é"})", "x").value().dump(),
            R"({"a":"é","b":[1,2.5]})");
  EXPECT_EQ(ParseOrderedJson(R"({"b": 1, "a": 2})", "x").value().dump(), R"({"b":1,"a":2})");
}

TEST(JsonTest, ErrorNamesFileAndPosition) {
  const std::string error = JsonError("{\n  \"a\": 1,\n  \"b\" true\n}");
  EXPECT_THAT(error, HasSubstr("model/config.json"));
  EXPECT_THAT(error, HasSubstr("line 3, column 10"));
  EXPECT_EQ(error.find("json.exception"), std::string::npos);
}

TEST(JsonTest, RefusesWhatIsNotJson) {
  for (const char* text :
       {"", "{", "{} x", "{\"a\":1,}", "nan", "{\"a\":1e999}", "\"\xff\"", "'a'"}) {
    EXPECT_NE(JsonError(text), "") << text;
  }
}

TEST(JsonTest, RefusesDuplicateKeys) {
  EXPECT_THAT(JsonError(R"({"a": 1, "b": {"c": 1, "d": 2, "c": 3}})"),
              HasSubstr("key \"c\" appears twice"));
  EXPECT_EQ(JsonError(R"([{"a": {"a": 1}}, {"a": 2}])"), "");
}

TEST(JsonTest, RefusesDeepNesting) {
  EXPECT_THAT(JsonError(std::string(1'000'000, '[')), HasSubstr("nested"));
  EXPECT_EQ(JsonError("[\"" + std::string(1000, '[') + "\\\"[\"]"), "");
}

TEST(JsonTest, LargeObjectsAreNotQuadratic) {
  std::string text = "{";
  for (int i = 0; i < 200'000; ++i) text += "\"key" + std::to_string(i) + "\":{\"a\":[]},";
  text.back() = '}';
  EXPECT_EQ(ParseJson(text, "x").value().size(), 200'000u);
}

TEST(JsonTest, ReadsFiles) {
  const std::string path = testing::MakeTempDir() + "/a.json";
  EXPECT_EQ(ReadJson(path).status().code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteFile(path, "[1]").ok());
  EXPECT_EQ(ReadJson(path).value().dump(), "[1]");
  EXPECT_EQ(ReadOrderedJson(path).value().dump(), "[1]");
}

}  // namespace
}  // namespace quantmill
