// Pipeline files: YAML to Pipeline, every mistake with its place.
#include <algorithm>
#include <filesystem>
#include <limits>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/pipeline/device.h"
#include "host/pipeline/keys.h"
#include "host/pipeline/patterns.h"
#include "host/pipeline/pipeline.h"
#include "host/pipeline/section.h"
#include "host/pipeline/yaml_node.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMostTokens = int64_t{1} << 24;
constexpr int64_t kMostSamples = int64_t{1} << 24;
constexpr int64_t kMostSeed = std::numeric_limits<int64_t>::max();
constexpr int64_t kMostRanks = 1024;
constexpr size_t kMostStages = 256;

class PipelineReader {
 public:
  // quantizes: without it the tree says only how a model is to be measured, and has neither stages
  // nor export.
  PipelineReader(const YamlNode& root, const std::string& file, bool quantizes = true)
      : root_(root), quantizes_(quantizes) {
    pipeline_.file = file;
    std::error_code error;
    folder_ = fs::absolute(file, error).parent_path();
  }

  absl::StatusOr<Pipeline> Read() {
    Section top = Open(root_, "", "");
    ReadVersion(&top);
    ReadModel(&top);
    for (const std::string& plugin : top.List("plugins", nullptr)) {
      pipeline_.plugins.push_back(AbsolutePath(plugin));
    }
    if (const YamlNode* node = top.Find("calibration")) ReadCalibration(*node);
    if (const YamlNode* node = top.Find("run")) ReadRun(*node);
    if (quantizes_) {
      ReadStages(&top);
      if (const YamlNode* node = top.Require("export", "say what to write and where")) {
        ReadExport(*node);
      }
    }
    if (const YamlNode* node = top.Find("evaluate")) ReadEvaluate(*node);
    if (pipeline_.work_dir.empty() && !pipeline_.export_path.empty()) {
      pipeline_.work_dir = pipeline_.export_path + ".work";
    }
    if (absl::Status status = errors_.ToStatus(); !status.ok()) return status;
    return std::move(pipeline_);
  }

 private:
  Section Open(const YamlNode& node, const std::string& path, const std::string& keys) {
    return Section(node, path, PipelineKeys(keys), &errors_, &pipeline_.locations);
  }

  std::string AbsolutePath(const std::string& path) const {
    if (path.empty()) return path;
    fs::path absolute = (folder_ / path).lexically_normal();
    if (!absolute.has_filename()) absolute = absolute.parent_path();  // "out/" is "out"
    return absolute.string();
  }

  std::string Path(Section* section, const std::string& key, const std::string& why) {
    if (section->Require(key, why) == nullptr) return "";
    const std::string path = section->Text(key, "");
    if (path.empty()) section->Error(key, absl::StrCat("'", section->KeyPath(key), "' is empty"));
    return AbsolutePath(path);
  }

  void ReadVersion(Section* top) {
    if (top->Require("version", "write 'version: 1'") == nullptr) return;
    if (top->Text("version", "1") != "1") {
      top->Error("version", "unknown version; this quantmill reads version 1");
    }
  }

  void ReadModel(Section* top) {
    const YamlNode* node = top->Require("model", "say where the checkpoint is: model: {path: DIR}");
    if (node == nullptr) return;
    Section section = Open(*node, "model", "model");
    pipeline_.model_path = Path(&section, "path", "name the checkpoint's directory");
    const std::string dtype = section.Choice("dtype", {"auto", "f32", "bf16", "f16"}, "auto");
    if (dtype == "f32") pipeline_.model_dtype = DType::kF32;
    if (dtype == "bf16") pipeline_.model_dtype = DType::kBF16;
    if (dtype == "f16") pipeline_.model_dtype = DType::kF16;
  }

  void ReadCalibration(const YamlNode& node) {
    Section section = Open(node, "calibration", "calibration");
    CalibrationSection calibration;
    calibration.location = node.location;
    const bool self = section.Text("text", "") == "self";
    calibration.text = self ? "self" : Path(&section, "text", "name a file, or write 'self'");
    calibration.key = section.Text("key", calibration.key);
    calibration.samples = section.Integer("samples", 128, 1, kMostSamples);
    calibration.sequence_length = section.Integer("sequence_length", 2048, 2, kMostTokens);
    calibration.join = section.Text("join", calibration.join);
    calibration.random_order = section.Choice("order", {"start", "random"}, "start") == "random";
    calibration.seed = static_cast<uint64_t>(section.Integer("seed", 0, 0, kMostSeed));
    pipeline_.calibration = std::move(calibration);
  }

