// Writes safetensors files and sharded checkpoints with constant memory: the tensors are declared
// first, then their data arrives in any order. Nothing appears under a final name before Finish().
#ifndef QUANTMILL_CORE_IO_SAFETENSORS_WRITER_H_
#define QUANTMILL_CORE_IO_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/io/files.h"
#include "core/tensor/tensor.h"

namespace quantmill {

struct TensorDeclaration {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;

  uint64_t bytes() const { return static_cast<uint64_t>(shape.elements() * ElementSize(dtype)); }
};

// One file. Layout as the reference writer's (huggingface/safetensors: safetensors/src/tensor.rs):
// widest types first, then by name; header padded to 8 bytes; __metadata__ is {"format": "pt"}.
// Equal declarations and data give equal bytes, whatever the order of the calls.
class SafetensorsWriter {
 public:
  // Reserves the whole file. INVALID_ARGUMENT for a name that is empty, declared twice, not UTF-8
  // or "__metadata__"; system errors as OutputFile::Create.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(
      const std::string& path, std::vector<TensorDeclaration> tensors);

  // The whole tensor, from host memory; dtype and shape must be as declared.
  absl::Status Write(std::string_view name, const Tensor& tensor);
  // The next bytes of a tensor.
  absl::Status Append(std::string_view name, std::string_view bytes);
  // FAILED_PRECONDITION naming a tensor that is not complete. Syncs, renames, syncs the directory.
  absl::Status Finish();

 private:
  friend class CheckpointWriter;
  struct Slot {
    TensorDeclaration tensor;
    uint64_t offset = 0;  // in the file
    uint64_t written = 0;
  };

  absl::Status CheckComplete() const;
  absl::StatusOr<Slot*> Find(std::string_view name);

  std::unique_ptr<OutputFile> file_;
  std::vector<Slot> slots_;  // in file order
  absl::flat_hash_map<std::string, size_t> by_name_;
};

constexpr uint64_t kDefaultShardBytes = 5'000'000'000;

// A model directory's weights: model.safetensors if everything fits into one shard, else
// model-00001-of-0000N.safetensors and model.safetensors.index.json. Tensors are put into shards in
// the order of declaration; a tensor larger than a shard gets one of its own.
class CheckpointWriter {
 public:
  // The directory must exist. All files are created (under temporary names) and reserved now.
  static absl::StatusOr<std::unique_ptr<CheckpointWriter>> Create(
      const std::string& directory, const std::vector<TensorDeclaration>& tensors,
      uint64_t max_shard_bytes = kDefaultShardBytes);

  // As SafetensorsWriter's.
  absl::Status Write(std::string_view name, const Tensor& tensor);
  absl::Status Append(std::string_view name, std::string_view bytes);
  // Publishes all files, the index last, and deletes weight files and an index that an earlier
  // checkpoint left in the directory.
  absl::Status Finish();

  // Names of the files that Finish() publishes, without the index.
  const std::vector<std::string>& file_names() const { return file_names_; }

 private:
  absl::StatusOr<SafetensorsWriter*> WriterOf(std::string_view name);
  absl::Status DeleteStale() const;
  std::string IndexJson() const;

  std::string directory_;
  uint64_t total_size_ = 0;
  std::vector<std::string> file_names_;
  std::vector<std::unique_ptr<SafetensorsWriter>> writers_;
  absl::flat_hash_map<std::string, size_t> shard_of_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_SAFETENSORS_WRITER_H_
