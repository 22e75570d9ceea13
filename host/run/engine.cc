#include "host/run/engine.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/run/unit_source.h"

namespace quantmill {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kUnknownDigest[] = "?";

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

SlotWorkInputs ForSlots(const EngineInputs& in) {
  return {in.plan, in.stages, in.backend, in.runner, in.formats, in.journal, in.work_dir, in.sink};
}

// Slots of a stage by input group, in the order of execution.
std::map<int, std::vector<size_t>> ByGroup(const PipelinePlan& plan, const PreparedStage& stage,
                                           const std::vector<size_t>& slots) {
  std::map<int, std::vector<size_t>> groups;
  for (size_t index : slots) {
    const LinearSlot& slot = plan.slots[static_cast<size_t>(stage.stage->slots[index])];
    groups[slot.input_group].push_back(index);
  }
  return groups;
}

}  // namespace

struct Engine::BlockState {
  int64_t index = 0;
  BlockWeights dense;    // as in the original
  BlockWeights current;  // with what is packed so far, dequantized
  LinearWeight head;     // index == layers: the only weight
  std::optional<Statistics> shared;
  bool measured = false;  // its hidden states exist
};

Engine::Engine(EngineInputs inputs)
    : in_(std::move(inputs)),
      store_(in_.work_dir),
      chain_(*in_.plan, *in_.stages, in_.calibration_digest, *in_.digests),
      worker_(ForSlots(in_)) {
  single_original_stream_ = in_.stages->UsesOriginalStream() && !in_.stages->UsesQuantizedStream();
}

Engine::~Engine() = default;

void Engine::Progress(const std::string& stage, const std::string& unit, int64_t done,
                      int64_t total) {
  in_.sink(
      {{"type", "progress"}, {"stage", stage}, {"unit", unit}, {"done", done}, {"total", total}});
}

std::vector<size_t> Engine::SlotsIn(const PreparedStage& stage, int64_t block) const {
  std::vector<size_t> indices;
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    const int64_t slot_block = in_.plan->slots[static_cast<size_t>(stage.stage->slots[i])].block;
    if ((slot_block < 0 ? in_.plan->config.layers : slot_block) == block) indices.push_back(i);
  }
  return indices;
}

// Is the unit finished and its file as the journal says? Files are looked at once, before any work.
bool Engine::Usable(const std::string& key) {
  const auto finished = in_.journal->finished.find(key);
  if (finished == in_.journal->finished.end()) return false;
  const auto [known, fresh] = usable_.try_emplace(key, false);
  if (!fresh) return known->second;
  const absl::Status status = store_.Load(key, finished->second, in_.backend->threads()).status();
  known->second = status.ok();
  if (!status.ok()) {
    in_.sink({{"type", "log"},
              {"severity", 2},
              {"text", absl::StrCat(status.message(), "; it is computed again")}});
  }
  return known->second;
}

// On a fresh run: the last block with statistics. On a resumed one: the last block with an
// unfinished or damaged unit that wants them, found by walking the keys.
void Engine::FindLastMeasuredBlock() {
  const bool resumed = !in_.journal->finished.empty();
  KeyChain chain(*in_.plan, *in_.stages, in_.calibration_digest, *in_.digests);
  for (int64_t block = 0; block < in_.plan->config.layers; ++block) {
    if (resumed) chain.BeginBlock(block);
    for (const PreparedStage& stage : in_.stages->stages) {
      const std::vector<size_t> slots = SlotsIn(stage, block);
      if (slots.empty()) continue;
      const std::string key = resumed ? chain.Key(stage, slots).unit : "";
      const bool usable = resumed && Usable(key);
      // What follows a unit that is to be made again is taken to change, too: then the hidden
      // states are there wherever they may be needed.
      if (resumed) chain.AddUnit(usable ? in_.journal->finished.at(key) : kUnknownDigest);
      if (!usable && stage.needs_statistics) last_measured_block_ = block;
    }
    if (resumed) {
      chain.EndBlock();
      in_.source->ReleaseBlock(block);
    }
  }
}

absl::Status Engine::StartCalibration() {
  CalibrationOptions options;
  options.keep_original = in_.stages->UsesOriginalStream() && in_.stages->UsesQuantizedStream();
  options.progress = [this](double fraction) {
    Progress(absl::StrCat(current_stage_, ": block ", current_block_ + 1, "/",
                          in_.plan->config.layers, ", ", current_part_),
             "percent", static_cast<int64_t>(fraction * 100), 100);
    return absl::OkStatus();
  };

  QM_ASSIGN_OR_RETURN(const Tensor embedding, in_.source->Embedding());
  QM_ASSIGN_OR_RETURN(calibration_, Calibration::Create(*in_.backend, in_.plan->config, in_.windows,
                                                        embedding, options));
  return absl::OkStatus();
}

