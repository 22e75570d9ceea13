#include "core/io/safetensors_reader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <utility>

#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/mapped_file.h"

namespace quantmill {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxHeader = 100'000'000;  // the reference reader's limit
constexpr absl::string_view kWriteAgain = "download or write the file again";

absl::Status Malformed(absl::string_view source, absl::string_view why) {
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("cannot read ", source), why, kWriteAgain));
}

absl::Status Truncated(absl::string_view source, absl::string_view why) {
  return absl::DataLossError(ErrorText(absl::StrCat("cannot read ", source), why, kWriteAgain));
}

absl::Status BadTensor(absl::string_view source, absl::string_view name, absl::string_view why) {
  return Malformed(source, absl::StrCat("tensor ", name, ": ", why));
}

// Bits per element of every type in the format, also those we only list
// (huggingface/safetensors: safetensors/src/tensor.rs); 0 for an unknown name.
uint64_t BitsOf(absl::string_view dtype) {
  struct Row {
    absl::string_view name;
    uint64_t bits;
  };
  static constexpr std::array<Row, 22> kRows = {{
      {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
      {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
      {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
      {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
      {"I64", 64},        {"U64", 64},
  }};
  for (const Row& row : kRows) {
    if (row.name == dtype) return row.bits;
  }
  return 0;
}

absl::Status ReadShape(const Json& json, absl::string_view source, SafetensorsEntry* entry) {
  if (!json.is_array()) return BadTensor(source, entry->name, "shape is not a list");
  for (const Json& extent : json) {
    if (!extent.is_number_unsigned() || extent.get<uint64_t>() > INT64_MAX) {
      return BadTensor(source, entry->name, "shape is not a list of non-negative integers");
    }
    entry->shape.push_back(extent.get<int64_t>());
  }
  return absl::OkStatus();
}

absl::Status ReadOffsets(const Json& json, absl::string_view source, SafetensorsEntry* entry) {
  if (!json.is_array() || json.size() != 2 || !json[0].is_number_unsigned() ||
      !json[1].is_number_unsigned()) {
    return BadTensor(source, entry->name, "data_offsets is not a pair of non-negative integers");
  }
  entry->begin = json[0].get<uint64_t>();
  entry->end = json[1].get<uint64_t>();
  if (entry->end < entry->begin) return BadTensor(source, entry->name, "it ends before it begins");
  return absl::OkStatus();
}

// The size that dtype and shape ask for must be the size the offsets give.
absl::Status CheckSize(const SafetensorsEntry& entry, absl::string_view source) {
  uint64_t bits = BitsOf(entry.dtype_name);
  if (bits == 0) return absl::OkStatus();  // unknown type: nothing to compare with
  for (const int64_t extent : entry.shape) {
    if (__builtin_mul_overflow(bits, static_cast<uint64_t>(extent), &bits)) {
      return BadTensor(source, entry.name,
                       absl::StrCat("shape ", entry.ShapeText(), " is too large"));
    }
  }
  if (bits % 8 != 0) {
    return BadTensor(
        source, entry.name,
        absl::StrCat(entry.dtype_name, " ", entry.ShapeText(), " does not fill whole bytes"));
  }
  if (bits / 8 != entry.bytes()) {
    return BadTensor(source, entry.name,
                     absl::StrCat(entry.dtype_name, " ", entry.ShapeText(), " needs ", bits / 8,
                                  " bytes but data_offsets give ", entry.bytes()));
  }
  return absl::OkStatus();
}

absl::StatusOr<SafetensorsEntry> ReadEntry(const std::string& name, const Json& json,
                                           absl::string_view source) {
  SafetensorsEntry entry;
  entry.name = name;
  if (!json.is_object()) return BadTensor(source, name, "its header entry is not an object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!json.contains(key)) return BadTensor(source, name, absl::StrCat("no \"", key, "\""));
  }
  if (!json["dtype"].is_string()) return BadTensor(source, name, "dtype is not a string");
  entry.dtype_name = json["dtype"].get<std::string>();
  entry.dtype = DTypeFromName(entry.dtype_name);
  QM_RETURN_IF_ERROR(ReadShape(json["shape"], source, &entry));
  QM_RETURN_IF_ERROR(ReadOffsets(json["data_offsets"], source, &entry));
  QM_RETURN_IF_ERROR(CheckSize(entry, source));
  return entry;
}

absl::Status ReadMetadata(const Json& json, absl::string_view source, SafetensorsHeader* header) {
  if (!json.is_object()) return Malformed(source, "__metadata__ is not an object");
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) {
      return Malformed(source, absl::StrCat("__metadata__ \"", key, "\" is not a string"));
    }
    header->metadata[key] = value.get<std::string>();
  }
  return absl::OkStatus();
}

