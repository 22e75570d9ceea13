#include "host/run/train/train_units.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "host/run/fingerprint.h"
#include "host/run/slot_work.h"
#include "host/run/unit_keys.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

// All of it that changes the result, every digit of it.
std::string TrainText(const TrainOptions& o) {
  return nlohmann::json::array({o.tokens, o.batch, o.micro_batch, o.sequence_length, o.rate,
                                o.parameter_rate, o.distill, o.warmup, o.rate_floor, o.decay,
                                o.clip_norm, o.beta1, o.average, o.sampled_tokens, o.norms,
                                o.embeddings, o.block_tokens, o.block_rate, o.block_batch})
      .dump();
}

SlotRecord RecordOf(const PipelinePlan& plan, const PreparedStage& stage,
                    const TrainedResult& trained, const TrainingResult& result) {
  const LinearSlot& slot = plan.slots[static_cast<size_t>(stage.stage->slots[trained.index])];
  SlotRecord r;
  r.slot = slot.name;
  r.trained = true;
  r.packed = trained.packed != nullptr;
  r.folded = !trained.folded.empty();
  r.method = stage.method.loaded.method->id;
  r.version = stage.method.loaded.method->version;
  r.plugin_sha256 = stage.method.plugin_sha256;
  r.options = OptionsJson(stage.OptionsOf(trained.index));
  r.seed = SlotSeed(plan.pipeline.seed, stage.stage->name, slot.name);
  r.out_features = slot.out_features;
  r.in_features = slot.in_features;
  if (trained.packed != nullptr) {
    r.format_id = trained.packed->format_id;
    r.format_json = trained.packed->format_json;
    r.bits_per_weight = trained.packed->BitsPerWeight();
  }
  r.weight_nmse = trained.weight_nmse;
  r.loss_before = result.first_loss;
  r.loss_after = result.last_loss;
  r.seconds = result.seconds / static_cast<double>(std::max<size_t>(1, result.slots.size()));
  return r;
}

}  // namespace

std::string TrainingKey(const PipelinePlan& plan, const StageSet& stages,
                        const PreparedStage& stage, DType activation,
                        const TrainingDigests& digests) {
  Fingerprint fingerprint;
  const PlannedStage& planned = *stage.stage;
  for (const std::string& text :
       {std::string("training/1"), planned.name, planned.use,
        std::string(stage.method.loaded.method->version), stage.method.plugin_sha256,
        absl::StrCat(plan.pipeline.seed, " ", static_cast<int>(stages.scale_dtype), " ",
                     static_cast<int>(activation)),
        digests.model, digests.data, TrainText(*planned.train)}) {
    fingerprint.Add(text);
  }
  for (size_t i = 0; i < planned.slots.size(); ++i) {
    fingerprint.Add(plan.slots[static_cast<size_t>(planned.slots[i])].name);
    fingerprint.Add(OptionsJson(stage.OptionsOf(i)));
  }
  for (const Unit& unit : *digests.units) {
    fingerprint.Add(unit.key);
    fingerprint.Add(unit.digest);
  }
  return fingerprint.Hex();
}

std::string TrainedUnitKey(const std::string& training_key, int64_t block) {
  Fingerprint fingerprint;
  fingerprint.Add(training_key);
  fingerprint.Add(absl::StrCat(block));
  return fingerprint.Hex();
}

std::vector<int64_t> TrainedBlocks(const PipelinePlan& plan, const PreparedStage& stage) {
  std::set<int64_t> blocks;
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    if (stage.AnyPlan(i) == nullptr) continue;
    blocks.insert(plan.slots[static_cast<size_t>(stage.stage->slots[i])].block);
  }
  if (TrainsEnds(stage)) blocks.insert(plan.config.layers);
  return {blocks.begin(), blocks.end()};
}

std::vector<Unit> TrainedUnits(const PipelinePlan& plan, const PreparedStage& stage,
                               const std::string& training_key, TrainingResult result) {
  std::map<int64_t, Unit> units;
  const std::vector<int64_t> blocks = TrainedBlocks(plan, stage);
  for (const int64_t block : blocks) {
    Unit& unit = units[block];
    unit.key = TrainedUnitKey(training_key, block);
    unit.stage = stage.stage->name;
    unit.block = block;
    unit.seconds = result.seconds / static_cast<double>(blocks.size());
    unit.edits = std::move(result.edits[block]);
    for (const BlockEdit& edit : unit.edits) unit.changed.insert(edit.target);
  }
  for (TrainedResult& trained : result.slots) {
    const LinearSlot& slot = plan.slots[static_cast<size_t>(stage.stage->slots[trained.index])];
    Unit& unit = units[slot.block];
    unit.slots.push_back(RecordOf(plan, stage, trained, result));
    if (trained.packed != nullptr) unit.packed[slot.name] = std::move(trained.packed);
    if (!trained.adapter.empty()) unit.adapters[slot.name] = std::move(trained.adapter);
  }
  std::vector<Unit> list;
  list.reserve(units.size());
  for (auto& [block, unit] : units) list.push_back(std::move(unit));
  return list;
}

absl::Status RefuseCrashedTraining(const JournalState& journal, const std::string& training_key,
                                   const std::string& crash_dir) {
  const auto same = [&](const CrashRecord& crash) { return crash.key == training_key; };
  const auto& crashes = journal.crashes;
  if (std::count_if(crashes.begin(), crashes.end(), same) < kCallAttempts) return absl::OkStatus();
  const auto last = std::find_if(crashes.rbegin(), crashes.rend(), same);
  return absl::AbortedError(absl::StrCat(last->how, ", twice; not tried again",
                                         ReplayHint(absl::StrCat(crash_dir, "/", last->slots))));
}

}  // namespace quantmill
