#include "core/checkpoint/export_checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/checkpoint/export_files.h"
#include "core/checkpoint/gguf_export.h"
#include "core/formats/activations.h"
#include "core/formats/reference.h"
#include "core/io/checkpoint_files.h"
#include "core/io/safetensors_writer.h"
#include "core/model/config.h"

namespace quantmill {
namespace {

using Stored = FormatRegistry::Stored;

// What a slot becomes in the file, without the data.
struct SlotPlan {
  LinearSlot slot;
  bool packed = false;
  SlotEntry entry;
};

class SafetensorsSink : public WeightSink {
 public:
  explicit SafetensorsSink(std::unique_ptr<CheckpointWriter> writer) : writer_(std::move(writer)) {}
  absl::Status Write(std::string_view name, const Tensor& tensor) override {
    return writer_->Write(name, tensor);
  }
  absl::Status Finish() override { return writer_->Finish(); }

 private:
  std::unique_ptr<CheckpointWriter> writer_;
};

class Exporter {
 public:
  Exporter(const ExportOptions& options, ExportSource& source, FormatRegistry* registry,
           Backend& backend)
      : options_(options), source_(source), registry_(registry), backend_(backend) {}

  absl::StatusOr<ExportResult> Run() {
    QM_RETURN_IF_ERROR(CheckOptions());
    QM_ASSIGN_OR_RETURN(config_, ReadModelConfig(options_.original));
    QM_ASSIGN_OR_RETURN(original_, Checkpoint::Open(options_.original));
    QM_RETURN_IF_ERROR(PlanSlots());
    QM_RETURN_IF_ERROR(PlanTensors());
    const std::string temporary =
        options_.temporary.empty() ? options_.output + ".tmp" : options_.temporary;
    QM_ASSIGN_OR_RETURN(TemporaryDirectory directory, TemporaryDirectory::Create(temporary));
    QM_RETURN_IF_ERROR(WriteWeights(directory.path()));
    QM_RETURN_IF_ERROR(WriteOtherFiles(directory.path()));
    QM_RETURN_IF_ERROR(directory.Publish(options_.output));
    return Result();
  }

 private:
  absl::Status CheckOptions() const {
    const auto& targets = CheckpointTargets();
    if (std::find(targets.begin(), targets.end(), options_.target) == targets.end()) {
      return absl::InvalidArgumentError(
          ErrorText(absl::StrCat("no checkpoint format '", options_.target, "'"),
                    absl::StrCat("known are ", absl::StrJoin(targets, ", "))));
    }
    std::error_code error;
    if (std::filesystem::exists(options_.output, error)) {
      return absl::AlreadyExistsError(ErrorText(absl::StrCat(options_.output, " exists"),
                                                "an export does not overwrite",
                                                "delete it or name another directory"));
    }
    return absl::OkStatus();
  }

  // ---- plan ----

  absl::Status PlanSlots() {
    std::vector<LinearSlot> slots = AllSlots(config_);
    slots.push_back(HeadSlot(config_));
    for (const LinearSlot& slot : slots) {
      QM_ASSIGN_OR_RETURN(const auto packed, source_.Packed(slot));
      SlotPlan plan{slot, packed != nullptr, {slot.name, packed != nullptr, "", ""}};
      if (packed != nullptr) QM_RETURN_IF_ERROR(PlanPacked(*packed, &plan));
      slot_index_[slot.name] = plans_.size();
      plans_.push_back(std::move(plan));
    }
    return absl::OkStatus();
  }

