#include "core/io/gguf_file.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/mapped_file.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr absl::string_view kGgufRemedy = "download or write the file again";
constexpr size_t kMaxName = 65535;  // of a key; longer ones are not names
constexpr size_t kMaxTensorName = 63;
constexpr uint32_t kMaxDimensions = 4;
constexpr uint64_t kMaxAlignment = uint64_t{1} << 30;

absl::Status GgufError(absl::string_view source, absl::string_view why) {
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("cannot read ", source), why, kGgufRemedy));
}

bool IsPrintable(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

// Bytes of a scalar; 0 for strings, arrays and unknown types.
size_t ScalarBytes(uint32_t type) {
  switch (static_cast<GgufValueType>(type)) {
    case GgufValueType::kU8:
    case GgufValueType::kI8:
    case GgufValueType::kBool:
      return 1;
    case GgufValueType::kU16:
    case GgufValueType::kI16:
      return 2;
    case GgufValueType::kU32:
    case GgufValueType::kI32:
    case GgufValueType::kF32:
      return 4;
    case GgufValueType::kU64:
    case GgufValueType::kI64:
    case GgufValueType::kF64:
      return 8;
    default:
      return 0;
  }
}

template <class T>
double Convert(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return static_cast<double>(value);
}

double ScalarAt(GgufValueType type, const char* at) {
  switch (type) {
    case GgufValueType::kU8:
    case GgufValueType::kBool:
      return Convert<uint8_t>(at);
    case GgufValueType::kI8:
      return Convert<int8_t>(at);
    case GgufValueType::kU16:
      return Convert<uint16_t>(at);
    case GgufValueType::kI16:
      return Convert<int16_t>(at);
    case GgufValueType::kU32:
      return Convert<uint32_t>(at);
    case GgufValueType::kI32:
      return Convert<int32_t>(at);
    case GgufValueType::kF32:
      return Convert<float>(at);
    case GgufValueType::kU64:
      return Convert<uint64_t>(at);
    case GgufValueType::kI64:
      return Convert<int64_t>(at);
    case GgufValueType::kF64:
      return Convert<double>(at);
    default:
      return 0;
  }
}

// Reads from the front of the file; every read is checked against what is left.
class Cursor {
 public:
  Cursor(std::string_view bytes, absl::string_view source) : bytes_(bytes), source_(source) {}

  size_t position() const { return at_; }
  size_t left() const { return bytes_.size() - at_; }

  absl::Status Ended() const {
    return absl::DataLossError(ErrorText(absl::StrCat("cannot read ", source_),
                                         absl::StrCat("its header ends early, at byte ", at_),
                                         kGgufRemedy));
  }

  template <class T>
  absl::StatusOr<T> Read() {
    if (left() < sizeof(T)) return Ended();
    T value;
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }

  absl::StatusOr<std::string_view> Bytes(uint64_t count) {
    if (count > left()) return Ended();
    const std::string_view view = bytes_.substr(at_, count);
    at_ += count;
    return view;
  }

  absl::StatusOr<std::string> String() {
    QM_ASSIGN_OR_RETURN(const uint64_t length, Read<uint64_t>());
    QM_ASSIGN_OR_RETURN(const std::string_view view, Bytes(length));
    return std::string(view);
  }

 private:
  std::string_view bytes_;
  absl::string_view source_;
  size_t at_ = 0;
};

class Parser {
 public:
  Parser(std::string_view bytes, uint64_t file_size, absl::string_view source)
      : cursor_(bytes, source), file_size_(file_size), source_(source) {}

  absl::StatusOr<GgufHeader> Run() {
    QM_RETURN_IF_ERROR(ReadVersion());
    QM_ASSIGN_OR_RETURN(const uint64_t tensors, cursor_.Read<uint64_t>());
    QM_ASSIGN_OR_RETURN(const uint64_t keys, cursor_.Read<uint64_t>());
    // The least that one of them takes.
    constexpr uint64_t kTensorBytes = 24, kKeyBytes = 13;
    if (tensors > cursor_.left() / kTensorBytes || keys > cursor_.left() / kKeyBytes) {
      return GgufError(source_, absl::StrCat("it claims ", tensors, " tensors and ", keys,
                                             " keys, more than it has room for"));
    }
    for (uint64_t i = 0; i < keys; ++i) QM_RETURN_IF_ERROR(ReadKey());
    QM_RETURN_IF_ERROR(ReadAlignment());
    header_.tensors.reserve(tensors);
    for (uint64_t i = 0; i < tensors; ++i) QM_RETURN_IF_ERROR(ReadTensor());
    QM_RETURN_IF_ERROR(CheckOffsets());
    return std::move(header_);
  }

 private:
  absl::Status ReadVersion() {
    const absl::StatusOr<std::string_view> magic = cursor_.Bytes(4);
    if (!magic.ok() || *magic != "GGUF") {
      return GgufError(source_, "it does not begin with \"GGUF\", so it is no GGUF file");
    }
    QM_ASSIGN_OR_RETURN(header_.version, cursor_.Read<uint32_t>());
    if (header_.version == 2 || header_.version == 3) return absl::OkStatus();
    if ((header_.version & 0xFFFF) == 0 && header_.version != 0) {
      return absl::UnimplementedError(ErrorText(absl::StrCat("cannot read ", source_),
                                                "it is big-endian", "convert it to little-endian"));
    }
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("cannot read ", source_),
                  absl::StrCat("it has GGUF version ", header_.version, "; 2 and 3 can be read"),
                  "convert the model again with a current llama.cpp"));
  }

  absl::Status ReadKey() {
    QM_ASSIGN_OR_RETURN(std::string key, cursor_.String());
    if (key.empty() || key.size() > kMaxName || !IsPrintable(key)) {
      return GgufError(source_, absl::StrCat("key ", header_.metadata.size(),
                                             " of its metadata is not a printable name"));
    }
    QM_ASSIGN_OR_RETURN(const uint32_t type, cursor_.Read<uint32_t>());
    GgufValue value;
    const absl::Status status = ReadValue(type, &value);
    if (!status.ok()) return WithContext(status, absl::StrCat("key ", key));
    if (!header_.metadata.emplace(key, std::move(value)).second) {
      return GgufError(source_, absl::StrCat("key ", key, " is there twice"));
    }
    return absl::OkStatus();
  }

  absl::Status ReadValue(uint32_t type, GgufValue* value) {
    uint64_t count = 1;
    if (type == static_cast<uint32_t>(GgufValueType::kArray)) {
      value->array = true;
      QM_ASSIGN_OR_RETURN(type, cursor_.Read<uint32_t>());
      QM_ASSIGN_OR_RETURN(count, cursor_.Read<uint64_t>());
    }
    value->type = static_cast<GgufValueType>(type);
    if (value->type == GgufValueType::kString) {
      if (count > cursor_.left() / sizeof(uint64_t)) return cursor_.Ended();
      value->strings.reserve(count);
      for (uint64_t i = 0; i < count; ++i) {
        QM_ASSIGN_OR_RETURN(std::string text, cursor_.String());
        value->strings.push_back(std::move(text));
      }
      return absl::OkStatus();
    }
    const size_t bytes = ScalarBytes(type);
    if (bytes == 0) {
      return GgufError(source_, absl::StrCat(value->array ? "an array of" : "a value of", " type ",
                                             type, " is not known"));
    }
    if (count > cursor_.left() / bytes) return cursor_.Ended();
    QM_ASSIGN_OR_RETURN(const std::string_view raw, cursor_.Bytes(count * bytes));
    value->numbers.reserve(count);
    for (uint64_t i = 0; i < count; ++i) {
      value->numbers.push_back(ScalarAt(value->type, raw.data() + i * bytes));
    }
    return absl::OkStatus();
  }

  absl::Status ReadAlignment() {
    const GgufValue* value = header_.Find("general.alignment");
    if (value == nullptr) return absl::OkStatus();
    const double number = value->array || value->numbers.empty() ? 0 : value->numbers[0];
    const auto alignment = static_cast<uint64_t>(
        number >= 1 && number <= static_cast<double>(kMaxAlignment) ? number : 0);
    if (value->type != GgufValueType::kU32 || alignment == 0 ||
        (alignment & (alignment - 1)) != 0) {
      return GgufError(source_, "general.alignment is not a power of two in 32 bits");
    }
    header_.alignment = alignment;
    return absl::OkStatus();
  }

  absl::Status BadTensor(const GgufTensor& tensor, absl::string_view why) const {
    return GgufError(source_, absl::StrCat("tensor ", tensor.name, ": ", why));
  }

  absl::Status ReadTensor() {
    GgufTensor tensor;
    QM_ASSIGN_OR_RETURN(tensor.name, cursor_.String());
    if (tensor.name.empty() || tensor.name.size() > kMaxTensorName || !IsPrintable(tensor.name)) {
      return GgufError(source_, absl::StrCat("tensor ", header_.tensors.size(),
                                             " has no printable name of at most ", kMaxTensorName,
                                             " characters"));
    }
    if (!names_.insert(tensor.name).second) return BadTensor(tensor, "is there twice");
    QM_ASSIGN_OR_RETURN(const uint32_t dimensions, cursor_.Read<uint32_t>());
    if (dimensions > kMaxDimensions) {
      return BadTensor(tensor, absl::StrCat("it has ", dimensions, " dimensions; at most ",
                                            kMaxDimensions, " are allowed"));
    }
    for (uint32_t i = 0; i < dimensions; ++i) {
      QM_ASSIGN_OR_RETURN(const uint64_t extent, cursor_.Read<uint64_t>());
      if (extent == 0 || extent > INT64_MAX) {
        return BadTensor(tensor, absl::StrCat("dimension ", i, " is ", extent));
      }
      tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(extent));
    }
    QM_ASSIGN_OR_RETURN(const int32_t type, cursor_.Read<int32_t>());
    tensor.type = FindGgmlType(type);
    if (tensor.type == nullptr) {
      return absl::UnimplementedError(ErrorText(
          absl::StrCat("cannot read ", source_),
          absl::StrCat("tensor ", tensor.name, " has type number ", type, ", which is not known"),
          absl::StrCat("types that can be read are ", ReadableGgmlTypes())));
    }
    QM_ASSIGN_OR_RETURN(tensor.offset, cursor_.Read<uint64_t>());
    QM_RETURN_IF_ERROR(SetBytes(&tensor));
    header_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  absl::Status SetBytes(GgufTensor* tensor) const {
    const GgmlTypeInfo& type = *tensor->type;
    const int64_t row = tensor->shape.empty() ? 1 : tensor->shape.back();
    if (row % type.block != 0) {
      return BadTensor(*tensor,
                       absl::StrCat("its rows of ", row, " weights are not whole blocks of ",
                                    type.block, ", which ", std::string(type.name), " needs"));
    }
    uint64_t bytes = static_cast<uint64_t>(row / type.block);
    bool overflow = __builtin_mul_overflow(bytes, static_cast<uint64_t>(type.bytes), &bytes);
    uint64_t elements = static_cast<uint64_t>(row);
    for (size_t i = 0; i + 1 < tensor->shape.size(); ++i) {
      const auto extent = static_cast<uint64_t>(tensor->shape[i]);
      overflow = overflow || __builtin_mul_overflow(bytes, extent, &bytes);
      overflow = overflow || __builtin_mul_overflow(elements, extent, &elements);
    }
    // Room for four bytes per weight and for padding.
    if (overflow || bytes > INT64_MAX / 4 || elements > INT64_MAX / 8) {
      return BadTensor(*tensor, absl::StrCat("shape ", tensor->ShapeText(), " is too large"));
    }
    tensor->bytes = bytes;
    return absl::OkStatus();
  }

  uint64_t Padded(uint64_t position) const {
    return (position + header_.alignment - 1) / header_.alignment * header_.alignment;
  }

  absl::Status CheckOffsets() {
    header_.data_begin = Padded(cursor_.position());
    const uint64_t data = file_size_ - std::min(file_size_, header_.data_begin);
    uint64_t expected = 0;
    for (const GgufTensor& tensor : header_.tensors) {
      if (tensor.offset != expected) {
        return BadTensor(tensor, absl::StrCat("it begins at byte ", tensor.offset,
                                              " of the data, but ", expected, " is its place"));
      }
      if (tensor.offset > data || tensor.bytes > data - tensor.offset) {
        return absl::DataLossError(ErrorText(
            absl::StrCat("cannot read ", source_),
            absl::StrCat("tensor ", tensor.name, " ends at byte ", tensor.offset + tensor.bytes,
                         " of the data, but the file ", "holds only ", data),
            "the file is not complete; download it again"));
      }
      expected = Padded(tensor.offset + tensor.bytes);
    }
    return absl::OkStatus();
  }

  Cursor cursor_;
  uint64_t file_size_;
  absl::string_view source_;
  GgufHeader header_;
  absl::flat_hash_set<std::string> names_;
};

}  // namespace

