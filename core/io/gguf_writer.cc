#include "core/io/gguf_writer.h"

#include <filesystem>
#include <set>

#include "core/base/status.h"

namespace quantmill {
namespace {

constexpr uint64_t kGgufAlignment = 32;  // what readers assume without general.alignment
constexpr size_t kMaxWrittenName = 63;
constexpr uint32_t kGgufVersion = 3;

uint64_t PaddedEnd(uint64_t position) {
  return (position + kGgufAlignment - 1) / kGgufAlignment * kGgufAlignment;
}

template <class T>
void Put(T value, std::string* out) {
  out->append(reinterpret_cast<const char*>(&value), sizeof value);
}

void PutString(const std::string& text, std::string* out) {
  Put(static_cast<uint64_t>(text.size()), out);
  out->append(text);
}

void PutNumber(GgufValueType type, double value, std::string* out) {
  switch (type) {
    case GgufValueType::kU8:
    case GgufValueType::kBool:
      return Put(static_cast<uint8_t>(value), out);
    case GgufValueType::kI8:
      return Put(static_cast<int8_t>(value), out);
    case GgufValueType::kU16:
      return Put(static_cast<uint16_t>(value), out);
    case GgufValueType::kI16:
      return Put(static_cast<int16_t>(value), out);
    case GgufValueType::kU32:
      return Put(static_cast<uint32_t>(value), out);
    case GgufValueType::kI32:
      return Put(static_cast<int32_t>(value), out);
    case GgufValueType::kF32:
      return Put(static_cast<float>(value), out);
    case GgufValueType::kU64:
      return Put(static_cast<uint64_t>(value), out);
    case GgufValueType::kI64:
      return Put(static_cast<int64_t>(value), out);
    case GgufValueType::kF64:
      return Put(value, out);
    case GgufValueType::kString:
    case GgufValueType::kArray:
      return;
  }
}

void PutValue(const GgufValue& value, std::string* out) {
  if (value.array) {
    Put(static_cast<uint32_t>(GgufValueType::kArray), out);
    Put(static_cast<uint32_t>(value.type), out);
    Put(static_cast<uint64_t>(value.size()), out);
  } else {
    Put(static_cast<uint32_t>(value.type), out);
  }
  for (const std::string& text : value.strings) PutString(text, out);
  for (const double number : value.numbers) PutNumber(value.type, number, out);
}

absl::StatusOr<uint64_t> BytesOf(const GgufDeclaration& tensor) {
  const GgmlTypeInfo& type = InfoOf(tensor.type);
  if (tensor.name.empty() || tensor.name.size() > kMaxWrittenName) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor name \"", tensor.name, "\" is empty or longer than ", kMaxWrittenName, " bytes"));
  }
  const int64_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (row % type.block != 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name, ": rows of ", row,
                                                   " weights are not whole blocks of ",
                                                   type.block));
  }
  uint64_t bytes = static_cast<uint64_t>(row / type.block * type.bytes);
  for (size_t i = 0; i + 1 < tensor.shape.size(); ++i) {
    bytes *= static_cast<uint64_t>(tensor.shape[i]);
  }
  return bytes;
}

}  // namespace

absl::StatusOr<std::unique_ptr<GgufWriter>> GgufWriter::Create(
    const std::string& path, const GgufMetadata& metadata,
    const std::vector<GgufDeclaration>& tensors) {
  std::string header("GGUF");
  Put(kGgufVersion, &header);
  Put(static_cast<uint64_t>(tensors.size()), &header);
  Put(static_cast<uint64_t>(metadata.size()), &header);
  std::set<std::string> keys;
  for (const auto& [key, value] : metadata) {
    if (!keys.insert(key).second) {
      return absl::InvalidArgumentError(absl::StrCat("key ", key, " is there twice"));
    }
    PutString(key, &header);
    PutValue(value, &header);
  }
  std::unique_ptr<GgufWriter> writer(new GgufWriter());
  uint64_t offset = 0;
  for (const GgufDeclaration& tensor : tensors) {
    QM_ASSIGN_OR_RETURN(const uint64_t bytes, BytesOf(tensor));
    if (!writer->by_name_.emplace(tensor.name, writer->slots_.size()).second) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name, " is there twice"));
    }
    PutString(tensor.name, &header);
    Put(static_cast<uint32_t>(tensor.shape.size()), &header);
    for (size_t i = tensor.shape.size(); i > 0; --i) {  // fastest first
      Put(static_cast<uint64_t>(tensor.shape[i - 1]), &header);
    }
    Put(static_cast<int32_t>(tensor.type), &header);
    Put(offset, &header);
    writer->slots_.push_back({tensor.name, offset, bytes, 0});
    offset = PaddedEnd(offset + bytes);
  }
  const uint64_t begin = PaddedEnd(header.size());
  header.resize(begin, '\0');
  QM_ASSIGN_OR_RETURN(writer->file_, OutputFile::Create(path, begin + offset));
  QM_RETURN_IF_ERROR(writer->file_->WriteAt(0, header));
  for (Slot& slot : writer->slots_) {
    slot.begin += begin;
    const uint64_t end = slot.begin + slot.bytes;
    const std::string padding(PaddedEnd(end) - end, '\0');
    QM_RETURN_IF_ERROR(writer->file_->WriteAt(end, padding));
  }
  return writer;
}

absl::Status GgufWriter::Write(std::string_view name, uint64_t offset, std::string_view bytes) {
  const auto found = by_name_.find(std::string(name));
  if (found == by_name_.end()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", AbslView(name), " was not declared"));
  }
  Slot& slot = slots_[found->second];
  if (offset > slot.bytes || bytes.size() > slot.bytes - offset ||
      bytes.size() > slot.bytes - slot.written) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", slot.name, " has ", slot.bytes, " bytes; more were given"));
  }
  slot.written += bytes.size();
  return file_->WriteAt(slot.begin + offset, bytes);
}

absl::Status GgufWriter::Finish() {
  for (const Slot& slot : slots_) {
    if (slot.written == slot.bytes) continue;
    return absl::FailedPreconditionError(absl::StrCat("tensor ", slot.name, " has ", slot.bytes,
                                                      " bytes, but ", slot.written, " were given"));
  }
  QM_RETURN_IF_ERROR(file_->Sync());
  QM_RETURN_IF_ERROR(file_->Publish());
  const std::string parent = std::filesystem::path(file_->path()).parent_path().string();
  return SyncDirectory(parent.empty() ? "." : parent);
}

}  // namespace quantmill
