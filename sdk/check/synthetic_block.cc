#include "sdk/check/synthetic_block.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace quantmill::check {
namespace {

using Rows = std::vector<double>;  // [rows, width]

Tensor NormalTensor(const Shape& shape, float deviation, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  Tensor out = *Tensor::Host(DType::kF32, shape);
  for (int64_t i = 0; i < out.elements(); ++i) out.as<float>()[i] = normal(random);
  return out;
}

Tensor CopyOf(const Tensor& tensor) {
  return Tensor::FromF32(
      tensor.shape(),
      absl::MakeConstSpan(tensor.as<float>(), static_cast<size_t>(tensor.elements())));
}

Rows Norm(const Rows& x, const Tensor& gain) {
  const int64_t width = gain.elements();
  Rows out(x.size());
  for (size_t begin = 0; begin < x.size(); begin += static_cast<size_t>(width)) {
    double squares = 1e-6 * static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) squares += x[begin + i] * x[begin + i];
    const double factor = 1.0 / std::sqrt(squares / static_cast<double>(width));
    for (int64_t i = 0; i < width; ++i) {
      out[begin + i] = x[begin + i] * factor * gain.as<float>()[i];
    }
  }
  return out;
}

Rows Multiply(const Rows& x, const Tensor& weight) {
  const int64_t out_features = weight.dim(0), in = weight.dim(1);
  const int64_t rows = static_cast<int64_t>(x.size()) / in;
  Rows out(static_cast<size_t>(rows * out_features));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out_features; ++o) {
      double sum = 0.0;
      for (int64_t i = 0; i < in; ++i) sum += x[r * in + i] * weight.as<float>()[o * in + i];
      out[r * out_features + o] = sum;
    }
  }
  return out;
}

Rows Sum(const Rows& a, const Rows& b) {
  Rows out(a.size());
  std::transform(a.begin(), a.end(), b.begin(), out.begin(), std::plus<>());
  return out;
}

// Causal softmax attention; query head h reads key and value head h / (heads / kv heads).
Rows Attend(const Rows& q, const Rows& k, const Rows& v) {
  constexpr int64_t kWidth = SyntheticBlock::kHeads * SyntheticBlock::kHeadDim;
  constexpr int64_t kKvWidth = SyntheticBlock::kKvHeads * SyntheticBlock::kHeadDim;
  constexpr int64_t kDim = SyntheticBlock::kHeadDim;
  const int64_t rows = static_cast<int64_t>(q.size()) / kWidth;
  Rows out(q.size(), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < SyntheticBlock::kHeads; ++h) {
      const int64_t kv = h / (SyntheticBlock::kHeads / SyntheticBlock::kKvHeads);
      std::vector<double> weight(static_cast<size_t>(r + 1));
      double total = 0.0;
      for (int64_t s = 0; s <= r; ++s) {
        double dot = 0.0;
        for (int64_t d = 0; d < kDim; ++d) {
          dot += q[r * kWidth + h * kDim + d] * k[s * kKvWidth + kv * kDim + d];
        }
        weight[s] = std::exp(dot / std::sqrt(static_cast<double>(kDim)));
        total += weight[s];
      }
      for (int64_t s = 0; s <= r; ++s) {
        for (int64_t d = 0; d < kDim; ++d) {
          out[r * kWidth + h * kDim + d] += weight[s] / total * v[s * kKvWidth + kv * kDim + d];
        }
      }
    }
  }
  return out;
}

absl::Status Wrong(const std::string& why) { return absl::InvalidArgumentError(why); }

absl::Status CheckFinite(const Tensor& value) {
  for (int64_t i = 0; i < value.elements(); ++i) {
    if (std::isfinite(value.as<float>()[i])) continue;
    return Wrong(absl::StrFormat("element %d of its value is %g", i, value.as<float>()[i]));
  }
  return absl::OkStatus();
}

absl::Status WantShape(const Tensor& value, const Shape& shape) {
  if (value.shape() == shape) return absl::OkStatus();
  return Wrong(absl::StrCat("its value has shape ", value.shape().ToString(), ", expected ",
                            shape.ToString()));
}

}  // namespace

