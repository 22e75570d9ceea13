#include "core/io/safetensors_writer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

constexpr char kIndexFile[] = "model.safetensors.index.json";

// Position in a file: smaller comes first (the reverse of the reference enum's order).
size_t FileOrder(DType dtype) {
  static constexpr std::array<DType, 11> kOrder = {
      DType::kI64, DType::kF64,    DType::kF32,    DType::kI32, DType::kBF16, DType::kF16,
      DType::kI16, DType::kF8E4M3, DType::kF8E5M2, DType::kI8,  DType::kU8};
  return static_cast<size_t>(std::find(kOrder.begin(), kOrder.end(), dtype) - kOrder.begin());
}

absl::Status BadName(absl::string_view path, std::string_view name, absl::string_view why) {
  return absl::InvalidArgumentError(ErrorText(
      absl::StrCat("cannot write ", path), absl::StrCat("tensor \"", AbslView(name), "\" ", why)));
}

// JSON string literal of `name`; empty if it is not UTF-8.
std::string Quoted(const std::string& name) {
  try {
    return nlohmann::json(name).dump();
  } catch (const nlohmann::json::exception&) {
    return "";
  }
}

absl::StatusOr<std::string> HeaderText(const std::string& path,
                                       const std::vector<TensorDeclaration>& tensors) {
  std::string json = R"({"__metadata__":{"format":"pt"})";
  uint64_t offset = 0;
  for (const TensorDeclaration& tensor : tensors) {
    const std::string quoted = Quoted(tensor.name);
    if (quoted.empty()) return BadName(path, tensor.name, "has a name that is not UTF-8");
    absl::StrAppend(&json, ",", quoted, ":{\"dtype\":\"", AbslView(DTypeName(tensor.dtype)),
                    "\",\"shape\":[", absl::StrJoin(tensor.shape.extents(), ","),
                    "],\"data_offsets\":[", offset, ",", offset + tensor.bytes(), "]}");
    offset += tensor.bytes();
  }
  json += '}';
  json.append((8 - json.size() % 8) % 8, ' ');
  return json;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, std::vector<TensorDeclaration> tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    const size_t order_a = FileOrder(a.dtype), order_b = FileOrder(b.dtype);
    return order_a != order_b ? order_a < order_b : a.name < b.name;
  });
  QM_ASSIGN_OR_RETURN(const std::string header, HeaderText(path, tensors));
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  uint64_t offset = 8 + header.size();
  for (TensorDeclaration& tensor : tensors) {
    if (tensor.name.empty() || tensor.name == "__metadata__") {
      return BadName(path, tensor.name, "has a name that the format reserves");
    }
    if (!writer->by_name_.emplace(tensor.name, writer->slots_.size()).second) {
      return BadName(path, tensor.name, "is declared twice");
    }
    const uint64_t bytes = tensor.bytes();
    writer->slots_.push_back({std::move(tensor), offset, 0});
    offset += bytes;
  }
  QM_ASSIGN_OR_RETURN(writer->file_, OutputFile::Create(path, offset));
  const uint64_t header_size = header.size();
  std::string prefix(sizeof header_size, '\0');
  std::memcpy(prefix.data(), &header_size, sizeof header_size);
  QM_RETURN_IF_ERROR(writer->file_->WriteAt(0, prefix + header));
  return writer;
}

absl::StatusOr<SafetensorsWriter::Slot*> SafetensorsWriter::Find(std::string_view name) {
  const auto found = by_name_.find(AbslView(name));
  if (found == by_name_.end()) return BadName(file_->path(), name, "was not declared");
  return &slots_[found->second];
}

absl::Status SafetensorsWriter::Write(std::string_view name, const Tensor& tensor) {
  QM_ASSIGN_OR_RETURN(const Slot* slot, Find(name));
  if (tensor.dtype() != slot->tensor.dtype || !(tensor.shape() == slot->tensor.shape)) {
    return BadName(
        file_->path(), name,
        absl::StrCat("was declared ", AbslView(DTypeName(slot->tensor.dtype)), " ",
                     slot->tensor.shape.ToString(), ", its data are ",
                     AbslView(DTypeName(tensor.dtype())), " ", tensor.shape().ToString()));
  }
  if (!tensor.device().is_cpu()) return BadName(file_->path(), name, "is not in host memory");
  return Append(name, {tensor.as<char>(), static_cast<size_t>(tensor.bytes())});
}

