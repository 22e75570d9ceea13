#include "host/pipeline/yaml_node.h"

#include <yaml-cpp/depthguard.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/parser.h>
#include <yaml-cpp/yaml.h>

#include <cmath>
#include <sstream>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "core/base/status.h"
#include "core/text/unicode.h"

namespace quantmill {
namespace {

constexpr size_t kMostBytes = 1 << 20;
constexpr int kMostNodes = 50000;  // aliases count each time they are used
constexpr int kMostDepth = 32;

SourceLocation LocationOf(const YAML::Mark& mark, const std::string& file) {
  if (mark.is_null()) return {file, 0, 0};
  return {file, mark.line + 1, mark.column + 1};
}

absl::Status ErrorAt(const SourceLocation& location, const std::string& text) {
  return absl::InvalidArgumentError(absl::StrCat(location.ToString(), ": ", text));
}

class Converter {
 public:
  explicit Converter(const std::string& file) : file_(file) {}

  absl::StatusOr<YamlNode> Convert(const YAML::Node& in, int depth) {
    YamlNode out;
    out.location = LocationOf(in.Mark(), file_);
    if (++nodes_ > kMostNodes) {
      return ErrorAt(out.location, absl::StrCat("the file has more than ", kMostNodes, " values"));
    }
    if (depth > kMostDepth) {
      return ErrorAt(out.location,
                     absl::StrCat("values are nested deeper than ", kMostDepth, " levels"));
    }
    switch (in.Type()) {
      case YAML::NodeType::Scalar:
        out.kind = YamlNode::Kind::kScalar;
        out.text = in.Scalar();
        out.quoted = in.Tag() == "!";
        return out;
      case YAML::NodeType::Sequence:
        return ConvertSequence(in, depth, std::move(out));
      case YAML::NodeType::Map:
        return ConvertMap(in, depth, std::move(out));
      default:
        return out;
    }
  }

 private:
  absl::StatusOr<YamlNode> ConvertSequence(const YAML::Node& in, int depth, YamlNode out) {
    out.kind = YamlNode::Kind::kSequence;
    for (const YAML::Node& item : in) {
      QM_ASSIGN_OR_RETURN(YamlNode converted, Convert(item, depth + 1));
      out.items.push_back(std::move(converted));
    }
    return out;
  }

  absl::StatusOr<YamlNode> ConvertMap(const YAML::Node& in, int depth, YamlNode out) {
    out.kind = YamlNode::Kind::kMap;
    for (const auto& pair : in) {
      const SourceLocation location = LocationOf(pair.first.Mark(), file_);
      if (!pair.first.IsScalar()) return ErrorAt(location, "a key must be a plain word");
      const std::string key = pair.first.Scalar();
      for (const YamlNode::Entry& entry : out.entries) {
        if (entry.key != key) continue;
        return ErrorAt(location, absl::StrCat("key '", key, "' is given twice; the first is at ",
                                              entry.location.ToString()));
      }
      QM_ASSIGN_OR_RETURN(YamlNode value, Convert(pair.second, depth + 1));
      out.entries.push_back({key, location, std::move(value)});
    }
    return out;
  }

  const std::string& file_;
  int nodes_ = 0;
};

// Values go into messages and JSON, which take nothing else.
absl::Status ExpectUtf8(absl::string_view text, const std::string& file) {
  SourceLocation at = {file, 1, 1};
  while (!text.empty()) {
    const size_t length = CharacterLength({text.data(), text.size()});
    if (length == 0) return ErrorAt(at, "this is no UTF-8 text; write it as UTF-8");
    at.column = text[0] == '\n' ? 1 : at.column + 1;
    at.line += text[0] == '\n' ? 1 : 0;
    text.remove_prefix(length);
  }
  return absl::OkStatus();
}

// Where the first event of every document was.
class DocumentMarks : public YAML::EventHandler {
 public:
  const std::vector<YAML::Mark>& marks() const { return marks_; }

  void OnDocumentStart(const YAML::Mark&) override { inside_ = false; }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override { Note(mark); }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override { Note(mark); }
  void OnScalar(const YAML::Mark& mark, const std::string&, YAML::anchor_t,
                const std::string&) override {
    Note(mark);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    Note(mark);
  }
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {
    Note(mark);
  }
  void OnMapEnd() override {}

 private:
  void Note(const YAML::Mark& mark) {
    if (!inside_) marks_.push_back(mark);
    inside_ = true;
  }