SyntheticBlock::SyntheticBlock(uint64_t seed) {
  constexpr int64_t kQ = kHeads * kHeadDim, kKv = kKvHeads * kHeadDim;
  AddNorm("input_layernorm", seed + 1);
  AddLinear("self_attn.q_proj", "attn.q", kQ, kHidden, 0, seed + 2);
  AddLinear("self_attn.k_proj", "attn.k", kKv, kHidden, 0, seed + 3);
  AddLinear("self_attn.v_proj", "attn.v", kKv, kHidden, 0, seed + 4);
  AddLinear("self_attn.o_proj", "attn.o", kHidden, kQ, 1, seed + 5);
  AddNorm("post_attention_layernorm", seed + 6);
  AddLinear("mlp.gate_proj", "mlp.gate", kInner, kHidden, 2, seed + 7);
  AddLinear("mlp.up_proj", "mlp.up", kInner, kHidden, 2, seed + 8);
  AddLinear("mlp.down_proj", "mlp.down", kHidden, kInner, 3, seed + 9);
  AddSites();
  windows_ = NormalTensor({kWindows * kRows, kHidden}, 1.0f, seed + 10);
}

void SyntheticBlock::AddLinear(const std::string& part, const std::string& role, int64_t out,
                               int64_t in, int32_t input_group, uint64_t seed) {
  linears_.push_back({absl::StrCat(name_, ".", part), role, out, in, input_group});
  const float deviation = 1.0f / std::sqrt(static_cast<float>(in));
  tensors_[linears_.back().weight()] = NormalTensor({out, in}, deviation, seed);
}

// Gains about 1, and outliers of 12 in two channels.
void SyntheticBlock::AddNorm(const std::string& part, uint64_t seed) {
  Tensor gain = NormalTensor({kHidden}, 0.1f, seed);
  for (int64_t i = 0; i < kHidden; ++i) {
    gain.as<float>()[i] = i % 16 == 5 ? 12.0f : 1.0f + gain.as<float>()[i];
  }
  tensors_[absl::StrCat(name_, ".", part, ".weight")] = gain;
}

void SyntheticBlock::AddSites() {
  const auto full = [&](const char* part) { return absl::StrCat(name_, ".", part); };
  std::vector<int32_t> heads;  // of o_proj's inputs: its query head's value channel
  for (int64_t i = 0; i < kHeads * kHeadDim; ++i) {
    const int64_t kv = i / kHeadDim / (kHeads / kKvHeads);
    heads.push_back(static_cast<int32_t>(kv * kHeadDim + i % kHeadDim));
  }
  sites_ = {
      {full("input_layernorm"),
       {{full("self_attn.q_proj"), {}, kHidden},
        {full("self_attn.k_proj"), {}, kHidden},
        {full("self_attn.v_proj"), {}, kHidden}},
       kHidden,
       0},
      {full("self_attn.v_proj"),
       {{full("self_attn.o_proj"), heads, kHeads * kHeadDim}},
       kKvHeads * kHeadDim,
       kHeadDim},
      {full("post_attention_layernorm"),
       {{full("mlp.gate_proj"), {}, kHidden}, {full("mlp.up_proj"), {}, kHidden}},
       kHidden,
       0},
      {full("mlp.up_proj"), {{full("mlp.down_proj"), {}, kInner}}, kInner, 0},
  };
}

BlockOutputs SyntheticBlock::Inputs(const BlockTensors& tensors, int64_t window,
                                    BlockOutputs* outputs) const {
  const auto at = [&](const std::string& part) -> const Tensor& {
    return tensors.at(absl::StrCat(name_, ".", part, ".weight"));
  };
  BlockOutputs inputs;
  const auto linear = [&](const char* part, const Rows& x) {
    const std::string name = absl::StrCat(name_, ".", part);
    inputs[name] = x;
    (*outputs)[name] = Multiply(x, at(part));
    return (*outputs)[name];
  };
  const float* first = windows_.as<float>() + window * kRows * kHidden;
  const Rows x(first, first + kRows * kHidden);
  const Rows h = Norm(x, at("input_layernorm"));
  const Rows q = linear("self_attn.q_proj", h), k = linear("self_attn.k_proj", h);
  const Rows v = linear("self_attn.v_proj", h);
  (*outputs)["self_attn"] = linear("self_attn.o_proj", Attend(q, k, v));
  const Rows middle = Sum(x, (*outputs)["self_attn"]);
  const Rows m = Norm(middle, at("post_attention_layernorm"));
  Rows gated = linear("mlp.gate_proj", m);
  const Rows up = linear("mlp.up_proj", m);
  for (size_t i = 0; i < gated.size(); ++i) gated[i] *= up[i] / (1.0 + std::exp(-gated[i]));
  (*outputs)["mlp"] = linear("mlp.down_proj", gated);
  (*outputs)[""] = Sum(middle, (*outputs)["mlp"]);
  return inputs;
}

