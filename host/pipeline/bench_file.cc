// Bench files: YAML to the pipelines of their cells, every mistake with its place.
#include "host/pipeline/bench_file.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/pipeline/keys.h"
#include "host/pipeline/section.h"
#include "host/pipeline/yaml_node.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr char kOriginal[] = "original";
constexpr size_t kMostModels = 64;
constexpr size_t kMostRows = 256;
constexpr int64_t kMostTokens = int64_t{1} << 20;
constexpr int64_t kMostBatch = 1024;

YamlNode Scalar(const std::string& text, const SourceLocation& location) {
  YamlNode node;
  node.kind = YamlNode::Kind::kScalar;
  node.text = text;
  node.quoted = true;
  node.location = location;
  return node;
}

YamlNode Map(const SourceLocation& location) {
  YamlNode node;
  node.kind = YamlNode::Kind::kMap;
  node.location = location;
  return node;
}

YamlNode* Value(YamlNode* map, const std::string& key) {
  for (YamlNode::Entry& entry : map->entries) {
    if (entry.key == key) return &entry.value;
  }
  return nullptr;
}

// In the place of an older value, if there is one.
void Put(const std::string& key, YamlNode value, YamlNode* map) {
  if (YamlNode* old = Value(map, key)) {
    *old = std::move(value);
  } else {
    const SourceLocation location = value.location;
    map->entries.push_back({key, location, std::move(value)});
  }
}

struct Row {
  std::string name;
  const YamlNode* stages = nullptr;   // null: the baseline
  const YamlNode* exports = nullptr;  // null: the native format
  SourceLocation location;
};

struct Model {
  BenchModel model;
  const YamlNode* dtype = nullptr;
};

class BenchReader {
 public:
  BenchReader(const YamlNode& root, const std::string& file, const std::string& directory,
              const std::string& device)
      : root_(root), device_(device) {
    bench_.file = file;
    std::error_code error;
    folder_ = fs::absolute(file, error).parent_path();
    directory_ = fs::absolute(directory, error).lexically_normal().string();
  }

  absl::StatusOr<BenchFile> Read() {
    if (root_.kind != YamlNode::Kind::kMap) {
      errors_.Add(root_.location,
                  absl::StrCat("the bench must be a map of ", absl::StrJoin(BenchKeys(""), ", "),
                               ", not ", KindName(root_)));
      return errors_.ToStatus();
    }
    Section top(root_, "", BenchKeys(""), &errors_, nullptr);
    if (top.Require("version", "write 'version: 1'") != nullptr &&
        top.Text("version", "1") != "1") {
      top.Error("version", "unknown version; this quantmill reads version 1");
    }
    ReadModels(&top);
    ReadRows(&top);
    top.Require("evaluate", "say what to score: evaluate: {text: FILE}");
    if (const YamlNode* node = top.Find("speed")) ReadSpeed(*node);
    if (const YamlNode* node = top.Find("run")) {
      Section run(*node, "run", BenchKeys("run"), &errors_, nullptr);
    }
    if (absl::Status status = errors_.ToStatus(); !status.ok()) return status;
    QM_RETURN_IF_ERROR(MakeCells());
    return std::move(bench_);
  }

 private:
  std::string AbsolutePath(const std::string& path) const {
    fs::path absolute = (folder_ / path).lexically_normal();
    if (!absolute.has_filename()) absolute = absolute.parent_path();
    return absolute.string();
  }

  // The items of a list of maps that must be there; empty, and reported, if it is not.
  const std::vector<YamlNode>& Items(Section* top, const std::string& key, const std::string& why,
                                     size_t most) {
    static const auto* none = new std::vector<YamlNode>();
    const YamlNode* node = top->Require(key, why);
    if (node == nullptr) return *none;
    if (node->kind != YamlNode::Kind::kSequence) {
      errors_.Add(node->location,
                  absl::StrCat("'", key, "' must be a list, not ", KindName(*node)));
      return *none;
    }
    if (node->items.empty() || node->items.size() > most) {
      errors_.Add(node->location, absl::StrCat("'", key, "' must have 1 to ", most,
                                               " entries, not ", node->items.size()));
      return *none;
    }
    return node->items;
  }

