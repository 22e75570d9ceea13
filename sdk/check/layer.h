// Made-up layers and the calls every quantizing case makes on them.
#ifndef QUANTMILL_SDK_CHECK_LAYER_H_
#define QUANTMILL_SDK_CHECK_LAYER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"

namespace quantmill::check {

// A weight and inputs to it. `weight` [rows, cols], `inputs` [input_rows, cols], row-major.
struct Layer {
  int64_t rows = 0, cols = 0, input_rows = 0;
  std::vector<float> weight;
  std::vector<float> inputs;
  std::string name = "model.layers.0.mlp.up_proj";
  std::string role = "mlp.up";
  qm_dtype scale_dtype = QM_F16;
};

// Gaussian weights of deviation 0.05. Inputs are correlated (neighbouring channels share a third of
// their variance) and one channel in 32 is 20 times as large: the outliers of language models.
Layer MakeLayer(int64_t rows, int64_t cols, int64_t input_rows, uint64_t seed);

// A qm_linear_info for `layer`, whose strings it points at.
qm_linear_info InfoOf(const Layer& layer);

// A qm_stat_request, copied.
struct WantedStat {
  std::string id;
  int64_t max_rows = 0;
  uint32_t flags = 0;
};

// The statistics that a plan asked for, in a call's memory, from the layer's inputs (STATS.md).
class LayerStats {
 public:
  // An id that STATS.md does not know gives no item.
  LayerStats(CheckedCall& call, const Layer& layer, absl::Span<const WantedStat> wanted);
  const qm_stats* get() const { return &stats_; }

 private:
  std::vector<qm_named_tensor> items_;
  qm_stats stats_ = {};
};

// What plan() answered, copied out of the call.
struct PlanAnswer {
  qm_status code = QM_OK;
  std::string outcome;               // CheckedCall::Outcome()
  std::optional<Verdict> violation;  // from Finish(), or of the answer itself
  std::vector<WantedStat> stats;
  uint64_t scratch_bytes = 0;
  uint64_t scratch_bytes_shared = 0;
  std::string format_id;
};
// qm.quantize-linear/1 plan() of the subject's method.
PlanAnswer Plan(Subject& subject, const Layer& layer, const CallSetup& setup);

// What run() answered.
struct RunAnswer {
  qm_status code = QM_OK;
  std::string outcome;
  std::optional<Verdict> violation;  // a broken rule; nothing else is worth looking at then
  PackedWeight packed;               // on the host; of a run that gave QM_OK
  int64_t scratch_calls = 0, emit_calls = 0, progress_calls = 0;
  uint64_t scratch_bytes = 0;
  double seconds = 0;
};
// run() with the statistics of `plan`. The scratch limit of `setup` counts, not that of the plan.
RunAnswer Run(Subject& subject, const Layer& layer, const PlanAnswer& plan, const CallSetup& setup);

// A layer the method's plan() accepts with these options: 8 x 256, or the first of a few other
// shapes; nullopt with the refusal in *why.
std::optional<Layer> AcceptedLayer(Subject& subject, const CallSetup& setup, std::string* why);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_LAYER_H_
