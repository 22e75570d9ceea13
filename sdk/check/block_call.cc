#include "sdk/check/block_call.h"

#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "sdk/check/quantize_call.h"

namespace quantmill::check {
namespace {

BlockCall& BlockCallOf(qm_call* call) { return *static_cast<BlockCall*>(call); }

bool IsSample(int64_t sample) { return sample >= 0 && sample < SyntheticBlock::kWindows; }

Tensor WithoutOwner(const qm_tensor& view, const Shape& shape, bool read_only) {
  return Tensor(nullptr, view.data, static_cast<DType>(view.dtype), shape,
                Device{view.device.kind, view.device.index}, read_only);
}

}  // namespace

absl::StatusOr<Tensor> HostCopyOf(Backend& backend, const qm_tensor& view, bool only_f32) {
  const bool known =
      view.dtype == QM_F32 || (!only_f32 && (view.dtype == QM_F16 || view.dtype == QM_BF16));
  if (!known || view.rank < 0 || view.rank > QM_MAX_RANK || view.data == nullptr) {
    return absl::InvalidArgumentError(only_f32 ? "its value is not an F32 tensor"
                                               : "its value is no tensor of F32, F16 or BF16");
  }
  const Shape shape(absl::MakeConstSpan(view.shape, static_cast<size_t>(view.rank)));
  int64_t step = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    if (view.shape[axis] < 1 || (view.shape[axis] > 1 && view.stride[axis] != step)) {
      return absl::InvalidArgumentError("its value is not dense, or empty");
    }
    step *= view.shape[axis];
  }
  QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, shape));
  QM_RETURN_IF_ERROR(backend.Copy(WithoutOwner(view, shape, /*read_only=*/true), &host));
  return host;
}

// ---- qm.host.block/1 ---------------------------------------------------------------------------

BlockCall::BlockCall(CheckedCall& call, const SyntheticBlock& block, Backend& backend,
                     Service service)
    : qm_call(*call.get()), checked_(call), block_(block), backend_(backend) {
  if (service != Service::kNone) {
    service_ = {sizeof service_, &SampleCount, &Forward, &Loss,
                service == Service::kWhole ? &Vjp : nullptr};
  }
  other_ext_ = host_ext;
  host_ext = &HostExt;
}

const void* BlockCall::HostExt(qm_call* call, const char* id) QM_NOEXCEPT {
  BlockCall& self = BlockCallOf(call);
  if (id == nullptr || std::strcmp(id, QM_HOST_BLOCK) != 0) return self.other_ext_(call, id);
  return self.service_.struct_size == 0 ? nullptr : &self.service_;
}

qm_status BlockCall::Override(const qm_override* overrides, uint64_t count, BlockTensors* tensors) {
  *tensors = block_.tensors();
  for (uint64_t i = 0; i < count; ++i) {
    const std::string name = overrides[i].tensor == nullptr ? "" : overrides[i].tensor;
    const auto found = tensors->find(name);
    const absl::StatusOr<Tensor> value =
        HostCopyOf(backend_, overrides[i].value, /*only_f32=*/false);
    if (found == tensors->end() || !value.ok() || !(value->shape() == found->second.shape())) {
      return fail(this, QM_INVALID_ARGUMENT,
                  absl::StrCat("override of '", name,
                               "': the block has no such tensor, or of another shape")
                      .c_str());
    }
    found->second = *value;
  }
  return QM_OK;
}

int64_t BlockCall::SampleCount(qm_call*) QM_NOEXCEPT { return SyntheticBlock::kWindows; }

qm_status BlockCall::Forward(qm_call* call, int64_t sample, const qm_override* overrides,
                             uint64_t count, qm_tensor* out) QM_NOEXCEPT {
  BlockCall& self = BlockCallOf(call);
  BlockTensors tensors;
  if (!IsSample(sample)) return call->fail(call, QM_INVALID_ARGUMENT, "there is no such sample");
  if (const qm_status status = self.Override(overrides, count, &tensors)) return status;
  const std::vector<double> whole = self.block_.Run(tensors, sample).at("");
  const std::vector<float> values(whole.begin(), whole.end());
  const Shape shape = {SyntheticBlock::kRows, SyntheticBlock::kHidden};
  if (self.output_.data == nullptr) {
    self.output_ = self.checked_.Output("the output of the block", DType::kF32, shape);
  }
  Tensor target = WithoutOwner(self.output_, shape, /*read_only=*/false);
  if (!self.backend_.Copy(Tensor::FromF32(shape, values), &target).ok() ||
      !self.backend_.Synchronize().ok()) {
    return call->fail(call, QM_INTERNAL, "the block's output cannot be copied");
  }
  *out = self.output_;
  return QM_OK;
}