absl::Status CheckContiguous(const SafetensorsHeader& header, uint64_t data_size,
                             absl::string_view source) {
  uint64_t position = 0;
  for (const SafetensorsEntry& entry : header.entries) {
    if (entry.begin != position) {
      return BadTensor(source, entry.name,
                       absl::StrCat("it begins at byte ", entry.begin, " of the data, but ",
                                    position, " is the next free one"));
    }
    if (entry.end > data_size) {
      return Truncated(source, absl::StrCat("tensor ", entry.name, ": it ends at byte ", entry.end,
                                            " of the data, but the file holds only ", data_size));
    }
    position = entry.end;
  }
  if (position != data_size) {
    return Malformed(source, absl::StrCat("its tensors take ", position, " bytes, but it holds ",
                                          data_size, " bytes of data"));
  }
  return absl::OkStatus();
}

}  // namespace

std::string SafetensorsEntry::ShapeText() const {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view prefix,
                                                         uint64_t file_size,
                                                         absl::string_view source) {
  if (file_size < 8 || prefix.size() < 8) {
    return Truncated(
        source, absl::StrCat("it has ", file_size, " bytes; a safetensors file has at least 8"));
  }
  uint64_t header_size;  // little endian, like every machine this runs on
  std::memcpy(&header_size, prefix.data(), sizeof header_size);
  if (header_size > kMaxHeader) {
    return Malformed(
        source, absl::StrCat("its header claims ", header_size, " bytes, more than the limit of ",
                             kMaxHeader, " (is it a safetensors file?)"));
  }
  if (header_size > file_size - 8 || header_size > prefix.size() - 8) {
    return Truncated(source, absl::StrCat("its header claims ", header_size,
                                          " bytes, but the file has only ", file_size));
  }
  const std::string_view text = prefix.substr(8, header_size);
  if (text.empty() || text[0] != '{') return Malformed(source, "its header is not a JSON object");
  QM_ASSIGN_OR_RETURN(const Json json, ParseJson(text, absl::StrCat("the header of ", source)));

  SafetensorsHeader header;
  header.data_begin = 8 + header_size;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      QM_RETURN_IF_ERROR(ReadMetadata(value, source, &header));
    } else {
      QM_ASSIGN_OR_RETURN(SafetensorsEntry entry, ReadEntry(name, value, source));
      header.entries.push_back(std::move(entry));
    }
  }
  std::sort(header.entries.begin(), header.entries.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  QM_RETURN_IF_ERROR(CheckContiguous(header, file_size - header.data_begin, source));
  return header;
}

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> SafetensorsFile::Open(
    const std::string& path) {
  auto file = std::make_shared<SafetensorsFile>();
  file->path_ = path;
  QM_ASSIGN_OR_RETURN(file->mapping_, MappedFile::Open(path));
  const std::string_view bytes = file->mapping_->bytes();
  QM_ASSIGN_OR_RETURN(file->header_, ParseSafetensorsHeader(bytes, bytes.size(), path));
  file->by_name_.reserve(file->header_.entries.size());
  for (const SafetensorsEntry& entry : file->header_.entries) {
    file->by_name_.emplace(entry.name, &entry);
  }
  return file;
}

const SafetensorsEntry* SafetensorsFile::Find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : found->second;
}

absl::StatusOr<Tensor> SafetensorsFile::Get(std::string_view name) const {
  const SafetensorsEntry* entry = Find(name);
  if (entry == nullptr) {
    return absl::NotFoundError(
        ErrorText(absl::StrCat("no tensor ", AbslView(name), " in ", path_)));
  }
  const std::string what = absl::StrCat("cannot read tensor ", AbslView(name), " of ", path_);
  if (!entry->dtype.has_value()) {
    return absl::UnimplementedError(
        ErrorText(what, absl::StrCat("its dtype ", entry->dtype_name, " is not supported")));
  }
  if (entry->shape.size() > QM_MAX_RANK) {
    return absl::UnimplementedError(
        ErrorText(what, absl::StrCat("it has ", entry->shape.size(), " dimensions; at most ",
                                     QM_MAX_RANK, " are supported")));
  }
  const Shape shape{absl::Span<const int64_t>(entry->shape)};
  char* data = mapping_->at(header_.data_begin + entry->begin);
  const Tensor view(mapping_, data, *entry->dtype, shape, Device{}, /*read_only=*/true);
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(ElementSize(*entry->dtype)) == 0) {
    return view;
  }
  QM_ASSIGN_OR_RETURN(Tensor copy, Tensor::Host(*entry->dtype, shape));
  std::memcpy(copy.data(), data, entry->bytes());
  return copy;
}

void SafetensorsFile::Release(std::string_view name) const {
  const SafetensorsEntry* entry = Find(name);
  if (entry == nullptr || entry->bytes() == 0) return;
  mapping_->Drop(header_.data_begin + entry->begin, header_.data_begin + entry->end);
}

}  // namespace quantmill
