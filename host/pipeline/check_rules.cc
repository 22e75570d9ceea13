#include "host/pipeline/check_rules.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "host/pipeline/check.h"

namespace quantmill {
namespace {

// The export formats of the contract; an installed plugin may add others.
const std::vector<std::string>& KnownTargets() {
  static const auto* targets = new std::vector<std::string>{
      "quantmill",          "gptq", "gptq_v2", "awq",  "hqq", "aqlm", "bitsandbytes", "eetq",
      "compressed-tensors", "gguf", "peft",    "dense"};
  return *targets;
}

const ResolvedOptions* OptionsOf(const PlannedStage& stage, int slot) {
  const auto it = std::lower_bound(stage.slots.begin(), stage.slots.end(), slot);
  if (it == stage.slots.end() || *it != slot) return nullptr;
  return &stage.options[static_cast<size_t>(it - stage.slots.begin())];
}

std::string Value(const ResolvedOptions& options, const std::string& name) {
  const auto it = options.find(name);
  return it == options.end() ? "" : it->second;
}

// Input channels per group; 0 when the slot is packed without groups.
int64_t GroupSize(const ResolvedOptions& options) {
  int64_t size = 0;
  if (absl::StartsWith(Value(options, "dtype"), "fp8")) return 0;
  if (Value(options, "axis") == "0") return 0;  // groups run along the outputs
  return absl::SimpleAtoi(Value(options, "group_size"), &size) && size > 0 ? size : 0;
}

std::string ValidGroupSizes(int64_t features) {
  std::vector<std::string> sizes;
  for (const int64_t size : {16, 32, 64, 128, 256, 512, 1024}) {
    if (features % size == 0) sizes.push_back(absl::StrCat(size));
  }
  if (sizes.empty()) {
    for (int64_t size = std::min<int64_t>(features, 1024); size > 1 && sizes.size() < 4; --size) {
      if (features % size == 0) sizes.insert(sizes.begin(), absl::StrCat(size));
    }
  }
  sizes.push_back("-1 (one group per output channel)");
  return absl::StrJoin(sizes, ", ");
}

SourceLocation LocationOf(const PipelinePlan& plan, const std::string& key) {
  const auto it = plan.pipeline.locations.find(key);
  return it == plan.pipeline.locations.end() ? SourceLocation{plan.pipeline.file, 0, 0}
                                             : it->second;
}

std::string AndMore(size_t count) {
  return count > 1 ? absl::StrCat(" and ", count - 1, " more") : "";
}

// How a slot is packed, in the words of the options that decide the stored layout. Slots with equal
// texts can share one parameter in a reader.
std::string Layout(const PipelinePlan& plan, int slot) {
  const int packed_by = plan.packed_by[slot];
  if (packed_by < 0) return "not packed";
  const ResolvedOptions& options = *OptionsOf(plan.stages[packed_by], slot);
  std::vector<std::string> parts;
  for (const char* name :
       {"bits", "group_size", "symmetric", "act_order", "static_groups", "dtype", "activations"}) {
    const std::string value = Value(options, name);
    // Absent and off are the same layout.
    if (value.empty() || value == "false" || value == "none" || value == "int") continue;
    parts.push_back(absl::StrCat(name, " ", value));
  }
  return parts.empty() ? plan.stages[packed_by].method : absl::StrJoin(parts, ", ");
}

// Slots that readers load as one parameter: q/k/v, gate/up, all experts of a layer.
std::string FusedGroup(const LinearSlot& slot) {
  if (slot.role == "attn.q" || slot.role == "attn.k" || slot.role == "attn.v") return "q/k/v";
  if (slot.role == "mlp.gate" || slot.role == "mlp.up") return "gate/up";
  if (absl::StartsWith(slot.role, "expert.")) return "experts";
  return "";
}

}  // namespace

void CheckGroupSizes(const PipelinePlan& plan, ErrorList* errors) {
  for (const PlannedStage& stage : plan.stages) {
    if (!stage.packs) continue;
    std::map<std::pair<int64_t, int64_t>, std::vector<int>> bad;  // (group, features) -> slots
    for (size_t i = 0; i < stage.slots.size(); ++i) {
      const int64_t group = GroupSize(stage.options[i]);
      const int64_t features = plan.slots[stage.slots[i]].in_features;
      if (group > 0 && features % group != 0) bad[{group, features}].push_back(stage.slots[i]);
    }
    for (const auto& [shape, slots] : bad) {
      errors->Add(stage.location,
                  ErrorText(absl::StrCat("stage '", stage.name, "': group_size ", shape.first,
                                         " does not divide the ", shape.second, " inputs of ",
                                         plan.slots[slots[0]].name, AndMore(slots.size())),
                            "", absl::StrCat("use ", ValidGroupSizes(shape.second))));
    }
  }
}

void CheckTensorParallel(const PipelinePlan& plan, ErrorList* errors) {
  const int64_t ranks = plan.pipeline.tensor_parallel;
  if (ranks <= 1) return;
  const SourceLocation location = LocationOf(plan, "export.tensor_parallel");
  const ModelConfig& config = plan.config;
  auto refuse = [&](const std::string& text) {
    errors->Add(location, absl::StrCat("tensor_parallel ", ranks, " ", text));
  };
  if (config.heads % ranks != 0) {
    refuse(absl::StrCat("does not divide the model's ", config.heads, " attention heads"));
  }
  // Readers repeat key/value heads when there are fewer of them than ranks.
  if (config.kv_heads % ranks != 0 && ranks % config.kv_heads != 0) {
    refuse(absl::StrCat("and the model's ", config.kv_heads, " key/value heads do not fit"));
  }
  std::map<std::string, std::vector<int>> bad;
  for (size_t s = 0; s < plan.slots.size(); ++s) {
    if (plan.packed_by[s] < 0) continue;
    const LinearSlot& slot = plan.slots[s];
    const bool by_input = absl::EndsWith(slot.role, ".o") || absl::EndsWith(slot.role, ".down");
    const int64_t split = by_input ? slot.in_features : slot.out_features;
    const int64_t group = GroupSize(*OptionsOf(plan.stages[plan.packed_by[s]], s));
    if (split % ranks != 0 && !by_input && absl::StartsWith(slot.role, "attn.")) continue;
    if (split % ranks != 0) {
      bad[absl::StrCat("does not divide the ", split, by_input ? " inputs of " : " outputs of ")]
          .push_back(static_cast<int>(s));
    } else if (by_input && group > 0 && (split / ranks) % group != 0) {
      bad[absl::StrCat("leaves ", split / ranks, " inputs per rank, not whole groups of ", group,
                       ", in ")]
          .push_back(static_cast<int>(s));
    }
  }
  for (const auto& [text, slots] : bad) {
    refuse(absl::StrCat(text, plan.slots[slots[0]].name, AndMore(slots.size()),
                        "; use fewer ranks or a smaller group_size"));
  }
}

void CheckFusedGroups(const PipelinePlan& plan, ErrorList* errors) {
  const std::string& target = plan.pipeline.export_format;
  if (target != "gptq" && target != "gptq_v2" && target != "awq" &&
      target != "compressed-tensors" && target != "gguf") {
    return;
  }
  std::map<std::pair<int, std::string>, std::vector<int>> groups;
  for (size_t s = 0; s < plan.slots.size(); ++s) {
    std::string group = FusedGroup(plan.slots[s]);
    // llama.cpp has one tensor for the same projection of all experts, and fuses nothing else.
    if (target == "gguf") group = group == "experts" ? plan.slots[s].role : "";
    if (!group.empty()) groups[{plan.slots[s].block, group}].push_back(static_cast<int>(s));
  }
  std::map<std::string, std::pair<std::string, size_t>> bad;  // kind of group -> first, count
  for (const auto& [key, slots] : groups) {
    std::map<std::string, int> layouts;  // layout -> first slot with it
    for (const int slot : slots) layouts.emplace(Layout(plan, slot), slot);
    if (layouts.size() < 2) continue;
    std::vector<std::string> members;
    members.reserve(layouts.size());
    for (const auto& [layout, slot] : layouts) {
      members.push_back(absl::StrCat(plan.slots[slot].name, " is ", layout));
    }
    auto& entry = bad[key.second];
    if (entry.second++ == 0) entry.first = absl::StrJoin(members, ", ");
  }
  for (const auto& [group, entry] : bad) {
    errors->Add(
        LocationOf(plan, "export.format"),
        absl::StrCat(
            "readers of ", target, " load ", group,
            " as one parameter, so they must be packed alike; ", entry.first,
            entry.second > 1 ? absl::StrCat(" (and so in ", entry.second - 1, " more blocks)") : "",
            "; give them the same stage and options, or export to quantmill"));
  }
}

void CheckActOrder(const PipelinePlan& plan, ErrorList* errors) {
  if (plan.pipeline.export_format != "awq") return;
  for (const PlannedStage& stage : plan.stages) {
    if (!stage.packs) continue;
    const bool scattered =
        std::any_of(stage.options.begin(), stage.options.end(), [](const ResolvedOptions& options) {
          return Value(options, "act_order") == "true" && Value(options, "static_groups") != "true";
        });
    if (!scattered) continue;
    errors->Add(stage.location,
                ErrorText(absl::StrCat("stage '", stage.name,
                                       "' sorts groups by activation (act_order), which awq files "
                                       "cannot express"),
                          "", "add static_groups: true, or export to gptq"));
  }
}

void CheckExportTarget(const PipelinePlan& plan, const Catalog& catalog, ErrorList* errors) {
  const std::string& target = plan.pipeline.export_format;
  const SourceLocation location = LocationOf(plan, "export.format");
  std::set<std::string> writable = {"quantmill", "dense", "peft"};
  for (const PluginInfo& plugin : catalog.plugins) {
    if (!plugin.rejected.empty()) continue;
    for (const MethodInfo& method : plugin.methods) {
      for (const auto& format : method.formats) {
        writable.insert(format.targets.begin(), format.targets.end());
      }
    }
  }
  std::vector<std::string> known = KnownTargets();
  for (const std::string& name : writable) {
    if (std::find(known.begin(), known.end(), name) == known.end()) known.push_back(name);
  }
  if (std::find(known.begin(), known.end(), target) == known.end()) {
    errors->Add(location, ErrorText(absl::StrCat("unknown export format '", target, "'"),
                                    NearestHint(target, known)));
    return;
  }
  if (writable.count(target) == 0) {
    errors->Add(location,
                ErrorText(absl::StrCat("no installed plugin writes '", target, "'"),
                          absl::StrCat("these can be written: ", absl::StrJoin(writable, ", ")),
                          "see quantmill plugins"));
    return;
  }
  const bool packs = std::any_of(plan.packed_by.begin(), plan.packed_by.end(),
                                 [](int stage) { return stage >= 0; });
  const bool trains =
      std::any_of(plan.stages.begin(), plan.stages.end(),
                  [](const PlannedStage& stage) { return stage.train.has_value(); });
  if (target == "peft" && !trains) {
    errors->Add(location,
                "no stage trains an adapter, so there is nothing to store as peft; add "
                "a training stage or use another format");
  } else if (!packs && target != "dense" && target != "peft") {
    errors->Add(location,
                absl::StrCat("no stage quantizes a layer, so there is nothing to store as ", target,
                             "; add a quantizing stage or use format: dense"));
  }
}

absl::Status CheckCalibration(const PipelinePlan& plan,
                              const std::vector<SlotEstimate>& estimates) {
  if (plan.pipeline.calibration.has_value()) return absl::OkStatus();
  ErrorList errors;
  std::set<int> reported;
  for (const SlotEstimate& estimate : estimates) {
    if (estimate.statistics.empty() || !reported.insert(estimate.stage).second) continue;
    const PlannedStage& stage = plan.stages[static_cast<size_t>(estimate.stage)];
    errors.Add(
        stage.location,
        absl::StrCat("stage '", stage.name, "' (", stage.use, ") needs calibration data for ",
                     absl::StrJoin(estimate.statistics, ", "),
                     "; add calibration: {text: FILE}, or {text: self} to draw it from the "
                     "model"));
  }
  return errors.ToStatus();
}

absl::Status CheckExportFormats(const PipelinePlan& plan,
                                const std::vector<SlotEstimate>& estimates,
                                const Catalog& catalog) {
  const std::string& target = plan.pipeline.export_format;
  if (target == "quantmill" || target == "dense" || target == "peft") return absl::OkStatus();
  ErrorList errors;
  std::map<std::pair<int, std::string>, std::vector<int>> bad;  // (stage, format) -> slots
  for (const SlotEstimate& estimate : estimates) {
    if (estimate.format_id.empty() ||
        plan.packed_by[static_cast<size_t>(estimate.slot)] != estimate.stage) {
      continue;
    }
    const std::vector<std::string> targets = catalog.Targets(estimate.format_id);
    if (std::find(targets.begin(), targets.end(), target) != targets.end()) continue;
    bad[{estimate.stage, estimate.format_id}].push_back(estimate.slot);
  }
  for (const auto& [key, slots] : bad) {
    std::vector<std::string> targets = catalog.Targets(key.second);
    targets.push_back("quantmill");
    targets.push_back("dense");
    errors.Add(LocationOf(plan, "export.format"),
               absl::StrCat(target, " cannot hold ", key.second, ", which stage '",
                            plan.stages[static_cast<size_t>(key.first)].name, "' makes of ",
                            plan.slots[static_cast<size_t>(slots[0])].name, AndMore(slots.size()),
                            "; export to ", absl::StrJoin(targets, ", ")));
  }
  return errors.ToStatus();
}

}  // namespace quantmill
