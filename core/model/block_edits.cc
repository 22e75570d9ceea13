#include "core/model/block_edits.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/graph.h"
#include "core/threads/thread_pool.h"

namespace quantmill {
namespace {

constexpr int64_t kRowsPerTask = 16;
// Rounding of Q to f32 leaves at most about n * 2^-24 in an entry of Q^T Q; a block has the size of
// a head.
constexpr double kOrthogonal = 1e-4;

std::string WeightOf(const std::string& module) { return module + ".weight"; }

bool AllFinite(const Tensor& value) {
  const float* v = value.as<const float>();
  return std::all_of(v, v + value.elements(), [](float x) { return std::isfinite(x); });
}

// target[row, i] *= factor of input i.
void ScaleColumns(const SiteConsumer& consumer, const float* scale, ThreadPool& threads,
                  Tensor* weight) {
  const int64_t columns = weight->dim(1);
  float* values = weight->as<float>();
  threads.ParallelFor(weight->dim(0), kRowsPerTask, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < columns; ++i) {
        values[row * columns + i] *= scale[consumer.ChannelOf(i)];
      }
    }
  });
}

void Clamp(const Tensor& limits, ThreadPool& threads, Tensor* weight) {
  const int64_t columns = weight->dim(1), groups = limits.dim(1), width = columns / groups;
  const float* limit = limits.as<const float>();
  float* values = weight->as<float>();
  threads.ParallelFor(weight->dim(0), kRowsPerTask, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < columns; ++i) {
        const float most = limit[row * groups + i / width];
        float& value = values[row * columns + i];
        value = std::clamp(value, -most, most);
      }
    }
  });
}

}  // namespace

std::string_view EditName(EditKind kind) {
  switch (kind) {
    case EditKind::kScale:
      return "scale";
    case EditKind::kRotate:
      return "rotate";
    case EditKind::kClip:
      return "clip";
    case EditKind::kReplace:
      return "replace";
  }
  return "";
}

BlockTensors::BlockTensors(const ModelConfig& config, int64_t block, BlockWeights* weights) {
  const std::string name = BlockName(block);
  auto add = [this](const std::string& full, Tensor* tensor) {
    if (!tensor->empty()) tensors_[full] = tensor;
  };
  add(name + ".input_layernorm.weight", &weights->input_norm);
  add(name + ".post_attention_layernorm.weight", &weights->post_attention_norm);
  add(name + ".self_attn.q_norm.weight", &weights->q_norm);
  add(name + ".self_attn.k_norm.weight", &weights->k_norm);
  add(WeightOf(RouterName(config, block)), &weights->moe.router.dense);
  for (const LinearSlot& slot : BlockSlots(config, block)) {
    LinearWeight* linear = weights->At(slot);
    if (linear == nullptr) continue;
    add(WeightOf(slot.name), &linear->dense);
    add(slot.name + ".bias", &linear->bias);
  }
}

Tensor* BlockTensors::Find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : found->second;
}

BlockEditor::BlockEditor(const ModelConfig& config, int64_t block, const BlockWeights& stored,
                         Backend& backend)
    : config_(config), block_(block), backend_(backend), sites_(BlockSites(config, block)) {
  BlockWeights handles = stored;
  const BlockTensors tensors(config, block, &handles);
  for (const auto& [name, tensor] : tensors.all()) {
    stored_[name] = {tensor->dtype(), tensor->shape()};
  }
}

const ScaleSite* BlockEditor::FindSite(std::string_view id) const {
  for (const ScaleSite& site : sites_) {
    if (site.id == id) return &site;
  }
  return nullptr;
}

// ---- checks ----

absl::Status BlockEditor::Check(const BlockEdit& edit) const {
  absl::Status status;
  if (edit.value.empty() || edit.value.dtype() != DType::kF32 || !edit.value.device().is_cpu()) {
    status = absl::InvalidArgumentError("its value is no f32 tensor");
  } else if (!AllFinite(edit.value)) {
    status = absl::InvalidArgumentError("its value holds a NaN or an infinity");
  } else {
    switch (edit.kind) {
      case EditKind::kScale:
        status = CheckScale(edit);
        break;
      case EditKind::kRotate:
        status = CheckRotation(edit);
        break;
      case EditKind::kClip:
        status = CheckClip(edit);
        break;
      case EditKind::kReplace:
        status = CheckReplacement(edit);
        break;
    }
  }
  return WithContext(
      status, absl::StrCat("edit '", std::string(EditName(edit.kind)), "' of ", edit.target));
}

