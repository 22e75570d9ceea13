#include "host/bench/tasks.h"

#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/eval/logits.h"
#include "core/io/checkpoint_files.h"
#include "host/bench/generation_speed.h"
#include "host/bench/stored_bits.h"
#include "host/cli/model_session.h"
#include "host/run/calibration_text.h"
#include "host/supervisor/supervise.h"
#include "host/trial/worker_call.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

// ---- requests -----------------------------------------------------------------------------------

// What of a pipeline the tasks need.
nlohmann::json MeasureRequest(const char* task, const Pipeline& pipeline) {
  nlohmann::json json = {{"mode", kBenchMode},
                         {"task", task},
                         {"model", pipeline.model_path},
                         {"device", pipeline.device},
                         {"dtype", ""}};
  if (pipeline.model_dtype) json["dtype"] = std::string(DTypeName(*pipeline.model_dtype));
  if (pipeline.evaluate) {
    json["text"] = pipeline.evaluate->text;
    json["context"] = pipeline.evaluate->context;
    json["windows"] = pipeline.evaluate->windows;
    json["reference"] = pipeline.evaluate->reference;
  }
  if (pipeline.calibration) {
    json["key"] = pipeline.calibration->key;
    json["join"] = pipeline.calibration->join;
  }
  return json;
}

Pipeline PipelineFromRequest(const nlohmann::json& request) {
  Pipeline pipeline;
  pipeline.model_path = request.at("model");
  pipeline.device = request.at("device");
  const std::string dtype = request.at("dtype");
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (dtype == DTypeName(type)) pipeline.model_dtype = type;
  }
  if (request.contains("text")) {
    pipeline.evaluate = Pipeline::Evaluate{request.at("text"), request.at("context"),
                                           request.at("windows"), request.at("reference")};
  }
  if (request.contains("key")) {
    CalibrationSection text;
    text.key = request.at("key");
    text.join = request.at("join");
    pipeline.calibration = std::move(text);
  }
  return pipeline;
}

// ---- the worker's side --------------------------------------------------------------------------

void Progress(const EventSink& sink, const std::string& stage, const std::string& unit,
              int64_t done, int64_t total) {
  sink({{"type", "progress"}, {"stage", stage}, {"unit", unit}, {"done", done}, {"total", total}});
}

StepProgress Steps(const EventSink& sink, const std::string& stage) {
  return [&sink, stage](int64_t done, int64_t total) {
    Progress(sink, stage, "block", done, total);
    return absl::OkStatus();
  };
}

absl::StatusOr<std::unique_ptr<ModelSession>> OpenSession(const nlohmann::json& request,
                                                          const Pipeline& pipeline) {
  return ModelSession::Open(pipeline.device, pipeline.model_dtype,
                            request.value("plugins", std::vector<std::string>()));
}

absl::StatusOr<nlohmann::ordered_json> FactsTask(const Pipeline& pipeline) {
  QM_ASSIGN_OR_RETURN(const auto backend, MakeBackend(pipeline.device, pipeline.model_dtype));
  const DeviceFacts facts = FactsOf(*backend);
  return nlohmann::ordered_json{{"device", facts.device},
                                {"processor", facts.processor},
                                {"threads", facts.threads},
                                {"gpu", facts.gpu},
                                {"driver", facts.driver}};
}

// What a quantized copy would have, too: weights, configuration and tokenizer, not what else lies
// in a downloaded folder.
absl::StatusOr<int64_t> ModelBytes(const std::string& directory) {
  QM_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(directory));
  int64_t bytes = 0;
  std::error_code error;
  for (const auto& file : checkpoint->files()) {
    bytes += static_cast<int64_t>(fs::file_size(file->path(), error));
  }
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    const std::string extension = entry.path().extension().string();
    const bool counts = extension == ".json" || extension == ".txt" || extension == ".model" ||
                        extension == ".jinja";
    if (counts && entry.is_regular_file(error)) {
      bytes += static_cast<int64_t>(entry.file_size(error));
    }
  }
  return bytes;
}

