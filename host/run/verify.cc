#include "host/run/verify.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "core/checkpoint/open_model.h"
#include "core/eval/generate.h"
#include "core/eval/logits.h"
#include "core/eval/resident_model.h"
#include "core/formats/distortion.h"
#include "core/io/checkpoint_files.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/sha256.h"
#include "core/model/graph.h"

namespace quantmill {
namespace {

constexpr int64_t kSampleTokens = 32;
constexpr int64_t kGeneratedTokens = 24;
constexpr int64_t kResidentHostBytes = int64_t{512} << 20;   // larger models are judged without
constexpr int64_t kResidentDeviceBytes = int64_t{16} << 30;  // being held in memory whole
constexpr double kBitsTolerance = 0.10;

// Bytes of all files under a directory; of a GGUF file its own.
int64_t FilesBytes(const std::string& directory) {
  int64_t bytes = 0;
  std::error_code error;
  if (std::filesystem::is_regular_file(directory, error)) {
    return static_cast<int64_t>(std::filesystem::file_size(directory, error));
  }
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory, error)) {
    if (entry.is_regular_file(error)) bytes += static_cast<int64_t>(entry.file_size(error));
  }
  return bytes;
}

// Ids spread over the vocabulary; the same for every model with it.
Tensor SampleIds(const ModelConfig& config) {
  const int64_t count = std::min(kSampleTokens, std::max<int64_t>(2, config.max_positions));
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<int32_t>((i * 7919 + 13) % config.vocab_size));
  }
  return Tensor::FromI32(Shape({1, count}), ids);
}

// Bytes of a linear's weight in the file: everything under its name but the bias.
int64_t StoredBytes(const Checkpoint& checkpoint, const std::string& slot) {
  const std::vector<CheckpointTensor>& tensors = checkpoint.tensors();
  const std::string prefix = slot + ".";
  auto it = std::lower_bound(
      tensors.begin(), tensors.end(), prefix,
      [](const CheckpointTensor& t, const std::string& name) { return t.entry->name < name; });
  int64_t bytes = 0;
  for (; it != tensors.end() && absl::StartsWith(it->entry->name, prefix); ++it) {
    if (it->entry->name != prefix + "bias") bytes += static_cast<int64_t>(it->entry->bytes());
  }
  return bytes;
}

class Verifier {
 public:
  Verifier(const VerifyOptions& options, PluginFormats& formats, Backend& backend)
      : options_(options), formats_(formats), backend_(backend) {}

  absl::StatusOr<VerifyReport> Run() {
    QM_RETURN_IF_ERROR(CheckModelDirectory(options_.directory));
    if (options_.check_digests) QM_RETURN_IF_ERROR(CheckDigests());
    QM_ASSIGN_OR_RETURN(model_, OpenModel(options_.directory, &formats_));
    Say(absl::StrCat("reopened ", options_.directory, " as ",
                     model_->quantization() == nullptr ? "an unquantized checkpoint"
                                                       : model_->quantization()->target()));
    QM_RETURN_IF_ERROR(CheckSlots());
    CheckSize();
    QM_RETURN_IF_ERROR(CheckLogits());
    QM_RETURN_IF_ERROR(CompareWithReference());
    QM_RETURN_IF_ERROR(JudgeGeneration());
    return std::move(report_);
  }

 private:
  void Say(std::string text) { report_.checks.push_back(std::move(text)); }
  void Progress(const char* step, int64_t done, int64_t total) const {
    if (options_.progress) options_.progress(step, done, total);
  }
  StepProgress Steps(const char* step) const {
    return [this, step](int64_t done, int64_t total) {
      Progress(step, done, total);
      return absl::OkStatus();
    };
  }