absl::Status Engine::Run() {
  FindLastMeasuredBlock();
  if (last_measured_block_ >= 0) QM_RETURN_IF_ERROR(StartCalibration());
  for (int64_t block = 0; block < in_.plan->config.layers; ++block) {
    current_block_ = block;
    QM_RETURN_IF_ERROR(RunBlock(block));
  }
  return RunHead();
}

absl::Status Engine::RunBlock(int64_t block) {
  bool any = block <= last_measured_block_;
  for (const PreparedStage& stage : in_.stages->stages) any = any || !SlotsIn(stage, block).empty();
  chain_.BeginBlock(block);
  if (!any) {
    chain_.EndBlock();
    in_.source->ReleaseBlock(block);
    return absl::OkStatus();
  }
  BlockState state;
  state.index = block;
  state.measured = block <= last_measured_block_;
  QM_ASSIGN_OR_RETURN(state.dense, in_.source->LoadBlock(block, *in_.backend));
  state.current = state.dense;
  for (const PreparedStage& stage : in_.stages->stages) {
    const std::vector<size_t> slots = SlotsIn(stage, block);
    if (!slots.empty()) QM_RETURN_IF_ERROR(RunStage(stage, slots, &state));
  }
  chain_.EndBlock();
  if (block < last_measured_block_) {
    current_part_ = "inputs of the next block";
    const bool both = in_.stages->UsesOriginalStream() && in_.stages->UsesQuantizedStream();
    QM_RETURN_IF_ERROR(calibration_->Advance(single_original_stream_ ? state.dense : state.current,
                                             both ? &state.dense : nullptr));
  }
  in_.source->ReleaseBlock(block);
  return absl::OkStatus();
}

absl::Status Engine::RunHead() {
  BlockState state;
  state.index = in_.plan->config.layers;
  chain_.BeginBlock(state.index);
  for (const PreparedStage& stage : in_.stages->stages) {
    const std::vector<size_t> slots = SlotsIn(stage, state.index);
    if (slots.empty()) continue;
    if (state.head.dense.empty()) {
      QM_ASSIGN_OR_RETURN(state.head, in_.source->Head(*in_.backend));
    }
    QM_RETURN_IF_ERROR(RunStage(stage, slots, &state));
  }
  return absl::OkStatus();
}

// Is the dequantized result of this stage looked at again in this run?
bool Engine::LaterNeeds(const PreparedStage& stage, int64_t block) const {
  if (block < last_measured_block_ && !single_original_stream_) return true;
  bool later = false;
  for (const PreparedStage& other : in_.stages->stages) {
    if (later && (other.sequential || other.stage->requantize) && !SlotsIn(other, block).empty()) {
      return true;
    }
    later = later || &other == &stage;
  }
  return false;
}

absl::Status Engine::RunStage(const PreparedStage& stage, const std::vector<size_t>& slots,
                              BlockState* state) {
  const std::string& name = stage.stage->name;
  current_stage_ = name;
  current_part_ = "statistics";
  const int64_t layers = in_.plan->config.layers;
  const UnitKeys keys = chain_.Key(stage, slots);
  Unit unit;
  bool reused = false;
  if (Usable(keys.unit)) {
    QM_ASSIGN_OR_RETURN(
        unit, store_.Load(keys.unit, in_.journal->finished.at(keys.unit), in_.backend->threads()));
    reused = true;
    ++reused_;
  }
  if (!reused) {
    if (state->index < layers) Progress(name, "block", state->index, layers);
    in_.sink({{"type", "begin"}, {"key", keys.unit}, {"stage", name}, {"block", state->index}});
    QM_ASSIGN_OR_RETURN(unit, ComputeUnit(stage, slots, keys, state));
    QM_RETURN_IF_ERROR(store_.Save(&unit, in_.backend->threads()));
    in_.sink({{"type", "end"}, {"key", keys.unit}, {"digest", unit.digest}});
  }
  // Blocks taken from the journal say nothing about the time the others take.
  if (!reused || state->index + 1 >= layers) {
    Progress(name, "block", std::min(state->index + 1, layers), layers);
  }
  if (reused && LaterNeeds(stage, state->index)) {
    QM_RETURN_IF_ERROR(PutIntoBlock(stage, slots, unit, state));
  }
  chain_.AddUnit(unit.digest);
  for (const SlotRecord& record : unit.slots) {
    exported_[record.slot] = {unit.key, unit.digest, unit.block};
  }
  unit.packed.clear();
  units_.push_back(std::move(unit));
  return absl::OkStatus();
}

absl::StatusOr<Statistics> Engine::Collect(const std::vector<StatRequest>& requests,
                                           const BlockWeights& weights, const BlockState& state) {
  std::vector<StatRequest> wanted = requests;
  if (single_original_stream_) {
    for (StatRequest& request : wanted) request.from_original = false;
  }
  Statistics statistics;
  const bool both = in_.stages->UsesOriginalStream() && in_.stages->UsesQuantizedStream();
  QM_RETURN_IF_ERROR(
      calibration_->Collect(weights, both ? &state.dense : nullptr, wanted, &statistics));
  return statistics;
}

