// Reads GGUF files, versions 2 and 3. Layout: ggml-org/ggml docs/gguf.md, src/gguf.cpp.
#ifndef QUANTMILL_CORE_IO_GGUF_FILE_H_
#define QUANTMILL_CORE_IO_GGUF_FILE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/io/ggml_blocks.h"

namespace quantmill {

enum class GgufValueType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

// One value of the metadata. Scalars are arrays of one element.
struct GgufValue {
  GgufValueType type = GgufValueType::kU32;  // of the elements
  bool array = false;
  std::vector<std::string> strings;  // of type kString
  std::vector<double> numbers;       // of the others; 64-bit integers beyond 2^53 are rounded

  size_t size() const { return type == GgufValueType::kString ? strings.size() : numbers.size(); }

  static GgufValue Number(GgufValueType type, double value) { return {type, false, {}, {value}}; }
  static GgufValue U32(int64_t value) {
    return Number(GgufValueType::kU32, static_cast<double>(value));
  }
  static GgufValue F32(double value) { return Number(GgufValueType::kF32, value); }
  static GgufValue Bool(bool value) { return Number(GgufValueType::kBool, value ? 1 : 0); }
  static GgufValue Text(std::string value) {
    return {GgufValueType::kString, false, {std::move(value)}, {}};
  }
};

struct GgufTensor {
  std::string name;
  const GgmlTypeInfo* type = nullptr;
  std::vector<int64_t> shape;  // row-major: the extent along which blocks run is the last
  uint64_t offset = 0;         // from the start of the data
  uint64_t bytes = 0;

  std::string ShapeText() const;
};

// What the first bytes of a file say.
struct GgufHeader {
  uint32_t version = 0;
  std::map<std::string, GgufValue, std::less<>> metadata;
  std::vector<GgufTensor> tensors;
  uint64_t alignment = 32;
  uint64_t data_begin = 0;  // of the data, in the file

  // Null if there is no such tensor or key.
  const GgufTensor* FindTensor(std::string_view name) const;
  const GgufValue* Find(std::string_view key) const;
  // A scalar; the fallback if there is none, or not of that kind.
  double Number(std::string_view key, double fallback) const;
  std::string Text(std::string_view key, std::string_view fallback = "") const;
  bool Flag(std::string_view key, bool fallback) const;
};

// Checks everything there is to check: magic, version, counts, names (printable ASCII, no two
// alike), types, shapes that whole blocks fill, offsets contiguous with padding, data inside the
// file. `bytes` holds at least the header of a file of `file_size` bytes. Errors name `source` and
// the tensor or key.
absl::StatusOr<GgufHeader> ParseGgufHeader(std::string_view bytes, uint64_t file_size,
                                           absl::string_view source);

class MappedFile;

class GgufFile {
 public:
  static absl::StatusOr<std::shared_ptr<const GgufFile>> Open(const std::string& path);

  const std::string& path() const { return path_; }
  const GgufHeader& header() const { return header_; }
  const char* data(const GgufTensor& tensor) const;
  const std::shared_ptr<MappedFile>& mapping() const { return mapping_; }
  // As TensorFile::Release.
  void Release(const GgufTensor& tensor) const;

 private:
  std::string path_;
  GgufHeader header_;
  std::shared_ptr<MappedFile> mapping_;
};

// The GGUF file that `path` means: the file itself, or the only one of a directory without
// safetensors weights; empty if `path` is something else. INVALID_ARGUMENT for a file that is none
// and for a directory with several.
absl::StatusOr<std::string> FindGguf(const std::string& path);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_GGUF_FILE_H_
