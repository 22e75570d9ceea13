#include "core/model/dense_source.h"

#include <algorithm>
#include <utility>

#include "core/base/status.h"

namespace quantmill {
namespace {

constexpr char kEmbeddingName[] = "model.embed_tokens.weight";
constexpr char kNormName[] = "model.norm.weight";

// Empty if the tensor is as asked for, else what is wrong with it.
std::string Mismatch(const CheckpointTensor* tensor, const Shape& shape) {
  if (tensor == nullptr) return "is missing";
  const SafetensorsEntry& entry = *tensor->entry;
  if (absl::Span<const int64_t>(entry.shape) != shape.extents()) {
    return absl::StrCat("has shape ", entry.ShapeText(), ", but config.json asks for ",
                        shape.ToString(), " (in ", tensor->file->path(), ")");
  }
  if (!entry.dtype.has_value() || !IsModelFloat(*entry.dtype)) {
    return absl::StrCat("has dtype ", entry.dtype_name,
                        ", but weights must be F32, F16 or BF16 (in ", tensor->file->path(), ")");
  }
  return "";
}

absl::Status Wrong(const Checkpoint& checkpoint, const std::string& name, const std::string& what,
                   size_t others) {
  std::string why = absl::StrCat("tensor ", name, " ", what);
  if (others > 0) absl::StrAppend(&why, ", and ", others, " other tensors are wrong too");
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("cannot open model ", checkpoint.directory()), why,
                "check that config.json belongs to these weights and all files are complete"));
}

absl::Status LoadNorms(const ModelConfig& config, const Checkpoint& checkpoint, int64_t block,
                       Backend& backend, BlockWeights* weights) {
  const std::string name = BlockName(block);
  const Shape hidden{config.hidden_size}, head{config.head_dim};
  const auto load = [&](const char* suffix, const Shape& shape, Tensor* out) -> absl::Status {
    QM_ASSIGN_OR_RETURN(*out, LoadTensor(checkpoint, name + suffix, shape, backend));
    return absl::OkStatus();
  };
  QM_RETURN_IF_ERROR(load(".input_layernorm.weight", hidden, &weights->input_norm));
  QM_RETURN_IF_ERROR(
      load(".post_attention_layernorm.weight", hidden, &weights->post_attention_norm));
  if (!config.qk_norm) return absl::OkStatus();
  QM_RETURN_IF_ERROR(load(".self_attn.q_norm.weight", head, &weights->q_norm));
  return load(".self_attn.k_norm.weight", head, &weights->k_norm);
}

}  // namespace

absl::Status CheckRequiredTensors(const ModelConfig& config, const Checkpoint& checkpoint,
                                  const std::function<bool(const std::string&)>& skip) {
  std::string first_name, first_what;
  size_t wrong = 0;
  for (const TensorSpec& spec : RequiredTensors(config)) {
    if (skip != nullptr && skip(spec.name)) continue;
    std::string what = Mismatch(checkpoint.Find(spec.name), spec.shape);
    if (what.empty()) continue;
    if (wrong++ == 0) first_name = spec.name, first_what = std::move(what);
  }
  return wrong == 0 ? absl::OkStatus() : Wrong(checkpoint, first_name, first_what, wrong - 1);
}

absl::StatusOr<Tensor> MapTensor(const Checkpoint& checkpoint, const std::string& name,
                                 const Shape& shape) {
  const std::string what = Mismatch(checkpoint.Find(name), shape);
  if (!what.empty()) return Wrong(checkpoint, name, what, 0);
  return checkpoint.Get(name);
}

absl::StatusOr<Tensor> LoadTensor(const Checkpoint& checkpoint, const std::string& name,
                                  const Shape& shape, Backend& backend) {
  QM_ASSIGN_OR_RETURN(const Tensor tensor, MapTensor(checkpoint, name, shape));
  return backend.ToDevice(tensor);
}

absl::StatusOr<LinearWeight> LoadDenseLinear(const Checkpoint& checkpoint, const LinearSlot& slot,
                                             Backend& backend) {
  LinearWeight weight;
  QM_ASSIGN_OR_RETURN(weight.dense,
                      LoadTensor(checkpoint, slot.name + ".weight",
                                 Shape{slot.out_features, slot.in_features}, backend));
  if (slot.has_bias) {
    QM_ASSIGN_OR_RETURN(weight.bias, LoadTensor(checkpoint, slot.name + ".bias",
                                                Shape{slot.out_features}, backend));
  }
  return weight;
}

