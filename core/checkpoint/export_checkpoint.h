// Writes a quantized checkpoint as one of the targets, block by block.
#ifndef QUANTMILL_CORE_CHECKPOINT_EXPORT_CHECKPOINT_H_
#define QUANTMILL_CORE_CHECKPOINT_EXPORT_CHECKPOINT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "core/checkpoint/quantization_config.h"
#include "core/formats/packed.h"
#include "core/model/graph.h"
#include "core/tensor/backend.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// What a run made of the model. Called from one thread, twice per slot: for its layout, in the
// order of AllSlots and then lm_head, then for its data, block by block and lm_head last (within a
// block in the order of the tensors' names). What is returned is dropped after it was written, so
// that memory stays at about one block.
class ExportSource {
 public:
  virtual ~ExportSource() = default;
  // The slot's packed weight on the host, or null if it stays dense.
  virtual absl::StatusOr<std::shared_ptr<const PackedWeight>> Packed(const LinearSlot& slot) = 0;
  // A dense tensor that a stage has changed, on the host ("model.layers.3.input_layernorm.weight",
  // also weights and biases of dense slots); an empty tensor means: as in the original. A float
  // tensor is stored in the dtype of the original.
  virtual absl::StatusOr<Tensor> Changed(const std::string& tensor_name) = 0;
};

struct ExportOptions {
  std::string original;   // directory of the original checkpoint
  std::string target;     // one of CheckpointTargets()
  std::string output;     // directory to create; ALREADY_EXISTS if it is there
  std::string temporary;  // directory to write in before renaming; empty = output + ".tmp". On the
                          // same file system as output; an old one is removed first
  nlohmann::ordered_json provenance;  // quantmill_provenance.json, to which "files" with the
                                      // SHA-256 of every other file is added; null = not written
  // Called when all but the provenance is written, to add files to the directory. May be null.
  std::function<absl::Status(const std::string& directory)> more_files;
  int64_t shard_bytes = int64_t{5} << 30;
  // Called after each block with the fraction done; true cancels (CANCELLED). May be null.
  std::function<bool(double)> progress;
};

struct ExportResult {
  // All bits stored for the packed linears over their weights; 0 if none is packed.
  double bits_per_weight = 0;
  int64_t size_bytes = 0;      // of the written directory
  int64_t original_bytes = 0;  // of the original's weight files
  int64_t packed_slots = 0;
  int64_t dense_slots = 0;
};

// `registry` may be null for the native and the dense target (then only affine-int can be
// dequantized). `backend` serves to dequantize for the dense target, and to convert changed tensors
// to the dtype of the original.
// Written files hold no paths, times or host names: equal inputs give equal bytes. On an error, a
// full disk included, nothing is left under `output` or the temporary name.
absl::StatusOr<ExportResult> ExportCheckpoint(const ExportOptions& options, ExportSource& source,
                                              FormatRegistry* registry, Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_EXPORT_CHECKPOINT_H_