  absl::Status PlanPacked(const PackedWeight& weight, SlotPlan* plan) {
    const LinearSlot& slot = plan->slot;
    if (weight.out_features != slot.out_features || weight.in_features != slot.in_features) {
      return absl::InvalidArgumentError(absl::StrCat(
          "packed weight of ", slot.name, " is [", weight.out_features, ", ", weight.in_features,
          "] instead of [", slot.out_features, ", ", slot.in_features, "]"));
    }
    if (slot.name == "lm_head" && config_.tied_embeddings) {
      return absl::FailedPreconditionError(
          "lm_head shares its weight with the embedding and cannot be packed alone; leave it out "
          "of the stage's layers");
    }
    ++result_.packed_slots;
    weights_ += static_cast<double>(slot.out_features) * static_cast<double>(slot.in_features);
    if (options_.target == kDenseTarget) {
      QM_ASSIGN_OR_RETURN(const DType dtype, OriginalDType(slot.name + ".weight"));
      bits_ += 8.0 * static_cast<double>(weight.bytes());
      declarations_[slot.name] = {
          {slot.name + ".weight", dtype, {slot.out_features, slot.in_features}}};
      return absl::OkStatus();
    }
    // Layout and parameters follow from the shapes: slots alike are converted once to learn them.
    const std::string key = LayoutKey(weight);
    auto known = layouts_.find(key);
    if (known == layouts_.end()) {
      QM_ASSIGN_OR_RETURN(const Stored stored, ToStored(slot.name, weight));
      Layout layout;
      layout.config_json = stored.config_json;
      for (const NamedTensor& named : stored.tensors) {
        layout.tensors.push_back({named.name, named.tensor.dtype(), named.tensor.shape()});
      }
      known = layouts_.emplace(key, std::move(layout)).first;
    }
    plan->entry.config_json = known->second.config_json;
    plan->entry.format_id = weight.format_id;
    for (TensorDeclaration declaration : known->second.tensors) {
      declaration.name = absl::StrCat(slot.name, ".", declaration.name);
      bits_ += 8.0 * static_cast<double>(declaration.bytes());
      declarations_[slot.name].push_back(std::move(declaration));
    }
    return absl::OkStatus();
  }

  static std::string LayoutKey(const PackedWeight& weight) {
    std::string key = absl::StrCat(weight.format_id, " ", weight.format_json);
    for (const NamedTensor& named : weight.tensors) {
      absl::StrAppend(&key, " ", named.name, std::string(DTypeName(named.tensor.dtype())),
                      named.tensor.shape().ToString());
    }
    return key;
  }

  absl::StatusOr<DType> OriginalDType(const std::string& name) const {
    const CheckpointTensor* tensor = original_->Find(name);
    if (tensor == nullptr) {
      return absl::NotFoundError(absl::StrCat(options_.original, " has no tensor ", name));
    }
    if (!tensor->entry->dtype) {
      return absl::UnimplementedError(
          absl::StrCat("tensor ", name, " has the unsupported dtype ", tensor->entry->dtype_name));
    }
    return *tensor->entry->dtype;
  }

  // The order of the files: tensors outside the blocks, then block by block.
  absl::Status PlanTensors() {
    std::set<std::string> in_blocks;
    for (int64_t block = 0; block < config_.layers; ++block) {
      std::vector<std::string>& names = blocks_.emplace_back();
      for (const CheckpointTensor& tensor : original_->TensorsUnder(BlockName(block) + ".")) {
        names.push_back(tensor.entry->name);
      }
      in_blocks.insert(names.begin(), names.end());
    }
    for (const CheckpointTensor& tensor : original_->tensors()) {
      if (in_blocks.count(tensor.entry->name) == 0) outside_.push_back(tensor.entry->name);
    }
    QM_RETURN_IF_ERROR(Declare(outside_));
    for (const auto& block : blocks_) QM_RETURN_IF_ERROR(Declare(block));
    return absl::OkStatus();
  }

  // The packed slot whose weight this tensor is, or null.
  const SlotPlan* PackedSlotOf(const std::string& name) const {
    if (!absl::EndsWith(name, ".weight")) return nullptr;
    const auto found = slot_index_.find(name.substr(0, name.size() - 7));
    if (found == slot_index_.end() || !plans_[found->second].packed) return nullptr;
    return &plans_[found->second];
  }

  absl::Status Declare(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      if (const SlotPlan* plan = PackedSlotOf(name)) {
        const auto& tensors = declarations_[plan->slot.name];
        order_.insert(order_.end(), tensors.begin(), tensors.end());
        continue;
      }
      QM_ASSIGN_OR_RETURN(const DType dtype, OriginalDType(name));
      const auto& shape = original_->Find(name)->entry->shape;
      if (shape.size() > QM_MAX_RANK) {
        return absl::UnimplementedError(absl::StrCat("tensor ", name, " has rank ", shape.size()));
      }
      order_.push_back({name, dtype, Shape(absl::Span<const int64_t>(shape))});
    }
    return absl::OkStatus();
  }

  // ---- write ----