  std::vector<YAML::Mark> marks_;
  bool inside_ = false;
};

// Not by YAML::LoadAll: a document that begins with a comma is empty and leaves the parser in its
// place, so that there is always one document more.
absl::Status ExpectOneDocument(const std::string& text, const std::string& file) {
  std::istringstream stream(text);
  YAML::Parser parser(stream);
  DocumentMarks documents;
  if (!parser.HandleNextDocument(documents)) return ErrorAt({file, 1, 1}, "the file is empty");
  if (!parser.HandleNextDocument(documents)) return absl::OkStatus();
  const YAML::Mark& first = documents.marks().front();
  const YAML::Mark& second = documents.marks().back();
  return ErrorAt(LocationOf(second, file),
                 first.pos == second.pos
                     ? "this is not the beginning of a value; write 'key: value' lines"
                     : "a second document begins here; write one document per file");
}

absl::StatusOr<YamlNode> ParseOneDocument(const std::string& text, const std::string& file) {
  try {
    QM_RETURN_IF_ERROR(ExpectOneDocument(text, file));
    return Converter(file).Convert(YAML::Load(text), 0);
  } catch (const YAML::DeepRecursion& error) {
    return ErrorAt(LocationOf(error.mark, file), "values are nested too deeply");
  } catch (const YAML::Exception& error) {
    return ErrorAt(LocationOf(error.mark, file), error.msg);
  } catch (const std::exception& error) {
    return ErrorAt({file, 0, 0}, error.what());
  }
}

// The index of `part` in a list of stages: a number, a stage's name, or the method of one without.
absl::StatusOr<size_t> ItemIndex(const YamlNode& list, const std::string& part) {
  uint32_t index = 0;
  if (absl::SimpleAtoi(part, &index)) {
    if (index < list.items.size()) return index;
    return absl::InvalidArgumentError(
        absl::StrCat("there is no entry ", part, "; the list has ", list.items.size()));
  }
  for (const char* key : {"name", "use"}) {
    for (size_t i = 0; i < list.items.size(); ++i) {
      const YamlNode* name = list.items[i].Find(key);
      if (name != nullptr && name->text == part) return i;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no entry is named '", part, "'; use its index, counted from 0"));
}

absl::StatusOr<YamlNode*> Step(const std::string& part, const SourceLocation& location,
                               YamlNode* node) {
  if (node->kind == YamlNode::Kind::kSequence) {
    QM_ASSIGN_OR_RETURN(const size_t index, ItemIndex(*node, part));
    return &node->items[index];
  }
  if (node->kind == YamlNode::Kind::kNull) {
    node->kind = YamlNode::Kind::kMap;
    node->location = location;
  }
  if (node->kind != YamlNode::Kind::kMap) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", part, "' cannot be set inside ", KindName(*node)));
  }
  for (YamlNode::Entry& entry : node->entries) {
    if (entry.key == part) return &entry.value;
  }
  node->entries.push_back({part, location, YamlNode()});
  return &node->entries.back().value;
}

nlohmann::json ScalarToJson(const YamlNode& node) {
  if (node.quoted) return node.text;
  const std::string lower = absl::AsciiStrToLower(node.text);
  if (lower == "true") return true;
  if (lower == "false") return false;
  if (lower == "null" || lower == "~") return nullptr;
  int64_t integer = 0;
  if (absl::SimpleAtoi(node.text, &integer)) return integer;
  double real = 0;
  if (absl::SimpleAtod(node.text, &real) && std::isfinite(real)) return real;
  return node.text;
}

}  // namespace

const YamlNode* YamlNode::Find(const std::string& key) const {
  for (const Entry& entry : entries) {
    if (entry.key == key) return &entry.value;
  }
  return nullptr;
}

std::string KindName(const YamlNode& node) {
  switch (node.kind) {
    case YamlNode::Kind::kNull:
      return "nothing";
    case YamlNode::Kind::kSequence:
      return "a list";
    case YamlNode::Kind::kMap:
      return "a map";
    default:
      return absl::StrCat("'", node.text.substr(0, 60), "'");
  }
}

absl::StatusOr<YamlNode> ParseYaml(const std::string& text, const std::string& file) {
  if (text.size() > kMostBytes) {
    return ErrorAt({file, 0, 0},
                   absl::StrCat("the file has ", text.size(), " bytes; the limit is ", kMostBytes));
  }
  if (text.find('\0') != std::string::npos) {
    return ErrorAt({file, 0, 0}, "the file holds a NUL byte; it is no YAML text");
  }
  QM_RETURN_IF_ERROR(ExpectUtf8(text, file));
  return ParseOneDocument(text, file);
}

absl::Status SetValue(const std::string& assignment, YamlNode* root) {
  const std::string place = absl::StrCat("--set ", assignment);
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0) {
    return absl::InvalidArgumentError(absl::StrCat(place, ": write --set a.b=value"));
  }
  absl::StatusOr<YamlNode> value = YamlNode();
  if (equals + 1 < assignment.size()) value = ParseYaml(assignment.substr(equals + 1), place);
  if (!value.ok()) return value.status();
  const SourceLocation location{place, 0, 0};
  YamlNode* node = root;
  for (const absl::string_view part : absl::StrSplit(assignment.substr(0, equals), '.')) {
    absl::StatusOr<YamlNode*> next = part.empty() ? absl::InvalidArgumentError("an empty key")
                                                  : Step(std::string(part), location, node);
    if (!next.ok()) return WithContext(next.status(), place);
    node = *next;
  }
  *node = *std::move(value);
  node->location = location;
  return absl::OkStatus();
}

nlohmann::json YamlToJson(const YamlNode& node) {
  switch (node.kind) {
    case YamlNode::Kind::kScalar:
      return ScalarToJson(node);
    case YamlNode::Kind::kSequence: {
      nlohmann::json list = nlohmann::json::array();
      for (const YamlNode& item : node.items) list.push_back(YamlToJson(item));
      return list;
    }
    case YamlNode::Kind::kMap: {
      nlohmann::json map = nlohmann::json::object();
      for (const YamlNode::Entry& entry : node.entries) map[entry.key] = YamlToJson(entry.value);
      return map;
    }
    default:
      return nullptr;
  }
}

}  // namespace quantmill