absl::Status Engine::CollectShared(BlockState* state) {
  if (state->shared) return absl::OkStatus();
  std::vector<StatRequest> requests;
  for (const PreparedStage& stage : in_.stages->stages) {
    if (!stage.needs_statistics || stage.sequential) continue;
    const std::vector<StatRequest> more = stage.Requests(SlotsIn(stage, state->index));
    requests.insert(requests.end(), more.begin(), more.end());
  }
  std::sort(requests.begin(), requests.end());
  requests.erase(
      std::unique(requests.begin(), requests.end(),
                  [](const StatRequest& a, const StatRequest& b) { return !(a < b) && !(b < a); }),
      requests.end());
  QM_ASSIGN_OR_RETURN(state->shared, Collect(requests, state->dense, *state));
  return absl::OkStatus();
}

absl::StatusOr<Unit> Engine::ComputeUnit(const PreparedStage& stage,
                                         const std::vector<size_t>& slots, const UnitKeys& keys,
                                         BlockState* state) {
  const auto start = Clock::now();
  const bool head = state->index == in_.plan->config.layers;
  if (stage.needs_statistics && !stage.sequential) QM_RETURN_IF_ERROR(CollectShared(state));
  Unit unit;
  unit.key = keys.unit;
  unit.stage = stage.stage->name;
  unit.block = state->index;
  for (const auto& [group, members] : ByGroup(*in_.plan, stage, slots)) {
    std::optional<Statistics> own;
    if (stage.needs_statistics && stage.sequential) {
      QM_ASSIGN_OR_RETURN(own, Collect(stage.Requests(members), state->current, *state));
    }
    GroupWork work;
    work.stage = &stage;
    work.slots = members;
    work.keys = keys;
    work.stats_from_original = single_original_stream_;
    if (stage.needs_statistics) work.stats = own ? &*own : &*state->shared;
    BlockWeights& from = stage.stage->requantize ? state->current : state->dense;
    for (size_t index : members) {
      const LinearSlot& slot = in_.plan->slots[static_cast<size_t>(stage.stage->slots[index])];
      const LinearWeight* weight = head ? &state->head : from.At(slot);
      if (weight == nullptr || weight->dense.empty()) {
        return absl::InternalError(absl::StrCat(slot.name, " has no dense weight"));
      }
      work.dense.push_back(weight->dense);
    }
    QM_ASSIGN_OR_RETURN(std::vector<SlotResult> results, worker_.Run(work));
    Unit part;
    for (SlotResult& result : results) {
      if (result.packed != nullptr) part.packed[result.record.slot] = result.packed;
      part.slots.push_back(std::move(result.record));
    }
    // A sequential stage's next group sees this one; later stages and blocks may, too.
    if (stage.sequential || LaterNeeds(stage, state->index)) {
      QM_RETURN_IF_ERROR(PutIntoBlock(stage, members, part, state));
    }
    unit.packed.insert(part.packed.begin(), part.packed.end());
    unit.slots.insert(unit.slots.end(), part.slots.begin(), part.slots.end());
  }
  unit.seconds = SecondsSince(start);
  return unit;
}

absl::Status Engine::PutIntoBlock(const PreparedStage& stage, const std::vector<size_t>& slots,
                                  const Unit& unit, BlockState* state) {
  const bool head = state->index == in_.plan->config.layers;
  for (size_t index : slots) {
    const LinearSlot& slot = in_.plan->slots[static_cast<size_t>(stage.stage->slots[index])];
    LinearWeight* weight = head ? &state->head : state->current.At(slot);
    if (weight == nullptr) return absl::InternalError(absl::StrCat("no slot ", slot.name));
    const auto packed = unit.packed.find(slot.name);
    if (packed != unit.packed.end()) {
      QM_ASSIGN_OR_RETURN(weight->dense, DequantizeOn(*in_.backend, *in_.formats, *packed->second,
                                                      in_.backend->activation_dtype()));
    } else if (!head) {
      // Kept dense, also where an earlier stage had packed it: that is what is exported.
      *weight = *state->dense.At(slot);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const PackedWeight>> Engine::Packed(const std::string& slot) {
  const auto it = exported_.find(slot);
  if (it == exported_.end()) return nullptr;
  const auto& [key, digest, block] = it->second;
  if (block != open_block_) open_units_.clear();
  open_block_ = block;
  auto unit = open_units_.find(key);
  if (unit == open_units_.end()) {
    QM_ASSIGN_OR_RETURN(Unit loaded, store_.Load(key, digest, in_.backend->threads()));
    unit = open_units_.emplace(key, std::move(loaded)).first;
  }
  const auto packed = unit->second.packed.find(slot);
  return packed == unit->second.packed.end() ? nullptr : packed->second;
}

}  // namespace quantmill