  absl::Status WriteWeights(const std::string& directory) {
    QM_RETURN_IF_ERROR(OpenWriter(directory));
    for (int64_t block = 0; block < config_.layers; ++block) {
      QM_RETURN_IF_ERROR(WriteTensors(blocks_[block]));
      const double done = static_cast<double>(block + 1) / static_cast<double>(config_.layers + 1);
      if (options_.progress && options_.progress(done)) {
        return absl::CancelledError("the export was cancelled");
      }
    }
    QM_RETURN_IF_ERROR(WriteTensors(outside_));
    QM_RETURN_IF_ERROR(writer_->Finish());
    writer_.reset();
    return absl::OkStatus();
  }

  absl::Status OpenWriter(const std::string& directory) {
    if (options_.target != kGgufTarget) {
      QM_ASSIGN_OR_RETURN(
          auto writer,
          CheckpointWriter::Create(directory, order_, static_cast<uint64_t>(options_.shard_bytes)));
      writer_ = std::make_unique<SafetensorsSink>(std::move(writer));
      return absl::OkStatus();
    }
    std::map<std::string, std::string> packed;
    for (const SlotPlan& plan : plans_) {
      if (plan.packed) packed[plan.slot.name + ".weight"] = plan.entry.config_json;
    }
    QM_ASSIGN_OR_RETURN(writer_,
                        CreateGgufSink(directory, options_.original, config_, order_, packed));
    return absl::OkStatus();
  }

  absl::Status WriteTensors(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      if (const SlotPlan* plan = PackedSlotOf(name)) {
        QM_RETURN_IF_ERROR(WritePacked(*plan));
      } else {
        QM_RETURN_IF_ERROR(WriteDense(name));
      }
      original_->Release(name);
    }
    return absl::OkStatus();
  }

  absl::Status WritePacked(const SlotPlan& plan) {
    QM_ASSIGN_OR_RETURN(const auto packed, source_.Packed(plan.slot));
    if (packed == nullptr) {
      return absl::InternalError(absl::StrCat(plan.slot.name, " was packed and now is not"));
    }
    if (options_.target == kDenseTarget) return WriteDequantized(plan.slot, *packed);
    QM_ASSIGN_OR_RETURN(const Stored stored, ToStored(plan.slot.name, *packed));
    if (stored.config_json != plan.entry.config_json) {
      return absl::InternalError(
          absl::StrCat("parameters of ", plan.slot.name, " do not follow from its layout"));
    }
    for (const NamedTensor& named : stored.tensors) {
      QM_RETURN_IF_ERROR(
          writer_->Write(absl::StrCat(plan.slot.name, ".", named.name), named.tensor));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Stored> ToStored(const std::string& slot, const PackedWeight& weight) const {
    if (options_.target == kNativeTarget) return Stored{weight.tensors, weight.format_json};
    if (registry_ == nullptr) {
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat("cannot write ", options_.target, " files"),
                    "no format plugins are loaded"));
    }
    return registry_->ToCheckpoint(options_.target, slot, weight);
  }

