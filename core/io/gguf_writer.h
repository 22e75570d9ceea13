// Writes GGUF files, version 3, with constant memory: metadata and tensors are declared first, then
// their data arrives in any order. Nothing appears under the final name before Finish().
#ifndef QUANTMILL_CORE_IO_GGUF_WRITER_H_
#define QUANTMILL_CORE_IO_GGUF_WRITER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/io/files.h"
#include "core/io/gguf_file.h"

namespace quantmill {

using GgufMetadata = std::vector<std::pair<std::string, GgufValue>>;  // in file order

struct GgufDeclaration {
  std::string name;  // at most 63 bytes
  GgmlType type = GgmlType::kF32;
  std::vector<int64_t> shape;  // row-major, as GgufTensor's
};

class GgufWriter {
 public:
  // Reserves the whole file and writes its header. INVALID_ARGUMENT for a key or tensor that is
  // there twice, a name that is too long, rows that are not whole blocks.
  static absl::StatusOr<std::unique_ptr<GgufWriter>> Create(
      const std::string& path, const GgufMetadata& metadata,
      const std::vector<GgufDeclaration>& tensors);

  // Bytes of a tensor from its byte `offset` on; each byte is written once.
  absl::Status Write(std::string_view name, uint64_t offset, std::string_view bytes);
  // FAILED_PRECONDITION naming a tensor that is not complete. Syncs, renames, syncs the directory.
  absl::Status Finish();

 private:
  struct Slot {
    std::string name;
    uint64_t begin = 0;  // in the file
    uint64_t bytes = 0;
    uint64_t written = 0;
  };

  std::unique_ptr<OutputFile> file_;
  std::vector<Slot> slots_;
  absl::flat_hash_map<std::string, size_t> by_name_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_GGUF_WRITER_H_