BlockOutputs SyntheticBlock::Run(const BlockTensors& tensors, int64_t window) const {
  BlockOutputs outputs;
  Inputs(tensors, window, &outputs);
  return outputs;
}

double SyntheticBlock::Loss(const BlockTensors& tensors, const std::string& part, int64_t first,
                            int64_t count) const {
  double sum = 0.0;
  size_t values = 0;
  for (int64_t window = first; window < first + count; ++window) {
    const BlockOutputs before = Run(tensors_, window), after = Run(tensors, window);
    const auto a = before.find(part);
    if (a == before.end()) return std::numeric_limits<double>::quiet_NaN();
    const Rows& b = after.at(part);
    for (size_t i = 0; i < b.size(); ++i) sum += (b[i] - a->second[i]) * (b[i] - a->second[i]);
    values += b.size();
  }
  return values == 0 ? 0.0 : sum / static_cast<double>(values);
}

SyntheticLayer SyntheticBlock::LayerOf(const Linear& linear) const {
  SyntheticLayer layer;
  layer.weight = tensors_.at(linear.weight());
  std::vector<float> rows;
  for (int64_t window = 0; window < kWindows; ++window) {
    BlockOutputs outputs;
    const BlockOutputs inputs = Inputs(tensors_, window, &outputs);
    for (const double value : inputs.at(linear.name)) rows.push_back(static_cast<float>(value));
  }
  layer.inputs = Tensor::FromF32({kWindows * kRows, linear.in}, rows);
  layer.original_inputs = layer.inputs;
  return layer;
}

BlockTensors SyntheticBlock::Rounded(const BlockTensors& tensors) const {
  BlockTensors rounded = tensors;
  for (const Linear& linear : linears_) {
    rounded[linear.weight()] = RoundPlainly(tensors.at(linear.weight()), rounding_);
  }
  return rounded;
}

const SyntheticBlock::Site* SyntheticBlock::FindSite(const std::string& id) const {
  for (const Site& site : sites_) {
    if (site.producer == id) return &site;
  }
  return nullptr;
}

bool SyntheticBlock::IsLinear(const std::string& name) const {
  return std::any_of(linears_.begin(), linears_.end(),
                     [&](const Linear& linear) { return linear.name == name; });
}

absl::Status SyntheticBlock::Scale(const Site& site, const Tensor& value,
                                   BlockTensors* tensors) const {
  if (absl::Status status = WantShape(value, {site.channels}); !status.ok()) return status;
  const float* s = value.as<float>();
  for (int64_t i = 0; i < site.channels; ++i) {
    if (s[i] == 0.0f) return Wrong(absl::StrCat("its scale of channel ", i, " is 0"));
  }
  Tensor& producer = tensors->at(site.producer + ".weight");
  producer = CopyOf(producer);
  const int64_t width = producer.elements() / site.channels;  // 1 for a norm
  for (int64_t i = 0; i < producer.elements(); ++i) producer.as<float>()[i] /= s[i / width];
  for (const Consumer& consumer : site.consumers) {
    Tensor& weight = tensors->at(consumer.name + ".weight");
    weight = CopyOf(weight);
    for (int64_t i = 0; i < weight.elements(); ++i) {
      const int64_t in = i % consumer.in;
      weight.as<float>()[i] *= s[consumer.channel_map.empty() ? in : consumer.channel_map[in]];
    }
  }
  return absl::OkStatus();
}

