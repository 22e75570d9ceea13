#include "host/run/unit_keys.h"

#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/model/graph.h"
#include "host/run/fingerprint.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

// The layer of "model.layers.3.mlp.down_proj.weight", or -1.
int64_t LayerOf(const std::string& name) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (name.compare(0, kPrefix.size(), kPrefix) != 0) return -1;
  char* end = nullptr;
  const int64_t layer = std::strtoll(name.c_str() + kPrefix.size(), &end, 10);
  return *end == '.' ? layer : -1;
}

void AddMap(const std::map<std::string, std::string>& map, Fingerprint* fingerprint) {
  for (const auto& [name, digest] : map) {
    fingerprint->Add(name);
    fingerprint->Add(digest);
  }
}

void AddRoundings(const TransformBlock& block, Fingerprint* fingerprint) {
  for (const qm_next_rounding& next : block.next_roundings) {
    fingerprint->Add(absl::StrCat(next.bits, " ", next.symmetric, " ", next.group_size));
  }
}

}  // namespace

ModelDigests::ModelDigests(const Checkpoint& checkpoint, int64_t layers, ThreadPool& threads)
    : checkpoint_(checkpoint), threads_(threads), names_(static_cast<size_t>(layers) + 1) {
  for (const CheckpointTensor& tensor : checkpoint.tensors()) {
    const int64_t layer = LayerOf(tensor.entry->name);
    if (layer >= layers) continue;
    names_[static_cast<size_t>(layer < 0 ? layers : layer)].push_back(tensor.entry->name);
  }
}

const std::map<std::string, std::string>& ModelDigests::Block(int64_t block) {
  const auto [it, fresh] = digests_.try_emplace(block);
  if (!fresh) return it->second;
  for (const std::string& name : names_[static_cast<size_t>(block)]) {
    const absl::StatusOr<Tensor> tensor = checkpoint_.Get(name);
    if (!tensor.ok()) continue;  // a dtype the model does not use
    Fingerprint fingerprint;
    fingerprint.Add(*tensor, threads_);
    it->second[name] = fingerprint.Hex();
  }
  return it->second;
}

std::string ModelDigests::Total() {
  Fingerprint fingerprint;
  for (size_t block = 0; block < names_.size(); ++block) {
    const bool fresh = !digests_.contains(static_cast<int64_t>(block));
    AddMap(Block(static_cast<int64_t>(block)), &fingerprint);
    if (!fresh) continue;
    for (const std::string& name : names_[block]) checkpoint_.Release(name);
  }
  return fingerprint.Hex();
}

KeyChain::KeyChain(const PipelinePlan& plan, const StageSet& stages, std::string calibration,
                   ModelDigests& digests)
    : plan_(plan), stages_(stages), calibration_(std::move(calibration)), digests_(digests) {
  if (!stages.NeedsStatistics()) return;
  Fingerprint fingerprint;
  fingerprint.Add(plan.config.json.dump());
  AddMap(digests.Block(plan.config.layers), &fingerprint);
  original_stream_ = quantized_stream_ = fingerprint.Hex();
}

void KeyChain::BeginBlock(int64_t block) {
  block_ = block;
  block_units_.clear();
  block_transforms_.clear();
}

UnitKeys KeyChain::Key(const PreparedStage& stage, const std::vector<size_t>& slots) const {
  Fingerprint fingerprint;
  const PlannedStage& planned = *stage.stage;
  const BoundMethod& method = stage.method;
  for (const std::string& text :
       {std::string(stage.transforms ? "transform/1"
                    : stage.tunes    ? "tune/1"
                                     : "unit/1"),
        planned.name, planned.use, std::string(method.loaded.method->version), method.plugin_sha256,
        absl::StrCat(plan_.pipeline.seed, " ", static_cast<int>(stages_.scale_dtype))}) {
    fingerprint.Add(text);
  }
  const auto& tensors = digests_.Block(block_);
  for (size_t index : slots) {
    const std::string& name = plan_.slots[static_cast<size_t>(planned.slots[index])].name;
    fingerprint.Add(name);
    fingerprint.Add(OptionsJson(stage.OptionsOf(index)));
    auto digest = tensors.find(name + ".weight");
    // A tied head is stored as the embedding.
    if (digest == tensors.end()) digest = tensors.find("model.embed_tokens.weight");
    if (digest != tensors.end()) fingerprint.Add(digest->second);
  }
  for (const std::string& unit : block_transforms_) fingerprint.Add(unit);
  if (stage.transforms) AddRoundings(stage.parts.at(block_).block, &fingerprint);
  if (stage.needs_statistics || stage.transforms) AddMap(tensors, &fingerprint);
  if (stage.needs_statistics) {
    fingerprint.Add(calibration_);
    fingerprint.Add(stage.uses_quantized_stream ? quantized_stream_ : "");
    fingerprint.Add(stage.uses_original_stream ? original_stream_ : "");
  }
  if (stage.sequential || stage.tunes || planned.requantize) {
    for (const std::string& unit : block_units_) fingerprint.Add(unit);
  }
  UnitKeys keys;
  keys.attempt = fingerprint.Hex();
  Fingerprint whole;
  whole.Add(keys.attempt);
  whole.Add(absl::StrCat(static_cast<int>(planned.on_error.action), planned.on_error.use));
  whole.Add(OptionsJson(planned.fallback_options));
  if (stage.fallback) whole.Add(stage.fallback->plugin_sha256);
  keys.unit = whole.Hex();
  return keys;
}

void KeyChain::EndBlock() {
  if (!stages_.NeedsStatistics()) return;
  const auto& tensors = digests_.Block(block_);
  Fingerprint original, quantized;
  original.Add(original_stream_);
  AddMap(tensors, &original);
  quantized.Add(quantized_stream_);
  AddMap(tensors, &quantized);
  for (const std::string& unit : block_units_) quantized.Add(unit);
  original_stream_ = original.Hex();
  quantized_stream_ = quantized.Hex();
}

std::string OptionsJson(const ResolvedOptions& options) { return nlohmann::json(options).dump(); }

}  // namespace quantmill
