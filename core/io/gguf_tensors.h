// The tensors of a GGUF file under their Hugging Face names, and the other way around.
#ifndef QUANTMILL_CORE_IO_GGUF_TENSORS_H_
#define QUANTMILL_CORE_IO_GGUF_TENSORS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "core/io/gguf_file.h"
#include "core/io/safetensors_reader.h"

namespace quantmill {

// What the names and the order of rows depend on.
struct GgufModel {
  std::string architecture;  // "llama", "qwen2", "qwen3" or "qwen3moe"
  int64_t heads = 0, kv_heads = 0;
  int64_t experts = 0;  // 0: dense

  bool mixtral() const { return architecture == "llama" && experts > 0; }
  // llama.cpp rotates neighbouring pairs of a head's channels for these, transformers the two
  // halves; rows of q and k are interleaved accordingly (llama.cpp: conversion/llama.py, permute).
  bool interleaved() const { return architecture == "llama"; }
};

// general.architecture and the keys under it. UNIMPLEMENTED lists the architectures.
absl::StatusOr<GgufModel> ReadGgufModel(const GgufHeader& header);

// "ARCHITECTURE.NAME"
std::string GgufKey(const GgufModel& model, std::string_view name);

// Where a Hugging Face tensor lies.
struct GgufPlace {
  std::string tensor;
  int64_t expert = -1;  // slice of the first axis of a tensor of all experts; -1: the whole
  int64_t heads = 0;    // its rows are interleaved per head; 0: they are in order
};
// nullopt for a name that no tensor of these models has.
std::optional<GgufPlace> GgufPlaceOf(const GgufModel& model, std::string_view name);

// Row of the interleaved order that holds row `row` of the original, `rows` in all.
int64_t InterleavedRow(int64_t row, int64_t rows, int64_t heads);

// Opens a file as tensors under Hugging Face names. F32, F16 and BF16 tensors keep their type,
// others are dequantized to F32; with `blocks`, two-dimensional weights of linears in Q8_0, Q4_0
// and Q4_1 are given as stored: no dtype, dtype_name "Q4_0", the shape that of the weight, and
// Get() returns U8 [out, bytes of a row]. What is dequantized is shared as long as somebody holds
// it.
absl::StatusOr<std::shared_ptr<const TensorFile>> OpenGgufTensors(const std::string& path,
                                                                  bool blocks);

// The stored type of every linear that OpenGgufTensors gives as blocks, by module name.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> GgufBlockLinears(
    const std::string& path);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_GGUF_TENSORS_H_
