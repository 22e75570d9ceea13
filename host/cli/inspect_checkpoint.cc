#include "host/cli/inspect_checkpoint.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/types/span.h"
#include "core/base/status.h"
#include "core/io/checkpoint_files.h"
#include "core/io/gguf_file.h"
#include "core/model/graph.h"
#include "host/cli/table.h"

namespace quantmill {
namespace {

std::string GroupName(const std::string& tensor) {
  std::vector<std::string> parts = absl::StrSplit(tensor, '.');
  for (std::string& part : parts) {
    const bool number = !part.empty() && std::all_of(part.begin(), part.end(), [](unsigned char c) {
      return c >= '0' && c <= '9';
    });
    if (number) part = "*";
  }
  return absl::StrJoin(parts, ".");
}

void AddTensor(const SafetensorsEntry& entry, CheckpointSummary* summary) {
  const std::string name = GroupName(entry.name), shape = entry.ShapeText();
  summary->bytes += static_cast<int64_t>(entry.bytes());
  ++summary->tensors;
  for (TensorGroup& group : summary->groups) {
    if (group.name != name || group.dtype != entry.dtype_name || group.shape != shape) continue;
    ++group.count;
    group.bytes += static_cast<int64_t>(entry.bytes());
    return;
  }
  summary->groups.push_back(
      {name, entry.dtype_name, shape, 1, static_cast<int64_t>(entry.bytes())});
}

// Packed codes may be stored under a dtype of floats (bnb_4bit_quant_storage), in another shape.
bool IsDense(const SafetensorsEntry& weight, const LinearSlot& slot) {
  if (weight.shape != std::vector<int64_t>{slot.out_features, slot.in_features}) return false;
  return weight.dtype_name == "F32" || weight.dtype_name == "F16" || weight.dtype_name == "BF16" ||
         weight.dtype_name == "F64";
}

void CountLinears(const ModelConfig& config, const Checkpoint& checkpoint,
                  CheckpointSummary* summary) {
  std::vector<LinearSlot> slots = AllSlots(config);
  slots.push_back(HeadSlot(config));
  double bits = 0, weights = 0;
  for (const LinearSlot& slot : slots) {
    const CheckpointTensor* weight = checkpoint.Find(slot.name + ".weight");
    const absl::Span<const CheckpointTensor> tensors = checkpoint.TensorsUnder(slot.name + ".");
    if (tensors.empty()) continue;  // a tied head
    if (weight != nullptr && IsDense(*weight->entry, slot)) {
      ++summary->dense_linears;
      continue;
    }
    ++summary->packed_linears;
    for (const CheckpointTensor& tensor : tensors) {
      if (tensor.entry->name == slot.name + ".bias") continue;
      bits += 8.0 * static_cast<double>(tensor.entry->bytes());
    }
    weights += static_cast<double>(slot.out_features) * static_cast<double>(slot.in_features);
  }
  if (weights > 0) summary->bits_per_weight = bits / weights;
}

void DescribeQuantization(const ModelConfig& config, CheckpointSummary* summary) {
  const auto it = config.json.find("quantization_config");
  if (it == config.json.end() || !it->is_object()) return;
  std::vector<std::string> parts;
  for (const auto& [key, value] : it->items()) {
    if (!value.is_primitive() || value.is_null()) continue;
    const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    if (key == "quant_method") summary->quant_method = text;
    parts.push_back(absl::StrCat(key, "=", text));
  }
  summary->quantization = absl::StrJoin(parts, " ");
}

// Linears are the matrices, and stacks of them, but the embedding and the routers.
bool IsLinear(const GgufTensor& tensor) {
  return tensor.shape.size() >= 2 && tensor.name != "token_embd.weight" &&
         !absl::EndsWith(tensor.name, "ffn_gate_inp.weight");
}

absl::StatusOr<CheckpointSummary> SummarizeGguf(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const auto file, GgufFile::Open(path));
  const GgufHeader& header = file->header();
  CheckpointSummary summary;
  summary.path = path;
  summary.model_type = header.Text("general.architecture", "unknown");
  summary.files = 1;
  std::map<std::string, int64_t> types;  // of packed linears
  double bits = 0, weights = 0;
  for (const GgufTensor& tensor : header.tensors) {
    SafetensorsEntry entry;
    entry.name = tensor.name;
    entry.dtype_name = std::string(tensor.type->name);
    entry.shape = tensor.shape;
    entry.end = tensor.bytes;
    AddTensor(entry, &summary);
    if (!IsLinear(tensor)) continue;
    const int64_t matrices = tensor.shape.size() > 2 ? tensor.shape[0] : 1;
    if (tensor.type->is_float()) {
      summary.dense_linears += matrices;
      continue;
    }
    summary.packed_linears += matrices;
    types[entry.dtype_name] += matrices;
    bits += 8.0 * static_cast<double>(tensor.bytes);
    weights += static_cast<double>(tensor.bytes) / static_cast<double>(tensor.type->bytes) *
               static_cast<double>(tensor.type->block);
  }
  if (weights > 0) summary.bits_per_weight = bits / weights;
  if (summary.packed_linears > 0) {
    summary.quant_method = "gguf";
    summary.quantization =
        absl::StrCat("gguf ", absl::StrJoin(types, " ", absl::PairFormatter("=")));
  }
  return summary;
}

}  // namespace

