// How long a run will take: the operations of each of its parts, counted from shapes, over rates
// that are measured on the spot where they differ most from machine to machine.
#ifndef QUANTMILL_HOST_RUN_TIME_ESTIMATE_H_
#define QUANTMILL_HOST_RUN_TIME_ESTIMATE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "core/eval/self_text.h"
#include "core/tensor/backend.h"
#include "host/pipeline/plan.h"
#include "host/run/stage_set.h"

namespace quantmill {

// Operations by kind, as far as their speeds differ.
struct RunWork {
  double products = 0;      // flops of products with many rows, Gram matrices included
  double few_rows = 0;      // flops of products with as many rows as sequences are drawn at once
  double attention = 0;     // flops of scores and of weighted sums of values
  double cached = 0;        // bytes of keys and values read while text is drawn
  double method = 0;        // flops as the methods count them
  double activations = 0;   // values that norms, activations and residuals go over
  double exponentials = 0;  // of softmax: in attention, of logits
  double weights = 0;       // weights packed, unpacked, compared, converted
  double bytes = 0;         // read, hashed and written
  double text_bytes = 0;    // tokenized
  double steps = 0;         // of one token after another
};

RunWork& operator+=(RunWork& a, const RunWork& b);

// What is counted; sizes the plan cannot tell.
struct RunExtent {
  int64_t evaluation_windows = 0;
  int64_t text_bytes = 0;      // of all texts
  int64_t original_bytes = 0;  // of the model's weights
  int64_t work_bytes = 0, output_bytes = 0;
  DrawingDevice device;
};

// Drawing calibration text, if that is asked for.
RunWork DrawingWork(const PipelinePlan& plan, DrawingDevice device);
// Measuring statistics, running the methods, and judging what they made.
RunWork QuantizingWork(const PipelinePlan& plan, const StageSet& stages);
// Forward and backward passes of training stages, their steps, and the text they draw.
RunWork TrainingWork(const PipelinePlan& plan, const StageSet& stages, DrawingDevice device);
// Writing, reopening and checking the output.
RunWork OutputWork(const PipelinePlan& plan, const RunExtent& extent);
// Perplexity, and KL to the original if that is asked for.
RunWork EvaluationWork(const PipelinePlan& plan, int64_t windows);
RunWork TotalWork(const PipelinePlan& plan, const StageSet& stages, const RunExtent& extent);

// Flops per second of a product with many rows in the dtype of activations: some milliseconds.
absl::StatusOr<double> MeasureProductRate(Backend& backend);

// `product_rate`: as MeasureProductRate gave it. `threads`: of the host's pool.
double SecondsFor(const RunWork& work, double product_rate, bool on_gpu, int threads);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TIME_ESTIMATE_H_
