#include "core/checkpoint/open_model.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/packed_linear.h"
#include "core/formats/reference.h"
#include "core/io/checkpoint_files.h"
#include "core/io/gguf_file.h"
#include "core/model/dense_source.h"

namespace quantmill {
namespace {

bool Contains(const std::vector<std::string>& list, const std::string& name) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

bool IsLeftOut(const SlotStorage& storage, const std::vector<std::string>& present) {
  return !storage.marker.empty() && Contains(present, "weight") &&
         !Contains(present, storage.marker);
}

class OriginalSource : public CheckpointSource {
 public:
  explicit OriginalSource(std::unique_ptr<DenseSource> dense) : dense_(std::move(dense)) {}
  const ModelConfig& config() const override { return dense_->config(); }
  absl::StatusOr<BlockWeights> LoadBlock(int64_t block, Backend& backend) override {
    return dense_->LoadBlock(block, backend);
  }
  absl::StatusOr<Tensor> Embedding() override { return dense_->Embedding(); }
  absl::StatusOr<Tensor> FinalNorm(Backend& backend) override { return dense_->FinalNorm(backend); }
  absl::StatusOr<LinearWeight> Head(Backend& backend) override { return dense_->Head(backend); }
  void ReleaseBlock(int64_t block) override { dense_->ReleaseBlock(block); }
  const QuantizationConfig* quantization() const override { return nullptr; }
  absl::StatusOr<PackedWeight> LoadPacked(std::string_view slot) override {
    return absl::NotFoundError(
        absl::StrCat(std::string(slot), " is dense; the checkpoint is not quantized"));
  }

 private:
  std::unique_ptr<DenseSource> dense_;
};

class QuantizedSource : public CheckpointSource {
 public:
  QuantizedSource(ModelConfig config, std::shared_ptr<const Checkpoint> checkpoint,
                  std::shared_ptr<const Checkpoint> dequantized,
                  std::shared_ptr<const QuantizationConfig> quantization, FormatRegistry* registry,
                  PackedMode mode)
      : config_(std::move(config)),
        checkpoint_(std::move(checkpoint)),
        dequantized_(std::move(dequantized)),
        quantization_(std::move(quantization)),
        registry_(registry),
        mode_(mode) {}

  // Decides for every slot how it is stored and looks for its tensors.
  absl::Status Index() {
    for (const LinearSlot& slot : AllSlots(config_)) QM_RETURN_IF_ERROR(IndexSlot(slot));
    const LinearSlot head = HeadSlot(config_);
    // A tied head has no tensors of its own, whatever the patterns of the config say.
    const bool own_head = !checkpoint_->TensorsUnder(head.name + ".").empty();
    if (own_head) QM_RETURN_IF_ERROR(IndexSlot(head));
    if (packed_.empty()) {
      return absl::InvalidArgumentError(
          ErrorText(absl::StrCat(checkpoint_->directory(), " has a quantization_config"),
                    "but none of its linears is packed", "check that the files belong together"));
    }
    return CheckRequiredTensors(config_, *checkpoint_, [&](const std::string& name) {
      return absl::EndsWith(name, ".weight") && packed_.contains(name.substr(0, name.size() - 7));
    });
  }

  const ModelConfig& config() const override { return config_; }
  const QuantizationConfig* quantization() const override { return quantization_.get(); }

  absl::StatusOr<BlockWeights> LoadBlock(int64_t block, Backend& backend) override {
    return LoadBlockWeights(
        config_, *checkpoint_, block, backend,
        [&](const LinearSlot& slot, Backend& on) { return LoadLinear(slot, on); });
  }
  absl::StatusOr<Tensor> Embedding() override { return MapEmbedding(config_, *checkpoint_); }
  absl::StatusOr<Tensor> FinalNorm(Backend& backend) override {
    return LoadFinalNorm(config_, *checkpoint_, backend);
  }
  absl::StatusOr<LinearWeight> Head(Backend& backend) override {
    const LinearSlot head = HeadSlot(config_);
    if (packed_.contains(head.name)) return LoadLinear(head, backend);
    return LoadDenseHead(config_, *checkpoint_, backend);
  }
  void ReleaseBlock(int64_t block) override {
    checkpoint_->ReleasePrefix(BlockName(block) + ".");
    if (dequantized_ != nullptr) dequantized_->ReleasePrefix(BlockName(block) + ".");
  }

