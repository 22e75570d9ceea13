// Reads one map of a pipeline file: known keys, types and ranges, with every mistake collected.
#ifndef QUANTMILL_HOST_PIPELINE_SECTION_H_
#define QUANTMILL_HOST_PIPELINE_SECTION_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "host/pipeline/pipeline.h"
#include "host/pipeline/yaml_node.h"

namespace quantmill {

// Mistakes by place; one status at the end.
class ErrorList {
 public:
  void Add(const SourceLocation& location, const std::string& text);
  bool empty() const { return errors_.empty(); }
  // OK, or INVALID_ARGUMENT with one "file:line:column: text" per line, in file order.
  absl::Status ToStatus() const;

 private:
  std::vector<std::pair<SourceLocation, std::string>> errors_;
};

class Section {
 public:
  // `path`: where it stands ("run.memory", empty for the whole file). `known`: the keys it may
  // have; others are reported with the nearest. A node that is no map is reported and reads as
  // empty. `locations`, if not null, receives "path.key" for each key present.
  Section(const YamlNode& node, std::string path, std::vector<std::string> known, ErrorList* errors,
          std::map<std::string, SourceLocation>* locations);

  // Null if absent or empty.
  const YamlNode* Find(const std::string& key) const;
  // As Find, but reports a missing key.
  const YamlNode* Require(const std::string& key, const std::string& why);

  // The value, or `fallback` if absent or wrong (which is reported).
  std::string Text(const std::string& key, const std::string& fallback);
  std::string Choice(const std::string& key, const std::vector<std::string>& choices,
                     const std::string& fallback);
  int64_t Integer(const std::string& key, int64_t fallback, int64_t least, int64_t most);
  bool Bool(const std::string& key, bool fallback);
  // "6GiB", "500MB" or plain bytes.
  int64_t Bytes(const std::string& key, int64_t fallback);
  // A list of texts; a single text counts as a list of one. Reports an empty list.
  std::vector<std::string> List(const std::string& key, std::vector<SourceLocation>* locations);

  std::string KeyPath(const std::string& key) const;
  void Error(const std::string& key, const std::string& text);

 private:
  const YamlNode* Scalar(const std::string& key, const std::string& wanted);

  const YamlNode& node_;
  std::string path_;
  ErrorList* errors_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_SECTION_H_