  // Are the files those that were written? Weights must be; the others may have been edited.
  absl::Status CheckDigests() {
    const std::string path = options_.directory + "/quantmill_provenance.json";
    if (!FileExists(path)) return absl::OkStatus();
    QM_ASSIGN_OR_RETURN(const nlohmann::json provenance, ReadJson(path));
    if (!provenance.is_object() || !provenance.contains("files")) return absl::OkStatus();
    int64_t equal = 0;
    for (const auto& [name, digest] : provenance["files"].items()) {
      const std::string file = absl::StrCat(options_.directory, "/", name);
      constexpr char kRemedy[] =
          "remove the directory and write it again, with run --resume if the work directory is "
          "still there";
      if (!FileExists(file)) {
        return absl::DataLossError(ErrorText(absl::StrCat(file, " is missing"),
                                             "it was written with the others", kRemedy));
      }
      QM_ASSIGN_OR_RETURN(const std::string actual, Sha256OfFile(file));
      if (digest == actual) {
        ++equal;
      } else if (absl::EndsWith(name, ".safetensors") || absl::EndsWith(name, ".gguf")) {
        return absl::DataLossError(ErrorText(absl::StrCat(file, " is not what was written"),
                                             "its SHA-256 differs from quantmill_provenance.json",
                                             kRemedy));
      } else {
        report_.warnings.push_back(absl::StrCat(file, " was changed after it was written"));
      }
    }
    Say(absl::StrCat(equal, " files have the SHA-256 they were written with"));
    return absl::OkStatus();
  }

  absl::Status CheckSlots() {
    std::vector<LinearSlot> slots = AllSlots(model_->config());
    slots.push_back(HeadSlot(model_->config()));
    QM_ASSIGN_OR_RETURN(const auto checkpoint,
                        Checkpoint::Open(options_.directory, GgufView::kBlocks));
    double bits = 0, weights = 0;
    for (size_t i = 0; i < slots.size(); ++i) {
      const LinearSlot& slot = slots[i];
      absl::StatusOr<PackedWeight> stored = model_->LoadPacked(slot.name);
      if (!stored.ok() && !absl::IsNotFound(stored.status())) return stored.status();
      std::shared_ptr<const PackedWeight> expected;
      if (options_.expected) {
        QM_ASSIGN_OR_RETURN(expected, options_.expected(slot.name));
      }
      if (stored.ok()) {
        ++report_.packed_slots;
        QM_ASSIGN_OR_RETURN(const auto storage, model_->quantization()->Find(slot.name));
        exact_ = exact_ && (!storage || storage->exact);
      } else {
        report_.unquantized.push_back(slot.name);
      }
      if (stored.ok() || expected != nullptr) {
        bits += 8.0 * static_cast<double>(StoredBytes(*checkpoint, slot.name));
        weights += static_cast<double>(slot.out_features * slot.in_features);
      }
      if (options_.expected && model_->quantization() != nullptr) {
        QM_RETURN_IF_ERROR(Compare(slot, stored.ok() ? &*stored : nullptr, expected.get()));
      }
      if (slot.block >= 0 && (i + 1 == slots.size() || slots[i + 1].block != slot.block)) {
        if (model_->config().moe_layer[static_cast<size_t>(slot.block)]) {
          report_.unquantized.push_back(RouterName(model_->config(), slot.block));
        }
        model_->ReleaseBlock(slot.block);
        Progress("verify", slot.block + 1, model_->config().layers);
      }
    }
    if (weights > 0) report_.bits_per_weight = bits / weights;
    Say(absl::StrCat(report_.packed_slots, " linears are packed, ", report_.unquantized.size(),
                     " are not", options_.expected ? "; packed values equal what was made" : ""));
    return absl::OkStatus();
  }