qm_status BlockCall::Loss(qm_call* call, const char* submodule, int64_t first, int64_t count,
                          const qm_override* overrides, uint64_t override_count,
                          double* out) QM_NOEXCEPT {
  BlockCall& self = BlockCallOf(call);
  BlockTensors tensors;
  if (submodule == nullptr || first < 0 || count < 1 || first + count > SyntheticBlock::kWindows) {
    return call->fail(call, QM_INVALID_ARGUMENT, "there are no such windows");
  }
  if (const qm_status status = self.Override(overrides, override_count, &tensors)) return status;
  *out = self.block_.Loss(tensors, submodule, first, count);
  if (!std::isnan(*out)) return QM_OK;
  return call->fail(call, QM_INVALID_ARGUMENT, "the block has no such part");
}

qm_status BlockCall::Vjp(qm_call* call, int64_t sample, const qm_override* overrides,
                         uint64_t count, const qm_tensor* d_out, qm_named_tensor* grads,
                         uint64_t grad_count) QM_NOEXCEPT {
  BlockCall& self = BlockCallOf(call);
  BlockTensors tensors;
  if (!IsSample(sample) || d_out == nullptr) {
    return call->fail(call, QM_INVALID_ARGUMENT, "there is no such sample, or no d_out");
  }
  if (const qm_status status = self.Override(overrides, count, &tensors)) return status;
  const absl::StatusOr<Tensor> above = HostCopyOf(self.backend_, *d_out, /*only_f32=*/false);
  if (!above.ok() || above->shape() != Shape({SyntheticBlock::kRows, SyntheticBlock::kHidden})) {
    return call->fail(call, QM_INVALID_ARGUMENT, "d_out has not the shape of the block's output");
  }
  const std::vector<double> slope(above->as<float>(), above->as<float>() + above->elements());
  const BlockOutputs gradients = self.block_.Gradients(tensors, sample, slope);
  for (uint64_t i = 0; i < grad_count; ++i) {
    const std::string name = grads[i].name == nullptr ? "" : grads[i].name;
    const auto found = gradients.find(name);
    if (found == gradients.end()) {
      return call->fail(call, QM_NOT_FOUND, ("the block has no tensor " + name).c_str());
    }
    absl::StatusOr<Tensor> sum = HostCopyOf(self.backend_, grads[i].tensor, /*only_f32=*/true);
    if (!sum.ok() || !(sum->shape() == tensors.at(name).shape())) {
      return call->fail(call, QM_INVALID_ARGUMENT,
                        ("the gradient of " + name + " is not F32 of its shape").c_str());
    }
    for (int64_t e = 0; e < sum->elements(); ++e) {
      sum->as<float>()[e] += static_cast<float>(found->second[static_cast<size_t>(e)]);
    }
    Tensor target = WithoutOwner(grads[i].tensor, sum->shape(), /*read_only=*/false);
    if (!self.backend_.Copy(*sum, &target).ok() || !self.backend_.Synchronize().ok()) {
      return call->fail(call, QM_INTERNAL, "a gradient cannot be copied");
    }
  }
  return QM_OK;
}

// ---- what the plugin is told -------------------------------------------------------------------

BlockInput::BlockInput(CheckedCall& call, const SyntheticBlock& block, Parts parts) {
  for (const SyntheticBlock::Linear& linear : block.linears()) {
    qm_linear_info info = LinearInfo(linear.out, linear.in);
    info.name = linear.name.c_str();
    info.role = linear.role.c_str();
    info.input_group = linear.input_group;
    infos_.push_back(call.Struct("a qm_linear_info", info));
    if (parts.transforms) {
      const PlainRule& rule = block.NextRounding();
      roundings_.push_back({rule.bits, rule.symmetric ? 1 : 0, rule.group});
    }
    if (parts.weights) {
      weights_.push_back(call.Input(linear.weight(), block.tensors().at(linear.weight())));
    }
  }
  if (parts.transforms) {
    for (const SyntheticBlock::Site& site : block.sites()) AddSite(site);
  }
  qm_block_info info = {};
  info.struct_size = sizeof info;
  info.name = block.name().c_str();
  info.linears = infos_.data();
  info.weights = parts.weights ? weights_.data() : nullptr;
  info.next_roundings = parts.transforms ? roundings_.data() : nullptr;
  info.linear_count = infos_.size();
  info.sites = parts.transforms ? sites_.data() : nullptr;
  info.site_count = sites_.size();
  given_ = call.Struct("the qm_block_info", info);
}

void BlockInput::AddSite(const SyntheticBlock::Site& site) {
  auto consumers = std::make_unique<std::vector<qm_site_consumer>>();
  for (const SyntheticBlock::Consumer& consumer : site.consumers) {
    consumers->push_back({consumer.name.c_str(),
                          consumer.channel_map.empty() ? nullptr : consumer.channel_map.data(),
                          consumer.in, 0});
  }
  const uint64_t flags =
      site.rotation_block == 0
          ? 0
          : QM_SITE_ROTATABLE | (static_cast<uint64_t>(site.rotation_block) << 32);
  sites_.push_back({site.producer.c_str(), site.producer.c_str(), consumers->data(),
                    consumers->size(), site.channels, flags});
  consumers_.push_back(std::move(consumers));
}

}  // namespace quantmill::check
