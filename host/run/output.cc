#include "host/run/output.h"

#include <cmath>
#include <filesystem>
#include <map>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/export_files.h"
#include "core/checkpoint/peft_adapter.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/sha256.h"
#include "host/run/block_state.h"
#include "host/run/train/adapter_files.h"
#include "host/run/verify.h"
#include "quantmill/plugin.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr char kProvenanceFile[] = "/quantmill_provenance.json";

std::string MarkPath(const Pipeline& pipeline) { return pipeline.work_dir + "/output.json"; }

// Identifies what is written, independent of white space and of the digests of the files, which are
// known only afterwards.
std::string Identity(nlohmann::json provenance) {
  if (provenance.is_object()) provenance.erase("files");
  return Sha256Hex(provenance.dump());
}

// Identity of the provenance inside a directory; empty if there is none.
std::string IdentityOf(const std::string& directory) {
  const auto json = ReadJson(directory + kProvenanceFile);
  return json.ok() ? Identity(*json) : "";
}

// The identity this work directory last wrote, or was about to write, to `path`; empty if none.
std::string MarkedIdentity(const Pipeline& pipeline) {
  const auto json = ReadJson(MarkPath(pipeline));
  if (!json.ok() || !json->is_object()) return "";
  if (json->value("path", "") != pipeline.export_path) return "";
  return json->value("identity", "");
}

class UnitExport : public ExportSource {
 public:
  UnitExport(const ModelConfig& config, Engine& engine, DenseSource& original, Backend& backend)
      : config_(config), engine_(engine), original_(original), backend_(backend) {}
  absl::StatusOr<std::shared_ptr<const PackedWeight>> Packed(const LinearSlot& slot) override {
    return engine_.Packed(slot.name);
  }
  absl::StatusOr<Tensor> Changed(const std::string& name) override {
    const int64_t block = engine_.EditedIn(name);
    if (block < 0) return Tensor();
    if (block == config_.layers) return Outside(name);
    if (block != open_block_) QM_RETURN_IF_ERROR(Open(block));
    const Tensor* tensor = BlockTensors(config_, block, &weights_).Find(name);
    if (tensor == nullptr) return absl::InternalError(absl::StrCat("no edited tensor ", name));
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(tensor->dtype(), tensor->shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(*tensor, &host));
    return host;
  }

 private:
  // A tensor outside of the blocks, which is edited by replacing it.
  absl::StatusOr<Tensor> Outside(const std::string& name) {
    QM_ASSIGN_OR_RETURN(const std::vector<BlockEdit> edits, engine_.Edits(config_.layers));
    Tensor found;
    for (const BlockEdit& edit : edits) {
      if (edit.target == name) found = edit.value;
    }
    return found;
  }

  absl::Status Open(int64_t block) {
    QM_ASSIGN_OR_RETURN(const std::vector<BlockEdit> edits, engine_.Edits(block));
    QM_ASSIGN_OR_RETURN(weights_, original_.LoadBlock(block, backend_));
    open_block_ = block;
    std::set<std::string> changed;
    return ApplyFinally(config_, block, edits, backend_, &weights_, &changed);
  }

  const ModelConfig& config_;
  Engine& engine_;
  DenseSource& original_;
  Backend& backend_;
  BlockWeights weights_;  // of open_block_, edited
  int64_t open_block_ = -1;
};

// A directory that holds an adapter and its provenance.
absl::StatusOr<ExportResult> ExportAdapter(const ExportOptions& options,
                                           const std::vector<StageAdapter>& adapters) {
  if (adapters.size() != 1) {
    return absl::FailedPreconditionError(
        ErrorText(absl::StrCat("peft files hold one adapter, the run trained ", adapters.size()),
                  "", "export to quantmill, which holds several, or merge some"));
  }
  QM_ASSIGN_OR_RETURN(TemporaryDirectory directory,
                      TemporaryDirectory::Create(options.output + ".tmp"));
  QM_RETURN_IF_ERROR(WritePeftAdapter(directory.path(), adapters[0].adapter));
  nlohmann::ordered_json provenance = options.provenance;
  QM_ASSIGN_OR_RETURN(provenance["files"], FileDigests(directory.path()));
  QM_RETURN_IF_ERROR(WriteFile(directory.path() + kProvenanceFile, provenance.dump(1) + "\n"));
  ExportResult result;
  for (const auto& entry : fs::directory_iterator(directory.path())) {
    result.size_bytes += static_cast<int64_t>(entry.file_size());
  }
  QM_RETURN_IF_ERROR(directory.Publish(options.output));
  return result;
}

absl::Status NotOurs(const std::string& path) {
  return absl::FailedPreconditionError(
      ErrorText(absl::StrCat("the output directory ", path, " exists"),
                "this pipeline did not write it", "choose another export.path or remove it"));
}

}  // namespace

