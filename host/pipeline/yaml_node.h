// A YAML document as plain data with places, bounded in size and depth: nothing behind it throws.
#ifndef QUANTMILL_HOST_PIPELINE_YAML_NODE_H_
#define QUANTMILL_HOST_PIPELINE_YAML_NODE_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "host/pipeline/pipeline.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct YamlNode {
  enum class Kind { kNull, kScalar, kSequence, kMap };
  struct Entry;
  Kind kind = Kind::kNull;
  std::string text;     // kScalar
  bool quoted = false;  // kScalar: written in quotes, so never a number or a truth value
  std::vector<YamlNode> items;
  std::vector<Entry> entries;  // in file order, keys unique
  SourceLocation location;

  const YamlNode* Find(const std::string& key) const;  // of a map; null if absent
};

struct YamlNode::Entry {
  std::string key;
  SourceLocation location;  // of the key
  YamlNode value;
};

// "a number", "a list", ... for error messages.
std::string KindName(const YamlNode& node);

// INVALID_ARGUMENT "file:line:column: what" for what YAML does not allow, duplicate keys, more than
// one document, and documents too large or too deep for a hand-written file.
absl::StatusOr<YamlNode> ParseYaml(const std::string& text, const std::string& file);

// Applies "a.b=value" to the tree; maps on the way are made. A list takes an index
// ("stages.0.options.bits=3") or, for `stages`, a stage's name ("stages.gptq.options.bits=3").
absl::Status SetValue(const std::string& assignment, YamlNode* root);

// A pipeline from a tree: what ParsePipelineText does behind the YAML. Without `quantizes` the tree
// says only how a model is to be measured: `stages` and `export` are not read.
absl::StatusOr<Pipeline> ParsePipelineTree(const YamlNode& root, const std::string& file,
                                           bool quantizes = true);

// Numbers, truth values and null as such, by the YAML 1.2 core schema.
nlohmann::json YamlToJson(const YamlNode& node);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_YAML_NODE_H_
