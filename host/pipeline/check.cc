// Which stage does what to which slot, with which options.
#include "host/pipeline/check.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "host/pipeline/check_rules.h"
#include "host/pipeline/methods.h"
#include "host/pipeline/options.h"
#include "host/pipeline/patterns.h"

namespace quantmill {
namespace {

constexpr char kHead[] = "lm_head";
constexpr char kEmbedding[] = "model.embed_tokens";

// "*" means the linears of the blocks; the head takes part only when a pattern is about it.
bool NamesHead(const LayerPattern& pattern) {
  return pattern.text().find("head") != std::string::npos && pattern.Matches(kHead);
}

std::string WithoutGlobs(const std::string& pattern) {
  const size_t begin = pattern.find_first_not_of("*.");
  if (begin == std::string::npos) return "";
  const size_t end = pattern.find_last_not_of("*.");
  return pattern.substr(begin, end - begin + 1);
}

// For a pattern that matches nothing: the layer name, or the end of one, that it comes closest to.
std::string NearestSlot(const std::string& pattern, const std::vector<LinearSlot>& slots) {
  if (slots.empty()) return "the model has no layers";
  std::set<std::string> seen;
  std::vector<std::string> names;
  for (const LinearSlot& slot : slots) {
    for (size_t at = 0; at != std::string::npos;) {
      const std::string tail = slot.name.substr(at);
      if (seen.insert(tail).second) names.push_back(tail);
      const size_t dot = slot.name.find('.', at);
      at = dot == std::string::npos ? dot : dot + 1;
    }
  }
  const std::string core = pattern.rfind("re:", 0) == 0 ? "" : WithoutGlobs(pattern);
  const std::string nearest = NearestName(core, names);
  if (!nearest.empty()) return absl::StrCat("the nearest name is '", nearest, "'");
  std::vector<std::string> examples;
  for (const LinearSlot& slot : slots) {
    if (slot.block > 0 || examples.size() >= 7) break;
    examples.push_back(slot.name);
  }
  return absl::StrCat("layers are named like ", absl::StrJoin(examples, ", "));
}

class Checker {
 public:
  Checker(const Pipeline& pipeline, const Catalog& catalog, const ModelConfig& config)
      : catalog_(catalog) {
    plan_.pipeline = pipeline;
    plan_.config = config;
    plan_.slots = AllSlots(config);
  }

  absl::StatusOr<PipelinePlan> Check() {
    AddHead();
    plan_.packed_by.assign(plan_.slots.size(), -1);
    for (const Stage& stage : plan_.pipeline.stages) AddStage(stage);
    if (!errors_.empty()) return errors_.ToStatus();
    CheckLengths();
    CheckGroupSizes(plan_, &errors_);
    CheckTensorParallel(plan_, &errors_);
    CheckFusedGroups(plan_, &errors_);
    CheckActOrder(plan_, &errors_);
    CheckExportTarget(plan_, catalog_, &errors_);
    if (!errors_.empty()) return errors_.ToStatus();
    return std::move(plan_);
  }

 private:
  // Windows longer than the model was made for.
  void CheckLengths() {
    const Pipeline& pipeline = plan_.pipeline;
    if (pipeline.calibration) {
      CheckLength("calibration.sequence_length", pipeline.calibration->sequence_length);
    }
    if (pipeline.evaluate) CheckLength("evaluate.context", pipeline.evaluate->context);
  }

  void CheckLength(const std::string& key, int64_t tokens) {
    const int64_t limit = plan_.config.max_positions;
    if (limit <= 0 || tokens <= limit) return;
    const auto& locations = plan_.pipeline.locations;
    auto it = locations.find(key);
    if (it == locations.end()) it = locations.find(key.substr(0, key.find('.')));  // a default
    const SourceLocation location =
        it == locations.end() ? SourceLocation{plan_.pipeline.file, 0, 0} : it->second;
    errors_.Add(location, absl::StrCat("'", key, "' is ", tokens, "; the model takes at most ",
                                       limit, " tokens; use ", limit, " or fewer"));
  }

  void AddHead() {
    for (const Stage& stage : plan_.pipeline.stages) {
      for (size_t i = 0; i < stage.layers.size(); ++i) {
        const auto pattern = LayerPattern::Compile(stage.layers[i]);
        if (!pattern.ok() || !NamesHead(*pattern)) continue;
        if (plan_.config.tied_embeddings) {
          errors_.Add(PatternLocation(stage, i),
                      "lm_head shares its weights with the embedding (tie_word_embeddings); it "
                      "cannot be packed alone; leave it out");
        }
        plan_.slots.push_back(HeadSlot(plan_.config));
        return;
      }
    }
  }

