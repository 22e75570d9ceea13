#include "core/calib/calibration.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/calib/collector.h"
#include "core/model/window_states.h"

namespace quantmill {
namespace {

constexpr int kFirstMlpGroup = 2;

// Input features of each input group of a block.
std::vector<int64_t> GroupFeatures(const ModelConfig& config, int64_t experts) {
  std::vector<int64_t> features = {config.hidden_size, config.q_features()};
  if (experts == 0) {
    features.insert(features.end(), {config.hidden_size, config.intermediate_size});
  }
  for (int64_t expert = 0; expert < experts; ++expert) {
    features.insert(features.end(), {config.hidden_size, config.expert_intermediate_size});
  }
  return features;
}

// What one Collect has to do, sorted by the stream it needs.
struct CollectPlan {
  std::vector<StatRequest> quantized, original, cross;
  std::vector<int64_t> in_features;
  int last_group = 0;
  bool identical = false;     // both streams are the same: cross is zero
  bool experts_seen = false;  // inputs of experts are wanted: their rows need windows one by one
};

// Passes every input on to two observers.
class ObserverPair : public BlockObserver {
 public:
  ObserverPair(BlockObserver& first, BlockObserver& second) : first_(first), second_(second) {}
  absl::Status OnInput(int input_group, const Tensor& x) override {
    QM_RETURN_IF_ERROR(first_.OnInput(input_group, x));
    return second_.OnInput(input_group, x);
  }

 private:
  BlockObserver& first_;
  BlockObserver& second_;
};

absl::Status CheckRequest(const StatRequest& request, size_t groups, bool has_original) {
  if (request.input_group < 0 || static_cast<size_t>(request.input_group) >= groups) {
    return absl::InvalidArgumentError(absl::StrCat("statistics asked for input group ",
                                                   request.input_group, " of a block with ", groups,
                                                   " groups"));
  }
  const bool rows = request.kind == StatKind::kRows;
  if (rows != (request.max_rows > 0)) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("max_rows is ", request.max_rows, " in a request for '",
                               std::string(StatId(request.kind)), "'"),
                  "it belongs to 'rows', where it must be at least 1"));
  }
  if (request.kind == StatKind::kCross && request.from_original) {
    return absl::InvalidArgumentError("'cross' compares both streams; it has no original form");
  }
  if ((request.kind == StatKind::kCross || request.from_original) && !has_original) {
    return absl::FailedPreconditionError(
        ErrorText("statistics of the untouched model were asked for",
                  "its activations are not kept in this calibration", "keep the original stream"));
  }
  return absl::OkStatus();
}

class CalibrationImpl : public Calibration {
 public:
  CalibrationImpl(Backend& backend, const ModelConfig& config, const CalibrationOptions& options)
      : backend_(backend), config_(config), options_(options) {}

  absl::Status Start(const Tensor& windows, const Tensor& embedding);

  int64_t windows() const override { return states_.windows(); }
  int64_t length() const override { return states_.length(); }
  int64_t block() const override { return block_; }
  absl::Status Collect(const BlockWeights& weights, const BlockWeights* original,
                       absl::Span<const StatRequest> requests, Statistics* out) override;
  absl::Status Advance(const BlockWeights& weights, const BlockWeights* original) override;
  absl::StatusOr<Tensor> Input(int64_t window, bool original_stream) override;
  absl::StatusOr<Tensor> Output(const BlockWeights& weights, int64_t window,
                                bool original_stream) override;

 private:
  absl::StatusOr<CollectPlan> Plan(const BlockWeights& weights, bool identical,
                                   absl::Span<const StatRequest> requests) const;
  std::vector<WindowRange> Ranges(bool one_by_one) const;
  // Runs the current block up to the plan's last group.
  absl::Status Observe(const BlockWeights& weights, const WindowStates& states, WindowRange range,
                       int last_group, BlockObserver* observer, Routing* routing) const;
  // How many rows each group will see: known for dense groups, counted for experts.
  absl::StatusOr<GroupRows> ExpectedRows(const BlockWeights& weights, const WindowStates& states,
                                         const CollectPlan& plan,
                                         const std::vector<StatRequest>& requests) const;
  absl::StatusOr<Collector> MakeCollector(const BlockWeights& weights, bool from_original,
                                          const CollectPlan& plan,
                                          const std::vector<StatRequest>& requests) const;
  absl::Status RunPlan(const BlockWeights& weights, const BlockWeights& untouched,
                       const CollectPlan& plan, Statistics* out);
  absl::Status CheckBlock() const;
  absl::StatusOr<const WindowStates*> Stream(int64_t window, bool original_stream) const;
  absl::Status Progress(int64_t done, int64_t total) const {
    if (!options_.progress) return absl::OkStatus();
    return options_.progress(static_cast<double>(done) / static_cast<double>(total));
  }
  // The untouched model's states, which are the quantized stream's until the two differ.
  const WindowStates& OriginalStates() const { return original_ ? *original_ : states_; }

