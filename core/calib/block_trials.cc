#include "core/calib/block_trials.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/block_edits.h"
#include "core/model/block_parts.h"
#include "core/threads/thread_pool.h"
#include "core/train/block_gradients.h"

namespace quantmill {
namespace {

constexpr int kOutputGroup = 1;
constexpr int64_t kSumTile = 1 << 16;

// Keeps the input of one group.
class Capture : public BlockObserver {
 public:
  explicit Capture(int group) : group_(group) {}
  absl::Status OnInput(int input_group, const Tensor& x) override {
    if (input_group == group_) input = x;
    return absl::OkStatus();
  }
  Tensor input;

 private:
  int group_;
};

// Sum of squared differences of two F32 host tensors, in fixed tiles.
double SquaredDifference(const Tensor& a, const Tensor& b, ThreadPool& threads) {
  const int64_t count = a.elements();
  const float* x = a.as<const float>();
  const float* y = b.as<const float>();
  std::vector<double> sums(static_cast<size_t>((count + kSumTile - 1) / kSumTile), 0.0);
  threads.ParallelFor(count, kSumTile, [&](int64_t begin, int64_t end, int) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const double difference = double{x[i]} - y[i];
      sum += difference * difference;
    }
    sums[static_cast<size_t>(begin / kSumTile)] = sum;
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

BlockTrials::BlockTrials(Backend& backend, const ModelConfig& config, int64_t block,
                         BlockWeights weights, int64_t windows, Inputs inputs, int64_t cache_bytes)
    : backend_(backend),
      config_(config),
      block_(block),
      weights_(std::move(weights)),
      slots_(BlockSlots(config, block)),
      windows_(windows),
      inputs_(std::move(inputs)),
      cache_bytes_(cache_bytes) {}

absl::StatusOr<BlockTrials::Target> BlockTrials::Resolve(std::string_view submodule) const {
  if (submodule.empty()) return Target{Part::kBlock, {}};
  if (submodule == "self_attn") return Target{Part::kAttention, {}};
  if (submodule == "mlp") return Target{Part::kMlp, {}};
  for (const LinearSlot& slot : slots_) {
    if (slot.name == submodule) return Target{Part::kLinear, slot};
  }
  return absl::NotFoundError(
      absl::StrCat("no submodule '", std::string(submodule), "' in ", BlockName(block_),
                   "; use self_attn, mlp, a linear's name, or nothing for the whole block"));
}

absl::StatusOr<BlockTrials::Place> BlockTrials::PlaceOf(const std::string& name) const {
  const std::string block = BlockName(block_);
  if (name == block + ".input_layernorm.weight") return Place{kInputNorm, -1};
  if (name == block + ".post_attention_layernorm.weight") return Place{kMlpNorm, -1};
  if (absl::EndsWith(name, "_norm.weight")) return Place{kQueries, -1};
  if (name == RouterName(config_, block_) + ".weight") return Place{kRouter, -1};
  const std::string module = name.substr(0, name.rfind('.'));
  for (const LinearSlot& slot : slots_) {
    if (slot.name != module) continue;
    if (slot.input_group == 0) return Place{kQueries, 0};
    if (slot.input_group == kOutputGroup) return Place{kOutput, kOutputGroup};
    return Place{kInner, slot.input_group};
  }
  return absl::NotFoundError(absl::StrCat("no tensor '", name, "' in ", block));
}

absl::StatusOr<BlockWeights> BlockTrials::Apply(absl::Span<const TensorOverride> overrides,
                                                std::vector<Place>* places) const {
  BlockWeights weights = weights_;
  if (overrides.empty()) return weights;
  const BlockTensors tensors(config_, block_, &weights);
  for (const TensorOverride& override : overrides) {
    Tensor* target = tensors.Find(override.name);
    if (target == nullptr) {
      return absl::NotFoundError(
          absl::StrCat("no tensor '", override.name, "' in ", BlockName(block_)));
    }
    if (!(override.value.shape() == target->shape()) || !IsModelFloat(override.value.dtype())) {
      return absl::InvalidArgumentError(absl::StrCat(
          "an override of ", override.name, " is ", AbslView(DTypeName(override.value.dtype())),
          " ", override.value.shape().ToString(), "; the tensor has shape ",
          target->shape().ToString(), " and must be F32, F16 or BF16"));
    }
    QM_ASSIGN_OR_RETURN(*target, backend_.ToDevice(override.value));
    QM_ASSIGN_OR_RETURN(const Place place, PlaceOf(override.name));
    places->push_back(place);
  }
  return weights;
}

bool BlockTrials::TouchesInput(const Target& target, const std::vector<Place>& places) {
  return std::any_of(places.begin(), places.end(), [&](const Place& place) {
    if (target.part == Part::kBlock) return false;
    if (target.part == Part::kAttention) return place.depth == kInputNorm;
    if (target.part == Part::kMlp) return place.depth <= kMlpNorm;
    const int group = target.slot.input_group;
    if (group == 0) return place.depth == kInputNorm;
    if (group == kOutputGroup) return place.depth <= kQueries;
    // The input of `down` also depends on gate and up of the same MLP.
    return place.depth <= kMlpNorm || (group % 2 == 1 && place.group == group - 1);
  });
}

absl::StatusOr<Tensor> BlockTrials::WindowInput(int64_t window) {
  if (window < 0 || window >= windows_) {
    return absl::InvalidArgumentError(
        absl::StrCat("there is no window ", window, "; the calibration has ", windows_));
  }
  QM_ASSIGN_OR_RETURN(Tensor hidden, inputs_(window));
  if (rope_.cosine.empty()) {
    QM_ASSIGN_OR_RETURN(rope_, MakeRopeTables(config_, hidden.dim(0), backend_));
  }
  return hidden;
}

absl::StatusOr<Tensor> BlockTrials::Attend(const BlockWeights& weights,
                                           const Tensor& normed) const {
  QM_ASSIGN_OR_RETURN(Tensor out, backend_.Allocate(normed.dtype(), normed.shape()));
  bool stopped = false;
  QM_RETURN_IF_ERROR(
      RunAttention(backend_, config_, weights, block_, rope_, BlockRun{}, normed, &out, &stopped));
  return out;
}

absl::StatusOr<Tensor> BlockTrials::BehindAttention(const BlockWeights& weights,
                                                    const Tensor& hidden) const {
  QM_ASSIGN_OR_RETURN(const Tensor normed,
                      Normalized(backend_, config_, weights.input_norm, hidden));
  QM_ASSIGN_OR_RETURN(Tensor out, Attend(weights, normed));
  QM_RETURN_IF_ERROR(backend_.Add(hidden, &out));
  return out;
}

absl::StatusOr<Tensor> BlockTrials::RunMlpOn(const BlockWeights& weights, const Tensor& x,
                                             Routing* routing) const {
  QM_ASSIGN_OR_RETURN(Tensor out, backend_.Allocate(x.dtype(), x.shape()));
  BlockRun run;
  run.routing = routing;
  bool stopped = false;
  QM_RETURN_IF_ERROR(RunMlp(backend_, config_, weights, run, x, &out, &stopped));
  return out;
}

absl::StatusOr<Tensor> BlockTrials::InputOf(const Target& target, const BlockWeights& weights,
                                            const Tensor& hidden, Routing* routing) const {
  if (target.part == Part::kBlock) return hidden;
  const bool linear = target.part == Part::kLinear;
  if (target.part == Part::kAttention || (linear && target.slot.input_group <= kOutputGroup)) {
    QM_ASSIGN_OR_RETURN(Tensor normed, Normalized(backend_, config_, weights.input_norm, hidden));
    if (!linear || target.slot.input_group == 0) return normed;
    Capture capture(kOutputGroup);
    BlockRun run;
    run.observer = &capture;
    run.stop_after_group = kOutputGroup;
    bool stopped = false;
    Tensor unused;
    QM_RETURN_IF_ERROR(
        RunAttention(backend_, config_, weights, block_, rope_, run, normed, &unused, &stopped));
    return capture.input;
  }
  QM_ASSIGN_OR_RETURN(const Tensor middle, BehindAttention(weights, hidden));
  QM_ASSIGN_OR_RETURN(Tensor normed,
                      Normalized(backend_, config_, weights.post_attention_norm, middle));
  if (!linear) return normed;
  Capture capture(target.slot.input_group);
  BlockRun run;
  run.observer = &capture;
  run.stop_after_group = target.slot.input_group;
  run.routing = routing;
  bool stopped = false;
  QM_ASSIGN_OR_RETURN(Tensor unused, backend_.Allocate(normed.dtype(), normed.shape()));
  QM_RETURN_IF_ERROR(RunMlp(backend_, config_, weights, run, normed, &unused, &stopped));
  return capture.input;
}

absl::StatusOr<Tensor> BlockTrials::BlockFromMiddle(const BlockWeights& weights,
                                                    const Tensor& middle, Routing* routing) const {
  QM_ASSIGN_OR_RETURN(const Tensor normed,
                      Normalized(backend_, config_, weights.post_attention_norm, middle));
  QM_ASSIGN_OR_RETURN(Tensor out, RunMlpOn(weights, normed, routing));
  QM_RETURN_IF_ERROR(backend_.Add(middle, &out));
  return out;
}

absl::StatusOr<Tensor> BlockTrials::OutputOf(const Target& target, const BlockWeights& weights,
                                             const Tensor& input, Routing* routing) const {
  switch (target.part) {
    case Part::kAttention:
      return Attend(weights, input);
    case Part::kMlp:
      return RunMlpOn(weights, input, routing);
    case Part::kBlock: {
      QM_ASSIGN_OR_RETURN(const Tensor middle, BehindAttention(weights, input));
      return BlockFromMiddle(weights, middle, routing);
    }
    case Part::kLinear:
      break;
  }
  QM_ASSIGN_OR_RETURN(Tensor out,
                      backend_.Allocate(input.dtype(), {input.dim(0), target.slot.out_features}));
  if (input.dim(0) == 0) return out;
  BlockWeights handles = weights;
  QM_RETURN_IF_ERROR(ApplyLinear(backend_, *handles.At(target.slot), input, &out));
  return out;
}

absl::Status BlockTrials::StartTraining() {
  if (training_ != nullptr) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(training_, MakeTrainingOps(backend_));
  return absl::OkStatus();
}

absl::StatusOr<double> BlockTrials::Difference(const Tensor& a, const Tensor& b) {
  if (a.device().is_cpu()) return SquaredDifference(a, b, backend_.threads());
  // One sum comes to the host, not the outputs: a search asks for thousands of losses.
  QM_RETURN_IF_ERROR(StartTraining());
  QM_ASSIGN_OR_RETURN(Tensor difference, backend_.Allocate(DType::kF32, a.shape()));
  return training_->SquaredError(a, b, 1, &difference);
}

absl::StatusOr<BlockTrials::Entry> BlockTrials::Reference(const Target& target, int64_t window) {
  const auto known = cache_.find(window);
  if (known != cache_.end()) return known->second;
  QM_ASSIGN_OR_RETURN(const Tensor hidden, WindowInput(window));
  Entry entry;
  QM_ASSIGN_OR_RETURN(entry.input, InputOf(target, weights_, hidden, &entry.routing));
  if (target.part == Part::kBlock) {
    QM_ASSIGN_OR_RETURN(entry.middle, BehindAttention(weights_, hidden));
    QM_ASSIGN_OR_RETURN(entry.output, BlockFromMiddle(weights_, entry.middle, &entry.routing));
  } else {
    QM_ASSIGN_OR_RETURN(entry.output, OutputOf(target, weights_, entry.input, &entry.routing));
  }
  if (cached_bytes_ + entry.bytes() <= cache_bytes_) {
    cached_bytes_ += entry.bytes();
    cache_[window] = entry;
  }
  return entry;
}

absl::StatusOr<Tensor> BlockTrials::Trial(const Target& target, int64_t window, const Entry& entry,
                                          const BlockWeights& weights,
                                          const std::vector<Place>& places) {
  // Rows are routed anew where the router or its input has changed.
  const bool rerouted = std::any_of(places.begin(), places.end(),
                                    [](const Place& place) { return place.depth <= kRouter; });
  Routing routing;
  if (!rerouted || target.part == Part::kLinear) routing = entry.routing;
  if (target.part == Part::kBlock) {
    const bool attention = std::any_of(places.begin(), places.end(),
                                       [](const Place& place) { return place.depth < kMlpNorm; });
    if (!attention) return BlockFromMiddle(weights, entry.middle, &routing);
  }
  Tensor input = entry.input;
  if (TouchesInput(target, places)) {
    QM_ASSIGN_OR_RETURN(const Tensor hidden, WindowInput(window));
    QM_ASSIGN_OR_RETURN(input, InputOf(target, weights, hidden, &routing));
  }
  return OutputOf(target, weights, input, &routing);
}

absl::StatusOr<Tensor> BlockTrials::Forward(int64_t window,
                                            absl::Span<const TensorOverride> overrides) {
  std::vector<Place> places;
  QM_ASSIGN_OR_RETURN(const BlockWeights weights, Apply(overrides, &places));
  QM_ASSIGN_OR_RETURN(const Tensor hidden, WindowInput(window));
  return OutputOf({Part::kBlock, {}}, weights, hidden, nullptr);
}

absl::StatusOr<double> BlockTrials::Loss(std::string_view submodule, int64_t first, int64_t count,
                                         absl::Span<const TensorOverride> overrides) {
  if (first < 0 || count < 1 || first > windows_ - count) {
    return absl::InvalidArgumentError(absl::StrCat("windows ", first, " to ", first + count - 1,
                                                   " were asked for; the calibration has ",
                                                   windows_));
  }
  QM_ASSIGN_OR_RETURN(const Target target, Resolve(submodule));
  std::vector<Place> places;
  QM_ASSIGN_OR_RETURN(const BlockWeights weights, Apply(overrides, &places));
  if (submodule != cached_submodule_) {
    cache_.clear();
    cached_bytes_ = 0;
    cached_submodule_ = submodule;
  }
  double sum = 0;
  int64_t elements = 0;
  for (int64_t window = first; window < first + count; ++window) {
    QM_ASSIGN_OR_RETURN(const Entry entry, Reference(target, window));
    QM_ASSIGN_OR_RETURN(const Tensor output, Trial(target, window, entry, weights, places));
    if (output.elements() == 0) continue;
    QM_ASSIGN_OR_RETURN(const double squares, Difference(output, entry.output));
    sum += squares;
    elements += output.elements();
  }
  return elements == 0 ? 0.0 : sum / static_cast<double>(elements);
}

absl::Status BlockTrials::Vjp(int64_t window, absl::Span<const TensorOverride> overrides,
                              const Tensor& d_out, absl::Span<const NamedTensor> gradients) {
  std::vector<Place> places;
  QM_ASSIGN_OR_RETURN(const BlockWeights weights, Apply(overrides, &places));
  QM_ASSIGN_OR_RETURN(BlockWeights targets, PlaceGradients(config_, block_, weights, gradients));
  QM_ASSIGN_OR_RETURN(const Tensor hidden, WindowInput(window));
  if (!IsModelFloat(d_out.dtype()) || !(d_out.shape() == hidden.shape())) {
    return absl::InvalidArgumentError(
        absl::StrCat("d_out is ", AbslView(DTypeName(d_out.dtype())), " ", d_out.shape().ToString(),
                     "; the block's output has shape ", hidden.shape().ToString(),
                     " and its gradient must be F32, F16 or BF16"));
  }
  QM_RETURN_IF_ERROR(StartTraining());
  const TrainedBlock block = {&config_, block_, &weights, &rope_, 1};
  BlockTape tape;
  QM_RETURN_IF_ERROR(RunBlockOnTape(backend_, block, hidden, &tape).status());
  Tensor d_output = d_out;
  if (d_out.dtype() != DType::kF32) {
    QM_ASSIGN_OR_RETURN(d_output, backend_.Allocate(DType::kF32, d_out.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(d_out, &d_output));
  }
  return BackwardThroughBlock(*training_, block, tape, d_output, &targets, nullptr);
}

}  // namespace quantmill