absl::Status BlockEditor::CheckScale(const BlockEdit& edit) const {
  const ScaleSite* site = FindSite(edit.target);
  if (site == nullptr) return absl::InvalidArgumentError("the block has no scale site of this id");
  if (!(edit.value.shape() == Shape{site->channels})) {
    return absl::InvalidArgumentError(absl::StrCat("its value has shape ",
                                                   edit.value.shape().ToString(), ", the site has ",
                                                   site->channels, " channels"));
  }
  const float* scale = edit.value.as<const float>();
  for (int64_t c = 0; c < site->channels; ++c) {
    if (scale[c] == 0) {
      return absl::InvalidArgumentError(absl::StrCat("the scale of channel ", c, " is 0"));
    }
  }
  return absl::OkStatus();
}

absl::Status BlockEditor::CheckRotation(const BlockEdit& edit) const {
  const ScaleSite* site = FindSite(edit.target);
  if (site == nullptr) return absl::InvalidArgumentError("the block has no scale site of this id");
  const int64_t width = site->rotation_block, n = site->channels;
  if (width == 0) return absl::InvalidArgumentError("this site cannot be rotated");
  if (!(edit.value.shape() == Shape{n, n})) {
    return absl::InvalidArgumentError(absl::StrCat(
        "its value has shape ", edit.value.shape().ToString(), " instead of [", n, ", ", n, "]"));
  }
  const float* q = edit.value.as<const float>();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      if (i / width != j / width && q[i * n + j] != 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("it mixes channels ", i, " and ", j, " of different heads of ", width));
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t first = i / width * width;
    for (int64_t j = first; j <= i; ++j) {
      double dot = 0;
      for (int64_t k = first; k < first + width; ++k) dot += double{q[i * n + k]} * q[j * n + k];
      if (std::abs(dot - (i == j ? 1.0 : 0.0)) > kOrthogonal) {
        return absl::InvalidArgumentError(absl::StrCat("it is not orthogonal (rows ", j, " and ", i,
                                                       " have the product ", dot, ")"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status BlockEditor::CheckClip(const BlockEdit& edit) const {
  const auto found = stored_.find(WeightOf(edit.target));
  if (found == stored_.end() || found->second.shape.rank() != 2) {
    return absl::InvalidArgumentError("the block has no linear of this name");
  }
  const Shape& shape = found->second.shape;
  if (edit.value.rank() != 2 || edit.value.dim(0) != shape[0] || edit.value.dim(1) < 1 ||
      shape[1] % edit.value.dim(1) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "its value has shape ", edit.value.shape().ToString(), "; for a weight ", shape.ToString(),
        " it must be [", shape[0], ", groups] with a number of groups that divides ", shape[1]));
  }
  const float* limits = edit.value.as<const float>();
  if (std::any_of(limits, limits + edit.value.elements(), [](float v) { return v < 0; })) {
    return absl::InvalidArgumentError("its value holds a negative limit");
  }
  return absl::OkStatus();
}

absl::Status BlockEditor::CheckReplacement(const BlockEdit& edit) const {
  const auto found = stored_.find(edit.target);
  if (found == stored_.end()) {
    return absl::InvalidArgumentError("the block has no tensor of this name");
  }
  if (edit.value.shape() == found->second.shape) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("its value has shape ",
                                                 edit.value.shape().ToString(), ", the tensor ",
                                                 found->second.shape.ToString()));
}

// ---- application ----

absl::StatusOr<Tensor> BlockEditor::ToHost(const Tensor& tensor) const {
  QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, tensor.shape()));
  QM_RETURN_IF_ERROR(backend_.Copy(tensor, &host));
  return host;
}

absl::Status BlockEditor::Edit(const BlockTensors& tensors, const std::string& name,
                               const HostEdit& edit, std::set<std::string>* changed) const {
  Tensor* target = tensors.Find(name);
  if (target == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("the block has no dense tensor ", name));
  }
  QM_ASSIGN_OR_RETURN(Tensor host, ToHost(*target));
  edit(&host);
  changed->insert(name);
  QM_ASSIGN_OR_RETURN(*target, backend_.ToDevice(host));
  return absl::OkStatus();
}

