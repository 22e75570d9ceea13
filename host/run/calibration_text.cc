#include "host/run/calibration_text.h"

#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/eval/resident_model.h"
#include "core/eval/self_text.h"
#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "core/text/documents.h"
#include "core/text/tokenizer.h"
#include "host/run/fingerprint.h"

namespace quantmill {
namespace {

constexpr char kSelfTensor[] = "input_ids";

absl::StatusOr<Tensor> FileWindows(const Pipeline& pipeline, const std::string& path,
                                   const TextOptions& text, const WindowOptions& options) {
  QM_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::FromDirectory(pipeline.model_path));
  QM_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, TokenizeFile(*tokenizer, path, text));
  absl::StatusOr<Tensor> windows = CutWindows(tokens, options);
  if (windows.ok()) return windows;
  return absl::FailedPreconditionError(absl::StrCat(path, ": ", windows.status().message()));
}

// Names the file after everything the windows depend on but the weights.
std::string SelfPath(const Pipeline& pipeline) {
  Fingerprint fingerprint;
  fingerprint.Add(pipeline.model_path);
  fingerprint.Add(absl::StrCat(pipeline.calibration->samples, " ",
                               pipeline.calibration->sequence_length, " ",
                               pipeline.calibration->seed));
  return absl::StrCat(pipeline.work_dir, "/self-text-", fingerprint.Hex().substr(0, 16),
                      ".safetensors");
}

// The windows that `draw` makes from the model, kept at `path`; or those that an earlier process
// kept there.
template <typename Draw>
absl::StatusOr<Tensor> KeptWindows(const std::string& path, const char* stage, WeightSource& source,
                                   Backend& backend, const EventSink& sink, const Draw& draw) {
  if (const auto file = SafetensorsFile::Open(path); file.ok()) return (*file)->Get(kSelfTensor);
  const StepProgress progress = [&](int64_t done, int64_t total) {
    sink({{"type", "progress"},
          {"stage", stage},
          {"unit", "token"},
          {"done", done},
          {"total", total}});
    return absl::OkStatus();
  };
  QM_ASSIGN_OR_RETURN(const ResidentModel model, ResidentModel::Load(backend, source));
  QM_ASSIGN_OR_RETURN(const Tensor windows, draw(model, progress));
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  QM_ASSIGN_OR_RETURN(
      const auto writer,
      SafetensorsWriter::Create(path, {{kSelfTensor, windows.dtype(), windows.shape()}}));
  QM_RETURN_IF_ERROR(writer->Write(kSelfTensor, windows));
  QM_RETURN_IF_ERROR(writer->Finish());
  return windows;
}

absl::StatusOr<Tensor> SelfWindows(const Pipeline& pipeline, WeightSource& source, Backend& backend,
                                   const EventSink& sink) {
  const CalibrationSection& section = *pipeline.calibration;
  return KeptWindows(SelfPath(pipeline), "drawing calibration text", source, backend, sink,
                     [&](const ResidentModel& model, const StepProgress& progress) {
                       return SampleSelfText(model, section.samples, section.sequence_length,
                                             section.seed, progress);
                     });
}

}  // namespace

absl::StatusOr<Tensor> CalibrationWindows(const Pipeline& pipeline, WeightSource& source,
                                          Backend& backend, const EventSink& sink) {
  const CalibrationSection& section = *pipeline.calibration;
  if (section.text == "self") return SelfWindows(pipeline, source, backend, sink);
  WindowOptions options;
  options.length = section.sequence_length;
  options.count = section.samples;
  options.order =
      section.random_order ? WindowOptions::Order::kRandom : WindowOptions::Order::kStart;
  options.seed = section.seed;
  return FileWindows(pipeline, section.text, {section.key, section.join}, options);
}

absl::StatusOr<Tensor> EvaluationWindows(const Pipeline& pipeline) {
  WindowOptions options;
  options.length = pipeline.evaluate->context;
  options.count = pipeline.evaluate->windows;
  const TextOptions text = pipeline.calibration
                               ? TextOptions{pipeline.calibration->key, pipeline.calibration->join}
                               : TextOptions{};
  return FileWindows(pipeline, pipeline.evaluate->text, text, options);
}

absl::StatusOr<TrainingText> ReadTrainingText(const PipelinePlan& plan, const PlannedStage& stage,
                                              ThreadPool& threads) {
  const TrainOptions& train = *stage.train;
  QM_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::FromDirectory(plan.pipeline.model_path));
  TrainingDataOptions options;
  options.length = train.sequence_length;
  options.seed = SlotSeed(plan.pipeline.seed, stage.name, "training text");
  options.text.key = train.key;
  if (absl::EndsWith(train.data, ".json") && !plan.config.eos_ids.empty()) {
    options.eos = static_cast<int32_t>(plan.config.eos_ids[0]);
  }
  absl::StatusOr<TrainingData> data = TrainingData::Read(*tokenizer, train.data, options);
  if (!data.ok()) {
    return WithContext(data.status(),
                       absl::StrCat(stage.location.ToString(), ": stage '", stage.name, "'"));
  }
  const TrainingData::Windows all = data->Batch(0, data->windows());
  Fingerprint fingerprint;
  fingerprint.Add(all.ids, threads);
  fingerprint.Add(all.targets, threads);
  return TrainingText{std::make_shared<const TrainingData>(*std::move(data)), fingerprint.Hex()};
}

absl::StatusOr<TrainingData> WithSampledText(const TrainingData& data, const TrainOptions& train,
                                             const SampledText& how, WeightSource& original,
                                             Backend& backend, const EventSink& sink) {
  const auto draw = [&](const ResidentModel& model,
                        const StepProgress& progress) -> absl::StatusOr<Tensor> {
    QM_ASSIGN_OR_RETURN(const Tensor beginnings,
                        data.Excerpts(train.SampledWindows(), train.GivenTokens(), how.seed));
    return ContinueText(model, beginnings, train.sequence_length, how.seed, progress);
  };
  QM_ASSIGN_OR_RETURN(const Tensor windows, KeptWindows(how.path, "drawing training text", original,
                                                        backend, sink, draw));
  return data.With(windows);
}

}  // namespace quantmill