  // A name that is also the name of a folder.
  std::string Name(Section* section, const std::string& what, const SourceLocation& location,
                   std::set<std::string>* taken) {
    if (section->Require("name", absl::StrCat("name the ", what)) == nullptr) return "";
    std::string name = section->Text("name", "");
    const bool good = !name.empty() && name.size() <= 64 && name[0] != '.' &&
                      std::all_of(name.begin(), name.end(), [](unsigned char c) {
                        return std::isalnum(c) || c == '-' || c == '_' || c == '.';
                      });
    if (!good) {
      section->Error("name", absl::StrCat(what, " name '", name,
                                          "' must be 1 to 64 letters, digits, '-', '_' and '.', "
                                          "and must not begin with '.'"));
    } else if (!taken->insert(name).second) {
      errors_.Add(location, absl::StrCat("two ", what, "s are named '", name, "'; rename one"));
    }
    return name;
  }

  void ReadModels(Section* top) {
    std::set<std::string> taken;
    const auto& items =
        Items(top, "models", "list at least one: models: [{name: NAME, path: DIR}]", kMostModels);
    for (size_t i = 0; i < items.size(); ++i) {
      Section section(items[i], absl::StrCat("models.", i), BenchKeys("models[]"), &errors_,
                      nullptr);
      Model model;
      model.model.name = Name(&section, "model", items[i].location, &taken);
      model.model.location = items[i].location;
      if (const YamlNode* path = section.Require("path", "name the checkpoint's directory")) {
        model.model.location = path->location;
        const std::string text = section.Text("path", "");
        if (text.empty()) section.Error("path", absl::StrCat("'models.", i, ".path' is empty"));
        model.model.path = AbsolutePath(text);
      }
      model.dtype = section.Find("dtype");
      bench_.models.push_back(model.model);
      models_.push_back(std::move(model));
    }
  }

  void ReadRows(Section* top) {
    std::set<std::string> taken;
    const auto& items =
        Items(top, "rows", "list at least one: rows: [{name: NAME, stages: [...]}]", kMostRows);
    const Row* baseline = nullptr;
    rows_.reserve(items.size() + 1);
    for (size_t i = 0; i < items.size(); ++i) {
      Section section(items[i], absl::StrCat("rows.", i), BenchKeys("rows[]"), &errors_, nullptr);
      Row row;
      row.location = items[i].location;
      row.name = Name(&section, "row", items[i].location, &taken);
      row.stages = section.Find("stages");
      row.exports = section.Find("export");
      if (row.exports != nullptr) {
        Section exports(*row.exports, absl::StrCat("rows.", i, ".export"),
                        BenchKeys("rows[].export"), &errors_, nullptr);
      }
      if (row.stages == nullptr && row.exports != nullptr) {
        errors_.Add(row.exports->location,
                    "a row without stages has nothing to export; it is the "
                    "original, measured as it is");
      }
      if (row.stages == nullptr && baseline != nullptr) {
        errors_.Add(row.location, absl::StrCat("the rows '", baseline->name, "' and '", row.name,
                                               "' both have no stages; one original is enough"));
      }
      rows_.push_back(std::move(row));
      if (rows_.back().stages == nullptr) baseline = &rows_.back();
    }
    if (baseline != nullptr || items.empty()) return;
    if (!taken.insert(kOriginal).second) {
      top->Error("rows",
                 "the row 'original' has stages; that name is the untouched model's, which "
                 "is measured in every bench");
    }
    Row row;
    row.name = kOriginal;
    row.location = items[0].location;
    rows_.insert(rows_.begin(), std::move(row));
  }

  void ReadSpeed(const YamlNode& node) {
    Section section(node, "speed", BenchKeys("speed"), &errors_, nullptr);
    BenchSpeed speed;
    speed.location = node.location;
    speed.prompt = section.Integer("prompt", speed.prompt, 1, kMostTokens);
    // The first of them comes with the prompt; the time of at least one more is needed.
    speed.new_tokens = section.Integer("new_tokens", speed.new_tokens, 2, kMostTokens);
    std::vector<SourceLocation> places;
    const std::vector<std::string> texts = section.List("batch", &places);
    if (!texts.empty()) speed.batch.clear();
    for (size_t i = 0; i < texts.size(); ++i) {
      int64_t batch = 0;
      if (!absl::SimpleAtoi(texts[i], &batch) || batch < 1 || batch > kMostBatch) {
        errors_.Add(places[i], absl::StrCat("'speed.batch' must be whole numbers in 1 .. ",
                                            kMostBatch, ", not '", texts[i], "'"));
      } else if (std::find(speed.batch.begin(), speed.batch.end(), batch) != speed.batch.end()) {
        errors_.Add(places[i], absl::StrCat("'speed.batch' lists ", batch, " twice"));
      } else {
        speed.batch.push_back(batch);
      }
    }
    bench_.speed = std::move(speed);
  }