  absl::Status Compare(const LinearSlot& slot, const PackedWeight* stored,
                       const PackedWeight* expected) {
    if ((stored == nullptr) != (expected == nullptr)) {
      return absl::DataLossError(absl::StrCat(slot.name, stored == nullptr ? " was packed but is "
                                                                             "stored dense"
                                                                           : " is stored packed "
                                                                             "but stayed dense"));
    }
    if (stored == nullptr) return absl::OkStatus();
    QM_ASSIGN_OR_RETURN(const Tensor read, Dequantized(*stored));
    QM_ASSIGN_OR_RETURN(const Tensor made, Dequantized(*expected));
    QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(made, read));
    if (distortion.max_error == 0 && distortion.finite) return absl::OkStatus();
    return absl::DataLossError(
        ErrorText(absl::StrCat(slot.name, " reads back with other values than were made"),
                  absl::StrFormat("largest difference %g", distortion.max_error),
                  "this is a defect of the format's plugin; please report it"));
  }

  absl::StatusOr<Tensor> Dequantized(const PackedWeight& packed) {
    QM_ASSIGN_OR_RETURN(Tensor tensor, DequantizeOn(backend_, formats_, packed, DType::kF32));
    if (tensor.device().is_cpu()) return tensor;
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, tensor.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(tensor, &host));
    return host;
  }

  void CheckSize() {
    report_.size_bytes = FilesBytes(options_.directory);
    if (report_.bits_per_weight == 0) return;
    Say(absl::StrFormat("%.3f bits per weight, %d bytes", report_.bits_per_weight,
                        report_.size_bytes));
    const double planned = options_.planned_bits;
    if (planned <= 0 || model_->quantization() == nullptr ||
        std::abs(report_.bits_per_weight / planned - 1) <= kBitsTolerance)
      return;
    report_.warnings.push_back(absl::StrFormat("%.3f bits per weight were planned, %.3f are stored",
                                               planned, report_.bits_per_weight));
  }

  absl::Status CheckLogits() {
    const Tensor ids = SampleIds(model_->config());
    QM_ASSIGN_OR_RETURN(logits_, ComputeLogits(backend_, *model_, ids, Steps("verify: logits")));
    const float* values = logits_.as<const float>();
    const int64_t count = logits_.elements();
    if (!std::all_of(values, values + count, [](float v) { return std::isfinite(v); })) {
      return absl::DataLossError("the written model computes logits that are not finite");
    }
    if (options_.in_memory == nullptr) {
      Say(absl::StrCat("logits of ", ids.dim(1), " tokens are finite"));
      return absl::OkStatus();
    }
    QM_ASSIGN_OR_RETURN(const Tensor made, ComputeLogits(backend_, *options_.in_memory, ids,
                                                         Steps("verify: logits in memory")));
    QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(made, logits_));
    // Equal weights give equal logits up to the order of sums; a dense target rounds the weights to
    // the model's dtype, and some targets round what they store beside the codes.
    const double rms = std::sqrt(distortion.reference_energy /
                                 static_cast<double>(std::max<int64_t>(1, distortion.count)));
    const bool equal = model_->quantization() != nullptr && exact_;
    const bool agrees = equal ? distortion.max_error <= 1e-4 * rms : distortion.nmse() <= 1e-2;
    if (!agrees) {
      return absl::DataLossError(
          ErrorText("the written model computes other logits than the one in memory",
                    absl::StrFormat("largest difference %g", distortion.max_error),
                    "this is a defect of the writer; please report it"));
    }
    Say(absl::StrFormat(
        "logits of %d tokens agree with the model in memory (largest difference %g)", ids.dim(1),
        distortion.max_error));
    return absl::OkStatus();
  }

  absl::Status CompareWithReference() {
    if (options_.reference.empty()) return absl::OkStatus();
    QM_ASSIGN_OR_RETURN(const auto reference, OpenModel(options_.reference, &formats_));
    if (reference->config().vocab_size != model_->config().vocab_size) {
      return absl::FailedPreconditionError(ErrorText(
          absl::StrCat(options_.reference, " is not the original of ", options_.directory),
          absl::StrCat("its vocabulary has ", reference->config().vocab_size, " tokens, not ",
                       model_->config().vocab_size)));
    }
    QM_ASSIGN_OR_RETURN(const Tensor original,
                        ComputeLogits(backend_, *reference, SampleIds(model_->config()),
                                      Steps("verify: reference")));
    const int64_t rows = logits_.dim(0), vocabulary = logits_.dim(1);
    double kl = 0, agreement = 0;
    for (int64_t row = 0; row < rows; ++row) {
      kl += Kl(original.as<const float>() + row * vocabulary,
               logits_.as<const float>() + row * vocabulary, vocabulary, &agreement);
    }
    report_.reference_kl = kl / static_cast<double>(rows);
    report_.reference_agreement = agreement / static_cast<double>(rows);
    Say(absl::StrFormat("against the reference: KL %.4f, same most probable token %.0f %%",
                        *report_.reference_kl, 100 * *report_.reference_agreement));
    return absl::OkStatus();
  }

  static double Kl(const float* p_logits, const float* q_logits, int64_t n, double* agreement) {
    auto log_sum = [n](const float* logits) {
      const double top = *std::max_element(logits, logits + n);
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += std::exp(logits[i] - top);
      return top + std::log(sum);
    };
    const double p_sum = log_sum(p_logits), q_sum = log_sum(q_logits);
    double kl = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double log_p = p_logits[i] - p_sum;
      kl += std::exp(log_p) * (log_p - (q_logits[i] - q_sum));
    }
    *agreement += std::max_element(p_logits, p_logits + n) - p_logits ==
                  std::max_element(q_logits, q_logits + n) - q_logits;
    return kl;
  }

  // A broken model repeats one token for ever.
  absl::Status JudgeGeneration() {
    std::set<int64_t> tokens;
    const int64_t limit = backend_.device().is_cuda() ? kResidentDeviceBytes : kResidentHostBytes;
    const bool resident = report_.size_bytes <= limit && model_->config().max_positions > 64;
    if (resident) {
      // Packed, as it would be served: dequantized it may be several times as large.
      QM_ASSIGN_OR_RETURN(const auto packed,
                          OpenModel(options_.directory, &formats_, PackedMode::kKeepPacked));
      QM_ASSIGN_OR_RETURN(const ResidentModel whole, ResidentModel::Load(backend_, *packed));
      GenerateOptions options;
      options.max_tokens = kGeneratedTokens;
      options.stop_at_eos = false;
      const int32_t first =
          model_->config().bos_ids.empty() ? 1 : static_cast<int32_t>(model_->config().bos_ids[0]);
      QM_ASSIGN_OR_RETURN(const GenerateResult result, Generate(whole, {&first, 1}, options));
      tokens.insert(result.tokens.begin(), result.tokens.end());
    } else {
      const int64_t vocabulary = logits_.dim(1);
      for (int64_t row = 0; row < logits_.dim(0); ++row) {
        const float* values = logits_.as<const float>() + row * vocabulary;
        tokens.insert(std::max_element(values, values + vocabulary) - values);
      }
    }
    if (tokens.size() <= 1) {
      report_.warnings.push_back(
          "the model always predicts the same token; if the original does not, choose more bits");
    }
    Say(absl::StrCat(resident ? "a short generation has " : "predictions for the sample have ",
                     tokens.size(), " different tokens"));
    return absl::OkStatus();
  }

  const VerifyOptions& options_;
  PluginFormats& formats_;
  Backend& backend_;
  std::unique_ptr<CheckpointSource> model_;
  Tensor logits_;
  bool exact_ = true;  // packed slots read back with the values that were made
  VerifyReport report_;
};

}  // namespace

nlohmann::ordered_json ToJson(const VerifyReport& report) {
  nlohmann::ordered_json json = {{"checks", report.checks},
                                 {"warnings", report.warnings},
                                 {"unquantized", report.unquantized},
                                 {"packed_slots", report.packed_slots},
                                 {"bits_per_weight", report.bits_per_weight},
                                 {"size_bytes", report.size_bytes}};
  if (report.reference_kl) json["reference_kl"] = *report.reference_kl;
  if (report.reference_agreement) json["reference_top1_agreement"] = *report.reference_agreement;
  return json;
}

absl::StatusOr<VerifyReport> VerifyCheckpoint(const VerifyOptions& options, PluginFormats& formats,
                                              Backend& backend) {
  return Verifier(options, formats, backend).Run();
}

}  // namespace quantmill