  Backend& backend_;
  const ModelConfig& config_;
  CalibrationOptions options_;
  RopeTables rope_;
  WindowStates states_;
  std::optional<WindowStates> original_;  // absent while equal to states_
  int64_t block_ = 0;
};

absl::Status CalibrationImpl::Start(const Tensor& windows, const Tensor& embedding) {
  QM_ASSIGN_OR_RETURN(states_, WindowStates::Embed(backend_, windows, embedding,
                                                   options_.batch_rows, options_.hidden_on_device));
  QM_ASSIGN_OR_RETURN(rope_, MakeRopeTables(config_, states_.length(), backend_));
  return absl::OkStatus();
}

absl::Status CalibrationImpl::CheckBlock() const {
  if (block_ < config_.layers) return absl::OkStatus();
  return absl::FailedPreconditionError("the calibration has already passed the last block");
}

absl::StatusOr<CollectPlan> CalibrationImpl::Plan(const BlockWeights& weights, bool identical,
                                                  absl::Span<const StatRequest> requests) const {
  CollectPlan plan;
  plan.identical = identical;
  const int64_t experts = static_cast<int64_t>(weights.moe.experts.size());
  plan.in_features = GroupFeatures(config_, experts);
  for (const StatRequest& request : requests) {
    QM_RETURN_IF_ERROR(CheckRequest(request, plan.in_features.size(), options_.keep_original));
    plan.last_group = std::max(plan.last_group, request.input_group);
    if (request.kind == StatKind::kCross) {
      plan.cross.push_back(request);
    } else if (request.from_original && !identical) {
      plan.original.push_back(request);
    } else {
      plan.quantized.push_back(request);
    }
  }
  plan.experts_seen = experts > 0 && plan.last_group >= kFirstMlpGroup;
  return plan;
}

std::vector<WindowRange> CalibrationImpl::Ranges(bool one_by_one) const {
  std::vector<WindowRange> ranges;
  const int64_t count = one_by_one ? states_.windows() : states_.batches();
  for (int64_t i = 0; i < count; ++i) {
    ranges.push_back(one_by_one ? WindowRange{i, i + 1} : states_.Batch(i));
  }
  return ranges;
}

absl::Status CalibrationImpl::Observe(const BlockWeights& weights, const WindowStates& states,
                                      WindowRange range, int last_group, BlockObserver* observer,
                                      Routing* routing) const {
  QM_ASSIGN_OR_RETURN(Tensor hidden, states.Load(backend_, range));
  BlockRun run;
  run.batch = range.count();
  run.observer = observer;
  run.stop_after_group = last_group;
  run.routing = routing;
  return RunBlock(backend_, config_, weights, block_, rope_, run, &hidden);
}

absl::StatusOr<GroupRows> CalibrationImpl::ExpectedRows(
    const BlockWeights& weights, const WindowStates& states, const CollectPlan& plan,
    const std::vector<StatRequest>& requests) const {
  GroupRows rows;
  const int dense_groups = weights.moe.experts.empty() ? 4 : kFirstMlpGroup;
  for (int group = 0; group < dense_groups; ++group) rows[group] = windows() * length();
  const bool counting =
      plan.experts_seen && std::any_of(requests.begin(), requests.end(), [](const StatRequest& r) {
        return r.kind == StatKind::kRows && r.input_group >= kFirstMlpGroup;
      });
  if (!counting) return rows;
  for (const WindowRange& range : Ranges(true)) {
    Routing routing;
    QM_RETURN_IF_ERROR(Observe(weights, states, range, kFirstMlpGroup, nullptr, &routing));
    for (int64_t i = 0; i < routing.experts.elements(); ++i) {
      const int group = kFirstMlpGroup + 2 * routing.experts.as<int32_t>()[i];
      ++rows[group];
      ++rows[group + 1];
    }
  }
  return rows;
}

