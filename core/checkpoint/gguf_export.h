// Writing a model as one GGUF file, complete with configuration and tokenizer.
#ifndef QUANTMILL_CORE_CHECKPOINT_GGUF_EXPORT_H_
#define QUANTMILL_CORE_CHECKPOINT_GGUF_EXPORT_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/checkpoint/weight_sink.h"
#include "core/io/safetensors_writer.h"
#include "core/model/config.h"

namespace quantmill {

inline constexpr std::string_view kGgufTarget = "gguf";
inline constexpr char kGgufFileName[] = "model.gguf";

// Can this model be written at all? FAILED_PRECONDITION names what a GGUF file cannot hold.
absl::Status CheckGgufExport(const std::string& original, const ModelConfig& config);

// DIRECTORY/model.gguf. `tensors`: under Hugging Face names; those in `packed` are blocks, U8
// [out, bytes of a row], of the type given there ({"type":"Q4_0"}). Floats keep their type, but
// vectors and routers become F32, as llama.cpp wants them.
absl::StatusOr<std::unique_ptr<WeightSink>> CreateGgufSink(
    const std::string& directory, const std::string& original, const ModelConfig& config,
    const std::vector<TensorDeclaration>& tensors,
    const std::map<std::string, std::string>& packed);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_GGUF_EXPORT_H_
