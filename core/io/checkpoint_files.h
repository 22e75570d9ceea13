// The weight files of a model, safetensors or GGUF, as one set of named tensors.
#ifndef QUANTMILL_CORE_IO_CHECKPOINT_FILES_H_
#define QUANTMILL_CORE_IO_CHECKPOINT_FILES_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/io/safetensors_reader.h"

namespace quantmill {

struct CheckpointTensor {
  const SafetensorsEntry* entry = nullptr;  // name, dtype, shape
  const TensorFile* file = nullptr;
};

// Quantized linears of a GGUF file (the others are stored in one way only).
enum class GgufView {
  kDense,   // dequantized, F32, as everything else of the file is
  kBlocks,  // those in Q8_0, Q4_0 and Q4_1 as they are stored, U8 [out, bytes of a row]
};

class Checkpoint {
 public:
  // Opens DIRECTORY/model.safetensors, or the shards that DIRECTORY/model.safetensors.index.json
  // lists. Every file's header is checked. Errors name the file, the tensor and the reason: a
  // missing or truncated shard, a tensor that the index places in a shard without it, an index
  // beside a single file it does not mention, no tensors at all.
  // A GGUF file, or a directory with one, is opened too; its tensors have the names they have in a
  // Hugging Face checkpoint, and their rows the order.
  static absl::StatusOr<std::shared_ptr<const Checkpoint>> Open(const std::string& directory,
                                                                GgufView view = GgufView::kDense);

  const std::string& directory() const { return directory_; }
  // Sorted by name.
  const std::vector<CheckpointTensor>& tensors() const { return tensors_; }
  // Those whose names start with `prefix`.
  absl::Span<const CheckpointTensor> TensorsUnder(std::string_view prefix) const;
  // The files, in the order of their names.
  const std::vector<std::shared_ptr<const TensorFile>>& files() const { return files_; }
  // Null if there is no such tensor.
  const CheckpointTensor* Find(std::string_view name) const;
  bool Has(std::string_view name) const { return Find(name) != nullptr; }

  // As TensorFile::Get; NOT_FOUND names the directory.
  absl::StatusOr<Tensor> Get(std::string_view name) const;
  // As TensorFile::Release; ignores unknown names.
  void Release(std::string_view name) const;
  // Release() of TensorsUnder(prefix).
  void ReleasePrefix(std::string_view prefix) const;

 private:
  absl::Status OpenGguf(const std::string& path, GgufView view);
  absl::Status OpenSingle();
  absl::Status OpenSharded(const std::string& index_path);
  absl::Status IndexByName();

  std::string directory_;
  std::vector<std::shared_ptr<const TensorFile>> files_;
  std::vector<CheckpointTensor> tensors_;
  absl::flat_hash_map<std::string_view, size_t> by_name_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_CHECKPOINT_FILES_H_