absl::StatusOr<nlohmann::ordered_json> BaselineTask(const nlohmann::json& request,
                                                    const Pipeline& pipeline,
                                                    const EventSink& sink) {
  QM_ASSIGN_OR_RETURN(const auto session, OpenSession(request, pipeline));
  QM_ASSIGN_OR_RETURN(const auto model,
                      session->OpenCheckpoint(pipeline.model_path, PackedMode::kDequantize));
  std::unique_ptr<CheckpointSource> reference;
  if (pipeline.evaluate->reference) {
    QM_ASSIGN_OR_RETURN(reference,
                        session->OpenCheckpoint(pipeline.model_path, PackedMode::kDequantize));
  }
  QM_ASSIGN_OR_RETURN(const Tensor windows, EvaluationWindows(pipeline));
  EvalOptions options;
  options.progress = [&sink](std::string_view stage, int64_t done, int64_t total) {
    const bool scoring = stage == "score";
    Progress(sink, scoring ? "evaluate" : absl::StrCat("evaluate: ", AbslView(stage)),
             scoring ? "window" : "block", done, total);
    return absl::OkStatus();
  };
  QM_ASSIGN_OR_RETURN(const EvalResult result,
                      Evaluate(session->backend(), *model, reference.get(), windows, options));
  nlohmann::ordered_json json = ToJson(result);
  json["window_nll"] = result.window_nll;
  json["window_kl"] = result.window_kl;
  QM_ASSIGN_OR_RETURN(json["bits_per_weight"], StoredBitsPerWeight(pipeline.model_path));
  QM_ASSIGN_OR_RETURN(const int64_t bytes, ModelBytes(pipeline.model_path));
  json["size_bytes"] = bytes;
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  json["peak_rss_bytes"] = int64_t{usage.ru_maxrss} * 1024;
  json["peak_device_bytes"] = session->backend().peak_device_bytes();
  return json;
}

// Sequence b begins where sequence b - 1 ended; a short text starts again.
std::vector<std::vector<int32_t>> Prompts(const Tensor& windows, int64_t batch, int64_t length) {
  std::vector<std::vector<int32_t>> prompts(static_cast<size_t>(batch));
  int64_t at = 0;
  for (auto& prompt : prompts) {
    for (int64_t i = 0; i < length; ++i, ++at) {
      prompt.push_back(windows.as<const int32_t>()[at % windows.elements()]);
    }
  }
  return prompts;
}

void PutRate(const std::string& key, const Estimate& estimate, nlohmann::ordered_json* json) {
  (*json)[key] = estimate.value;
  if (estimate.standard_error) (*json)[key + "_stderr"] = *estimate.standard_error;
}

// The first and the last sequence through the weights as `eval` has them.
absl::Status CheckText(ModelSession& session, WeightSource& evaluated, const GenerationSpeed& speed,
                       int64_t prompt, const EventSink& sink) {
  for (const size_t b : {size_t{0}, speed.ids.size() - 1}) {
    std::vector<int32_t> ids = speed.ids[b];
    const int64_t count = static_cast<int64_t>(ids.size());
    QM_ASSIGN_OR_RETURN(Tensor tensor, Tensor::Host(DType::kI32, {1, count}));
    std::copy(ids.begin(), ids.end(), tensor.as<int32_t>());
    QM_ASSIGN_OR_RETURN(const Tensor logits, ComputeLogits(session.backend(), evaluated, tensor,
                                                           Steps(sink, "check the text")));
    QM_RETURN_IF_ERROR(
        CheckGreedy(ids, prompt, logits, GreedyTolerance(session.backend().activation_dtype())));
    if (speed.ids.size() == 1) break;
  }
  return absl::OkStatus();
}

