#include "host/bench/cell_keys.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/io/checkpoint_files.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/sha256.h"
#include "core/model/config.h"
#include "host/pipeline/methods.h"
#include "host/run/unit_keys.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

// Size and time of change.
std::string Stamp(const fs::path& path) {
  std::error_code error;
  const auto size = fs::file_size(path, error);
  const auto time = fs::last_write_time(path, error).time_since_epoch();
  return absl::StrCat(size, " ",
                      std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}

std::string FolderStamp(const std::string& directory) {
  std::vector<std::string> stamps;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    if (!entry.is_regular_file(error)) continue;
    stamps.push_back(absl::StrCat(entry.path().filename().string(), " ", Stamp(entry.path())));
  }
  std::sort(stamps.begin(), stamps.end());
  return absl::StrJoin(stamps, "\n");
}

absl::StatusOr<std::string> ModelDigest(const std::string& directory, ThreadPool& threads) {
  QM_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(directory));
  QM_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(directory));
  std::string text = ModelDigests(*checkpoint, config.layers, threads).Total();
  for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json"}) {
    const auto content = ReadFile(absl::StrCat(directory, "/", name));
    absl::StrAppend(&text, " ", content.ok() ? Sha256Hex(*content) : "none");
  }
  return Sha256Hex(text);
}

std::string OwnerOf(const std::string& format, const Catalog& catalog) {
  for (const PluginInfo& plugin : catalog.plugins) {
    if (!plugin.rejected.empty()) continue;
    for (const MethodInfo& method : plugin.methods) {
      for (const MethodInfo::Format& owned : method.formats) {
        if (owned.id == format) return plugin.sha256;
      }
    }
  }
  return "";
}

absl::Status AddMethod(const std::string& use, const Catalog& catalog, nlohmann::json* plugins) {
  QM_ASSIGN_OR_RETURN(const MethodUse found, FindUse(catalog, use));
  const PluginInfo* plugin = catalog.FindPlugin(found.method->id);
  if (plugin != nullptr) (*plugins)[use] = plugin->sha256;
  return absl::OkStatus();
}

}  // namespace

InputDigests::InputDigests(std::string cache_file, ThreadPool& threads)
    : cache_file_(std::move(cache_file)), threads_(threads) {
  const auto json = ReadJson(cache_file_);
  cache_ = json.ok() && json->is_object() ? *json : nlohmann::json::object();
}

absl::StatusOr<std::string> InputDigests::Cached(
    const std::string& path, const std::string& stamp,
    const std::function<absl::StatusOr<std::string>()>& compute) {
  const auto it = cache_.find(path);
  if (it != cache_.end() && it->is_object() && it->value("stamp", "") == stamp) {
    return it->value("digest", "");
  }
  QM_ASSIGN_OR_RETURN(const std::string digest, compute());
  cache_[path] = {{"stamp", stamp}, {"digest", digest}};
  return digest;
}

absl::StatusOr<std::string> InputDigests::Model(const std::string& directory) {
  return Cached(directory, FolderStamp(directory),
                [&] { return ModelDigest(directory, threads_); });
}

absl::StatusOr<std::string> InputDigests::File(const std::string& path) {
  return Cached(path, Stamp(path), [&] { return Sha256OfFile(path); });
}

absl::Status InputDigests::Save() const { return WriteFile(cache_file_, cache_.dump(1) + "\n"); }

absl::StatusOr<std::string> CellKey(const BenchCell& cell, const CellContext& context,
                                    InputDigests* digests) {
  nlohmann::json key = cell.tree;
  const Pipeline& pipeline = cell.pipeline;
  QM_ASSIGN_OR_RETURN(key["model"]["path"], digests->Model(pipeline.model_path));
  if (pipeline.evaluate) {
    QM_ASSIGN_OR_RETURN(key["evaluate"]["text"], digests->File(pipeline.evaluate->text));
  }
  if (cell.baseline && pipeline.calibration) {
    // All the scoring takes from it.
    key["calibration"] = {{"key", pipeline.calibration->key}, {"join", pipeline.calibration->join}};
  } else if (pipeline.calibration && pipeline.calibration->text != "self") {
    QM_ASSIGN_OR_RETURN(key["calibration"]["text"], digests->File(pipeline.calibration->text));
  }
  nlohmann::json plugins = nlohmann::json::object();
  for (size_t i = 0; i < pipeline.stages.size(); ++i) {
    const Stage& stage = pipeline.stages[i];
    QM_RETURN_IF_ERROR(AddMethod(stage.use, *context.catalog, &plugins));
    if (stage.on_error.action == OnError::Action::kUse) {
      QM_RETURN_IF_ERROR(AddMethod(stage.on_error.use, *context.catalog, &plugins));
    }
    const std::string data =
        stage.train.is_object() ? stage.train.value("data", std::string()) : std::string();
    if (data.empty()) continue;
    QM_ASSIGN_OR_RETURN(key["stages"][i]["train"]["data"], digests->File(data));
  }
  key["plugins"] = plugins;
  key["run"].erase("work_dir");
  key["run"]["device"] = context.facts.device;
  if (key.contains("export")) key["export"].erase("path");
  key["machine"] = {context.facts.processor, context.facts.gpu, context.facts.driver};
  key["program"] = context.program_sha256;
  return Sha256Hex(key.dump());
}

std::string SpeedKey(const std::string& cell_key, const BenchSpeed& speed,
                     const DeviceFacts& facts) {
  return Sha256Hex(absl::StrCat(cell_key, " ", speed.prompt, " ", speed.new_tokens, " ",
                                absl::StrJoin(speed.batch, ","), " ", facts.threads));
}

std::string SelfTextKey(const std::string& model_digest, const CellContext& context,
                        const Pipeline& pipeline) {
  const std::string dtype =
      pipeline.model_dtype ? std::string(DTypeName(*pipeline.model_dtype)) : "";
  return Sha256Hex(absl::StrJoin({model_digest, context.program_sha256, context.facts.device,
                                  context.facts.processor, context.facts.gpu, dtype},
                                 "\n"));
}

nlohmann::json FormatOwners(const std::string& directory, const Catalog& catalog) {
  nlohmann::json owners = nlohmann::json::object();
  const auto provenance = ReadJson(directory + "/quantmill_provenance.json");
  if (!provenance.ok() || !provenance->contains("slots")) return owners;
  for (const nlohmann::json& slot : provenance->at("slots")) {
    for (const nlohmann::json& entry : slot) {
      const std::string format = entry.value("format", "");
      if (!format.empty()) owners[format] = OwnerOf(format, catalog);
    }
  }
  return owners;
}

bool SameOwners(const nlohmann::json& owners, const Catalog& catalog) {
  if (!owners.is_object()) return false;
  for (const auto& [format, sha256] : owners.items()) {
    if (sha256 != OwnerOf(format, catalog)) return false;
  }
  return true;
}

}  // namespace quantmill