  static const SourceLocation& PatternLocation(const Stage& stage, size_t index) {
    return index < stage.layer_locations.size() ? stage.layer_locations[index] : stage.location;
  }

  void AddStage(const Stage& stage) {
    const absl::StatusOr<MethodUse> use = FindUse(catalog_, stage.use);
    if (!use.ok()) {
      errors_.Add(stage.use_location, std::string(use.status().message()));
      return;
    }
    PlannedStage planned;
    planned.name = stage.name;
    planned.use = stage.use;
    planned.method = use->method->id;
    planned.tables = use->tables;
    planned.packs = use->Packs();
    planned.requantize = stage.requantize;
    planned.location = stage.location;
    planned.on_error = stage.on_error;
    ReadTraining(stage, *use, &planned);
    ResolveFallback(stage, &planned);
    planned.slots = SelectSlots(stage);
    ResolveSlotOptions(stage, *use->method, &planned);
    Advance(stage, &planned);
    plan_.stages.push_back(std::move(planned));
  }

  void ReadTraining(const Stage& stage, const MethodUse& use, PlannedStage* planned) {
    if (!use.Trains()) {
      if (!stage.train.is_null()) {
        errors_.Add(stage.location,
                    absl::StrCat("stage '", stage.name, "' has 'train', but method '", stage.use,
                                 "' does not train; remove it"));
      }
      CheckTrainingIsLast(stage);
      return;
    }
    std::vector<std::string> errors;
    planned->train = ReadTrainOptions(stage.train, &errors);
    for (const std::string& error : errors) {
      errors_.Add(stage.location, absl::StrCat("stage '", stage.name, "': ", error));
    }
    const int64_t limit = plan_.config.max_positions;
    if (limit > 0 && planned->train->sequence_length > limit) {
      errors_.Add(stage.location,
                  absl::StrCat("stage '", stage.name, "': 'train.sequence_length' is ",
                               planned->train->sequence_length, "; the model takes at most ", limit,
                               " tokens; use ", limit, " or fewer"));
    }
    if (plan_.config.experts > 0) {
      errors_.Add(stage.location,
                  absl::StrCat("stage '", stage.name,
                               "' cannot train this model: mixtures of experts have no gradients "
                               "yet; use a model with dense MLPs"));
    }
  }

  // Training works on the model as a whole, behind everything that works block by block.
  void CheckTrainingIsLast(const Stage& stage) {
    for (const PlannedStage& earlier : plan_.stages) {
      if (!earlier.train) continue;
      errors_.Add(stage.location, absl::StrCat("stage '", stage.name, "' comes after stage '",
                                               earlier.name, "', which trains; put it first"));
      return;
    }
  }

  void ResolveFallback(const Stage& stage, PlannedStage* planned) {
    if (stage.on_error.action != OnError::Action::kUse) return;
    const absl::StatusOr<MethodUse> use = FindUse(catalog_, stage.on_error.use);
    if (!use.ok()) {
      errors_.Add(stage.location, absl::StrCat("on_error: ", std::string(use.status().message())));
      return;
    }
    if (!use->Packs() && planned->packs) {
      errors_.Add(stage.location, absl::StrCat("on_error: '", stage.on_error.use,
                                               "' does not quantize; name a quantizing method"));
      return;
    }
    planned->fallback_method = use->method->id;
    planned->fallback_options =
        ResolveOptions(*use->method, stage.on_error.options, {}, stage.location, &errors_);
  }

  // Slots matched by the stage's patterns; reports patterns that match none.
  std::vector<int> SelectSlots(const Stage& stage) {
    std::vector<LayerPattern> patterns;
    for (const std::string& text : stage.layers) {
      auto pattern = LayerPattern::Compile(text);
      if (pattern.ok()) patterns.push_back(*std::move(pattern));
    }
    std::vector<bool> used(patterns.size(), false);
    std::vector<int> slots;
    for (size_t s = 0; s < plan_.slots.size(); ++s) {
      const LinearSlot& slot = plan_.slots[s];
      bool matched = false;
      for (size_t p = 0; p < patterns.size(); ++p) {
        const bool match =
            slot.name == kHead ? NamesHead(patterns[p]) : patterns[p].Matches(slot.name);
        used[p] = used[p] || match;
        matched = matched || match;
      }
      if (matched) slots.push_back(static_cast<int>(s));
    }
    for (size_t p = 0; p < patterns.size() && !stage.optional; ++p) {
      if (!used[p]) ReportUnmatched(stage, patterns[p].text(), PatternLocation(stage, p));
    }
    return slots;
  }