nlohmann::ordered_json BuildProvenance(const PipelinePlan& plan, const Engine& engine,
                                       const std::string& model_digest,
                                       const std::string& calibration_digest) {
  std::map<std::string, nlohmann::ordered_json> slots;
  for (const Unit& unit : engine.units()) {
    for (const SlotRecord& r : unit.slots) {
      nlohmann::ordered_json entry = {{"stage", unit.stage}};
      if (r.packed || ((r.transformed || r.tuned || r.trained) && r.error.empty())) {
        entry["method"] = r.method;
        entry["version"] = r.version;
        entry["plugin_sha256"] = r.plugin_sha256;
        entry["abi"] = absl::StrCat(QM_ABI_MAJOR, ".", QM_ABI_MINOR);
        entry["options_sha256"] = Sha256Hex(r.options);
        entry["options"] = nlohmann::ordered_json::parse(r.options);
        entry["seed"] = r.seed;
        if (r.transformed) entry["edits"] = r.edits;
        if (r.tuned) {
          entry["tuned"] = {{"loss_before", r.loss_before}, {"loss_after", r.loss_after}};
        }
        if (r.trained) {
          entry["trained"] = {{"loss_first", r.loss_before}, {"loss_last", r.loss_after}};
        }
      }
      if (r.packed) {
        entry["format"] = r.format_id;
        entry["weight_nmse"] = r.weight_nmse;
        if (r.output_nmse >= 0) entry["output_nmse"] = r.output_nmse;
      } else if (!r.transformed && !r.tuned && !r.trained) {
        entry["kept_dense"] = 1;
      }
      if (!r.error.empty()) entry["error"] = r.error;
      slots[r.slot].push_back(std::move(entry));
    }
  }
  return {{"version", 1},
          {"target", plan.pipeline.export_format},
          {"seed", plan.pipeline.seed},
          {"model_digest", model_digest},
          {"calibration_digest", calibration_digest},
          {"slots", slots}};
}

absl::Status CheckOutput(const Pipeline& pipeline, bool resume) {
  std::error_code error;
  if (!fs::exists(pipeline.export_path, error)) return absl::OkStatus();
  if (resume && !MarkedIdentity(pipeline).empty() &&
      MarkedIdentity(pipeline) == IdentityOf(pipeline.export_path)) {
    return absl::OkStatus();
  }
  return NotOurs(pipeline.export_path);
}

absl::StatusOr<OutputResult> WriteOutput(const PipelinePlan& plan, Engine& engine,
                                         DenseSource& original,
                                         const nlohmann::ordered_json& provenance,
                                         PluginFormats& formats, ReparamCalls& training,
                                         Backend& backend, const EventSink& sink) {
  const Pipeline& pipeline = plan.pipeline;
  const std::string& path = pipeline.export_path;
  const std::string identity = Identity(provenance);
  std::error_code error;
  OutputResult result;
  const std::string old = path + ".quantmill-old";
  bool replaces = false;
  if (fs::exists(path, error)) {
    if (IdentityOf(path) == identity) {
      result.written = false;
      return result;
    }
    if (MarkedIdentity(pipeline).empty() || MarkedIdentity(pipeline) != IdentityOf(path)) {
      return NotOurs(path);
    }
    replaces = true;
  }
  fs::create_directories(fs::path(path).parent_path(), error);
  ExportOptions options;
  options.original = pipeline.model_path;
  options.target = pipeline.export_format;
  options.output = path;
  options.provenance = provenance;
  options.progress = [&sink, &plan](double fraction) {
    sink({{"type", "progress"},
          {"stage", "export"},
          {"unit", "block"},
          {"done", std::llround(fraction * static_cast<double>(plan.config.layers + 1))},
          {"total", plan.config.layers}});
    return false;
  };
  QM_ASSIGN_OR_RETURN(const std::vector<StageAdapter> adapters,
                      CollectAdapters(plan, engine, training));
  options.more_files = [&adapters](const std::string& directory) {
    return WriteAdaptersBeside(adapters, directory);
  };
  if (replaces) {
    fs::remove_all(old, error);
    fs::rename(path, old, error);
    if (error) return SystemError("move away", path, error.value());
  }
  // Noted before the directory appears, so that a run killed in between knows it as its own.
  QM_RETURN_IF_ERROR(
      WriteFile(MarkPath(pipeline),
                nlohmann::ordered_json({{"path", path}, {"identity", identity}}).dump(1) + "\n"));
  UnitExport source(plan.config, engine, original, backend);
  absl::StatusOr<ExportResult> exported =
      pipeline.export_format == kPeftTarget ? ExportAdapter(options, adapters)
                                            : ExportCheckpoint(options, source, &formats, backend);
  if (!exported.ok()) {
    // The older output is better than none.
    if (replaces) fs::rename(old, path, error);
    return exported.status();
  }
  result.exported = *std::move(exported);
  fs::remove_all(old, error);
  return result;
}

}  // namespace quantmill