  absl::Status MakeCells() {
    std::vector<std::string> lines;
    for (const Row& row : rows_) bench_.rows.push_back(row.name);
    for (const Model& model : models_) {
      for (const Row& row : rows_) {
        BenchCell cell;
        cell.model = model.model.name;
        cell.row = row.name;
        cell.baseline = row.stages == nullptr;
        YamlNode tree = Tree(model, row, BenchCellPath(directory_, cell));
        absl::StatusOr<Pipeline> pipeline = ParsePipelineTree(tree, bench_.file, !cell.baseline);
        if (!pipeline.ok()) {
          // What all cells share is said once.
          for (const absl::string_view line : absl::StrSplit(pipeline.status().message(), '\n')) {
            if (std::find(lines.begin(), lines.end(), line) == lines.end()) {
              lines.emplace_back(line);
            }
          }
          continue;
        }
        cell.pipeline = *std::move(pipeline);
        if (cell.baseline) {
          cell.pipeline.export_path = BenchCellPath(directory_, cell) + "/out";  // never written
        }
        cell.tree = YamlToJson(tree);
        bench_.cells.push_back(std::move(cell));
      }
    }
    if (lines.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrJoin(lines, "\n"));
  }

  void MakeAbsolute(YamlNode* node) const {
    if (node != nullptr && node->kind == YamlNode::Kind::kScalar && !node->text.empty()) {
      node->text = AbsolutePath(node->text);
    }
  }

  void CopyShared(const std::string& key, YamlNode* tree) const {
    const YamlNode* shared = root_.Find(key);
    if (shared == nullptr || shared->kind == YamlNode::Kind::kNull) return;
    YamlNode copy = *shared;
    if (key == "plugins") {
      for (YamlNode& item : copy.items) MakeAbsolute(&item);
      MakeAbsolute(&copy);
    } else if (YamlNode* text = Value(&copy, "text")) {
      if (key != "calibration" || text->text != "self") MakeAbsolute(text);
    }
    Put(key, std::move(copy), tree);
  }

  // The row's pipeline on this model. Every value keeps its place in the bench file.
  YamlNode Tree(const Model& model, const Row& row, const std::string& directory) const {
    YamlNode tree = Map(row.location);
    YamlNode version = Scalar("1", row.location);
    version.quoted = false;
    Put("version", std::move(version), &tree);
    YamlNode model_map = Map(model.model.location);
    Put("path", Scalar(model.model.path, model.model.location), &model_map);
    if (model.dtype != nullptr) Put("dtype", *model.dtype, &model_map);
    Put("model", std::move(model_map), &tree);
    for (const char* key : {"plugins", "calibration", "evaluate"}) CopyShared(key, &tree);
    const YamlNode* shared_run = root_.Find("run");
    YamlNode run = shared_run != nullptr && shared_run->kind == YamlNode::Kind::kMap
                       ? *shared_run
                       : Map(row.location);
    Put("work_dir", Scalar(directory + "/work", row.location), &run);
    if (!device_.empty()) Put("device", Scalar(device_, row.location), &run);
    Put("run", std::move(run), &tree);
    if (row.stages == nullptr) return tree;
    YamlNode stages = *row.stages;
    for (YamlNode& stage : stages.items) {
      YamlNode* train = Value(&stage, "train");
      if (train != nullptr) MakeAbsolute(Value(train, "data"));
    }
    Put("stages", std::move(stages), &tree);
    YamlNode exports = Map(row.location);
    if (row.exports != nullptr && row.exports->kind == YamlNode::Kind::kMap) exports = *row.exports;
    if (Value(&exports, "format") == nullptr) {
      Put("format", Scalar("quantmill", row.location), &exports);
    }
    Put("path", Scalar(directory + "/out", row.location), &exports);
    Put("export", std::move(exports), &tree);
    return tree;
  }

  const YamlNode& root_;
  const std::string& device_;
  fs::path folder_;
  std::string directory_;
  ErrorList errors_;
  std::vector<Model> models_;
  std::vector<Row> rows_;
  BenchFile bench_;
};

}  // namespace

std::string BenchCellPath(const std::string& directory, const BenchCell& cell) {
  return absl::StrCat(directory, "/cells/", cell.model, "/", cell.row);
}

absl::StatusOr<BenchFile> ParseBenchText(const std::string& text, const std::string& file,
                                         const std::string& directory, const std::string& device) {
  QM_ASSIGN_OR_RETURN(const YamlNode root, ParseYaml(text, file));
  return BenchReader(root, file, directory, device).Read();
}

absl::StatusOr<BenchFile> ParseBenchFile(const std::string& path, const std::string& directory,
                                         const std::string& device) {
  QM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParseBenchText(text, path, directory, device);
}

}  // namespace quantmill
