// The files of docs/schema and the parsers accept the same keys.
#include <set>

#include "core/io/json.h"
#include "gtest/gtest.h"
#include "host/pipeline/keys.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

std::set<std::string> KeysAt(const nlohmann::json& schema, const std::string& pointer) {
  std::set<std::string> keys;
  const auto& node = schema.at(nlohmann::json::json_pointer(pointer));
  EXPECT_EQ(node.at("additionalProperties"), false) << pointer;
  for (const auto& item : node.at("properties").items()) keys.insert(item.key());
  return keys;
}

TEST(PipelineSchemaTest, KeysAgreeWithTheParser) {
  const auto schema = ReadJson(testing::SourcePath("docs/schema/pipeline.schema.json"));
  ASSERT_TRUE(schema.ok()) << schema.status();
  const std::map<std::string, std::string> pointers = {
      {"", ""},
      {"model", "/properties/model"},
      {"calibration", "/properties/calibration"},
      {"run", "/properties/run"},
      {"run.memory", "/properties/run/properties/memory"},
      {"stages[]", "/$defs/stage"},
      {"overrides[]", "/$defs/override"},
      {"on_error", "/$defs/fallback"},
      {"train", "/$defs/train"},
      {"export", "/properties/export"},
      {"evaluate", "/properties/evaluate"}};
  for (const std::string& section : PipelineSections()) {
    ASSERT_EQ(pointers.count(section), 1u) << "section without a place in the schema: " << section;
    const std::vector<std::string>& keys = PipelineKeys(section);
    EXPECT_EQ(KeysAt(*schema, pointers.at(section)),
              std::set<std::string>(keys.begin(), keys.end()))
        << section;
  }
}

TEST(BenchSchemaTest, KeysAgreeWithTheParser) {
  const auto schema = ReadJson(testing::SourcePath("docs/schema/bench.schema.json"));
  ASSERT_TRUE(schema.ok()) << schema.status();
  const std::map<std::string, std::string> pointers = {
      {"", ""},
      {"models[]", "/$defs/model"},
      {"rows[]", "/$defs/row"},
      {"rows[].export", "/$defs/row/properties/export"},
      {"run", "/properties/run"},
      {"speed", "/properties/speed"}};
  for (const std::string& section : BenchSections()) {
    ASSERT_EQ(pointers.count(section), 1u) << "section without a place in the schema: " << section;
    const std::vector<std::string>& keys = BenchKeys(section);
    EXPECT_EQ(KeysAt(*schema, pointers.at(section)),
              std::set<std::string>(keys.begin(), keys.end()))
        << section;
  }
}

// Every "$ref" into the pipeline's schema points at something.
void CheckReferences(const nlohmann::json& node, const nlohmann::json& pipeline) {
  if (node.is_object() && node.contains("$ref")) {
    const std::string text = node.at("$ref");
    const std::string file = "pipeline.schema.json#";
    if (text.compare(0, file.size(), file) == 0) {
      EXPECT_TRUE(pipeline.contains(nlohmann::json::json_pointer(text.substr(file.size()))))
          << text;
    }
  }
  if (!node.is_structured()) return;
  for (const auto& item : node) CheckReferences(item, pipeline);
}

TEST(BenchSchemaTest, ReferencesArePartsOfThePipelineSchema) {
  const auto schema = ReadJson(testing::SourcePath("docs/schema/bench.schema.json"));
  const auto pipeline = ReadJson(testing::SourcePath("docs/schema/pipeline.schema.json"));
  ASSERT_TRUE(schema.ok() && pipeline.ok());
  CheckReferences(*schema, *pipeline);
}

}  // namespace
}  // namespace quantmill