std::string GgufTensor::ShapeText() const {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

const GgufTensor* GgufHeader::FindTensor(std::string_view name) const {
  for (const GgufTensor& tensor : tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

const GgufValue* GgufHeader::Find(std::string_view key) const {
  const auto found = metadata.find(key);
  return found == metadata.end() ? nullptr : &found->second;
}

double GgufHeader::Number(std::string_view key, double fallback) const {
  const GgufValue* value = Find(key);
  return value == nullptr || value->array || value->numbers.empty() ? fallback : value->numbers[0];
}

std::string GgufHeader::Text(std::string_view key, std::string_view fallback) const {
  const GgufValue* value = Find(key);
  const bool text = value != nullptr && !value->array && !value->strings.empty();
  return text ? value->strings[0] : std::string(fallback);
}

bool GgufHeader::Flag(std::string_view key, bool fallback) const {
  return Number(key, fallback ? 1 : 0) != 0;
}

absl::StatusOr<GgufHeader> ParseGgufHeader(std::string_view bytes, uint64_t file_size,
                                           absl::string_view source) {
  return Parser(bytes, file_size, source).Run();
}

absl::StatusOr<std::shared_ptr<const GgufFile>> GgufFile::Open(const std::string& path) {
  auto file = std::make_shared<GgufFile>();
  file->path_ = path;
  QM_ASSIGN_OR_RETURN(file->mapping_, MappedFile::Open(path));
  const std::string_view bytes = file->mapping_->bytes();
  QM_ASSIGN_OR_RETURN(file->header_, ParseGgufHeader(bytes, bytes.size(), path));
  return file;
}

const char* GgufFile::data(const GgufTensor& tensor) const {
  return mapping_->at(header_.data_begin + tensor.offset);
}

void GgufFile::Release(const GgufTensor& tensor) const {
  const uint64_t begin = header_.data_begin + tensor.offset;
  if (tensor.bytes > 0) mapping_->Drop(begin, begin + tensor.bytes);
}

absl::StatusOr<std::string> FindGguf(const std::string& path) {
  std::error_code error;
  if (fs::is_regular_file(path, error)) {
    if (fs::path(path).extension() == ".gguf") return path;
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("cannot open model ", path), "it is neither a directory nor .gguf",
                  "give the directory of a Hugging Face checkpoint or a GGUF file"));
  }
  std::set<std::string> found;
  for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() == ".safetensors") return std::string();
    if (it->path().extension() == ".gguf") found.insert(it->path().filename().string());
  }
  if (found.empty()) return std::string();
  if (found.size() == 1) return (fs::path(path) / *found.begin()).string();
  return absl::InvalidArgumentError(ErrorText(
      absl::StrCat("cannot open model ", path),
      absl::StrCat("it holds ", found.size(), " GGUF files: ", absl::StrJoin(found, ", ")),
      "name the one to read; a model split into several must be merged first"));
}

}  // namespace quantmill
