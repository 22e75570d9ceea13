// Calls a method's quantize-linear table for slots of a block, with everything around a call:
// options, seed, statistics views, last words, crash bundles, and the copy of the result to the
// host.
#ifndef QUANTMILL_HOST_RUN_METHOD_RUNNER_H_
#define QUANTMILL_HOST_RUN_METHOD_RUNNER_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/calib/statistics.h"
#include "core/formats/packed.h"
#include "core/model/graph.h"
#include "core/tensor/backend.h"
#include "host/plugins/registry.h"
#include "host/supervisor/last_words.h"
#include "host/supervisor/process.h"
#include "host/worker/call.h"
#include "host/worker/plugin_log.h"

namespace quantmill {

// What a method's plan() said about one slot.
struct SlotPlan {
  struct Stat {
    StatRequest request;
    bool optional = false;
  };
  std::vector<Stat> stats;
  uint64_t scratch_bytes = 0, scratch_bytes_shared = 0;
  std::string format_id;
  std::string format_json;     // "" = the method does not say
  double bits_per_weight = 0;  // of all that is emitted; 0 = the method does not say
  double flops = 0;
};

// One slot to quantize.
struct SlotTask {
  const LinearSlot* slot = nullptr;
  const ResolvedOptions* options = nullptr;
  const SlotPlan* plan = nullptr;
  DType weight_dtype = DType::kF32;  // as stored
  DType scale_dtype = DType::kF16;
  Tensor weight;                      // F32 [out, in] on the device
  const Statistics* stats = nullptr;  // null: the plan asks for none
  bool stats_from_original = false;   // the single stream of the calibration is the untouched one
  uint64_t seed = 0;
};

struct SlotOutcome {
  absl::Status status;
  PackedWeight packed;  // on the host
  double seconds = 0;   // of the call, divided by the slots it served
  uint64_t scratch_peak = 0;
};

struct RunContext {
  std::string stage;
  std::string key;          // of the unit
  bool bundle = false;      // write the inputs of every call to `crash_dir` before making it
  bool one_by_one = false;  // no group calls: a crash must name its slot
  std::string crash_dir;    // work_dir/crash/KEY
  // Where the inputs of the call for one slot go.
  std::string BundleOf(const std::string& slot) const { return crash_dir + "/" + slot; }
};

// The device itself has failed (a sticky CUDA error): nothing in this process can be trusted.
absl::Status DeviceLost(const absl::Status& cause);
bool IsDeviceLost(const absl::Status& status);

// The statistics that run() is given for a task, by StatId, and the rows they were measured on.
std::vector<NamedTensor> StatisticsOf(const SlotTask& task, int64_t* row_count);

class MethodRunner {
 public:
  // `words` may be null. Both must outlive this object.
  MethodRunner(Backend& backend, LastWords* words, EventSink sink)
      : backend_(backend), words_(words), sink_(std::move(sink)) {}

  // Asks plan(). Refusals name stage, plugin and slot. INVALID_ARGUMENT for a statistic this host
  // does not know.
  absl::StatusOr<SlotPlan> Plan(const LoadedMethod& method, const std::string& stage,
                                const LinearSlot& slot, const ResolvedOptions& options,
                                DType weight_dtype, DType scale_dtype);

  // Quantizes tasks of one input group with equal options, in one call where the method can.
  // Returns one outcome per task. After a call that left the device unusable the outcomes say so
  // (IsDeviceLost), no further call is made, and the last words go on naming that call.
  std::vector<SlotOutcome> Run(const LoadedMethod& method, const RunContext& context,
                               absl::Span<const SlotTask> tasks);

  // Writes the inputs of run() for one task to context.BundleOf(slot), to be called again from
  // there (host/run/crash_bundle.h).
  absl::Status SaveCall(const LoadedMethod& method, const RunContext& context,
                        const SlotTask& task);

 private:
  CallSettings Settings(const LoadedMethod& method, const std::string& stage,
                        const std::string& function, const std::string& slot,
                        const ResolvedOptions& options, uint64_t seed);
  nlohmann::json Words(const LoadedMethod& method, const RunContext& context,
                       const std::string& function, absl::Span<const SlotTask> tasks) const;
  std::vector<SlotOutcome> RunGroup(const LoadedMethod& method, const RunContext& context,
                                    absl::Span<const SlotTask> tasks);
  SlotOutcome RunOne(const LoadedMethod& method, const RunContext& context, const SlotTask& task);
  absl::StatusOr<PackedWeight> ToHost(PackedWeight packed, const SlotTask& task,
                                      const std::string& what);

  Backend& backend_;
  LastWords* words_;
  EventSink sink_;
  PluginLog log_{[this](int32_t severity, const std::string& text) {
    sink_({{"type", "log"}, {"severity", severity}, {"text", text}});
  }};
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_METHOD_RUNNER_H_