  absl::StatusOr<PackedWeight> LoadPacked(std::string_view slot) override {
    const std::string name(slot);
    const auto found = packed_.find(name);
    if (found == packed_.end()) return absl::NotFoundError(absl::StrCat(name, " is dense"));
    QM_ASSIGN_OR_RETURN(PackedWeight weight, Unpack(found->second));
    const LinearSlot& expected = found->second.slot;
    if (weight.out_features != expected.out_features ||
        weight.in_features != expected.in_features) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the packed weight of ", name, " is [", weight.out_features, ", ", weight.in_features,
          "]; config.json asks for [", expected.out_features, ", ", expected.in_features, "]"));
    }
    return weight;
  }

 private:
  struct PackedSlot {
    LinearSlot slot;
    SlotStorage storage;
    std::vector<std::string> tensors;  // without the layer prefix
  };

  absl::Status IndexSlot(const LinearSlot& slot) {
    QM_ASSIGN_OR_RETURN(std::optional<SlotStorage> storage, quantization_->Find(slot.name));
    std::vector<std::string> present;
    for (const CheckpointTensor& tensor : checkpoint_->TensorsUnder(slot.name + ".")) {
      present.push_back(tensor.entry->name.substr(slot.name.size() + 1));
    }
    if (storage && IsLeftOut(*storage, present)) storage.reset();
    if (!storage) return CheckDense(slot, present);
    PackedSlot packed{slot, *std::move(storage), {}};
    for (const std::string& name : packed.storage.required) {
      if (Contains(present, name)) continue;
      return absl::InvalidArgumentError(
          ErrorText(absl::StrCat(checkpoint_->directory(), " has no tensor ", slot.name, ".", name),
                    absl::StrCat("its quantization_config (", packed.storage.target, ") says that ",
                                 slot.name, " is packed")));
    }
    for (const std::string& name : present) {
      if (name == "bias") continue;
      const bool known = packed.storage.target == kNativeTarget ||
                         Contains(packed.storage.required, name) ||
                         Contains(packed.storage.optional, name);
      if (!known) return LeftOver(slot, name, "packed as " + packed.storage.target);
      packed.tensors.push_back(name);
    }
    if (packed.tensors.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(checkpoint_->directory(), " has no tensors of ", slot.name));
    }
    packed_.emplace(slot.name, std::move(packed));
    return absl::OkStatus();
  }

  absl::Status CheckDense(const LinearSlot& slot, const std::vector<std::string>& present) const {
    for (const std::string& name : present) {
      if (name != "weight" && name != "bias") return LeftOver(slot, name, "dense");
    }
    return absl::OkStatus();
  }

  absl::Status LeftOver(const LinearSlot& slot, const std::string& name,
                        const std::string& state) const {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat(checkpoint_->directory(), " has a tensor ", slot.name, ".", name),
                  absl::StrCat("its quantization_config says that ", slot.name, " is ", state),
                  "the files do not belong together"));
  }

  absl::StatusOr<PackedWeight> Unpack(const PackedSlot& packed) const {
    FormatRegistry::Stored stored;
    stored.config_json = packed.storage.config_json;
    for (const std::string& name : packed.tensors) {
      QM_ASSIGN_OR_RETURN(Tensor tensor,
                          checkpoint_->Get(absl::StrCat(packed.slot.name, ".", name)));
      stored.tensors.push_back({name, std::move(tensor)});
    }
    if (packed.storage.target != kNativeTarget) {
      if (registry_ == nullptr) {
        return absl::FailedPreconditionError(ErrorText(
            absl::StrCat("cannot read ", packed.slot.name, " stored as ", packed.storage.target),
            "no format plugins are loaded"));
      }
      return registry_->FromCheckpoint(packed.storage.target, packed.slot.name, stored);
    }
    PackedWeight weight;
    weight.format_id = packed.storage.format_id;
    weight.format_json = packed.storage.config_json;
    weight.tensors = std::move(stored.tensors);
    weight.out_features = packed.slot.out_features;
    weight.in_features = packed.slot.in_features;
    const absl::Status checked =
        registry_ != nullptr ? registry_->Check(weight) : CheckWithReference(weight);
    if (!checked.ok()) return WithContext(checked, packed.slot.name);
    return weight;
  }

  absl::StatusOr<LinearWeight> LoadLinear(const LinearSlot& slot, Backend& backend) {
    if (!packed_.contains(slot.name)) return LoadDenseLinear(*checkpoint_, slot, backend);
    if (dequantized_ != nullptr && mode_ == PackedMode::kDequantize) {
      return LoadDenseLinear(*dequantized_, slot, backend);
    }
    QM_ASSIGN_OR_RETURN(PackedWeight weight, LoadPacked(slot.name));
    QM_ASSIGN_OR_RETURN(LinearWeight linear,
                        MakePackedLinear(std::move(weight), mode_, registry_, backend));
    if (slot.has_bias) {
      QM_ASSIGN_OR_RETURN(
          linear.bias, LoadTensor(*checkpoint_, slot.name + ".bias", {slot.out_features}, backend));
    }
    return linear;
  }

  const ModelConfig config_;
  const std::shared_ptr<const Checkpoint> checkpoint_;
  // Of a GGUF file: the same tensors with the values its own rules give; else null.
  const std::shared_ptr<const Checkpoint> dequantized_;
  const std::shared_ptr<const QuantizationConfig> quantization_;
  FormatRegistry* const registry_;
  const PackedMode mode_;
  absl::flat_hash_map<std::string, PackedSlot> packed_;
};

}  // namespace