absl::Status BlockEditor::DivideProducer(const ScaleSite& site, const Tensor& scale,
                                         const BlockTensors& tensors,
                                         std::set<std::string>* changed) const {
  const float* s = scale.as<const float>();
  const HostEdit divide = [&](Tensor* rows) {
    const int64_t columns = rows->elements() / site.channels;
    backend_.threads().ParallelFor(site.channels, kRowsPerTask,
                                   [&](int64_t begin, int64_t end, int) {
                                     for (int64_t i = begin * columns; i < end * columns; ++i) {
                                       rows->as<float>()[i] /= s[i / columns];
                                     }
                                   });
  };
  QM_RETURN_IF_ERROR(Edit(tensors, WeightOf(site.producer), divide, changed));
  const std::string bias = site.producer + ".bias";
  if (tensors.Find(bias) == nullptr) return absl::OkStatus();
  return Edit(tensors, bias, divide, changed);
}

absl::StatusOr<Tensor> BlockEditor::DivideNorm(const ScaleSite& site, const Tensor& scale,
                                               const BlockTensors& tensors,
                                               std::set<std::string>* changed) const {
  const std::string name = WeightOf(site.producer);
  const DType dtype = stored_.at(name).dtype;
  QM_ASSIGN_OR_RETURN(const Tensor old, ToHost(*tensors.Find(name)));
  QM_ASSIGN_OR_RETURN(Tensor divided, Tensor::Host(DType::kF32, old.shape()));
  QM_ASSIGN_OR_RETURN(Tensor rounded, Tensor::Host(dtype, old.shape()));
  QM_ASSIGN_OR_RETURN(Tensor ratio, Tensor::Host(DType::kF32, old.shape()));
  const float* s = scale.as<const float>();
  const float* before = old.as<const float>();
  float* after = divided.as<float>();
  for (int64_t c = 0; c < site.channels; ++c) after[c] = before[c] / s[c];
  QM_RETURN_IF_ERROR(backend_.Copy(divided, &rounded));
  QM_RETURN_IF_ERROR(backend_.Copy(rounded, &divided));
  for (int64_t c = 0; c < site.channels; ++c) {
    // A norm of 0 stays 0 whatever the scale: nothing reaches the consumers.
    const float factor = before[c] == 0 ? s[c] : before[c] / after[c];
    if (!std::isfinite(after[c]) || !std::isfinite(factor) || factor == 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("channel ", c, " of ", name, " is ", before[c], "; divided by ", s[c],
                       " it leaves the range of ", AbslView(DTypeName(dtype))));
    }
    ratio.as<float>()[c] = factor;
  }
  changed->insert(name);
  QM_ASSIGN_OR_RETURN(*tensors.Find(name), backend_.ToDevice(divided));
  return ratio;
}

// Rows of the producer: (Q^T W)[i, :] = sum over k of the head of Q[k, i] W[k, :].
void BlockEditor::RotateRows(const ScaleSite& site, const Tensor& rotation, Tensor* rows) const {
  const int64_t n = site.channels, width = site.rotation_block, columns = rows->elements() / n;
  const float* q = rotation.as<const float>();
  backend_.threads().ParallelFor(n / width, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<double> sums(static_cast<size_t>(width * columns));
    for (int64_t head = begin; head < end; ++head) {
      float* block = rows->as<float>() + head * width * columns;
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t i = 0; i < width; ++i) {
        double* sum = sums.data() + i * columns;
        for (int64_t k = 0; k < width; ++k) {
          const double factor = q[(head * width + k) * n + head * width + i];
          for (int64_t j = 0; j < columns; ++j) sum[j] += factor * block[k * columns + j];
        }
      }
      for (int64_t i = 0; i < width * columns; ++i) {
        block[i] = static_cast<float>(sums[static_cast<size_t>(i)]);
      }
    }
  });
}