absl::StatusOr<CheckpointSummary> SummarizeCheckpoint(const std::string& directory) {
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(directory));
  if (!gguf.empty()) return SummarizeGguf(gguf);
  QM_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(directory));
  QM_ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> checkpoint,
                      Checkpoint::Open(directory));
  CheckpointSummary summary;
  summary.path = directory;
  summary.model_type = config.model_type;
  summary.files = static_cast<int64_t>(checkpoint->files().size());
  for (const CheckpointTensor& tensor : checkpoint->tensors()) AddTensor(*tensor.entry, &summary);
  DescribeQuantization(config, &summary);
  CountLinears(config, *checkpoint, &summary);
  return summary;
}

absl::StatusOr<CheckpointSummary> SummarizeFile(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const std::shared_ptr<const SafetensorsFile> file,
                      SafetensorsFile::Open(path));
  CheckpointSummary summary;
  summary.path = path;
  summary.files = 1;
  for (const SafetensorsEntry& entry : file->entries()) AddTensor(entry, &summary);
  return summary;
}

std::string FormatSummary(const CheckpointSummary& summary) {
  std::vector<std::vector<std::string>> rows = {{"TENSOR", "COUNT", "DTYPE", "SHAPE", "SIZE"}};
  for (const TensorGroup& group : summary.groups) {
    rows.push_back({group.name, absl::StrCat(group.count), group.dtype, group.shape,
                    FormatBytes(group.bytes)});
  }
  std::string text = FormatTable(rows, {1, 4});
  absl::StrAppend(&text, "\n", summary.tensors, " tensors in ", summary.files,
                  summary.files == 1 ? " file, " : " files, ", FormatBytes(summary.bytes), "\n");
  if (summary.model_type.empty()) return text;
  absl::StrAppend(&text, "model type ", summary.model_type, "; linears: ", summary.dense_linears,
                  " dense, ", summary.packed_linears, " packed\n");
  if (!summary.quantization.empty()) {
    absl::StrAppend(&text, "quantization: ", summary.quantization, "\n");
  }
  if (summary.packed_linears > 0) {
    absl::StrAppendFormat(&text, "packed linears take %.3f bits per weight, scales and all\n",
                          summary.bits_per_weight);
  }
  return text;
}

nlohmann::ordered_json SummaryToJson(const CheckpointSummary& summary) {
  nlohmann::ordered_json groups = nlohmann::ordered_json::array();
  for (const TensorGroup& group : summary.groups) {
    groups.push_back({{"name", group.name},
                      {"count", group.count},
                      {"dtype", group.dtype},
                      {"shape", group.shape},
                      {"bytes", group.bytes}});
  }
  return {{"path", summary.path},
          {"model_type", summary.model_type},
          {"quant_method", summary.quant_method},
          {"quantization", summary.quantization},
          {"files", summary.files},
          {"tensors", summary.tensors},
          {"size_bytes", summary.bytes},
          {"dense_linears", summary.dense_linears},
          {"packed_linears", summary.packed_linears},
          {"bits_per_weight", summary.bits_per_weight},
          {"groups", groups}};
}

}  // namespace quantmill