  absl::Status WriteDequantized(const LinearSlot& slot, const PackedWeight& weight) {
    if (ActivationsOf(weight.format_json) != Activations::kFloat) {
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat("cannot write ", slot.name, " as dense"),
                    "a dense file cannot say that activations are quantized",
                    "export as compressed-tensors or quantmill"));
    }
    const std::string name = slot.name + ".weight";
    QM_ASSIGN_OR_RETURN(const DType dtype, OriginalDType(name));
    PackedWeight local = weight;
    for (NamedTensor& named : local.tensors) {
      QM_ASSIGN_OR_RETURN(named.tensor, backend_.ToDevice(named.tensor));
    }
    std::shared_ptr<PackedKernel> kernel;
    if (registry_ != nullptr) {
      QM_ASSIGN_OR_RETURN(kernel, registry_->Kernel(local, backend_));
    } else {
      kernel = MakeReferencePackedKernel(backend_);
    }
    const Shape shape = {slot.out_features, slot.in_features};
    QM_ASSIGN_OR_RETURN(Tensor dense, backend_.Allocate(dtype, shape));
    QM_RETURN_IF_ERROR(kernel->Dequantize(local, &dense));
    if (!dense.device().is_cpu()) {
      QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(dtype, shape));
      QM_RETURN_IF_ERROR(backend_.Copy(dense, &host));
      dense = host;
    }
    return writer_->Write(name, dense);
  }

  absl::Status WriteDense(const std::string& name) {
    QM_ASSIGN_OR_RETURN(Tensor changed, source_.Changed(name));
    QM_ASSIGN_OR_RETURN(Tensor stored, original_->Get(name));
    if (changed.empty()) return writer_->Write(name, stored);
    if (!(changed.shape() == stored.shape())) {
      return absl::InvalidArgumentError(absl::StrCat("changed tensor ", name, " has shape ",
                                                     changed.shape().ToString(), " instead of ",
                                                     stored.shape().ToString()));
    }
    if (changed.dtype() == stored.dtype()) return writer_->Write(name, changed);
    QM_ASSIGN_OR_RETURN(Tensor converted, Tensor::Host(stored.dtype(), stored.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(changed, &converted));
    return writer_->Write(name, converted);
  }

  absl::Status WriteOtherFiles(const std::string& directory) {
    // A GGUF file holds configuration and tokenizer.
    if (options_.target != kGgufTarget) QM_RETURN_IF_ERROR(WriteModelFiles(directory));
    if (options_.more_files != nullptr) QM_RETURN_IF_ERROR(options_.more_files(directory));
    if (options_.provenance.is_null()) return absl::OkStatus();
    nlohmann::ordered_json provenance = options_.provenance;
    QM_ASSIGN_OR_RETURN(provenance["files"], FileDigests(directory));
    return WriteJsonFile(directory + "/quantmill_provenance.json", provenance);
  }

  absl::Status WriteModelFiles(const std::string& directory) {
    nlohmann::ordered_json config = config_.json;
    config.erase("quantization_config");
    if (options_.target != kDenseTarget && result_.packed_slots > 0) {
      QM_ASSIGN_OR_RETURN(const auto quantization,
                          ComposeQuantizationConfig(options_.target, Entries()));
      config["quantization_config"] = quantization;
      if (absl::StartsWith(options_.target, "gptq")) {
        QM_RETURN_IF_ERROR(WriteJsonFile(directory + "/quantize_config.json", quantization));
      }
    }
    QM_RETURN_IF_ERROR(WriteJsonFile(directory + "/config.json", config));
    return CopyModelFiles(options_.original, directory);
  }

  // Slots, and routers: readers take those for linears too.
  std::vector<SlotEntry> Entries() const {
    std::vector<SlotEntry> entries;
    for (size_t i = 0; i < plans_.size(); ++i) {
      const int block = plans_[i].slot.block;
      const bool last_of_block = i + 1 == plans_.size() || plans_[i + 1].slot.block != block;
      entries.push_back(plans_[i].entry);
      if (last_of_block && block >= 0 && config_.experts > 0 && config_.moe_layer[block]) {
        entries.push_back({RouterName(config_, block), false, "", ""});
      }
    }
    return entries;
  }

  absl::StatusOr<ExportResult> Result() {
    result_.bits_per_weight = weights_ > 0 ? bits_ / weights_ : 0;
    result_.dense_slots = static_cast<int64_t>(plans_.size()) - result_.packed_slots;
    QM_ASSIGN_OR_RETURN(result_.size_bytes, DirectoryBytes(options_.output));
    for (const auto& file : original_->files()) {
      std::error_code error;
      result_.original_bytes +=
          static_cast<int64_t>(std::filesystem::file_size(file->path(), error));
    }
    return result_;
  }

  struct Layout {
    std::string config_json;
    std::vector<TensorDeclaration> tensors;  // names without the layer prefix
  };

  const ExportOptions& options_;
  ExportSource& source_;
  FormatRegistry* const registry_;
  Backend& backend_;
  ModelConfig config_;
  std::shared_ptr<const Checkpoint> original_;
  std::vector<SlotPlan> plans_;
  std::map<std::string, size_t> slot_index_;
  std::map<std::string, Layout> layouts_;
  std::map<std::string, std::vector<TensorDeclaration>> declarations_;  // of packed slots
  std::vector<std::vector<std::string>> blocks_;                        // original tensor names
  std::vector<std::string> outside_;
  std::vector<TensorDeclaration> order_;
  std::unique_ptr<WeightSink> writer_;
  ExportResult result_;
  double bits_ = 0, weights_ = 0;
};

}  // namespace

absl::StatusOr<ExportResult> ExportCheckpoint(const ExportOptions& options, ExportSource& source,
                                              FormatRegistry* registry, Backend& backend) {
  return Exporter(options, source, registry, backend).Run();
}

}  // namespace quantmill
