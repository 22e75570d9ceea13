#include "host/run/block_view.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/worker/tensor_view.h"

namespace quantmill {
namespace {

constexpr uint64_t kMaxEdits = 1 << 20;
constexpr int kRotationWidthShift = 32;  // in qm_scale_site::flags

}  // namespace

BlockView::BlockView(const TransformBlock& block, const std::vector<Tensor>& weights) : info_{} {
  for (size_t i = 0; i < block.slots.size(); ++i) {
    linears_.push_back(std::make_unique<LinearInfoView>(block.slots[i], block.weight_dtypes[i],
                                                        block.scale_dtype));
    pointers_.push_back(linears_.back()->get());
  }
  for (const Tensor& weight : weights) weights_.push_back(ReadOnlyView(weight));
  consumers_.reserve(block.sites.size());
  for (const ScaleSite& site : block.sites) AddSite(site);
  info_.struct_size = sizeof(info_);
  info_.name = block.name.c_str();
  info_.linears = pointers_.data();
  info_.weights = weights_.empty() ? nullptr : weights_.data();
  info_.next_roundings = block.next_roundings.empty() ? nullptr : block.next_roundings.data();
  info_.linear_count = pointers_.size();
  info_.sites = sites_.data();
  info_.site_count = sites_.size();
}

void BlockView::AddSite(const ScaleSite& site) {
  std::vector<qm_site_consumer>& consumers = consumers_.emplace_back();
  for (const SiteConsumer& consumer : site.consumers) {
    consumers.push_back({consumer.name.c_str(),
                         consumer.channel_map.empty() ? nullptr : consumer.channel_map.data(),
                         consumer.in_features, consumer.is_slot() ? 0 : QM_CONSUMER_NOT_A_SLOT});
  }
  qm_scale_site view = {};
  view.id = site.id.c_str();
  view.producer = site.producer.c_str();
  view.consumers = consumers.data();
  view.consumer_count = consumers.size();
  view.channels = site.channels;
  if (site.rotation_block > 0) {
    view.flags = QM_SITE_ROTATABLE | static_cast<uint64_t>(site.rotation_block)
                                         << kRotationWidthShift;
  }
  sites_.push_back(view);
}

absl::StatusOr<std::vector<BlockEdit>> TakeEdits(Backend& backend, const qm_edit* edits,
                                                 uint64_t count) {
  if (count > kMaxEdits || (count > 0 && edits == nullptr)) {
    return absl::InternalError(absl::StrCat(count, " edits were counted, none listed"));
  }
  std::vector<BlockEdit> result;
  for (uint64_t i = 0; i < count; ++i) {
    const qm_edit& edit = edits[i];
    if (edit.target == nullptr) {
      return absl::InternalError(absl::StrCat("edit ", i, " names no target"));
    }
    if (edit.kind < QM_EDIT_SCALE || edit.kind > QM_EDIT_REPLACE) {
      return absl::InternalError(
          absl::StrCat("edit ", i, " of ", edit.target, " has the unknown kind ", edit.kind));
    }
    absl::StatusOr<Tensor> value = BorrowTensor(edit.value, backend.device());
    if (value.ok() && !IsModelFloat(value->dtype())) {
      value = absl::InvalidArgumentError("its value is not F32, F16 or BF16");
    }
    if (!value.ok()) {
      return absl::InternalError(
          absl::StrCat("edit ", i, " of ", edit.target, ": ", value.status().message()));
    }
    BlockEdit copy;
    copy.kind = static_cast<EditKind>(edit.kind);
    copy.target = edit.target;
    QM_ASSIGN_OR_RETURN(copy.value, Tensor::Host(DType::kF32, value->shape()));
    if (value->elements() > 0) QM_RETURN_IF_ERROR(backend.Copy(*value, &copy.value));
    result.push_back(std::move(copy));
  }
  return result;
}

}  // namespace quantmill