  void ReadRun(const YamlNode& node) {
    Section section = Open(node, "run", "run");
    pipeline_.device = section.Text("device", "auto");
    const auto device = ParseDevice(pipeline_.device);
    if (!device.ok()) section.Error("device", std::string(device.status().message()));
    pipeline_.seed = static_cast<uint64_t>(section.Integer("seed", 1, 0, kMostSeed));
    pipeline_.work_dir = AbsolutePath(section.Text("work_dir", ""));
    pipeline_.inputs_quantized =
        section.Choice("inputs", {"quantized", "original"}, "quantized") == "quantized";
    if (const YamlNode* on_error = section.Find("on_error")) {
      pipeline_.on_error = ReadOnError(*on_error, "run.on_error");
    }
    if (const YamlNode* memory = section.Find("memory")) {
      Section limits = Open(*memory, "run.memory", "run.memory");
      pipeline_.device_memory_limit = limits.Bytes("device", 0);
      pipeline_.host_memory_limit = limits.Bytes("host", 0);
    }
  }

  OnError ReadOnError(const YamlNode& node, const std::string& path) {
    OnError result;
    if (node.kind == YamlNode::Kind::kMap) {
      Section section = Open(node, path, "on_error");
      result.action = OnError::Action::kUse;
      if (section.Require("use", "name the method to fall back to") != nullptr) {
        result.use = section.Text("use", "");
      }
      result.options = ReadOptions(section.Find("options"), path + ".options");
      return result;
    }
    if (node.kind == YamlNode::Kind::kScalar && node.text == "stop") return result;
    if (node.kind == YamlNode::Kind::kScalar && node.text == "keep-dense") {
      result.action = OnError::Action::kKeepDense;
      return result;
    }
    const std::string nearest = NearestName(node.text, {"stop", "keep-dense"});
    errors_.Add(node.location,
                ErrorText(absl::StrCat("'", path, "' must be stop, keep-dense or {use: METHOD, ",
                                       "options: {...}}, not ", KindName(node)),
                          nearest.empty() ? "" : absl::StrCat("did you mean '", nearest, "'?")));
    return result;
  }

  OptionMap ReadOptions(const YamlNode* node, const std::string& path) {
    OptionMap options;
    if (node == nullptr) return options;
    if (node->kind != YamlNode::Kind::kMap) {
      errors_.Add(node->location,
                  absl::StrCat("'", path, "' must be a map of options, not ", KindName(*node)));
      return options;
    }
    for (const YamlNode::Entry& entry : node->entries) {
      options[entry.key] = {OptionText(entry, path), entry.value.location};
    }
    return options;
  }

  // A list of scalars reaches the method as "a,b".
  std::string OptionText(const YamlNode::Entry& entry, const std::string& path) {
    if (entry.value.kind == YamlNode::Kind::kScalar) return entry.value.text;
    std::vector<std::string> parts;
    bool good = entry.value.kind == YamlNode::Kind::kSequence;
    for (const YamlNode& item : entry.value.items) {
      good = good && item.kind == YamlNode::Kind::kScalar;
      parts.push_back(item.text);
    }
    if (!good) {
      errors_.Add(entry.value.kind == YamlNode::Kind::kNull ? entry.location : entry.value.location,
                  absl::StrCat("'", path, ".", entry.key, "' must be a value, not ",
                               KindName(entry.value)));
    }
    return absl::StrJoin(parts, ",");
  }

  void ReadStages(Section* top) {
    const YamlNode* node = top->Require("stages", "list at least one: stages: [{use: METHOD}]");
    if (node == nullptr) return;
    if (node->kind != YamlNode::Kind::kSequence || node->items.empty()) {
      errors_.Add(
          node->location,
          absl::StrCat("'stages' must be a list of stages, not ",
                       node->kind == YamlNode::Kind::kSequence ? "an empty one" : KindName(*node)));
      return;
    }
    if (node->items.size() > kMostStages) {
      errors_.Add(node->location, absl::StrCat("more than ", kMostStages, " stages"));
      return;
    }
    for (size_t i = 0; i < node->items.size(); ++i) {
      ReadStage(node->items[i], absl::StrCat("stages.", i));
    }
    NameStages();
  }

  void ReadStage(const YamlNode& node, const std::string& path) {
    Section section = Open(node, path, "stages[]");
    Stage stage;
    stage.location = stage.use_location = node.location;
    if (const YamlNode* use = section.Require("use", "name the method")) {
      stage.use_location = use->location;
      stage.use = section.Text("use", "");
    }
    stage.name = section.Text("name", "");
    CheckName(&section, stage);
    stage.options = ReadOptions(section.Find("options"), path + ".options");
    if (section.Find("layers") != nullptr) {
      stage.layers = ReadPatterns(&section, &stage.layer_locations);
    }
    if (const YamlNode* overrides = section.Find("overrides")) ReadOverrides(*overrides, &stage);
    stage.on_error = pipeline_.on_error;
    if (const YamlNode* on_error = section.Find("on_error")) {
      stage.on_error = ReadOnError(*on_error, path + ".on_error");
    }
    stage.optional = section.Bool("optional", false);
    stage.requantize = section.Bool("requantize", false);
    if (const YamlNode* train = section.Find("train")) stage.train = ReadTrain(*train, path);
    pipeline_.stages.push_back(std::move(stage));
  }