// Columns of a consumer, head by head: W Q.
void BlockEditor::RotateColumns(const ScaleSite& site, const SiteConsumer& consumer,
                                const Tensor& rotation, Tensor* weight) const {
  const int64_t n = site.channels, width = site.rotation_block, columns = weight->dim(1);
  const float* q = rotation.as<const float>();
  backend_.threads().ParallelFor(
      weight->dim(0), kRowsPerTask, [&](int64_t begin, int64_t end, int) {
        std::vector<float> head(static_cast<size_t>(width));
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t first = 0; first < columns; first += width) {
            float* values = weight->as<float>() + row * columns + first;
            std::copy(values, values + width, head.begin());
            const int64_t channel = consumer.ChannelOf(first);
            for (int64_t i = 0; i < width; ++i) {
              double sum = 0;
              for (int64_t k = 0; k < width; ++k) {
                sum += double{head[static_cast<size_t>(k)]} * q[(channel + k) * n + channel + i];
              }
              values[i] = static_cast<float>(sum);
            }
          }
        }
      });
}

absl::Status BlockEditor::Rotate(const ScaleSite& site, const Tensor& rotation,
                                 const BlockTensors& tensors,
                                 std::set<std::string>* changed) const {
  const HostEdit rows = [&](Tensor* tensor) { RotateRows(site, rotation, tensor); };
  QM_RETURN_IF_ERROR(Edit(tensors, WeightOf(site.producer), rows, changed));
  const std::string bias = site.producer + ".bias";
  if (tensors.Find(bias) != nullptr) QM_RETURN_IF_ERROR(Edit(tensors, bias, rows, changed));
  for (const SiteConsumer& consumer : site.consumers) {
    const HostEdit columns = [&](Tensor* weight) {
      RotateColumns(site, consumer, rotation, weight);
    };
    QM_RETURN_IF_ERROR(Edit(tensors, WeightOf(consumer.name), columns, changed));
  }
  return absl::OkStatus();
}

absl::StatusOr<Tensor> BlockEditor::Scale(const ScaleSite& site, const Tensor& scale,
                                          const BlockTensors& tensors,
                                          std::set<std::string>* changed) const {
  Tensor applied = scale;
  if (site.producer_is_slot) {
    QM_RETURN_IF_ERROR(DivideProducer(site, scale, tensors, changed));
  } else {
    QM_ASSIGN_OR_RETURN(applied, DivideNorm(site, scale, tensors, changed));
  }
  for (const SiteConsumer& consumer : site.consumers) {
    const HostEdit multiply = [&](Tensor* weight) {
      ScaleColumns(consumer, applied.as<const float>(), backend_.threads(), weight);
    };
    QM_RETURN_IF_ERROR(Edit(tensors, WeightOf(consumer.name), multiply, changed));
  }
  return applied;
}

absl::StatusOr<BlockEdit> BlockEditor::Apply(const BlockEdit& edit, BlockWeights* weights,
                                             std::set<std::string>* changed) const {
  const BlockTensors tensors(config_, block_, weights);
  BlockEdit applied = edit;
  switch (edit.kind) {
    case EditKind::kScale: {
      QM_ASSIGN_OR_RETURN(applied.value,
                          Scale(*FindSite(edit.target), edit.value, tensors, changed));
      break;
    }
    case EditKind::kRotate:
      QM_RETURN_IF_ERROR(Rotate(*FindSite(edit.target), edit.value, tensors, changed));
      break;
    case EditKind::kClip:
      QM_RETURN_IF_ERROR(Edit(
          tensors, WeightOf(edit.target),
          [&](Tensor* weight) { Clamp(edit.value, backend_.threads(), weight); }, changed));
      break;
    case EditKind::kReplace:
      QM_RETURN_IF_ERROR(Edit(
          tensors, edit.target, [&](Tensor* tensor) { *tensor = edit.value; }, changed));
      break;
  }
  return applied;
}

absl::Status BlockEditor::Round(const std::set<std::string>& names, BlockWeights* weights) const {
  const BlockTensors tensors(config_, block_, weights);
  for (const std::string& name : names) {
    Tensor* target = tensors.Find(name);
    const auto stored = stored_.find(name);
    if (target == nullptr || stored == stored_.end() || target->dtype() == stored->second.dtype) {
      continue;
    }
    QM_ASSIGN_OR_RETURN(Tensor rounded,
                        backend_.Allocate(stored->second.dtype, stored->second.shape));
    QM_RETURN_IF_ERROR(backend_.Copy(*target, &rounded));
    *target = std::move(rounded);
  }
  return absl::OkStatus();
}

}  // namespace quantmill
