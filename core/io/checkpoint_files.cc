#include "core/io/checkpoint_files.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <utility>

#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/gguf_file.h"
#include "core/io/gguf_tensors.h"
#include "core/io/json.h"

namespace quantmill {
namespace {

constexpr char kSingleName[] = "model.safetensors";
constexpr char kIndexName[] = "model.safetensors.index.json";

std::string Join(const std::string& directory, std::string_view name) {
  return (std::filesystem::path(directory) / name).string();
}

// Says what is there instead, since "file not found" helps nobody.
absl::Status NoWeights(const std::string& directory) {
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) {
    return absl::NotFoundError(ErrorText(absl::StrCat("cannot open model ", directory),
                                         "it is not a directory",
                                         "give the directory that holds config.json"));
  }
  std::string why = absl::StrCat("it has neither ", kSingleName, " nor ", kIndexName);
  std::string remedy = "give the directory of a Hugging Face checkpoint";
  for (const auto& item : std::filesystem::directory_iterator(directory, error)) {
    const std::string name = item.path().filename().string();
    if (item.path().extension() == ".safetensors") {
      why = absl::StrCat("it has ", name, " but no ", kIndexName);
      remedy = absl::StrCat("download ", kIndexName, " too");
      break;
    }
    if (item.path().extension() == ".bin" || item.path().extension() == ".pth") {
      why = absl::StrCat("its weights (", name, ") are not in safetensors files");
      remedy = "convert them to safetensors";
    }
  }
  return absl::NotFoundError(ErrorText(absl::StrCat("cannot open model ", directory), why, remedy));
}

// Shards by file name, each with the tensors the index puts there.
using ShardMap = std::map<std::string, std::vector<std::string>>;

absl::StatusOr<ShardMap> ReadIndex(const std::string& path) {
  const auto bad = [&path](absl::string_view why) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("cannot read ", path), why, "download the file again"));
  };
  QM_ASSIGN_OR_RETURN(const nlohmann::json json, ReadJson(path));
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
    return bad("it has no object \"weight_map\"");
  }
  ShardMap shards;
  for (const auto& [tensor, file] : json["weight_map"].items()) {
    if (!file.is_string()) return bad(absl::StrCat("the file of tensor ", tensor, " is no string"));
    const std::string& name = file.get_ref<const std::string&>();
    if (name.empty() || name.find('/') != std::string::npos || name == "." || name == "..") {
      return bad(absl::StrCat("tensor ", tensor, " is said to be in \"", name,
                              "\", which is not the name of a file in this directory"));
    }
    shards[name].push_back(tensor);
  }
  if (shards.empty()) return bad("it lists no tensors");
  return shards;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::Open(const std::string& directory,
                                                                   GgufView view) {
  auto checkpoint = std::make_shared<Checkpoint>();
  checkpoint->directory_ = directory;
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(directory));
  if (!gguf.empty()) {
    QM_RETURN_IF_ERROR(checkpoint->OpenGguf(gguf, view));
    QM_RETURN_IF_ERROR(checkpoint->IndexByName());
    return checkpoint;
  }
  const std::string index_path = Join(directory, kIndexName);
  if (FileExists(index_path)) {
    QM_RETURN_IF_ERROR(checkpoint->OpenSharded(index_path));
  } else if (FileExists(Join(directory, kSingleName))) {
    QM_RETURN_IF_ERROR(checkpoint->OpenSingle());
  } else {
    return NoWeights(directory);
  }
  QM_RETURN_IF_ERROR(checkpoint->IndexByName());
  return checkpoint;
}

absl::Status Checkpoint::OpenGguf(const std::string& path, GgufView view) {
  QM_ASSIGN_OR_RETURN(auto file, OpenGgufTensors(path, view == GgufView::kBlocks));
  for (const SafetensorsEntry& entry : file->entries()) tensors_.push_back({&entry, file.get()});
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::Status Checkpoint::OpenSingle() {
  QM_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(Join(directory_, kSingleName)));
  for (const SafetensorsEntry& entry : file->entries()) {
    tensors_.push_back({&entry, file.get()});
  }
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::Status Checkpoint::OpenSharded(const std::string& index_path) {
  QM_ASSIGN_OR_RETURN(const ShardMap shards, ReadIndex(index_path));
  if (shards.find(kSingleName) == shards.end() && FileExists(Join(directory_, kSingleName))) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("cannot open model ", directory_),
                  absl::StrCat("it has both ", kSingleName, " and ", kIndexName,
                               ", and the index does not mention the single file"),
                  "delete the one that is out of date"));
  }
  for (const auto& [name, tensors] : shards) {
    const std::string path = Join(directory_, name);
    if (!FileExists(path)) {
      return absl::NotFoundError(
          ErrorText(absl::StrCat("cannot open model ", directory_),
                    absl::StrCat("file ", name, " is missing; ", kIndexName, " places ",
                                 tensors.size(), " tensors in it, the first is ", tensors.front()),
                    "download the file"));
    }
    QM_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(path));
    for (const std::string& tensor : tensors) {
      const SafetensorsEntry* entry = file->Find(tensor);
      if (entry == nullptr) {
        return absl::InvalidArgumentError(
            ErrorText(absl::StrCat("cannot open model ", directory_),
                      absl::StrCat("file ", name, " has no tensor ", tensor, ", but ", kIndexName,
                                   " says so"),
                      "download both files again"));
      }
      tensors_.push_back({entry, file.get()});
    }
    files_.push_back(std::move(file));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::IndexByName() {
  if (tensors_.empty()) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("cannot open model ", directory_), "its files hold no tensors"));
  }
  std::sort(tensors_.begin(), tensors_.end(),
            [](const auto& a, const auto& b) { return a.entry->name < b.entry->name; });
  by_name_.reserve(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) by_name_.emplace(tensors_[i].entry->name, i);
  return absl::OkStatus();
}

const CheckpointTensor* Checkpoint::Find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

absl::StatusOr<Tensor> Checkpoint::Get(std::string_view name) const {
  const CheckpointTensor* tensor = Find(name);
  if (tensor == nullptr) {
    return absl::NotFoundError(
        ErrorText(absl::StrCat("no tensor ", AbslView(name), " in model ", directory_)));
  }
  return tensor->file->Get(name);
}

void Checkpoint::Release(std::string_view name) const {
  const CheckpointTensor* tensor = Find(name);
  if (tensor != nullptr) tensor->file->Release(name);
}

absl::Span<const CheckpointTensor> Checkpoint::TensorsUnder(std::string_view prefix) const {
  const auto starts = [prefix](const CheckpointTensor& tensor) {
    return std::string_view(tensor.entry->name).substr(0, prefix.size());
  };
  const auto begin = std::partition_point(tensors_.begin(), tensors_.end(),
                                          [&](const auto& t) { return starts(t) < prefix; });
  const auto end = std::partition_point(begin, tensors_.end(),
                                        [&](const auto& t) { return starts(t) == prefix; });
  return absl::MakeConstSpan(tensors_).subspan(static_cast<size_t>(begin - tensors_.begin()),
                                               static_cast<size_t>(end - begin));
}

void Checkpoint::ReleasePrefix(std::string_view prefix) const {
  for (const CheckpointTensor& tensor : TensorsUnder(prefix)) {
    tensor.file->Release(tensor.entry->name);
  }
}

}  // namespace quantmill