  static void CheckName(Section* section, const Stage& stage) {
    if (section->Find("name") == nullptr) return;
    const bool good = !stage.name.empty() && stage.name.size() <= 64 &&
                      std::all_of(stage.name.begin(), stage.name.end(), [](unsigned char c) {
                        return std::isalnum(c) || c == '-' || c == '_';
                      });
    if (!good) {
      section->Error("name", absl::StrCat("stage name '", stage.name,
                                          "' must be 1 to 64 letters, digits, '-' and '_'"));
    }
  }

  std::vector<std::string> ReadPatterns(Section* section, std::vector<SourceLocation>* locations) {
    std::vector<SourceLocation> places;
    std::vector<std::string> patterns = section->List("layers", &places);
    for (size_t i = 0; i < patterns.size(); ++i) {
      const auto compiled = LayerPattern::Compile(patterns[i]);
      if (!compiled.ok()) errors_.Add(places[i], std::string(compiled.status().message()));
    }
    if (locations != nullptr) *locations = std::move(places);
    return patterns;
  }

  void ReadOverrides(const YamlNode& node, Stage* stage) {
    const std::string path = absl::StrCat("stages.", pipeline_.stages.size(), ".overrides");
    if (node.kind != YamlNode::Kind::kSequence) {
      errors_.Add(node.location, absl::StrCat("'", path, "' must be a list, not ", KindName(node)));
      return;
    }
    for (const YamlNode& item : node.items) {
      Section section = Open(item, path, "overrides[]");
      Override override;
      override.location = item.location;
      if (section.Require("layers", "say which layers it is for") != nullptr) {
        override.layers = ReadPatterns(&section, nullptr);
      }
      if (const YamlNode* options = section.Require("options", "say what is different there")) {
        override.options = ReadOptions(options, path + ".options");
      }
      stage->overrides.push_back(std::move(override));
    }
  }

  nlohmann::json ReadTrain(const YamlNode& node, const std::string& path) {
    Section section = Open(node, path + ".train", "train");
    nlohmann::json train = YamlToJson(node);
    if (section.Find("data") != nullptr && train.is_object()) {
      train["data"] = AbsolutePath(section.Text("data", ""));
    }
    return train;
  }

  void NameStages() {
    std::set<std::string> taken;
    for (const Stage& stage : pipeline_.stages) {
      if (stage.name.empty() || taken.insert(stage.name).second) continue;
      errors_.Add(stage.location,
                  absl::StrCat("two stages are named '", stage.name, "'; rename one"));
    }
    for (Stage& stage : pipeline_.stages) {
      if (!stage.name.empty()) continue;
      stage.name = stage.use;
      for (int n = 2; !taken.insert(stage.name).second; ++n) {
        stage.name = absl::StrCat(stage.use, "-", n);
      }
    }
  }

  void ReadExport(const YamlNode& node) {
    Section section = Open(node, "export", "export");
    if (section.Require("format", "name a checkpoint format, e.g. compressed-tensors") != nullptr) {
      pipeline_.export_format = section.Text("format", "");
    }
    pipeline_.export_path = Path(&section, "path", "name the directory to write");
    pipeline_.tensor_parallel = section.Integer("tensor_parallel", 1, 1, kMostRanks);
  }

  void ReadEvaluate(const YamlNode& node) {
    Section section = Open(node, "evaluate", "evaluate");
    Pipeline::Evaluate evaluate;
    evaluate.text = Path(&section, "text", "name a text file");
    evaluate.context = section.Integer("context", 2048, 2, kMostTokens);
    evaluate.windows = section.Integer("windows", 0, 0, kMostSamples);
    evaluate.reference = section.Bool("reference", true);
    pipeline_.evaluate = evaluate;
  }

  const YamlNode& root_;
  bool quantizes_;
  fs::path folder_;
  ErrorList errors_;
  Pipeline pipeline_;
};

}  // namespace

std::string SourceLocation::ToString() const {
  return line > 0 ? absl::StrCat(file, ":", line, ":", column) : file;
}

absl::StatusOr<Pipeline> ParsePipelineTree(const YamlNode& root, const std::string& file,
                                           bool quantizes) {
  return PipelineReader(root, file, quantizes).Read();
}

absl::StatusOr<Pipeline> ParsePipelineText(const std::string& text, const std::string& file,
                                           const std::vector<std::string>& sets) {
  QM_ASSIGN_OR_RETURN(YamlNode root, ParseYaml(text, file));
  for (const std::string& set : sets) QM_RETURN_IF_ERROR(SetValue(set, &root));
  return PipelineReader(root, file).Read();
}

absl::StatusOr<Pipeline> ParsePipelineFile(const std::string& path,
                                           const std::vector<std::string>& sets) {
  QM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParsePipelineText(text, path, sets);
}

}  // namespace quantmill