absl::StatusOr<BlockWeights> LoadBlockWeights(const ModelConfig& config,
                                              const Checkpoint& checkpoint, int64_t block,
                                              Backend& backend, const LinearLoader& load_linear) {
  if (block < 0 || block >= config.layers) {
    return absl::OutOfRangeError(
        ErrorText(absl::StrCat("no block ", block), absl::StrCat("the model has ", config.layers)));
  }
  BlockWeights weights;
  QM_RETURN_IF_ERROR(LoadNorms(config, checkpoint, block, backend, &weights));
  if (config.moe_layer[static_cast<size_t>(block)]) {
    weights.moe.experts.resize(static_cast<size_t>(config.experts));
    QM_ASSIGN_OR_RETURN(weights.moe.router.dense,
                        LoadTensor(checkpoint, RouterName(config, block) + ".weight",
                                   Shape{config.experts, config.hidden_size}, backend));
  }
  for (const LinearSlot& slot : BlockSlots(config, block)) {
    LinearWeight* target = weights.At(slot);
    if (target == nullptr) {
      return absl::InternalError(ErrorText(absl::StrCat("no place for slot ", slot.name)));
    }
    QM_ASSIGN_OR_RETURN(*target, load_linear(slot, backend));
  }
  return weights;
}

absl::StatusOr<Tensor> MapEmbedding(const ModelConfig& config, const Checkpoint& checkpoint) {
  return MapTensor(checkpoint, kEmbeddingName, Shape{config.vocab_size, config.hidden_size});
}

absl::StatusOr<Tensor> LoadFinalNorm(const ModelConfig& config, const Checkpoint& checkpoint,
                                     Backend& backend) {
  return LoadTensor(checkpoint, kNormName, Shape{config.hidden_size}, backend);
}

absl::StatusOr<LinearWeight> LoadDenseHead(const ModelConfig& config, const Checkpoint& checkpoint,
                                           Backend& backend) {
  if (!config.tied_embeddings) return LoadDenseLinear(checkpoint, HeadSlot(config), backend);
  QM_ASSIGN_OR_RETURN(const Tensor table, MapEmbedding(config, checkpoint));
  LinearWeight head;
  QM_ASSIGN_OR_RETURN(head.dense, backend.ToDevice(table));
  return head;
}

absl::StatusOr<std::unique_ptr<DenseSource>> DenseSource::Open(const std::string& directory) {
  QM_ASSIGN_OR_RETURN(ModelConfig config, ReadModelConfig(directory));
  QM_ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open(directory));
  return Create(std::move(config), std::move(checkpoint));
}

absl::StatusOr<std::unique_ptr<DenseSource>> DenseSource::Create(
    ModelConfig config, std::shared_ptr<const Checkpoint> checkpoint) {
  QM_RETURN_IF_ERROR(CheckRequiredTensors(config, *checkpoint));
  return std::unique_ptr<DenseSource>(new DenseSource(std::move(config), std::move(checkpoint)));
}

absl::StatusOr<BlockWeights> DenseSource::LoadBlock(int64_t block, Backend& backend) {
  return LoadBlockWeights(config_, *checkpoint_, block, backend,
                          [this](const LinearSlot& slot, Backend& target) {
                            return LoadDenseLinear(*checkpoint_, slot, target);
                          });
}

absl::StatusOr<Tensor> DenseSource::Embedding() { return MapEmbedding(config_, *checkpoint_); }

absl::StatusOr<Tensor> DenseSource::FinalNorm(Backend& backend) {
  return LoadFinalNorm(config_, *checkpoint_, backend);
}

absl::StatusOr<LinearWeight> DenseSource::Head(Backend& backend) {
  return LoadDenseHead(config_, *checkpoint_, backend);
}

void DenseSource::ReleaseBlock(int64_t block) {
  checkpoint_->ReleasePrefix(BlockName(block) + ".");
}

}  // namespace quantmill
