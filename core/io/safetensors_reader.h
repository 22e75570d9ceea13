// Reads safetensors files without copying. File layout: huggingface/safetensors README.md.
#ifndef QUANTMILL_CORE_IO_SAFETENSORS_READER_H_
#define QUANTMILL_CORE_IO_SAFETENSORS_READER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/tensor/tensor.h"

namespace quantmill {

class MappedFile;

// One entry of the header.
struct SafetensorsEntry {
  std::string name;
  std::string dtype_name;      // as in the file
  std::optional<DType> dtype;  // nullopt: no type this program computes with (BOOL, U16, ...)
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes, from the start of the data

  uint64_t bytes() const { return end - begin; }
  std::string ShapeText() const;  // "[384, 1024]"
};

// What the first bytes of a file say.
struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  // by offset
  std::map<std::string, std::string> metadata;
  uint64_t data_begin = 0;  // of the data, in the file
};

// Checks everything there is to check: header size, JSON, duplicate names, offsets contiguous from
// zero and equal to dtype x shape, data ending exactly at `file_size`. `prefix` holds at least the
// first min(file_size, 8 + header size) bytes. Errors name `source` and the tensor.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view prefix,
                                                         uint64_t file_size,
                                                         absl::string_view source);

// A file of named tensors.
class TensorFile {
 public:
  virtual ~TensorFile() = default;
  virtual const std::string& path() const = 0;
  virtual const std::vector<SafetensorsEntry>& entries() const = 0;
  // Host memory. NOT_FOUND for an unknown name; UNIMPLEMENTED for a dtype or rank that Tensor
  // cannot hold.
  virtual absl::StatusOr<Tensor> Get(std::string_view name) const = 0;
  // Tells the kernel that the pages under the tensor are not needed now; they are read again from
  // the file when touched.
  virtual void Release(std::string_view name) const = 0;
};

// A mapped file. Tensors are read-only views that keep the mapping alive after this object is gone.
class SafetensorsFile : public TensorFile {
 public:
  // NOT_FOUND, or INVALID_ARGUMENT / DATA_LOSS with the reason the file is refused.
  static absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Open(const std::string& path);

  const std::string& path() const override { return path_; }
  const std::vector<SafetensorsEntry>& entries() const override { return header_.entries; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  // Null if there is no such tensor.
  const SafetensorsEntry* Find(std::string_view name) const;

  // Zero copy, except for data that the file does not align to its element size.
  absl::StatusOr<Tensor> Get(std::string_view name) const override;
  void Release(std::string_view name) const override;

 private:
  std::string path_;
  SafetensorsHeader header_;
  std::shared_ptr<MappedFile> mapping_;
  absl::flat_hash_map<std::string_view, const SafetensorsEntry*> by_name_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_SAFETENSORS_READER_H_
