// docs/schema/pipeline.schema.json and the parser accept the same keys.
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

}  // namespace
}  // namespace quantmill
