// plan() and run() of qm.quantize-linear/1 as every case calls them: fenced, on a made-up layer.
#ifndef QUANTMILL_SDK_CHECK_QUANTIZE_CALL_H_
#define QUANTMILL_SDK_CHECK_QUANTIZE_CALL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/synthetic.h"

namespace quantmill::check {

// A qm_linear_info of one up projection; its strings are static.
qm_linear_info LinearInfo(int64_t out_features, int64_t in_features, qm_dtype scale_dtype = QM_F16);

// What plan() answered, copied out of the call.
struct PlanAnswer {
  // A qm_stat_request.
  struct Wanted {
    std::string id;
    int64_t max_rows = 0;
    qm_dtype dtype = QM_F32;
    uint32_t flags = 0;
  };

  qm_status code = QM_OK;
  std::string outcome;               // CheckedCall::Outcome()
  std::optional<Verdict> violation;  // a broken rule; nothing else is worth looking at then
  std::vector<Wanted> stats;
  uint64_t scratch_bytes = 0;
  uint64_t scratch_bytes_shared = 0;
  std::string format_id;
};
PlanAnswer Plan(Subject& subject, const qm_linear_info& info, const CallSetup& setup);

// What run() answered.
struct RunAnswer {
  qm_status code = QM_OK;
  std::string outcome;
  std::optional<Verdict> violation;  // likewise
  PackedWeight packed;               // on the host; of a run that gave QM_OK
  int64_t scratch_calls = 0, emit_calls = 0, progress_calls = 0;
  uint64_t scratch_bytes = 0;
  double seconds = 0;
  double seconds_since_cancel = 0;
};
// run() on `layer` with the statistics that `plan` asked for. The scratch limit is that of `setup`.
RunAnswer Run(Subject& subject, const SyntheticLayer& layer, const qm_linear_info& info,
              const PlanAnswer& plan, const CallSetup& setup);

// The statistics `plan` asked for as inputs of `call`, measured on the layer's rows; in a struct
// whose pointers live as long as it does.
class StatInputs {
 public:
  StatInputs(CheckedCall& call, Subject& subject, const SyntheticLayer& layer,
             const PlanAnswer& plan);
  StatInputs(const StatInputs&) = delete;
  StatInputs& operator=(const StatInputs&) = delete;
  const qm_stats* get() const { return given_; }

 private:
  std::vector<std::string> names_;
  std::vector<qm_named_tensor> items_;
  qm_stats stats_ = {};
  const qm_stats* given_ = nullptr;  // in the call's memory
};

// A layer whose shape the method's plan() accepts with these options: 8 x 256 or a few others.
struct AcceptedLayer {
  SyntheticLayer layer;
  qm_linear_info info = {};
  PlanAnswer plan;
};
// Otherwise the verdict to give: skipped with the refusal, or a broken rule.
std::optional<Verdict> FindAcceptedLayer(Subject& subject, const CallSetup& setup,
                                         AcceptedLayer* out);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_QUANTIZE_CALL_H_
