#include "host/trial/try_layers.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/trial/worker_call.h"
#include "host/worker/plugin_log.h"
#include "sdk/check/synthetic.h"

namespace quantmill {
namespace {

// Rows of input per input channel: the Hessian has full rank.
constexpr int64_t kRowsPerChannel = 2;

nlohmann::json ToJson(const TryRequest& request) {
  return {{"mode", kTryMode},        {"setup", ToJson(request.setup)}, {"options", request.options},
          {"seed", request.seed},    {"out", request.out_features},    {"in", request.in_features},
          {"layers", request.layers}};
}

TryRequest RequestFromJson(const nlohmann::json& json) {
  TryRequest request;
  request.setup = TrialSetupFromJson(json.value("setup", nlohmann::json::object()));
  request.options = json.value("options", ResolvedOptions());
  request.seed = json.value("seed", uint64_t{1});
  request.out_features = json.value("out", int64_t{0});
  request.in_features = json.value("in", int64_t{0});
  request.layers = json.value("layers", std::vector<std::string>());
  return request;
}

TryRow RowFromJson(const nlohmann::ordered_json& json) {
  TryRow row;
  row.method = json.value("method", "");
  row.layer = json.value("layer", "");
  row.outcome = json.value("outcome", "");
  row.text = json.value("text", "");
  row.result = TrialResultFromJson(json);
  return row;
}

absl::StatusOr<SyntheticKind> KindOf(const std::string& name) {
  for (const SyntheticKind kind : kSyntheticKinds) {
    if (SyntheticName(kind) == name) return kind;
  }
  return absl::InvalidArgumentError(absl::StrCat("no synthetic layer '", name, "'"));
}

absl::StatusOr<Statistics> Measure(Backend& backend, const SyntheticLayer& layer,
                                   const LinearSlot& slot, const SlotPlan& plan) {
  Statistics statistics;
  for (const SlotPlan::Stat& stat : plan.stats) {
    const std::string id(StatId(stat.request.kind));
    const qm_stat_request request = {id.c_str(), stat.request.max_rows, QM_F32,
                                     stat.request.from_original ? QM_STAT_FROM_ORIGINAL : 0u};
    QM_ASSIGN_OR_RETURN(const std::vector<NamedTensor> value,
                        MeasureStatistics(backend, layer, {&request, 1}));
    statistics.Set(stat.request, value.at(0).tensor);
    statistics.SetRowCount(slot.input_group, stat.request.from_original, layer.inputs.dim(0));
  }
  return statistics;
}

absl::StatusOr<TrialResult> TryLayer(const TryRequest& request, const std::string& name,
                                     TrialSession& session) {
  QM_ASSIGN_OR_RETURN(const SyntheticKind kind, KindOf(name));
  QM_ASSIGN_OR_RETURN(const SyntheticLayer layer,
                      MakeSyntheticLayer(kind, request.out_features, request.in_features,
                                         kRowsPerChannel * request.in_features, request.seed));
  TrialCall call;
  call.stage = kTryMode;
  call.slot = {.name = name,
               .role = "mlp.up",
               .out_features = request.out_features,
               .in_features = request.in_features};
  call.options = request.options;
  call.seed = request.seed;
  call.weight = layer.weight;
  call.statistics = [&](const SlotPlan& plan) {
    return Measure(session.backend(), layer, call.slot, plan);
  };
  call.output_error = [&](const Tensor& approximate) {
    return OutputNmse(session.host(), layer, approximate);
  };
  call.timed = true;
  return session.Call(call);
}

TryRow MakeRow(const TryRequest& request, const std::string& layer,
               const absl::StatusOr<TrialResult>& result) {
  TryRow row;
  row.method = request.setup.method;
  row.layer = layer;
  row.outcome = result.ok() ? "ok" : "failed";
  if (result.ok()) row.result = *result;
  if (!result.ok()) row.text = std::string(result.status().message());
  return row;
}

// Hands every row on as soon as it is there. An error: nothing in this process works any more.
absl::Status TryLayers(const TryRequest& request, const EventSink& sink,
                       const std::function<void(const TryRow&)>& done) {
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<TrialSession> session,
                      TrialSession::Open(request.setup, sink));
  for (const std::string& layer : request.layers) {
    const absl::StatusOr<TrialResult> result = TryLayer(request, layer, *session);
    if (IsDeviceLost(result.status())) return result.status();
    done(MakeRow(request, layer, result));
  }
  return absl::OkStatus();
}

// For the layers that `rows` does not have yet.
void FillWith(const absl::Status& status, const TryRequest& request, std::vector<TryRow>* rows) {
  for (size_t i = rows->size(); i < request.layers.size(); ++i) {
    rows->push_back(MakeRow(request, request.layers[i], status));
  }
}

}  // namespace

nlohmann::ordered_json ToJson(const TryRow& row) {
  nlohmann::ordered_json json = {
      {"method", row.method}, {"layer", row.layer}, {"outcome", row.outcome}};
  if (row.outcome == "ok") {
    json.update(ToJson(row.result));
  } else {
    json["text"] = row.text;
  }
  return json;
}

std::vector<std::string> TryLayerNames() {
  std::vector<std::string> names;
  names.reserve(kSyntheticKinds.size());
  for (const SyntheticKind kind : kSyntheticKinds) names.emplace_back(SyntheticName(kind));
  return names;
}

absl::StatusOr<std::vector<TryRow>> TryInWorkers(TryRequest request, double hang_seconds) {
  std::vector<TryRow> rows;
  const std::vector<std::string> layers = request.layers;
  while (rows.size() < layers.size()) {
    request.layers.assign(layers.begin() + static_cast<std::ptrdiff_t>(rows.size()), layers.end());
    QM_ASSIGN_OR_RETURN(const WorkerCallEnd end, CallInWorker(
                                                     [&request](const std::string& last_words) {
                                                       request.setup.last_words = last_words;
                                                       return ToJson(request);
                                                     },
                                                     hang_seconds,
                                                     [&rows](const nlohmann::json& event) {
                                                       if (event.value("type", "") == "row")
                                                         rows.push_back(RowFromJson(event));
                                                     }));
    if (end.lost && rows.size() < layers.size()) {
      TryRow row;
      row.method = request.setup.method;
      row.layer = layers[rows.size()];
      row.outcome = end.hung ? "hung" : "crashed";
      row.text = end.text;
      rows.push_back(std::move(row));
    } else if (!end.lost && rows.size() < layers.size()) {
      request.layers = layers;
      FillWith(end.status.ok() ? absl::InternalError("the worker left this layer out") : end.status,
               request, &rows);
    }
  }
  return rows;
}

std::vector<TryRow> TryInProcess(const TryRequest& request) {
  std::vector<TryRow> rows;
  const absl::Status status = TryLayers(
      request,
      [](const nlohmann::json& event) {
        PrintWarning(event.value("severity", 0), event.value("text", ""));
      },
      [&rows](const TryRow& row) { rows.push_back(row); });
  FillWith(status, request, &rows);
  return rows;
}

absl::StatusOr<nlohmann::ordered_json> RunTryTask(const nlohmann::json& request,
                                                  const EventSink& sink) {
  QM_RETURN_IF_ERROR(TryLayers(RequestFromJson(request), sink, [&sink](const TryRow& row) {
    nlohmann::json event = ToJson(row);
    event["type"] = "row";
    sink(event);
  }));
  return nlohmann::ordered_json::object();
}

}  // namespace quantmill