absl::Status SafetensorsWriter::Append(std::string_view name, std::string_view bytes) {
  QM_ASSIGN_OR_RETURN(Slot * slot, Find(name));
  if (bytes.size() > slot->tensor.bytes() - slot->written) {
    return BadName(file_->path(), name,
                   absl::StrCat("gets more than its ", slot->tensor.bytes(), " bytes"));
  }
  QM_RETURN_IF_ERROR(file_->WriteAt(slot->offset + slot->written, bytes));
  slot->written += bytes.size();
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::CheckComplete() const {
  for (const Slot& slot : slots_) {
    if (slot.written != slot.tensor.bytes()) {
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat("cannot write ", file_->path()),
                    absl::StrCat("tensor ", slot.tensor.name, " has ", slot.written, " of its ",
                                 slot.tensor.bytes(), " bytes")));
    }
  }
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  QM_RETURN_IF_ERROR(CheckComplete());
  QM_RETURN_IF_ERROR(file_->Sync());
  QM_RETURN_IF_ERROR(file_->Publish());
  return SyncDirectory(std::filesystem::path(file_->path()).parent_path().string());
}

absl::StatusOr<std::unique_ptr<CheckpointWriter>> CheckpointWriter::Create(
    const std::string& directory, const std::vector<TensorDeclaration>& tensors,
    uint64_t max_shard_bytes) {
  std::unique_ptr<CheckpointWriter> writer(new CheckpointWriter);
  writer->directory_ = directory;
  std::vector<std::vector<TensorDeclaration>> shards(1);
  uint64_t shard_bytes = 0;
  for (const TensorDeclaration& tensor : tensors) {
    if (!shards.back().empty() && shard_bytes + tensor.bytes() > max_shard_bytes) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    if (!writer->shard_of_.emplace(tensor.name, shards.size() - 1).second) {
      return BadName(directory, tensor.name, "is declared twice");
    }
    shards.back().push_back(tensor);
    shard_bytes += tensor.bytes();
    writer->total_size_ += tensor.bytes();
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    writer->file_names_.push_back(
        shards.size() == 1
            ? "model.safetensors"
            : absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, shards.size()));
    const std::string path =
        (std::filesystem::path(directory) / writer->file_names_.back()).string();
    QM_ASSIGN_OR_RETURN(auto file, SafetensorsWriter::Create(path, std::move(shards[i])));
    writer->writers_.push_back(std::move(file));
  }
  return writer;
}

absl::StatusOr<SafetensorsWriter*> CheckpointWriter::WriterOf(std::string_view name) {
  const auto found = shard_of_.find(AbslView(name));
  if (found == shard_of_.end()) return BadName(directory_, name, "was not declared");
  return writers_[found->second].get();
}

absl::Status CheckpointWriter::Write(std::string_view name, const Tensor& tensor) {
  QM_ASSIGN_OR_RETURN(SafetensorsWriter * writer, WriterOf(name));
  return writer->Write(name, tensor);
}

absl::Status CheckpointWriter::Append(std::string_view name, std::string_view bytes) {
  QM_ASSIGN_OR_RETURN(SafetensorsWriter * writer, WriterOf(name));
  return writer->Append(name, bytes);
}

std::string CheckpointWriter::IndexJson() const {
  nlohmann::json index;  // sorted by key
  index["metadata"]["total_size"] = total_size_;
  index["weight_map"] = nlohmann::json::object();
  for (const auto& [name, shard] : shard_of_) index["weight_map"][name] = file_names_[shard];
  return index.dump(2) + "\n";
}

absl::Status CheckpointWriter::DeleteStale() const {
  std::vector<std::string> stale;
  std::error_code error;
  for (const auto& item : std::filesystem::directory_iterator(directory_, error)) {
    const std::string name = item.path().filename().string();
    const bool ours = std::find(file_names_.begin(), file_names_.end(), name) != file_names_.end();
    const bool weights = name == "model.safetensors" ||
                         (absl::StartsWith(name, "model-") && absl::EndsWith(name, ".safetensors"));
    const bool old_index = name == kIndexFile && file_names_.size() == 1;
    if ((weights && !ours) || old_index) stale.push_back(item.path().string());
  }
  for (const std::string& path : stale) QM_RETURN_IF_ERROR(RemoveFile(path));
  return absl::OkStatus();
}

absl::Status CheckpointWriter::Finish() {
  for (const auto& writer : writers_) QM_RETURN_IF_ERROR(writer->CheckComplete());
  for (const auto& writer : writers_) QM_RETURN_IF_ERROR(writer->file_->Sync());
  QM_RETURN_IF_ERROR(DeleteStale());
  for (size_t i = 0; i < writers_.size(); ++i) {
    const absl::Status status = writers_[i]->file_->Publish();
    if (status.ok()) continue;
    for (size_t done = 0; done < i; ++done) RemoveFile(writers_[done]->file_->path()).IgnoreError();
    return status;
  }
  if (writers_.size() > 1) {
    QM_RETURN_IF_ERROR(
        WriteFile((std::filesystem::path(directory_) / kIndexFile).string(), IndexJson()));
  }
  return SyncDirectory(directory_);
}

}  // namespace quantmill
