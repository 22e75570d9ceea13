#include "host/run/engine.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "host/run/calibration_text.h"
#include "host/run/fingerprint.h"
#include "host/run/train/adapted_source.h"
#include "host/run/train/train_state.h"
#include "host/run/train/train_units.h"
#include "host/run/unit_source.h"

namespace quantmill {
namespace {

constexpr char kUnknownDigest[] = "?";

SlotWorkInputs ForSlots(const EngineInputs& in) {
  return {in.plan,         in.stages,  in.backend,  in.runner, in.formats,
          in.format_words, in.journal, in.work_dir, in.sink};
}

// The saved state of a training that is not finished.
std::string StateFile(const std::string& work_dir, const std::string& key) {
  return absl::StrCat(work_dir, "/training/", key, ".safetensors");
}
// What the model wrote for that training.
std::string SampledFile(const std::string& work_dir, const std::string& key) {
  return absl::StrCat(work_dir, "/training/", key, ".text.safetensors");
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

Engine::Engine(EngineInputs inputs)
    : in_(std::move(inputs)),
      store_(in_.work_dir),
      chain_(*in_.plan, *in_.stages, in_.calibration_digest, *in_.digests),
      worker_(ForSlots(in_)),
      transform_worker_(ForSlots(in_), *in_.transforms),
      tune_worker_(ForSlots(in_), *in_.tuning) {
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
  if (stage.trains || (stage.tunes && !stage.parts.contains(block))) return indices;
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

// On a fresh run all blocks with stages are unfinished, and the last with statistics is the last
// that is measured. On a resumed one: those with an unfinished or damaged unit, found by walking
// the keys.
void Engine::FindUnfinishedBlocks() {
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
      if (resumed) {
        chain.AddUnit(stage, key, usable ? in_.journal->finished.at(key) : kUnknownDigest);
      }
      if (!usable) unfinished_.insert(block);
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
  FindUnfinishedBlocks();
  if (last_measured_block_ >= 0) QM_RETURN_IF_ERROR(StartCalibration());
  for (int64_t block = 0; block < in_.plan->config.layers; ++block) {
    current_block_ = block;
    QM_RETURN_IF_ERROR(RunBlock(block));
  }
  QM_RETURN_IF_ERROR(RunHead());
  for (const PreparedStage& stage : in_.stages->stages) {
    if (stage.trains) QM_RETURN_IF_ERROR(RunTraining(stage));
  }
  return absl::OkStatus();
}

absl::Status Engine::RunTraining(const PreparedStage& stage) {
  const TrainingText& text = in_.texts.at(stage.stage->name);
  const std::string key =
      TrainingKey(*in_.plan, *in_.stages, stage, in_.backend->activation_dtype(),
                  {in_.digests->Total(), text.digest, &units_});
  const std::vector<int64_t> blocks = TrainedBlocks(*in_.plan, stage);
  const bool finished = std::all_of(blocks.begin(), blocks.end(), [&](int64_t block) {
    return Usable(TrainedUnitKey(key, block));
  });
  if (!finished) {
    QM_ASSIGN_OR_RETURN(std::vector<Unit> units, ComputeTraining(stage, key));
    for (Unit& unit : units) {
      in_.sink(
          {{"type", "begin"}, {"key", unit.key}, {"stage", unit.stage}, {"block", unit.block}});
      QM_RETURN_IF_ERROR(store_.Save(&unit, in_.backend->threads()));
      in_.sink({{"type", "end"}, {"key", unit.key}, {"digest", unit.digest}});
      Remember(std::move(unit));
    }
    std::error_code error;
    std::filesystem::remove(SampledFile(in_.work_dir, key), error);
    return TrainState(StateFile(in_.work_dir, key)).Remove();
  }
  for (const int64_t block : blocks) {
    const std::string unit_key = TrainedUnitKey(key, block);
    QM_ASSIGN_OR_RETURN(Unit unit, store_.Load(unit_key, in_.journal->finished.at(unit_key),
                                               in_.backend->threads()));
    ++reused_;
    Remember(std::move(unit));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Unit>> Engine::ComputeTraining(const PreparedStage& stage,
                                                          const std::string& key) {
  const std::string crash_dir = absl::StrCat(in_.work_dir, "/crash/", key);
  QM_RETURN_IF_ERROR(RefuseCrashedTraining(*in_.journal, key, crash_dir));
  const PackedLookup packed = [this](const std::string& slot) { return Packed(slot); };
  const PackedLookup nothing =
      [](const std::string&) -> absl::StatusOr<std::shared_ptr<const PackedWeight>> {
    return std::shared_ptr<const PackedWeight>();
  };
  const EditLookup edits = [this](int64_t block) { return Edits(block); };
  UnitSource dense(*in_.source, nothing, edits, *in_.formats);
  UnitSource packed_model(*in_.source, packed, edits, *in_.formats);
  AdaptedSource current(packed_model, LoadedAdapters());
  TrainingInputs inputs;
  inputs.plan = in_.plan;
  inputs.stages = in_.stages;
  inputs.stage = &stage;
  inputs.original = in_.source;
  inputs.dense = &dense;
  inputs.current = &current;
  inputs.packed = packed;
  inputs.backend = in_.backend;
  inputs.calls = in_.training;
  inputs.formats = in_.formats;
  inputs.data = in_.texts.at(stage.stage->name).data.get();
  TrainingData more;
  if (const TrainOptions& train = *stage.stage->train; train.sampled_tokens > 0) {
    const uint64_t seed = SlotSeed(in_.plan->pipeline.seed, stage.stage->name, "sampled text");
    QM_ASSIGN_OR_RETURN(more,
                        WithSampledText(*inputs.data, train, {seed, SampledFile(in_.work_dir, key)},
                                        *in_.source, *in_.backend, in_.sink));
    inputs.data = &more;
  }
  inputs.key = key;
  inputs.crash_dir = crash_dir;
  inputs.crashed = [this, &key](const std::string& slot) {
    const auto& crashes = in_.journal->crashes;
    return std::any_of(crashes.begin(), crashes.end(), [&](const CrashRecord& crash) {
      return crash.key == key && crash.Covers(slot);
    });
  };
  inputs.state_file = StateFile(in_.work_dir, key);
  inputs.loss_file = absl::StrCat(in_.work_dir, "/training/", stage.stage->name, ".jsonl");
  inputs.sink = in_.sink;
  absl::StatusOr<TrainingResult> result = quantmill::RunTraining(inputs);
  if (!result.ok()) return WithContext(result.status(), "stage " + stage.stage->name);
  std::error_code error;
  std::filesystem::remove_all(crash_dir, error);  // of an attempt before, as far as there was one
  return TrainedUnits(*in_.plan, stage, key, *std::move(result));
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
  BlockState state(in_.plan->config, block, *in_.backend);
  QM_ASSIGN_OR_RETURN(BlockWeights weights, in_.source->LoadBlock(block, *in_.backend));
  state.SetWeights(std::move(weights));
  for (const PreparedStage& stage : in_.stages->stages) {
    const std::vector<size_t> slots = SlotsIn(stage, block);
    if (!slots.empty()) QM_RETURN_IF_ERROR(RunStage(stage, slots, &state));
  }
  chain_.EndBlock();
  if (block < last_measured_block_) {
    current_part_ = "inputs of the next block";
    QM_RETURN_IF_ERROR(state.Finish());
    const bool both = in_.stages->UsesOriginalStream() && in_.stages->UsesQuantizedStream();
    QM_RETURN_IF_ERROR(
        calibration_->Advance(single_original_stream_ ? state.untouched() : state.current(),
                              both ? &state.untouched() : nullptr));
  }
  in_.source->ReleaseBlock(block);
  return absl::OkStatus();
}

absl::Status Engine::RunHead() {
  BlockState state(in_.plan->config, in_.plan->config.layers, *in_.backend);
  chain_.BeginBlock(state.index());
  for (const PreparedStage& stage : in_.stages->stages) {
    const std::vector<size_t> slots = SlotsIn(stage, state.index());
    if (slots.empty()) continue;
    if (state.head().dense.empty()) {
      QM_ASSIGN_OR_RETURN(state.head(), in_.source->Head(*in_.backend));
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
  // Where a stage's statistics were measured when the block was worked on first, they are measured
  // again for those that follow: before this stage's edits, which then change them alike.
  if (stage.needs_statistics && !stage.sequential && unfinished_.contains(state->index()) &&
      state->index() <= last_measured_block_) {
    QM_RETURN_IF_ERROR(CollectShared(stage, state));
  }
  if (!reused) {
    if (!state->is_head()) Progress(name, "block", state->index(), layers);
    in_.sink({{"type", "begin"}, {"key", keys.unit}, {"stage", name}, {"block", state->index()}});
    absl::StatusOr<Unit> computed = stage.transforms ? ComputeTransform(stage, slots, keys, state)
                                    : stage.tunes    ? ComputeTuning(stage, slots, keys, state)
                                                     : ComputeUnit(stage, slots, keys, state);
    QM_RETURN_IF_ERROR(computed.status());
    unit = *std::move(computed);
    QM_RETURN_IF_ERROR(store_.Save(&unit, in_.backend->threads()));
    in_.sink({{"type", "end"}, {"key", keys.unit}, {"digest", unit.digest}});
  }
  // Blocks taken from the journal say nothing about the time the others take.
  if (!reused || state->index() + 1 >= layers) {
    Progress(name, "block", std::min(state->index() + 1, layers), layers);
  }
  const bool wanted =
      unfinished_.contains(state->index()) || state->index() <= last_measured_block_;
  if (wanted && !unit.edits.empty()) QM_RETURN_IF_ERROR(state->Apply(unit.edits));
  if ((stage.tunes || (!stage.transforms && reused)) && LaterNeeds(stage, state->index())) {
    QM_RETURN_IF_ERROR(PutIntoBlock(stage, slots, unit, state));
  }
  chain_.AddUnit(stage, keys.unit, unit.digest);
  Remember(std::move(unit));
  return absl::OkStatus();
}

void Engine::Remember(Unit unit) {
  const Place place = {unit.key, unit.digest, unit.block};
  if (!unit.edits.empty()) transforms_[unit.block].push_back(place);
  for (const std::string& tensor : unit.changed) edited_[tensor] = unit.block;
  for (const auto& [slot, params] : unit.adapters) adapters_[slot].push_back(place);
  for (const SlotRecord& record : unit.slots) {
    const bool same = record.transformed || (record.tuned && !record.packed) ||
                      (record.trained && !record.packed && !record.folded);
    if (!same) exported_[record.slot] = place;
  }
  unit.packed.clear();
  unit.adapters.clear();
  unit.edits.clear();
  units_.push_back(std::move(unit));
}

absl::Status Engine::Collect(const std::vector<StatRequest>& requests, const BlockWeights& weights,
                             const BlockState& state, Statistics* out) {
  if (requests.empty()) return absl::OkStatus();
  std::vector<StatRequest> wanted = requests;
  if (single_original_stream_) {
    for (StatRequest& request : wanted) request.from_original = false;
  }
  const bool both = in_.stages->UsesOriginalStream() && in_.stages->UsesQuantizedStream();
  return calibration_->Collect(weights, both ? &state.original() : nullptr, wanted, out);
}

absl::Status Engine::CollectShared(const PreparedStage& stage, BlockState* state) {
  std::set<StatRequest> requests;
  bool behind = false;
  for (const PreparedStage& other : in_.stages->stages) {
    behind = behind || &other == &stage;
    if (!behind || !other.needs_statistics || other.sequential) continue;
    for (StatRequest request : other.Requests(SlotsIn(other, state->index()))) {
      if (single_original_stream_) request.from_original = false;
      if (state->statistics().Find(request) == nullptr) requests.insert(request);
    }
  }
  return Collect({requests.begin(), requests.end()}, state->dense(), *state, &state->statistics());
}

absl::StatusOr<Unit> Engine::ComputeTransform(const PreparedStage& stage,
                                              const std::vector<size_t>& slots,
                                              const UnitKeys& keys, BlockState* state) {
  const auto start = Clock::now();
  TransformWork work;
  work.stage = &stage;
  work.slots = slots;
  work.keys = keys;
  work.state = state;
  work.calibration = calibration_.get();
  work.single_original_stream = single_original_stream_;
  QM_ASSIGN_OR_RETURN(TransformResult result, transform_worker_.Run(work));
  Unit unit;
  unit.key = keys.unit;
  unit.stage = stage.stage->name;
  unit.block = state->index();
  unit.slots = std::move(result.records);
  unit.edits = std::move(result.edits);
  unit.changed = std::move(result.changed);
  unit.seconds = SecondsSince(start);
  return unit;
}

absl::StatusOr<Unit> Engine::ComputeTuning(const PreparedStage& stage,
                                           const std::vector<size_t>& slots, const UnitKeys& keys,
                                           BlockState* state) {
  const auto start = Clock::now();
  const LinearSlot& first = in_.plan->slots[static_cast<size_t>(stage.stage->slots[slots[0]])];
  const Place& place = exported_.at(first.name);  // the packing's unit has all slots of the stage
  QM_ASSIGN_OR_RETURN(const Unit packed,
                      store_.Load(place.key, place.digest, in_.backend->threads()));
  current_part_ = "tuning";
  TuneWork work;
  work.stage = &stage;
  work.slots = slots;
  work.keys = keys;
  work.state = state;
  work.calibration = calibration_.get();
  work.packed = &packed;
  QM_ASSIGN_OR_RETURN(TuneResult result, tune_worker_.Run(work));
  Unit unit;
  unit.key = keys.unit;
  unit.stage = stage.stage->name;
  unit.block = state->index();
  unit.slots = std::move(result.records);
  unit.packed = std::move(result.packed);
  unit.edits = std::move(result.edits);
  unit.changed = std::move(result.changed);
  unit.seconds = SecondsSince(start);
  return unit;
}

absl::StatusOr<Unit> Engine::ComputeUnit(const PreparedStage& stage,
                                         const std::vector<size_t>& slots, const UnitKeys& keys,
                                         BlockState* state) {
  const auto start = Clock::now();
  Unit unit;
  unit.key = keys.unit;
  unit.stage = stage.stage->name;
  unit.block = state->index();
  for (const auto& [group, members] : ByGroup(*in_.plan, stage, slots)) {
    std::optional<Statistics> own;
    if (stage.needs_statistics && stage.sequential) {
      QM_RETURN_IF_ERROR(
          Collect(stage.Requests(members), state->current(), *state, &own.emplace()));
    }
    GroupWork work;
    work.stage = &stage;
    work.slots = members;
    work.keys = keys;
    work.stats_from_original = single_original_stream_;
    if (stage.needs_statistics) work.stats = own ? &*own : &state->statistics();
    BlockWeights& from = stage.stage->requantize ? state->current() : state->dense();
    for (size_t index : members) {
      const LinearSlot& slot = in_.plan->slots[static_cast<size_t>(stage.stage->slots[index])];
      const LinearWeight* weight = state->is_head() ? &state->head() : from.At(slot);
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
    if (stage.sequential || LaterNeeds(stage, state->index())) {
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
  for (size_t index : slots) {
    const LinearSlot& slot = in_.plan->slots[static_cast<size_t>(stage.stage->slots[index])];
    const auto packed = unit.packed.find(slot.name);
    if (stage.tunes && packed == unit.packed.end()) continue;  // as it was
    LinearWeight weight;  // empty: kept dense, also where an earlier stage had packed it
    if (packed != unit.packed.end()) {
      QM_RETURN_IF_ERROR(PutPacked(*in_.backend, *in_.formats, *packed->second, &weight));
    }
    QM_RETURN_IF_ERROR(state->Put(slot, std::move(weight)));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<BlockEdit>> Engine::Edits(int64_t block) {
  std::vector<BlockEdit> edits;
  const auto found = transforms_.find(block);
  if (found == transforms_.end()) return edits;
  for (const Place& place : found->second) {
    QM_ASSIGN_OR_RETURN(const Unit* unit, Opened(place));
    edits.insert(edits.end(), unit->edits.begin(), unit->edits.end());
  }
  return edits;
}

absl::StatusOr<std::vector<Engine::Adapter>> Engine::Adapters(const std::string& slot) {
  std::vector<Adapter> adapters;
  const auto found = adapters_.find(slot);
  if (found == adapters_.end()) return adapters;
  for (const Place& place : found->second) {
    QM_ASSIGN_OR_RETURN(const Unit* unit, Opened(place));
    const auto stage = std::find_if(
        in_.stages->stages.begin(), in_.stages->stages.end(),
        [&](const PreparedStage& s) { return s.trains && s.stage->name == unit->stage; });
    size_t index = 0;
    while (in_.plan->slots[static_cast<size_t>(stage->stage->slots[index])].name != slot) ++index;
    adapters.push_back({&*stage, index, unit->adapters.at(slot)});
  }
  return adapters;
}

AdapterLookup Engine::LoadedAdapters() {
  return [this](const LinearSlot& slot,
                Backend& backend) -> absl::StatusOr<std::vector<std::shared_ptr<LinearAdapter>>> {
    std::vector<std::shared_ptr<LinearAdapter>> loaded;
    QM_ASSIGN_OR_RETURN(const std::vector<Adapter> adapters, Adapters(slot.name));
    for (const Adapter& adapter : adapters) {
      std::vector<NamedTensor> params = adapter.params;
      for (NamedTensor& param : params) {
        QM_ASSIGN_OR_RETURN(param.tensor, backend.ToDevice(param.tensor));
      }
      loaded.push_back(std::make_shared<PluginAdapter>(
          *in_.training, adapter.stage->SubjectOf(*in_.plan, *in_.stages, adapter.index),
          *adapter.stage->AnyPlan(adapter.index), std::move(params)));
    }
    return loaded;
  };
}

int64_t Engine::EditedIn(const std::string& tensor) const {
  const auto found = edited_.find(tensor);
  return found == edited_.end() ? -1 : found->second;
}

absl::StatusOr<std::shared_ptr<const PackedWeight>> Engine::Packed(const std::string& slot) {
  const auto it = exported_.find(slot);
  if (it == exported_.end()) return nullptr;
  QM_ASSIGN_OR_RETURN(const Unit* unit, Opened(it->second));
  const auto packed = unit->packed.find(slot);
  return packed == unit->packed.end() ? nullptr : packed->second;
}

absl::StatusOr<const Unit*> Engine::Opened(const Place& place) {
  if (place.block != open_block_) open_units_.clear();
  open_block_ = place.block;
  auto unit = open_units_.find(place.key);
  if (unit == open_units_.end()) {
    QM_ASSIGN_OR_RETURN(Unit loaded, store_.Load(place.key, place.digest, in_.backend->threads()));
    unit = open_units_.emplace(place.key, std::move(loaded)).first;
  }
  return &unit->second;
}

}  // namespace quantmill
