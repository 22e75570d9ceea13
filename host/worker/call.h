// The host's side of one plugin call: error text, options, scratch, emitted results, services.
#ifndef QUANTMILL_HOST_WORKER_CALL_H_
#define QUANTMILL_HOST_WORKER_CALL_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/tensor/backend.h"
#include "host/worker/plugin_log.h"
#include "quantmill/all.h"

namespace quantmill {

class BlockTrials;

// Option values checked against a method's table, defaults filled in, text form.
using ResolvedOptions = std::map<std::string, std::string>;

struct CallSettings {
  std::string what;  // "plugin gptq 0.1.0, quantize-linear.run, model.layers.3.mlp.down_proj"
  const ResolvedOptions* options = nullptr;  // null: none
  uint64_t seed = 0;
  uint64_t scratch_limit = 0;  // bytes; 0 = no limit
  // Receives progress in [0, 1] (negative: alive); returns true to cancel. May be null.
  std::function<bool(double)> progress;
  // Told when the call enters (true) and leaves (false) a service that may take long and reports no
  // progress (linear algebra, runs of the block). May be null.
  std::function<void(bool entered)> service;
  bool with_services = true;     // false: every host extension is NULL
  BlockTrials* block = nullptr;  // what qm.host.block/1 runs; null: it is not offered
  // Receives the plugin's log lines (severity 0 debug, 1 info, 2 warning), from any thread. Null:
  // warnings go to stderr, the rest nowhere.
  LogSink log;
  // Finish() waits for the stream. Off for products, which must not synchronize.
  bool synchronize = true;
};

// One open call. Create, hand get() to the plugin, then Finish() with what the plugin returned.
class PluginCall {
 public:
  PluginCall(Backend& backend, CallSettings settings);
  ~PluginCall();
  PluginCall(const PluginCall&) = delete;
  PluginCall& operator=(const PluginCall&) = delete;

  qm_call* get();
  // Turns the plugin's return code and text into a status that names the call; a bare code becomes
  // "... returned INTERNAL without a message" (QM-P-005). Waits for the stream on CUDA.
  absl::Status Finish(qm_status code);
  // The packed weight that `packed` (filled by the plugin) and the tensors emitted under `item`
  // describe. Checks that every tensor was emitted in this call.
  absl::StatusOr<PackedWeight> TakePacked(const qm_packed& packed, uint64_t item = 0);
  // Emitted tensors of `item`, by name.
  std::vector<NamedTensor> TakeEmitted(uint64_t item = 0);
  uint64_t scratch_peak_bytes() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// A view of a packed weight for the C ABI; valid while `weight` lives and is not changed.
class PackedView {
 public:
  explicit PackedView(const PackedWeight& weight);
  const qm_packed* get() const { return &packed_; }

 private:
  std::vector<qm_named_tensor> tensors_;
  qm_packed packed_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_CALL_H_
