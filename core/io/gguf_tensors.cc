#include "core/io/gguf_tensors.h"

#include <array>
#include <cstring>
#include <mutex>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "core/base/status.h"
#include "core/io/mapped_file.h"

namespace quantmill {
namespace {

constexpr std::array<const char*, 4> kArchitectures = {"llama", "qwen2", "qwen3", "qwen3moe"};
constexpr double kMaxCount = 65536;  // heads or experts

struct NamePair {
  const char* hugging_face;
  const char* gguf;
};
// gguf-py/gguf/tensor_mapping.py.
constexpr std::array<NamePair, 3> kOutside = {
    {{"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}}};
constexpr std::array<NamePair, 11> kInBlock = {{{"input_layernorm", "attn_norm"},
                                                {"post_attention_layernorm", "ffn_norm"},
                                                {"self_attn.q_proj", "attn_q"},
                                                {"self_attn.k_proj", "attn_k"},
                                                {"self_attn.v_proj", "attn_v"},
                                                {"self_attn.o_proj", "attn_output"},
                                                {"self_attn.q_norm", "attn_q_norm"},
                                                {"self_attn.k_norm", "attn_k_norm"},
                                                {"mlp.gate_proj", "ffn_gate"},
                                                {"mlp.up_proj", "ffn_up"},
                                                {"mlp.down_proj", "ffn_down"}}};
struct ExpertNames {
  const char* module;
  NamePair projections[3];
};
constexpr ExpertNames kMixtralNames = {
    "block_sparse_moe", {{"w1", "ffn_gate_exps"}, {"w3", "ffn_up_exps"}, {"w2", "ffn_down_exps"}}};
constexpr ExpertNames kQwenNames = {
    "mlp",
    {{"gate_proj", "ffn_gate_exps"}, {"up_proj", "ffn_up_exps"}, {"down_proj", "ffn_down_exps"}}};

const ExpertNames& NamesOfExperts(const GgufModel& model) {
  return model.mixtral() ? kMixtralNames : kQwenNames;
}

// "model.layers.12.REST" -> 12, REST
bool SplitLayer(std::string_view name, absl::string_view prefix, int64_t* layer,
                std::string_view* rest) {
  absl::string_view text = AbslView(name);
  if (!absl::ConsumePrefix(&text, prefix)) return false;
  const size_t dot = text.find('.');
  if (dot == absl::string_view::npos || !absl::SimpleAtoi(text.substr(0, dot), layer)) return false;
  text.remove_prefix(dot + 1);
  *rest = std::string_view(text.data(), text.size());
  return *layer >= 0;
}

// "NAME.weight" or "NAME.bias" -> NAME, ".weight"
bool SplitSuffix(std::string_view name, std::string_view* module, std::string_view* suffix) {
  const size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) return false;
  *module = name.substr(0, dot);
  *suffix = name.substr(dot);
  return *suffix == ".weight" || *suffix == ".bias";
}

std::optional<GgufPlace> PlaceOfExpert(const GgufModel& model, const std::string& block,
                                       std::string_view module) {
  const ExpertNames& names = NamesOfExperts(model);
  absl::string_view text = AbslView(module);
  if (!absl::ConsumePrefix(&text, names.module)) return std::nullopt;
  if (text == ".gate") return GgufPlace{block + "ffn_gate_inp.weight", -1, 0};
  int64_t expert = 0;
  std::string_view projection;
  if (!SplitLayer({text.data(), text.size()}, ".experts.", &expert, &projection)) {
    return std::nullopt;
  }
  for (const NamePair& pair : names.projections) {
    if (projection != pair.hugging_face || expert >= model.experts) continue;
    return GgufPlace{absl::StrCat(block, pair.gguf, ".weight"), expert, 0};
  }
  return std::nullopt;
}

int64_t HeadsOf(const GgufModel& model, std::string_view gguf) {
  if (!model.interleaved()) return 0;
  if (gguf == "attn_q") return model.heads;
  return gguf == "attn_k" ? model.kv_heads : 0;
}

// The Hugging Face names of a tensor of the file; several for one with all experts.
std::vector<std::string> HuggingFaceNames(const GgufModel& model, std::string_view name) {
  std::string_view module, suffix, rest;
  if (!SplitSuffix(name, &module, &suffix)) return {};
  const std::string ending(suffix);
  for (const NamePair& pair : kOutside) {
    if (module == pair.gguf) return {pair.hugging_face + ending};
  }
  int64_t layer = 0;
  if (!SplitLayer(module, "blk.", &layer, &rest)) return {};
  const std::string block = absl::StrCat("model.layers.", layer, ".");
  for (const NamePair& pair : kInBlock) {
    if (rest == pair.gguf) return {block + pair.hugging_face + ending};
  }
  if (model.experts == 0 || ending != ".weight") return {};
  const ExpertNames& names = NamesOfExperts(model);
  if (rest == "ffn_gate_inp") return {absl::StrCat(block, names.module, ".gate.weight")};
  std::vector<std::string> found;
  for (const NamePair& pair : names.projections) {
    if (rest != pair.gguf) continue;
    for (int64_t expert = 0; expert < model.experts; ++expert) {
      found.push_back(absl::StrCat(block, names.module, ".experts.", expert, ".", pair.hugging_face,
                                   ".weight"));
    }
  }
  return found;
}

DType FloatType(const GgmlTypeInfo& type) {
  if (type.Is(GgmlType::kF16)) return DType::kF16;
  return type.Is(GgmlType::kBF16) ? DType::kBF16 : DType::kF32;
}

bool IsBlockType(const GgmlTypeInfo& type) {
  return type.Is(GgmlType::kQ8_0) || type.Is(GgmlType::kQ4_0) || type.Is(GgmlType::kQ4_1);
}

// Embedding rows are looked up one by one, so the table is never kept as blocks.
bool IsLinear(std::string_view name) {
  return absl::EndsWith(AbslView(name), ".weight") && name != "model.embed_tokens.weight";
}

class GgufTensors : public TensorFile {
 public:
  static absl::StatusOr<std::shared_ptr<const TensorFile>> Open(const std::string& path,
                                                                bool blocks) {
    auto file = std::make_shared<GgufTensors>();
    QM_ASSIGN_OR_RETURN(file->file_, GgufFile::Open(path));
    QM_ASSIGN_OR_RETURN(file->model_, ReadGgufModel(file->file_->header()));
    for (const GgufTensor& tensor : file->file_->header().tensors) {
      QM_RETURN_IF_ERROR(file->Add(tensor, blocks));
    }
    for (size_t i = 0; i < file->entries_.size(); ++i) {
      file->by_name_.emplace(file->entries_[i].name, i);
    }
    return std::shared_ptr<const TensorFile>(std::move(file));
  }

  const std::string& path() const override { return file_->path(); }
  const std::vector<SafetensorsEntry>& entries() const override { return entries_; }

  absl::StatusOr<Tensor> Get(std::string_view name) const override {
    const auto found = by_name_.find(std::string(name));
    if (found == by_name_.end()) {
      return absl::NotFoundError(
          ErrorText(absl::StrCat("no tensor ", AbslView(name), " in ", path())));
    }
    const Part& part = parts_[found->second];
    const bool as_is = part.blocks || part.tensor->type->is_float();
    return as_is ? Stored(entries_[found->second], part) : Dequantized(found->second);
  }

  void Release(std::string_view name) const override {
    const auto found = by_name_.find(std::string(name));
    if (found != by_name_.end()) file_->Release(*parts_[found->second].tensor);
  }

 private:
  struct Part {
    const GgufTensor* tensor;
    int64_t first_row, rows;  // of the tensor seen as a matrix; a vector has rows of one number
    int64_t row_bytes;
    int64_t heads;
    bool blocks;
  };

  absl::Status Add(const GgufTensor& tensor, bool blocks) {
    const absl::string_view name = tensor.name;
    if (name == "rope_freqs.weight") return absl::OkStatus();  // part of the configuration
    const std::vector<std::string> names = HuggingFaceNames(model_, tensor.name);
    const auto refuse = [&](absl::string_view why, absl::string_view remedy) {
      return absl::UnimplementedError(ErrorText(absl::StrCat("cannot read ", path()),
                                                absl::StrCat("tensor ", name, " ", why), remedy));
    };
    if (names.empty()) {
      return refuse(absl::StrCat("is not one that a model of architecture ", model_.architecture,
                                 " is known to have"),
                    "the model may be of a later kind");
    }
    if (!tensor.type->readable) {
      return refuse(
          absl::StrCat("has type ", std::string(tensor.type->name), ", which is not supported"),
          absl::StrCat("supported are ", ReadableGgmlTypes()));
    }
    const bool experts = names.size() > 1 || absl::StrContains(name, "_exps.");
    std::vector<int64_t> shape = tensor.shape;
    if (experts) {
      if (shape.size() != 3 || shape[0] != static_cast<int64_t>(names.size())) {
        return refuse(absl::StrCat("has shape ", tensor.ShapeText(),
                                   ", not one matrix for each of ", names.size(), " experts"),
                      "");
      }
      shape.erase(shape.begin());
    }
    if (shape.empty() || shape.size() > 2) {
      return refuse(absl::StrCat("has shape ", tensor.ShapeText(), ", neither vector nor matrix"),
                    "");
    }
    Part part;
    part.tensor = &tensor;
    part.rows = shape[0];
    const int64_t all_rows = part.rows * static_cast<int64_t>(names.size());
    if (shape.size() == 1 && tensor.type->block != 1) part.rows = 1;
    part.row_bytes =
        static_cast<int64_t>(tensor.bytes) / (shape.size() == 1 ? part.rows : all_rows);
    part.heads = 0;
    const std::optional<GgufPlace> place = GgufPlaceOf(model_, names[0]);
    if (place) part.heads = place->heads;
    if (part.heads > 0 && part.rows % (2 * part.heads) != 0) {
      return refuse(absl::StrCat("has ", part.rows, " rows, not pairs of them for each of ",
                                 part.heads, " heads"),
                    "");
    }
    for (size_t i = 0; i < names.size(); ++i) {
      part.first_row = part.rows * static_cast<int64_t>(i);
      part.blocks = blocks && IsBlockType(*tensor.type) && shape.size() == 2 && IsLinear(names[i]);
      SafetensorsEntry entry;
      entry.name = names[i];
      entry.shape = shape;
      const int64_t elements = shape[0] * (shape.size() == 2 ? shape[1] : 1);
      if (part.blocks) {
        entry.dtype_name = std::string(tensor.type->name);
        entry.end = static_cast<uint64_t>(part.rows * part.row_bytes);
      } else {
        entry.dtype = FloatType(*tensor.type);
        entry.dtype_name = std::string(DTypeName(*entry.dtype));
        entry.end = static_cast<uint64_t>(elements * ElementSize(*entry.dtype));
      }
      entries_.push_back(std::move(entry));
      parts_.push_back(part);
    }
    return absl::OkStatus();
  }

  // First byte of row `row` of the original order.
  const char* RowAt(const Part& part, int64_t row) const {
    const int64_t stored = part.heads > 0 ? InterleavedRow(row, part.rows, part.heads) : row;
    return file_->data(*part.tensor) + (part.first_row + stored) * part.row_bytes;
  }

  absl::StatusOr<Tensor> Stored(const SafetensorsEntry& entry, const Part& part) const {
    const DType dtype = part.blocks ? DType::kU8 : *entry.dtype;
    const Shape shape = part.blocks ? Shape{part.rows, part.row_bytes}
                                    : Shape(absl::Span<const int64_t>(entry.shape));
    char* first = const_cast<char*>(RowAt(part, 0));
    const auto alignment = static_cast<uintptr_t>(ElementSize(dtype));
    if (part.heads == 0 && reinterpret_cast<uintptr_t>(first) % alignment == 0) {
      return Tensor(file_->mapping(), first, dtype, shape, Device{}, /*read_only=*/true);
    }
    QM_ASSIGN_OR_RETURN(Tensor copy, Tensor::Host(dtype, shape));
    for (int64_t row = 0; row < part.rows; ++row) {
      std::memcpy(copy.as<char>() + row * part.row_bytes, RowAt(part, row),
                  static_cast<size_t>(part.row_bytes));
    }
    return copy;
  }

  absl::StatusOr<Tensor> Dequantized(size_t index) const {
    const SafetensorsEntry& entry = entries_[index];
    const Part& part = parts_[index];
    const Shape shape{absl::Span<const int64_t>(entry.shape)};
    std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Tensor> holder = dequantized_[index].lock();
    if (holder == nullptr) {
      QM_ASSIGN_OR_RETURN(Tensor tensor, Tensor::Host(DType::kF32, shape));
      const int64_t columns = shape.elements() / part.rows;
      for (int64_t row = 0; row < part.rows; ++row) {
        DequantizeGgml(*part.tensor->type, RowAt(part, row), columns / part.tensor->type->block,
                       tensor.as<float>() + row * columns);
      }
      holder = std::make_shared<Tensor>(std::move(tensor));
      dequantized_[index] = holder;
    }
    return Tensor(holder, holder->data(), DType::kF32, shape, Device{}, /*read_only=*/true);
  }

  std::shared_ptr<const GgufFile> file_;
  GgufModel model_;
  std::vector<SafetensorsEntry> entries_;
  std::vector<Part> parts_;  // of the entry with the same index
  absl::flat_hash_map<std::string, size_t> by_name_;
  mutable std::mutex mutex_;
  mutable absl::flat_hash_map<size_t, std::weak_ptr<Tensor>> dequantized_;
};

// A whole number above 0; an array counts if its elements are equal (heads per layer).
absl::StatusOr<int64_t> Count(const GgufHeader& header, const std::string& key, double fallback) {
  const GgufValue* value = header.Find(key);
  double number = fallback;
  if (value != nullptr && !value->numbers.empty()) {
    number = value->numbers[0];
    for (const double other : value->numbers) {
      if (other == number) continue;
      return absl::UnimplementedError(
          ErrorText(absl::StrCat("key ", key, " differs between layers"),
                    "models whose layers are alike can be read"));
    }
  }
  if (!(number >= 0 && number <= kMaxCount) ||
      number != static_cast<double>(static_cast<int64_t>(number))) {
    return absl::InvalidArgumentError(absl::StrCat("key ", key, " is missing or no valid count"));
  }
  return static_cast<int64_t>(number);
}

}  // namespace

std::string GgufKey(const GgufModel& model, std::string_view name) {
  return absl::StrCat(model.architecture, ".", AbslView(name));
}

absl::StatusOr<GgufModel> ReadGgufModel(const GgufHeader& header) {
  GgufModel model;
  model.architecture = header.Text("general.architecture");
  bool known = false;
  for (const char* name : kArchitectures) known = known || model.architecture == name;
  if (!known) {
    return absl::UnimplementedError(
        ErrorText(model.architecture.empty() ? std::string("the file has no general.architecture")
                                             : absl::StrCat("architecture \"", model.architecture,
                                                            "\" of a GGUF file is not supported"),
                  absl::StrCat("supported are ", absl::StrJoin(kArchitectures, ", "))));
  }
  if (header.Number("split.count", 0) > 1) {
    return absl::UnimplementedError(
        ErrorText("the file is one of several that a model was split into", "",
                  "merge them first (llama-gguf-split --merge)"));
  }
  QM_ASSIGN_OR_RETURN(model.heads, Count(header, GgufKey(model, "attention.head_count"), -1));
  QM_ASSIGN_OR_RETURN(model.kv_heads, Count(header, GgufKey(model, "attention.head_count_kv"),
                                            static_cast<double>(model.heads)));
  QM_ASSIGN_OR_RETURN(model.experts, Count(header, GgufKey(model, "expert_count"), 0));
  if (model.heads == 0 || model.kv_heads == 0) {
    return absl::InvalidArgumentError("the file says that attention has no heads");
  }
  return model;
}

std::optional<GgufPlace> GgufPlaceOf(const GgufModel& model, std::string_view name) {
  std::string_view module, suffix, rest;
  if (!SplitSuffix(name, &module, &suffix)) return std::nullopt;
  const std::string ending(suffix);
  for (const NamePair& pair : kOutside) {
    if (module == pair.hugging_face) return GgufPlace{pair.gguf + ending, -1, 0};
  }
  int64_t layer = 0;
  if (!SplitLayer(module, "model.layers.", &layer, &rest)) return std::nullopt;
  const std::string block = absl::StrCat("blk.", layer, ".");
  for (const NamePair& pair : kInBlock) {
    if (rest != pair.hugging_face) continue;
    return GgufPlace{block + pair.gguf + ending, -1, HeadsOf(model, pair.gguf)};
  }
  if (model.experts == 0 || ending != ".weight") return std::nullopt;
  return PlaceOfExpert(model, block, rest);
}

// Of a head's rows, j of the first half is followed by j of the second.
int64_t InterleavedRow(int64_t row, int64_t rows, int64_t heads) {
  const int64_t size = rows / heads, half = size / 2;
  const int64_t within = row % size;
  return row - within + within % half * 2 + within / half;
}

absl::StatusOr<std::shared_ptr<const TensorFile>> OpenGgufTensors(const std::string& path,
                                                                  bool blocks) {
  auto file = GgufTensors::Open(path, blocks);
  if (!file.ok() && !absl::StrContains(file.status().message(), path)) {
    return WithContext(file.status(), absl::StrCat("cannot read ", path));
  }
  return file;
}

absl::StatusOr<std::vector<std::pair<std::string, std::string>>> GgufBlockLinears(
    const std::string& path) {
  QM_ASSIGN_OR_RETURN(const auto file, OpenGgufTensors(path, /*blocks=*/true));
  std::vector<std::pair<std::string, std::string>> linears;
  for (const SafetensorsEntry& entry : file->entries()) {
    if (entry.dtype.has_value()) continue;
    constexpr size_t kSuffix = 7;  // ".weight"
    linears.emplace_back(entry.name.substr(0, entry.name.size() - kSuffix), entry.dtype_name);
  }
  return linears;
}

}  // namespace quantmill
