// Opens a checkpoint directory, original or quantized, or a GGUF file as the weights of a decoder.
#ifndef QUANTMILL_CORE_CHECKPOINT_OPEN_MODEL_H_
#define QUANTMILL_CORE_CHECKPOINT_OPEN_MODEL_H_

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "core/checkpoint/quantization_config.h"
#include "core/formats/packed.h"
#include "core/model/weights.h"

namespace quantmill {

enum class PackedMode {
  kDequantize,  // packed slots become dense at load, but not where they quantize activations
  kKeepPacked,  // packed slots keep their codes, prepacked for the kernel (generation)
};

// A WeightSource that knows how its slots are stored.
class CheckpointSource : public WeightSource {
 public:
  // Null for an original checkpoint.
  virtual const QuantizationConfig* quantization() const = 0;
  // The slot's weight as its format defines it, on the host; NOT_FOUND if the slot is dense.
  virtual absl::StatusOr<PackedWeight> LoadPacked(std::string_view slot) = 0;
};

// NOT_FOUND or INVALID_ARGUMENT if `directory` is none, or holds no config.json, and is no GGUF
// file either.
absl::Status CheckModelDirectory(const std::string& directory);

// `registry` may be null: then only original checkpoints and the native format with affine-int
// weights can be opened (through the reference kernel); it must outlive the source. Every slot's
// tensors are looked for before this returns, so that a missing or left-over tensor is an error
// here, naming it, and not halfway through a run.
absl::StatusOr<std::unique_ptr<CheckpointSource>> OpenModel(
    const std::string& directory, FormatRegistry* registry,
    PackedMode mode = PackedMode::kDequantize);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_OPEN_MODEL_H_
