#include "host/run/job.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/checkpoint/peft_adapter.h"
#include "core/eval/evaluate.h"
#include "core/io/files.h"
#include "core/model/dense_source.h"
#include "host/cli/command.h"
#include "host/pipeline/check.h"
#include "host/plugins/registry.h"
#include "host/run/backend.h"
#include "host/run/calibration_text.h"
#include "host/run/engine.h"
#include "host/run/fingerprint.h"
#include "host/run/output.h"
#include "host/run/preflight.h"
#include "host/run/report.h"
#include "host/run/train/train_checks.h"
#include "host/run/verify.h"
#include "host/supervisor/supervise.h"

namespace quantmill {
namespace {

int64_t PeakRssBytes() {
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

// Ids of the methods a plan runs, and of everything that knows formats or has kernels.
std::vector<std::string> MethodsToLoad(const PipelinePlan& plan, const Catalog& catalog) {
  std::set<std::string> ids;
  for (const PlannedStage& stage : plan.stages) {
    ids.insert(stage.method);
    if (stage.on_error.action == OnError::Action::kUse) {
      ids.insert(stage.fallback_method);
    }
  }
  for (const PluginInfo& plugin : catalog.plugins) {
    if (!plugin.rejected.empty()) continue;
    for (const MethodInfo& method : plugin.methods) {
      if (method.Has(QM_EXT_FORMAT) || method.Has(QM_EXT_LINEAR_KERNEL)) ids.insert(method.id);
    }
  }
  return {ids.begin(), ids.end()};
}

class Job {
 public:
  Job(const JobRequest& request, const EventSink& sink) : request_(request), sink_(sink) {}

  absl::StatusOr<nlohmann::ordered_json> Run() {
    const auto start = Clock::now();
    QM_RETURN_IF_ERROR(Prepare());
    QM_RETURN_IF_ERROR(Preflight());
    if (request_.mode == JobRequest::Mode::kPlan) return PlanReportToJson(report_);
    QM_RETURN_IF_ERROR(Quantize());
    return Finish(start);
  }

 private:
  // Everything up to the estimates: reads the file, the model's headers and the plugins.
  absl::Status Prepare() {
    QM_ASSIGN_OR_RETURN(Pipeline pipeline, PipelineOf(request_));
    std::vector<std::string> files = request_.plugins;
    files.insert(files.end(), pipeline.plugins.begin(), pipeline.plugins.end());
    if (const absl::Status status = CheckFiles(pipeline, request_.resume); !status.ok()) {
      return RefusedError(status);
    }
    absl::StatusOr<Catalog> catalog = DiscoverPlugins(files);
    if (!catalog.ok()) return RefusedError(catalog.status());
    catalog_ = *std::move(catalog);
    if (const absl::Status status = CheckNamedPlugins(catalog_, files); !status.ok()) {
      return RefusedError(status);
    }
    absl::StatusOr<ModelConfig> config = ReadModelConfig(pipeline.model_path);
    if (!config.ok()) return RefusedError(config.status());
    absl::StatusOr<PipelinePlan> plan = CheckPipeline(pipeline, catalog_, *config);
    if (!plan.ok()) return RefusedError(plan.status());
    plan_ = *std::move(plan);
    absl::StatusOr<std::unique_ptr<DenseSource>> source =
        DenseSource::Open(plan_.pipeline.model_path);
    if (!source.ok()) return RefusedError(source.status());
    source_ = *std::move(source);
    auto backend = MakeBackend(plan_.pipeline.device, plan_.pipeline.model_dtype);
    if (!backend.ok()) return RefusedError(backend.status());
    backend_ = *std::move(backend);
    WarnOfDType();
    QM_ASSIGN_OR_RETURN(host_, MakeCpuBackend());
    QM_ASSIGN_OR_RETURN(methods_, LoadMethods(catalog_, MethodsToLoad(plan_, catalog_)));
    formats_ = std::make_unique<PluginFormats>(methods_, *host_);
    if (!request_.last_words.empty()) {
      QM_ASSIGN_OR_RETURN(words_, LastWords::Open(request_.last_words));
    }
    format_words_ = std::make_unique<FormatWords>(words_.get());
    formats_->Watch(format_words_.get());
    runner_ = std::make_unique<MethodRunner>(*backend_, words_.get(), sink_);
    transforms_ = std::make_unique<TransformRunner>(*backend_, words_.get(), sink_,
                                                    plan_.pipeline.model_path + "/config.json");
    tuning_ = std::make_unique<TuneRunner>(*backend_, words_.get(), sink_,
                                           plan_.pipeline.model_path + "/config.json");
    training_ = std::make_unique<ReparamCalls>(*backend_, words_.get(), sink_);
    absl::Status status = PlanMethods();
    return status.ok() ? status : RefusedError(status);
  }

  // The CPU computes in f32 whatever is asked for.
  void WarnOfDType() {
    const std::optional<DType> wanted = plan_.pipeline.model_dtype;
    if (!wanted || *wanted == backend_->activation_dtype()) return;
    const std::string name(DTypeName(backend_->activation_dtype()));
    Warn(ErrorText(absl::StrCat("model.dtype has no effect on ", DeviceName(backend_->device())),
                   absl::StrCat("it computes in ", name), "leave it out, or use a GPU"));
  }

  // Statistics of a few tokens say little about any other text.
  void WarnOfPoorText() {
    constexpr int64_t kFew = 32;
    const int32_t* ids = calibration_.as<const int32_t>();
    const std::set<int32_t> different(ids, ids + calibration_.elements());
    if (static_cast<int64_t>(different.size()) >= kFew || calibration_.elements() < 4 * kFew)
      return;
    Warn(ErrorText(absl::StrCat("the calibration text has only ", different.size(),
                                " different tokens in ", calibration_.elements()),
                   "what is measured on it will not hold for other text", "use another text"));
  }

  void Warn(std::string text) {
    sink_({{"type", "log"}, {"severity", 2}, {"text", text}});
    warnings_.push_back(std::move(text));
  }

  absl::Status PlanMethods() {
    QM_ASSIGN_OR_RETURN(stages_, PrepareStages(plan_, catalog_, methods_, source_->checkpoint(),
                                               *runner_, *transforms_, *tuning_, *training_));
    QM_ASSIGN_OR_RETURN(report_, EstimateRun(plan_, stages_, source_->checkpoint(), *backend_));
    for (const PreparedStage& stage : stages_.stages) {
      if (!HasNothingToLearn(stage, stages_)) continue;
      Warn(ErrorText(absl::StrCat("stage '", stage.stage->name, "' has nothing to learn"),
                     "it distills the original model into that model itself",
                     "quantize before it, or use loss: lm"));
    }
    QM_RETURN_IF_ERROR(CheckCalibration(plan_, report_.slots));
    QM_RETURN_IF_ERROR(CheckExportFormats(plan_, report_.slots, catalog_));
    return CheckCanStore(plan_, stages_, *formats_);
  }

  absl::Status Preflight() {
    const Pipeline& pipeline = plan_.pipeline;
    if (const absl::Status status = CheckOutput(pipeline, request_.resume); !status.ok()) {
      return RefusedError(status);
    }
    if (pipeline.evaluate) {
      absl::StatusOr<Tensor> windows = EvaluationWindows(pipeline);
      if (!windows.ok()) return RefusedError(windows.status());
      evaluation_ = *std::move(windows);
      AddEvaluation(plan_, source_->checkpoint(), evaluation_.dim(0), *backend_, &report_);
    }
    if (const absl::Status status =
            CheckMachine(plan_, report_, ReadMachineState(pipeline, *backend_));
        !status.ok()) {
      return RefusedError(status);
    }
    if (request_.mode == JobRequest::Mode::kPlan) {
      QM_RETURN_IF_ERROR(EstimateTime(plan_, stages_, source_->checkpoint(),
                                      pipeline.evaluate ? evaluation_.dim(0) : 0, *backend_,
                                      &report_));
    }
    if (request_.mode != JobRequest::Mode::kPlan) QM_RETURN_IF_ERROR(ReadTexts());
    if (!stages_.NeedsStatistics()) return absl::OkStatus();
    // Drawing text from the model is work, not a check.
    if (request_.mode == JobRequest::Mode::kPlan && pipeline.calibration->text == "self") {
      return absl::OkStatus();
    }
    absl::StatusOr<Tensor> windows = CalibrationWindows(pipeline, *source_, *backend_, sink_);
    if (!windows.ok()) return RefusedError(windows.status());
    calibration_ = *std::move(windows);
    WarnOfPoorText();
    Fingerprint fingerprint;
    fingerprint.Add(calibration_, host_->threads());
    fingerprint.Add(DTypeName(backend_->activation_dtype()));
    calibration_digest_ = fingerprint.Hex();
    return absl::OkStatus();
  }

  absl::Status ReadTexts() {
    for (const PreparedStage& stage : stages_.stages) {
      if (!stage.trains) continue;
      absl::StatusOr<TrainingText> text = ReadTrainingText(plan_, *stage.stage, host_->threads());
      if (!text.ok()) return RefusedError(text.status());
      texts_[stage.stage->name] = *std::move(text);
    }
    return absl::OkStatus();
  }

  absl::Status Quantize() {
    digests_ = std::make_unique<ModelDigests>(source_->checkpoint(), plan_.config.layers,
                                              host_->threads());
    EngineInputs inputs;
    inputs.plan = &plan_;
    inputs.stages = &stages_;
    inputs.source = source_.get();
    inputs.backend = backend_.get();
    inputs.runner = runner_.get();
    inputs.transforms = transforms_.get();
    inputs.tuning = tuning_.get();
    inputs.training = training_.get();
    inputs.texts = texts_;
    inputs.formats = formats_.get();
    inputs.format_words = format_words_.get();
    inputs.digests = digests_.get();
    inputs.journal = &request_.journal;
    inputs.work_dir = plan_.pipeline.work_dir;
    inputs.sink = sink_;
    inputs.windows = calibration_;
    inputs.calibration_digest = calibration_digest_;
    engine_ = std::make_unique<Engine>(std::move(inputs));
    const auto start = Clock::now();
    QM_RETURN_IF_ERROR(engine_->Run());
    quantize_seconds_ = SecondsSince(start);
    // Kept apart from the checkpoint: times differ from run to run.
    return WriteFile(plan_.pipeline.work_dir + "/report.json",
                     SlotReport(engine_->units()).dump(1) + "\n");
  }

  PackedLookup Lookup() {
    return [this](const std::string& slot) { return engine_->Packed(slot); };
  }
  UnitSource InMemory() {
    return {*source_, Lookup(), [this](int64_t block) { return engine_->Edits(block); }, *formats_};
  }

  void Progress(const std::string& stage, const std::string& unit, int64_t done, int64_t total) {
    sink_(
        {{"type", "progress"}, {"stage", stage}, {"unit", unit}, {"done", done}, {"total", total}});
  }

  absl::StatusOr<nlohmann::ordered_json> Finish(Clock::time_point start) {
    const nlohmann::ordered_json provenance =
        BuildProvenance(plan_, *engine_, digests_->Total(), calibration_digest_);
    QM_ASSIGN_OR_RETURN(const OutputResult output,
                        WriteOutput(plan_, *engine_, *source_, provenance, *formats_, *training_,
                                    *backend_, sink_));
    QM_ASSIGN_OR_RETURN(const VerifyReport verified, Verify(!output.written));
    int64_t original_bytes = 0;
    for (const auto& file : source_->checkpoint().files()) {
      std::error_code error;
      original_bytes += static_cast<int64_t>(std::filesystem::file_size(file->path(), error));
    }
    nlohmann::ordered_json result = {{"output", plan_.pipeline.export_path},
                                     {"format", plan_.pipeline.export_format},
                                     {"bits_per_weight", verified.bits_per_weight},
                                     {"size_bytes", verified.size_bytes},
                                     {"original_bytes", original_bytes}};
    nlohmann::ordered_json evaluation;
    if (plan_.pipeline.evaluate) {
      QM_ASSIGN_OR_RETURN(evaluation, EvaluateOutput());
    }
    result["seconds"] = SecondsSince(start);
    result["peak_rss_bytes"] = PeakRssBytes();
    result["peak_device_bytes"] = backend_->peak_device_bytes();
    result["stages"] = StageSummary(plan_, engine_->units());
    if (!evaluation.is_null()) result["evaluation"] = std::move(evaluation);
    result["device"] = DeviceName(backend_->device());
    result["units"] = static_cast<int64_t>(engine_->units().size());
    result["reused_units"] = engine_->reused_units();
    result["quantize_seconds"] = quantize_seconds_;
    std::vector<std::string> warnings = warnings_;
    warnings.insert(warnings.end(), verified.warnings.begin(), verified.warnings.end());
    std::string coverage_warning;
    const auto coverage = ExpertCoverage(plan_, stages_, engine_->units(), &coverage_warning);
    for (const auto& [key, value] : coverage.items()) result[key] = value;
    if (!coverage_warning.empty()) warnings.push_back(coverage_warning);
    if (const auto adapters = AdapterDirectories(); !adapters.empty())
      result["adapters"] = adapters;
    result["checks"] = verified.checks;
    result["warnings"] = warnings;
    result["unquantized"] = verified.unquantized;
    return result;
  }

  // Where what was trained beside the weights lies.
  std::vector<std::string> AdapterDirectories() {
    const std::string& path = plan_.pipeline.export_path;
    std::vector<std::string> directories;
    if (!engine_->HasAdapters()) return directories;
    if (plan_.pipeline.export_format == kPeftTarget) return {path};
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(path, error)) {
      if (entry.is_directory(error)) directories.push_back(entry.path().string());
    }
    std::sort(directories.begin(), directories.end());
    return directories;
  }

  // An adapter alone has no weights to verify: its files are read back.
  absl::StatusOr<VerifyReport> VerifyAdapter() {
    const std::string& path = plan_.pipeline.export_path;
    QM_ASSIGN_OR_RETURN(const PeftAdapter files, ReadPeftAdapter(path));
    VerifyReport report;
    for (const LinearSlot& slot : plan_.slots) {
      QM_ASSIGN_OR_RETURN(const std::vector<Engine::Adapter> adapters,
                          engine_->Adapters(slot.name));
      if (adapters.empty()) continue;
      const auto stored = files.modules.find(slot.name);
      if (stored == files.modules.end() || !SameTensors(stored->second, adapters[0].params)) {
        return absl::DataLossError(
            absl::StrCat(path, ": the adapter of ", slot.name, " is not what was trained"));
      }
    }
    report.checks.push_back("the adapter reads back as it was trained");
    report.bits_per_weight = report_.bits_per_weight;
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      report.size_bytes += static_cast<int64_t>(entry.file_size());
    }
    return report;
  }

