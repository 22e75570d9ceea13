#include "host/run/block_state.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/sites.h"

namespace quantmill {

void BlockState::SetWeights(BlockWeights weights) {
  untouched_ = original_ = dense_ = current_ = std::move(weights);
  editor_.emplace(config_, index_, untouched_, backend_);
}

absl::Status BlockState::Apply(absl::Span<const BlockEdit> edits) {
  std::set<std::string> changed;
  for (const BlockEdit& edit : edits) {
    QM_ASSIGN_OR_RETURN(const BlockEdit applied, editor_->Apply(edit, &dense_, &changed));
    std::set<std::string> same;
    if (edit.preserves()) QM_RETURN_IF_ERROR(editor_->Apply(edit, &original_, &same).status());
    QM_RETURN_IF_ERROR(UpdateStatistics(applied));
  }
  CopyToCurrent(changed);
  edited_.insert(changed.begin(), changed.end());
  return absl::OkStatus();
}

void BlockState::CopyToCurrent(const std::set<std::string>& names) {
  const BlockTensors from(config_, index_, &dense_), to(config_, index_, &current_);
  for (const std::string& name : names) {
    if (!packed_.contains(name)) *to.Find(name) = *from.Find(name);
  }
}

absl::Status BlockState::UpdateStatistics(const BlockEdit& applied) {
  if (applied.kind == EditKind::kClip || applied.kind == EditKind::kReplace) {
    const std::string tensor =
        applied.kind == EditKind::kClip ? applied.target + ".weight" : applied.target;
    for (int group : GroupsBehind(config_, index_, tensor)) statistics_.Erase(group);
    return absl::OkStatus();
  }
  std::set<int> done;
  for (const SiteConsumer& consumer : editor_->FindSite(applied.target)->consumers) {
    if (!consumer.is_slot() || !done.insert(consumer.input_group).second) continue;
    if (applied.kind == EditKind::kRotate) {
      statistics_.Erase(consumer.input_group);
      continue;
    }
    std::vector<float> scale;
    for (int64_t i = 0; i < consumer.in_features; ++i) {
      scale.push_back(applied.value.as<const float>()[consumer.ChannelOf(i)]);
    }
    QM_RETURN_IF_ERROR(DivideInputs(backend_, consumer.input_group, scale, &statistics_));
  }
  return absl::OkStatus();
}

absl::Status BlockState::Put(const LinearSlot& slot, LinearWeight weight) {
  LinearWeight* target = is_head() ? &head_ : current_.At(slot);
  if (target == nullptr) return absl::InternalError(absl::StrCat("no slot ", slot.name));
  const std::string name = slot.name + ".weight";
  if (!weight.dense.empty()) {
    weight.bias = target->bias;
    *target = std::move(weight);
    packed_.insert(name);
  } else if (!is_head()) {
    *target = *dense_.At(slot);
    packed_.erase(name);
  }
  return absl::OkStatus();
}

absl::Status BlockState::Finish() {
  std::set<std::string> names;
  for (const std::string& name : edited_) {
    if (!packed_.contains(name)) names.insert(name);
  }
  return names.empty() ? absl::OkStatus() : editor_->Round(names, &current_);
}

absl::Status ApplyFinally(const ModelConfig& config, int64_t block,
                          absl::Span<const BlockEdit> edits, Backend& backend,
                          BlockWeights* weights, std::set<std::string>* changed) {
  const BlockEditor editor(config, block, *weights, backend);
  for (const BlockEdit& edit : edits) {
    QM_RETURN_IF_ERROR(editor.Apply(edit, weights, changed).status());
  }
  return editor.Round(*changed, weights);
}

}  // namespace quantmill
