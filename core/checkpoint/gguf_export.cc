#include "core/checkpoint/gguf_export.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/export_files.h"
#include "core/io/gguf_tensors.h"
#include "core/io/gguf_writer.h"
#include "core/model/gguf_config.h"
#include "core/text/gguf_tokenizer.h"

namespace quantmill {
namespace {

// Values of general.file_type (llama.cpp: include/llama.h, llama_ftype).
int64_t FileType(GgmlType type) {
  switch (type) {
    case GgmlType::kF16:
      return 1;
    case GgmlType::kQ4_0:
      return 2;
    case GgmlType::kQ4_1:
      return 3;
    case GgmlType::kQ8_0:
      return 7;
    case GgmlType::kBF16:
      return 32;
    default:
      return 0;
  }
}

absl::StatusOr<GgufMetadata> BuildMetadata(const std::string& original, const ModelConfig& config,
                                           GgmlType most) {
  QM_ASSIGN_OR_RETURN(GgufMetadata metadata, GgufConfig(config));
  metadata.emplace_back("general.file_type", GgufValue::U32(FileType(most)));
  metadata.emplace_back("general.quantization_version", GgufValue::U32(2));
  QM_ASSIGN_OR_RETURN(const TokenizerFiles files, ReadTokenizerFiles(original));
  if (files.tokenizer.is_null()) {  // llama.cpp's word for a model that takes ids only
    metadata.emplace_back("tokenizer.ggml.model", GgufValue::Text("none"));
    return metadata;
  }
  QM_ASSIGN_OR_RETURN(GgufMetadata tokenizer,
                      GgufTokenizer(files.tokenizer, files.config, config.vocab_size));
  std::move(tokenizer.begin(), tokenizer.end(), std::back_inserter(metadata));
  // Ids that only config.json names.
  const auto add = [&](const char* key, const std::vector<int64_t>& ids) {
    const bool there = std::any_of(metadata.begin(), metadata.end(),
                                   [key](const auto& pair) { return pair.first == key; });
    if (!there && !ids.empty()) metadata.emplace_back(key, GgufValue::U32(ids[0]));
  };
  add("tokenizer.ggml.bos_token_id", config.bos_ids);
  add("tokenizer.ggml.eos_token_id", config.eos_ids);
  return metadata;
}

GgmlType FloatType(DType dtype) {
  if (dtype == DType::kF16) return GgmlType::kF16;
  return dtype == DType::kBF16 ? GgmlType::kBF16 : GgmlType::kF32;
}

// Buffers of older checkpoints that hold no weights.
bool IsBuffer(const std::string& name) { return absl::EndsWith(name, ".rotary_emb.inv_freq"); }

class GgufSink : public WeightSink {
 public:
  GgufSink(const ModelConfig& config, GgufModel model)
      : config_(config), model_(std::move(model)) {}

  absl::Status Open(const std::string& directory, const std::string& original,
                    const std::vector<TensorDeclaration>& tensors,
                    const std::map<std::string, std::string>& packed) {
    for (const TensorDeclaration& tensor : tensors) QM_RETURN_IF_ERROR(Place(tensor, packed));
    std::vector<GgufDeclaration> declarations;
    const std::vector<float> divisors = RopeDivisors(config_);
    if (!divisors.empty()) {
      declarations.push_back(
          {"rope_freqs.weight", GgmlType::kF32, {static_cast<int64_t>(divisors.size())}});
    }
    std::map<GgmlType, int64_t> weights;
    for (const GgufDeclaration& declaration : declarations_) {
      int64_t count = 1;
      for (const int64_t extent : declaration.shape) count *= extent;
      weights[declaration.type] += count;
      declarations.push_back(declaration);
    }
    const auto most =
        std::max_element(weights.begin(), weights.end(),
                         [](const auto& a, const auto& b) { return a.second < b.second; });
    QM_ASSIGN_OR_RETURN(const GgufMetadata metadata, BuildMetadata(original, config_, most->first));
    QM_ASSIGN_OR_RETURN(writer_, GgufWriter::Create(absl::StrCat(directory, "/", kGgufFileName),
                                                    metadata, declarations));
    if (divisors.empty()) return absl::OkStatus();
    return writer_->Write("rope_freqs.weight", 0,
                          {reinterpret_cast<const char*>(divisors.data()), divisors.size() * 4});
  }

  absl::Status Write(std::string_view name, const Tensor& tensor) override {
    const auto found = slots_.find(std::string(name));
    if (found == slots_.end()) return absl::OkStatus();  // a buffer, or a tied head
    const Slot& slot = found->second;
    QM_ASSIGN_OR_RETURN(const Tensor stored, slot.widen ? InF32(tensor) : tensor);
    const int64_t rows = stored.dim(0), row_bytes = stored.bytes() / rows;
    const auto bytes = static_cast<size_t>(stored.bytes());
    const uint64_t offset = static_cast<uint64_t>(std::max<int64_t>(slot.place.expert, 0)) * bytes;
    if (slot.place.heads == 0) {
      return writer_->Write(slot.place.tensor, offset, {stored.as<const char>(), bytes});
    }
    std::string interleaved(bytes, '\0');
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(interleaved.data() + InterleavedRow(row, rows, slot.place.heads) * row_bytes,
                  stored.as<const char>() + row * row_bytes, static_cast<size_t>(row_bytes));
    }
    return writer_->Write(slot.place.tensor, offset, interleaved);
  }