absl::StatusOr<Collector> CalibrationImpl::MakeCollector(
    const BlockWeights& weights, bool from_original, const CollectPlan& plan,
    const std::vector<StatRequest>& requests) const {
  const WindowStates& states = from_original ? OriginalStates() : states_;
  QM_ASSIGN_OR_RETURN(GroupRows rows, ExpectedRows(weights, states, plan, requests));
  std::vector<int> capture;  // `cross` compares with inputs of the quantized stream
  if (!from_original) {
    for (const StatRequest& request : plan.cross) capture.push_back(request.input_group);
  }
  Collector collector(backend_, from_original, plan.in_features, std::move(rows),
                      std::move(capture));
  for (const StatRequest& request : requests) QM_RETURN_IF_ERROR(collector.Add(request));
  return collector;
}

absl::Status CalibrationImpl::RunPlan(const BlockWeights& weights, const BlockWeights& untouched,
                                      const CollectPlan& plan, Statistics* out) {
  QM_ASSIGN_OR_RETURN(Collector quantized, MakeCollector(weights, false, plan, plan.quantized));
  QM_ASSIGN_OR_RETURN(Collector original, MakeCollector(untouched, true, plan, plan.original));
  CrossCollector cross(backend_, quantized);
  for (const StatRequest& request : plan.cross) {
    QM_RETURN_IF_ERROR(
        cross.Add(request, plan.in_features[static_cast<size_t>(request.input_group)]));
  }
  ObserverPair both(cross, original);
  const bool needs_quantized = !plan.quantized.empty() || !plan.cross.empty();
  // With experts the two observers of the untouched block need different routings.
  const bool joined = !plan.cross.empty() && !plan.original.empty() && !plan.experts_seen;
  const std::vector<WindowRange> ranges = Ranges(plan.experts_seen);
  for (size_t i = 0; i < ranges.size(); ++i) {
    const WindowRange range = ranges[i];
    quantized.BeginBatch(range.count());
    original.BeginBatch(range.count());
    Routing routing;
    if (needs_quantized) {
      QM_RETURN_IF_ERROR(Observe(weights, states_, range, plan.last_group, &quantized, &routing));
    }
    if (!plan.cross.empty() && !plan.identical) {
      BlockObserver* observer = joined ? static_cast<BlockObserver*>(&both) : &cross;
      QM_RETURN_IF_ERROR(
          Observe(untouched, OriginalStates(), range, plan.last_group, observer, &routing));
    }
    if (!plan.original.empty() && !joined) {
      QM_RETURN_IF_ERROR(
          Observe(untouched, OriginalStates(), range, plan.last_group, &original, nullptr));
    }
    QM_RETURN_IF_ERROR(Progress(static_cast<int64_t>(i) + 1, static_cast<int64_t>(ranges.size())));
  }
  QM_RETURN_IF_ERROR(original.Finish(out));
  QM_RETURN_IF_ERROR(quantized.Finish(out));
  cross.Finish(out);
  return absl::OkStatus();
}

absl::Status CalibrationImpl::Collect(const BlockWeights& weights, const BlockWeights* original,
                                      absl::Span<const StatRequest> requests, Statistics* out) {
  QM_RETURN_IF_ERROR(CheckBlock());
  const bool identical = original == nullptr && !original_.has_value();
  QM_ASSIGN_OR_RETURN(const CollectPlan plan, Plan(weights, identical, requests));
  if (requests.empty()) return absl::OkStatus();
  return RunPlan(weights, original != nullptr ? *original : weights, plan, out);
}

