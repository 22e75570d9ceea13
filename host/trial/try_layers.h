// `quantmill try`: a method on made-up layers, in worker processes that it may take down.
#ifndef QUANTMILL_HOST_TRIAL_TRY_LAYERS_H_
#define QUANTMILL_HOST_TRIAL_TRY_LAYERS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "host/supervisor/process.h"
#include "host/trial/session.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct TryRequest {
  TrialSetup setup;
  ResolvedOptions options;
  uint64_t seed = 1;
  int64_t out_features = 256, in_features = 512;
  std::vector<std::string> layers;  // by SyntheticName()
};

// One method on one layer.
struct TryRow {
  std::string method, layer;
  // "ok", "failed" (an error was returned, or the result is wrong), "crashed" or "hung"
  std::string outcome;
  std::string text;    // of all but "ok": what happened, in which function
  TrialResult result;  // of "ok"
};
nlohmann::ordered_json ToJson(const TryRow& row);

// Names of all layers, in order.
std::vector<std::string> TryLayerNames();

// One row per layer of the request. A worker that is lost costs the layer it was at; the next one
// goes on behind it. hang_seconds: without a sign of life from the plugin. CANCELLED after SIGINT.
absl::StatusOr<std::vector<TryRow>> TryInWorkers(TryRequest request, double hang_seconds);
// The same in this process, for debuggers.
std::vector<TryRow> TryInProcess(const TryRequest& request);

// The worker's side: one event {"type":"row",...} per layer. `request`: as TryInWorkers wrote it.
absl::StatusOr<nlohmann::ordered_json> RunTryTask(const nlohmann::json& request,
                                                  const EventSink& sink);
inline constexpr char kTryMode[] = "try";

}  // namespace quantmill

#endif  // QUANTMILL_HOST_TRIAL_TRY_LAYERS_H_