  absl::Status Finish() override { return writer_->Finish(); }

 private:
  struct Slot {
    GgufPlace place;
    bool widen = false;  // to F32
  };

  absl::Status Place(const TensorDeclaration& tensor,
                     const std::map<std::string, std::string>& packed) {
    if (IsBuffer(tensor.name)) return absl::OkStatus();
    if (tensor.name == "lm_head.weight" && config_.tied_embeddings) return absl::OkStatus();
    const std::optional<GgufPlace> place = GgufPlaceOf(model_, tensor.name);
    if (!place) {
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat("a GGUF file cannot hold the tensor ", tensor.name),
                    absl::StrCat("architecture ", model_.architecture, " has none of that name"),
                    "export as quantmill or dense"));
    }
    Slot slot = {*place, false};
    GgufDeclaration declaration = {place->tensor, FloatType(tensor.dtype), {}};
    const auto extents = tensor.shape.extents();
    declaration.shape.assign(extents.begin(), extents.end());
    const auto type = packed.find(tensor.name);
    if (type != packed.end()) {
      QM_RETURN_IF_ERROR(Unpack(type->second, &declaration));
    } else if (!IsModelFloat(tensor.dtype)) {
      return absl::FailedPreconditionError(absl::StrCat("a GGUF file cannot hold ", tensor.name,
                                                        " of type ",
                                                        std::string(DTypeName(tensor.dtype))));
    } else if (extents.size() == 1 || absl::EndsWith(place->tensor, "ffn_gate_inp.weight")) {
      declaration.type = GgmlType::kF32;
      slot.widen = true;
    }
    slots_.emplace(tensor.name, slot);
    if (place->expert < 0) {
      declarations_.push_back(std::move(declaration));
      return absl::OkStatus();
    }
    return AddExpert(std::move(declaration));
  }

  // From bytes to weights.
  static absl::Status Unpack(const std::string& config_json, GgufDeclaration* declaration) {
    for (const GgmlType type : {GgmlType::kQ8_0, GgmlType::kQ4_0, GgmlType::kQ4_1}) {
      const GgmlTypeInfo& info = InfoOf(type);
      if (config_json != absl::StrCat("{\"type\":\"", std::string(info.name), "\"}")) continue;
      declaration->type = type;
      declaration->shape[1] = declaration->shape[1] / info.bytes * info.block;
      return absl::OkStatus();
    }
    return absl::InternalError(absl::StrCat("unknown type of GGUF blocks ", config_json));
  }

  // The experts of a layer are one tensor.
  absl::Status AddExpert(GgufDeclaration declaration) {
    declaration.shape.insert(declaration.shape.begin(), model_.experts);
    for (const GgufDeclaration& other : declarations_) {
      if (other.name != declaration.name) continue;
      if (other.type == declaration.type && other.shape == declaration.shape) {
        return absl::OkStatus();
      }
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat("the experts in ", other.name, " are stored in different ways"),
                    "a GGUF file has one tensor for all experts of a layer",
                    "give them the same stage and options"));
    }
    declarations_.push_back(std::move(declaration));
    return absl::OkStatus();
  }

  static absl::StatusOr<Tensor> InF32(const Tensor& tensor) {
    if (tensor.dtype() == DType::kF32) return tensor;
    QM_ASSIGN_OR_RETURN(Tensor wide, Tensor::Host(DType::kF32, tensor.shape()));
    for (int64_t i = 0; i < tensor.elements(); ++i) StoreFloat(wide, i, LoadFloat(tensor, i));
    return wide;
  }

  const ModelConfig& config_;
  const GgufModel model_;
  std::map<std::string, Slot> slots_;
  std::vector<GgufDeclaration> declarations_;
  std::unique_ptr<GgufWriter> writer_;
};

}  // namespace

absl::Status CheckGgufExport(const std::string& original, const ModelConfig& config) {
  return BuildMetadata(original, config, GgmlType::kQ8_0).status();
}

absl::StatusOr<std::unique_ptr<WeightSink>> CreateGgufSink(
    const std::string& directory, const std::string& original, const ModelConfig& config,
    const std::vector<TensorDeclaration>& tensors,
    const std::map<std::string, std::string>& packed) {
  QM_ASSIGN_OR_RETURN(GgufModel model, GgufModelOf(config));
  auto sink = std::make_unique<GgufSink>(config, std::move(model));
  QM_RETURN_IF_ERROR(sink->Open(directory, original, tensors, packed));
  return std::unique_ptr<WeightSink>(std::move(sink));
}

}  // namespace quantmill