absl::StatusOr<nlohmann::ordered_json> GenerationTask(const nlohmann::json& request,
                                                      const Pipeline& pipeline,
                                                      const EventSink& sink) {
  const std::string directory = request.at("directory");
  const int64_t length = request.at("prompt"), new_tokens = request.at("new_tokens");
  QM_ASSIGN_OR_RETURN(const auto session, OpenSession(request, pipeline));
  QM_ASSIGN_OR_RETURN(const Tensor windows, EvaluationWindows(pipeline));
  QM_ASSIGN_OR_RETURN(const auto packed,
                      session->OpenCheckpoint(directory, PackedMode::kKeepPacked));
  QM_ASSIGN_OR_RETURN(const auto evaluated,
                      session->OpenCheckpoint(directory, PackedMode::kDequantize));
  const std::vector<int64_t> batches = request.at("batch");
  std::vector<GenerationSpeed> speeds;
  nlohmann::ordered_json json;
  {
    QM_ASSIGN_OR_RETURN(const ResidentModel model,
                        ResidentModel::Load(session->backend(), *packed, Steps(sink, "load")));
    for (const int64_t batch : batches) {
      const std::string stage = absl::StrCat("generate, batch ", batch);
      int64_t done = 0;
      auto speed = MeasureGeneration(model, Prompts(windows, batch, length), new_tokens,
                                     [&] { Progress(sink, stage, "repetition", ++done, 0); });
      if (!speed.ok()) return WithContext(speed.status(), stage);
      speeds.push_back(*std::move(speed));
    }
  }
  for (size_t i = 0; i < batches.size(); ++i) {
    QM_RETURN_IF_ERROR(CheckText(*session, *evaluated, speeds[i], length, sink));
    PutRate(absl::StrCat("prompt_tokens_per_second_b", batches[i]),
            speeds[i].prompt_tokens_per_second, &json);
    PutRate(absl::StrCat("tokens_per_second_b", batches[i]), speeds[i].tokens_per_second, &json);
  }
  return json;
}

// ---- the supervisor's side ----------------------------------------------------------------------

absl::StatusOr<nlohmann::ordered_json> Call(const nlohmann::json& request, const EventSink& sink) {
  QM_ASSIGN_OR_RETURN(WorkerCallEnd end, CallInWorker(
                                             [&request](const std::string& last_words) {
                                               nlohmann::json with_words = request;
                                               with_words["last_words"] = last_words;
                                               return with_words;
                                             },
                                             HangSeconds(), sink));
  if (end.lost) return absl::InternalError(absl::StrCat("the worker ", end.text));
  QM_RETURN_IF_ERROR(end.status);
  return std::move(end.value);
}

}  // namespace

absl::StatusOr<nlohmann::ordered_json> RunBenchTask(const nlohmann::json& request,
                                                    const EventSink& sink) {
  try {
    const Pipeline pipeline = PipelineFromRequest(request);
    const std::string task = request.at("task");
    if (task == "facts") return FactsTask(pipeline);
    if (task == "baseline") return BaselineTask(request, pipeline, sink);
    return GenerationTask(request, pipeline, sink);
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("not a request of bench: ", error.what()));
  }
}

absl::StatusOr<DeviceFacts> BenchFacts(const Pipeline& pipeline) {
  QM_ASSIGN_OR_RETURN(const nlohmann::ordered_json json,
                      Call(MeasureRequest("facts", pipeline), [](const nlohmann::json&) {}));
  DeviceFacts facts;
  facts.device = json.value("device", "");
  facts.processor = json.value("processor", "");
  facts.threads = json.value("threads", 0);
  facts.gpu = json.value("gpu", "");
  facts.driver = json.value("driver", "");
  return facts;
}

absl::StatusOr<nlohmann::ordered_json> BenchBaseline(const Pipeline& pipeline,
                                                     const EventSink& sink) {
  return Call(MeasureRequest("baseline", pipeline), sink);
}

absl::StatusOr<nlohmann::ordered_json> BenchGeneration(const Pipeline& pipeline,
                                                       const std::string& directory,
                                                       const std::vector<std::string>& plugins,
                                                       const BenchSpeed& speed,
                                                       const EventSink& sink) {
  nlohmann::json request = MeasureRequest("generate", pipeline);
  request["directory"] = directory;
  request["plugins"] = plugins;
  request["prompt"] = speed.prompt;
  request["new_tokens"] = speed.new_tokens;
  request["batch"] = speed.batch;
  return Call(request, sink);
}

}  // namespace quantmill