  void ReportUnmatched(const Stage& stage, const std::string& pattern,
                       const SourceLocation& location) {
    const auto compiled = LayerPattern::Compile(pattern);
    if (pattern != "*" && compiled.ok() && compiled->Matches(kEmbedding)) {
      errors_.Add(location,
                  absl::StrCat("pattern '", pattern, "' of stage '", stage.name,
                               "' names the embedding, which is not packed; leave it out"));
      return;
    }
    errors_.Add(location,
                ErrorText(absl::StrCat("pattern '", pattern, "' of stage '", stage.name,
                                       "' matches no layer"),
                          NearestSlot(pattern, plan_.slots), "correct it, or set optional: true"));
  }

  void ResolveSlotOptions(const Stage& stage, const MethodInfo& method, PlannedStage* planned) {
    // One set of options per override, and the stage's own last.
    std::vector<std::vector<LayerPattern>> patterns;
    std::vector<ResolvedOptions> resolved;
    for (const Override& override : stage.overrides) {
      resolved.push_back(
          ResolveOptions(method, stage.options, override.options, stage.location, &errors_));
      patterns.emplace_back();
      for (const std::string& text : override.layers) {
        auto pattern = LayerPattern::Compile(text);
        if (pattern.ok()) patterns.back().push_back(*std::move(pattern));
      }
    }
    resolved.push_back(ResolveOptions(method, stage.options, {}, stage.location, &errors_));
    std::vector<std::set<std::string>> used(patterns.size());
    for (const int index : planned->slots) {
      const std::string& name = plan_.slots[index].name;
      size_t chosen = 0;
      while (chosen < patterns.size() && !AnyMatches(patterns[chosen], name)) ++chosen;
      planned->options.push_back(resolved[chosen]);
      for (size_t o = 0; o < patterns.size(); ++o) {
        for (const LayerPattern& pattern : patterns[o]) {
          if (pattern.Matches(name)) used[o].insert(pattern.text());
        }
      }
    }
    for (size_t o = 0; o < patterns.size() && !stage.optional; ++o) {
      for (const LayerPattern& pattern : patterns[o]) {
        if (used[o].count(pattern.text()) == 0) {
          ReportUnmatched(stage, pattern.text(), stage.overrides[o].location);
        }
      }
    }
  }

  // Slot states: which stage has packed what so far.
  void Advance(const Stage& stage, PlannedStage* planned) {
    const bool transforms = std::find(planned->tables.begin(), planned->tables.end(),
                                      QM_EXT_BLOCK_TRANSFORM) != planned->tables.end();
    // Training may start from what an earlier stage packed.
    const bool wants_dense = (planned->packs && !planned->train) || transforms;
    std::map<int, std::vector<int>> conflicts;  // earlier stage -> slots
    for (const int slot : planned->slots) {
      int& packed_by = plan_.packed_by[slot];
      if (wants_dense && packed_by >= 0) {
        if (!stage.requantize || transforms) conflicts[packed_by].push_back(slot);
        packed_by = -1;
      }
      if (planned->packs) packed_by = static_cast<int>(plan_.stages.size());
    }
    for (const auto& [earlier, slots] : conflicts) {
      const std::string more =
          slots.size() > 1 ? absl::StrCat(" and ", slots.size() - 1, " more") : "";
      errors_.Add(
          stage.location,
          absl::StrCat("stage '", stage.name, "' wants ", plan_.slots[slots[0]].name, more,
                       " dense; stage '", plan_.stages[earlier].name, "' (",
                       plan_.stages[earlier].method, ") has packed it; narrow one pattern, or ",
                       transforms ? "put the transform first"
                                  : "set requantize: true (dequantizes first, loses "
                                    "twice)"));
    }
  }

  const Catalog& catalog_;
  PipelinePlan plan_;
  ErrorList errors_;
};

}  // namespace

absl::StatusOr<PipelinePlan> CheckPipeline(const Pipeline& pipeline, const Catalog& catalog,
                                           const ModelConfig& config) {
  return Checker(pipeline, catalog, config).Check();
}

}  // namespace quantmill