// y becomes y Q: the producer's weight Q^T W, a consumer's W Q within each head.
absl::Status SyntheticBlock::Rotate(const Site& site, const Tensor& value,
                                    BlockTensors* tensors) const {
  const int64_t n = site.channels, block = site.rotation_block;
  if (block == 0) return Wrong("its site is not rotatable");
  if (absl::Status status = WantShape(value, {n, n}); !status.ok()) return status;
  const float* q = value.as<float>();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      if (i / block != j / block && q[i * n + j] != 0.0f) return Wrong("it mixes heads");
      double dot = i == j ? -1.0 : 0.0;
      for (int64_t k = 0; k < n; ++k) dot += static_cast<double>(q[k * n + i]) * q[k * n + j];
      if (std::fabs(dot) > 1e-5) return Wrong(absl::StrFormat("it is not orthogonal: %g", dot));
    }
  }
  Tensor& producer = tensors->at(site.producer + ".weight");
  const Tensor old = producer;
  producer = CopyOf(old);
  const int64_t in = old.dim(1);
  for (int64_t o = 0; o < n; ++o) {
    for (int64_t i = 0; i < in; ++i) {
      double sum = 0.0;
      for (int64_t k = 0; k < n; ++k) {
        sum += static_cast<double>(q[k * n + o]) * old.as<float>()[k * in + i];
      }
      producer.as<float>()[o * in + i] = static_cast<float>(sum);
    }
  }
  for (const Consumer& consumer : site.consumers) {
    Tensor& weight = tensors->at(consumer.name + ".weight");
    const Tensor before = weight;
    weight = CopyOf(before);
    for (int64_t at = 0; at < weight.elements(); ++at) {
      const int64_t i = at % consumer.in, head = i / block * block;
      double sum = 0.0;
      for (int64_t j = head; j < head + block; ++j) {
        sum += static_cast<double>(before.as<float>()[at - i + j]) *
               q[consumer.channel_map[j] * n + consumer.channel_map[i]];
      }
      weight.as<float>()[at] = static_cast<float>(sum);
    }
  }
  return absl::OkStatus();
}

absl::Status SyntheticBlock::Clip(const std::string& linear, const Tensor& value,
                                  BlockTensors* tensors) const {
  Tensor& weight = tensors->at(linear + ".weight");
  const int64_t in = weight.dim(1);
  if (value.rank() != 2 || value.dim(0) != weight.dim(0) || value.dim(1) < 1 ||
      in % value.dim(1) != 0) {
    return Wrong(absl::StrCat("its value has shape ", value.shape().ToString(), ", expected [",
                              weight.dim(0), ", a divisor of ", in, "]"));
  }
  weight = CopyOf(weight);
  const int64_t group = in / value.dim(1);
  for (int64_t i = 0; i < weight.elements(); ++i) {
    const float bound = value.as<float>()[i / group];
    if (bound < 0.0f) return Wrong(absl::StrFormat("a bound of it is %g", bound));
    weight.as<float>()[i] = std::clamp(weight.as<float>()[i], -bound, bound);
  }
  return absl::OkStatus();
}

absl::Status SyntheticBlock::Apply(const qm_edit& edit, const Tensor& value,
                                   BlockTensors* tensors) const {
  const std::string target = edit.target == nullptr ? "" : edit.target;
  const Site* site = FindSite(target);
  if (absl::Status status = CheckFinite(value); !status.ok()) return status;
  switch (edit.kind) {
    case QM_EDIT_SCALE:
      return site == nullptr ? Wrong("the block has no such site") : Scale(*site, value, tensors);
    case QM_EDIT_ROTATE:
      return site == nullptr ? Wrong("the block has no such site") : Rotate(*site, value, tensors);
    case QM_EDIT_CLIP:
      return IsLinear(target) ? Clip(target, value, tensors)
                              : Wrong("the block has no such linear");
    case QM_EDIT_REPLACE: {
      const auto found = tensors->find(target);
      if (found == tensors->end()) return Wrong("the block has no such tensor");
      if (absl::Status status = WantShape(value, found->second.shape()); !status.ok()) {
        return status;
      }
      found->second = value;
      return absl::OkStatus();
    }
    default:
      return Wrong(absl::StrCat("there is no kind ", edit.kind));
  }
}

}  // namespace quantmill::check