absl::Status CheckModelDirectory(const std::string& directory) {
  constexpr char kRemedy[] = "give the directory of a Hugging Face checkpoint, or a GGUF file";
  const std::string what = absl::StrCat("cannot open model ", directory);
  std::error_code error;
  if (!std::filesystem::exists(directory, error)) {
    return absl::NotFoundError(ErrorText(what, "there is no such directory", kRemedy));
  }
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(directory));
  if (!gguf.empty()) return absl::OkStatus();
  if (!std::filesystem::is_directory(directory, error)) {
    return absl::InvalidArgumentError(ErrorText(what, "it is not a directory", kRemedy));
  }
  if (!std::filesystem::exists(std::filesystem::path(directory) / "config.json", error)) {
    return absl::NotFoundError(ErrorText(what, "it holds no config.json", kRemedy));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CheckpointSource>> OpenModel(const std::string& directory,
                                                            FormatRegistry* registry,
                                                            PackedMode mode) {
  QM_RETURN_IF_ERROR(CheckModelDirectory(directory));
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(directory));
  QM_ASSIGN_OR_RETURN(auto quantization, ReadQuantizationConfig(directory));
  if (quantization == nullptr || (!gguf.empty() && registry == nullptr)) {
    QM_ASSIGN_OR_RETURN(auto dense, DenseSource::Open(directory));
    return std::unique_ptr<CheckpointSource>(std::make_unique<OriginalSource>(std::move(dense)));
  }
  QM_ASSIGN_OR_RETURN(ModelConfig config, ReadModelConfig(directory));
  QM_ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open(directory, GgufView::kBlocks));
  std::shared_ptr<const Checkpoint> dequantized;
  if (!gguf.empty()) {
    QM_ASSIGN_OR_RETURN(dequantized, Checkpoint::Open(directory));
  }
  auto source = std::make_unique<QuantizedSource>(std::move(config), std::move(checkpoint),
                                                  std::move(dequantized), std::move(quantization),
                                                  registry, mode);
  QM_RETURN_IF_ERROR(source->Index());
  return std::unique_ptr<CheckpointSource>(std::move(source));
}

}  // namespace quantmill