  // Of the same names and contents, in any order.
  static bool SameTensors(const std::vector<NamedTensor>& a, const std::vector<NamedTensor>& b) {
    return a.size() == b.size() && std::all_of(a.begin(), a.end(), [&](const NamedTensor& one) {
             return std::any_of(b.begin(), b.end(), [&](const NamedTensor& other) {
               return one.name == other.name && one.tensor.bytes() == other.tensor.bytes() &&
                      std::memcmp(one.tensor.data(), other.tensor.data(),
                                  static_cast<size_t>(one.tensor.bytes())) == 0;
             });
           });
  }

  absl::StatusOr<VerifyReport> Verify(bool check_digests) {
    if (plan_.pipeline.export_format == kPeftTarget) return VerifyAdapter();
    UnitSource in_memory = InMemory();
    VerifyOptions options;
    options.directory = plan_.pipeline.export_path;
    options.expected = Lookup();
    options.in_memory = &in_memory;
    options.check_digests = check_digests;
    options.planned_bits = report_.bits_per_weight;
    options.progress = [this](const std::string& step, int64_t done, int64_t total) {
      Progress(step, "block", done, total);
    };
    return VerifyCheckpoint(options, *formats_, *backend_);
  }

  absl::StatusOr<nlohmann::ordered_json> EvaluateOutput() {
    UnitSource packed = InMemory();
    AdaptedSource model(packed, engine_->LoadedAdapters());
    EvalOptions options;
    options.progress = [this](std::string_view stage, int64_t done, int64_t total) {
      const bool scoring = stage == "score";  // the last part: its end is the end of all
      Progress(scoring ? "evaluate" : absl::StrCat("evaluate: ", AbslView(stage)),
               scoring ? "window" : "block", done, total);
      return absl::OkStatus();
    };
    WeightSource* reference = plan_.pipeline.evaluate->reference ? source_.get() : nullptr;
    QM_ASSIGN_OR_RETURN(const EvalResult result,
                        Evaluate(*backend_, model, reference, evaluation_, options));
    QM_RETURN_IF_ERROR(WriteEvaluationWindows(plan_.pipeline.work_dir, result));
    return ToJson(result);
  }