absl::Status CalibrationImpl::Advance(const BlockWeights& weights, const BlockWeights* original) {
  QM_RETURN_IF_ERROR(CheckBlock());
  if (options_.keep_original && original != nullptr && !original_) {
    QM_ASSIGN_OR_RETURN(original_, states_.Clone(backend_));
  }
  const int64_t batches = states_.batches();
  for (int64_t batch = 0; batch < batches; ++batch) {
    QM_RETURN_IF_ERROR(states_.Advance(backend_, config_, weights, block_, rope_, batch));
    if (original_) {
      const BlockWeights& untouched = original != nullptr ? *original : weights;
      QM_RETURN_IF_ERROR(original_->Advance(backend_, config_, untouched, block_, rope_, batch));
    }
    QM_RETURN_IF_ERROR(Progress(batch + 1, batches));
  }
  ++block_;
  return absl::OkStatus();
}

absl::StatusOr<const WindowStates*> CalibrationImpl::Stream(int64_t window,
                                                            bool original_stream) const {
  if (window < 0 || window >= windows()) {
    return absl::InvalidArgumentError(
        absl::StrCat("calibration window ", window, " of ", windows(), " does not exist"));
  }
  if (original_stream && !options_.keep_original) {
    return absl::FailedPreconditionError("the original stream is not kept in this calibration");
  }
  return original_stream ? &OriginalStates() : &states_;
}

absl::StatusOr<Tensor> CalibrationImpl::Input(int64_t window, bool original_stream) {
  QM_ASSIGN_OR_RETURN(const WindowStates* states, Stream(window, original_stream));
  return states->Load(backend_, {window, window + 1});
}

absl::StatusOr<Tensor> CalibrationImpl::Output(const BlockWeights& weights, int64_t window,
                                               bool original_stream) {
  QM_RETURN_IF_ERROR(CheckBlock());
  QM_ASSIGN_OR_RETURN(Tensor hidden, Input(window, original_stream));
  QM_RETURN_IF_ERROR(RunBlock(backend_, config_, weights, block_, rope_, BlockRun{}, &hidden));
  return hidden;
}

int64_t StatisticElements(const StatRequest& request, int64_t in, int64_t rows) {
  if (request.kind == StatKind::kHessian || request.kind == StatKind::kCross) return in * in;
  return request.kind == StatKind::kRows ? SampleRows(rows, request.max_rows).count * in : in;
}

}  // namespace

CalibrationMemory EstimateCalibrationMemory(const ModelConfig& config, int64_t windows,
                                            int64_t length, DType activation_dtype,
                                            const CalibrationOptions& options, int64_t block,
                                            absl::Span<const StatRequest> requests) {
  const int64_t element = ElementSize(activation_dtype);
  const size_t index = static_cast<size_t>(block);
  const bool moe = index < config.moe_layer.size() && config.moe_layer[index];
  const std::vector<int64_t> features = GroupFeatures(config, moe ? config.experts : 0);
  const int64_t streams = options.keep_original ? 2 : 1;
  const int64_t batch = std::clamp<int64_t>(options.batch_rows / length, 1, windows) * length;
  CalibrationMemory memory;
  memory.hidden = windows * length * config.hidden_size * element * streams;
  // Residual, its change and the normed input live all the time; with them either attention's
  // tensors or the two inner ones of the MLP (of a mixture: at most every row in one expert).
  const int64_t attention = 2 * config.q_features() + 2 * config.kv_features();
  const int64_t inner = moe ? 2 * config.expert_intermediate_size + 2 * config.hidden_size
                            : 2 * config.intermediate_size;
  memory.activations = batch * element * (3 * config.hidden_size + std::max(attention, inner));
  for (const StatRequest& request : requests) {
    if (request.input_group < 0 || static_cast<size_t>(request.input_group) >= features.size()) {
      continue;
    }
    const int64_t in = features[static_cast<size_t>(request.input_group)];
    memory.statistics +=
        StatisticElements(request, in, windows * length) * ElementSize(DType::kF32);
    // The quantized stream's input waits for the untouched block's.
    if (request.kind == StatKind::kCross) memory.activations += batch * in * element;
  }
  return memory;
}

absl::StatusOr<std::unique_ptr<Calibration>> Calibration::Create(
    Backend& backend, const ModelConfig& config, const Tensor& windows, const Tensor& embedding,
    const CalibrationOptions& options) {
  auto calibration = std::make_unique<CalibrationImpl>(backend, config, options);
  QM_RETURN_IF_ERROR(calibration->Start(windows, embedding));
  return calibration;
}

}  // namespace quantmill
