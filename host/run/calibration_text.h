// Token windows for calibration, evaluation and training, from a text file or from the model
// itself.
#ifndef QUANTMILL_HOST_RUN_CALIBRATION_TEXT_H_
#define QUANTMILL_HOST_RUN_CALIBRATION_TEXT_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "core/threads/thread_pool.h"
#include "core/train/training_data.h"
#include "host/pipeline/pipeline.h"
#include "host/pipeline/plan.h"
#include "host/pipeline/train_options.h"
#include "host/supervisor/process.h"

namespace quantmill {

// I32 [samples, sequence_length] on the host. FAILED_PRECONDITION when the text is too short, with
// the number of tokens it has. `source` (the untouched model) is used for `self` text only, whose
// windows are kept in work_dir for a resumed run.
absl::StatusOr<Tensor> CalibrationWindows(const Pipeline& pipeline, WeightSource& source,
                                          Backend& backend, const EventSink& sink);

// Consecutive windows from the start of the evaluation text: all of them if windows is 0.
absl::StatusOr<Tensor> EvaluationWindows(const Pipeline& pipeline);

// Text to train on, and a digest of what is read in which order.
struct TrainingText {
  std::shared_ptr<const TrainingData> data;
  std::string digest;
};
// Of a training stage. Alpaca records end in the model's end-of-text token, and their prompts are
// no targets.
absl::StatusOr<TrainingText> ReadTrainingText(const PipelinePlan& plan, const PlannedStage& stage,
                                              ThreadPool& threads);

// How text is drawn for a training, and where it is kept until the training is finished.
struct SampledText {
  uint64_t seed = 0;
  std::string path;
};
// `data` and train.sampled_tokens of windows that begin with excerpts of it and that the original
// model continues.
absl::StatusOr<TrainingData> WithSampledText(const TrainingData& data, const TrainOptions& train,
                                             const SampledText& how, WeightSource& original,
                                             Backend& backend, const EventSink& sink);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_CALIBRATION_TEXT_H_