  const JobRequest& request_;
  const EventSink& sink_;
  Catalog catalog_;
  PipelinePlan plan_;
  std::unique_ptr<DenseSource> source_;
  std::unique_ptr<Backend> backend_, host_;
  std::vector<LoadedMethod> methods_;
  std::unique_ptr<PluginFormats> formats_;
  std::unique_ptr<LastWords> words_;
  std::unique_ptr<FormatWords> format_words_;
  std::unique_ptr<MethodRunner> runner_;
  std::unique_ptr<TransformRunner> transforms_;
  std::unique_ptr<TuneRunner> tuning_;
  std::unique_ptr<ReparamCalls> training_;
  std::map<std::string, TrainingText> texts_;  // by training stage
  StageSet stages_;
  PlanReport report_;
  std::vector<std::string> warnings_;
  Tensor calibration_, evaluation_;
  std::string calibration_digest_;
  double quantize_seconds_ = 0;  // of the units computed here, statistics and all
  std::unique_ptr<ModelDigests> digests_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace

absl::StatusOr<Pipeline> PipelineOf(const JobRequest& request) {
  absl::StatusOr<Pipeline> pipeline = ParsePipelineFile(request.pipeline_file, request.sets);
  if (!pipeline.ok()) return UsageError(pipeline.status());
  if (!request.device.empty()) pipeline->device = request.device;
  if (!request.work_dir.empty()) {
    // As the paths of the file: the checks compare them with each other.
    std::error_code error;
    pipeline->work_dir =
        std::filesystem::absolute(request.work_dir, error).lexically_normal().string();
  }
  return pipeline;
}

absl::StatusOr<nlohmann::ordered_json> RunJob(const JobRequest& request, const EventSink& sink) {
  return Job(request, sink).Run();
}

absl::StatusOr<PlanReport> PlanInWorker(JobRequest request) {
  request.mode = JobRequest::Mode::kPlan;
  std::string path = (std::filesystem::temp_directory_path() / "quantmill-plan-XXXXXX").string();
  const int descriptor = mkstemp(path.data());
  if (descriptor < 0) return absl::UnavailableError("cannot make a temporary file");
  close(descriptor);
  request.last_words = path;
  SuperviseOptions options;
  options.request = [&request](const JournalState&) { return ToJson(request).dump(); };
  options.last_words = path;
  options.hang_seconds = HangSeconds();
  const absl::StatusOr<SuperviseResult> result =
      Supervise(options, nullptr, [](const nlohmann::json&) {});
  QM_RETURN_IF_ERROR(RemoveFile(path));
  QM_RETURN_IF_ERROR(result.status());
  return PlanReportFromJson(result->value);
}

}  // namespace quantmill
