// Gradients of the small decoder block: the rules of each part, from the last to the first. In f64.
#include <cmath>

#include "absl/strings/str_cat.h"
#include "sdk/check/synthetic_block.h"

namespace quantmill::check {
namespace {

using VjpValues = std::vector<double>;  // [rows, width]

// y = x W^T: dL/dW = dy^T x; dL/dx = dy W, returned.
VjpValues LinearVjp(const VjpValues& x, const Tensor& weight, const VjpValues& d_y,
                    VjpValues* d_weight) {
  const int64_t out_features = weight.dim(0), in = weight.dim(1);
  const int64_t rows = static_cast<int64_t>(x.size()) / in;
  VjpValues d_x(x.size(), 0.0);
  d_weight->assign(static_cast<size_t>(out_features * in), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out_features; ++o) {
      const double above = d_y[r * out_features + o];
      for (int64_t i = 0; i < in; ++i) {
        (*d_weight)[o * in + i] += above * x[r * in + i];
        d_x[r * in + i] += above * weight.as<float>()[o * in + i];
      }
    }
  }
  return d_x;
}

// y_i = x_i f g_i with f = (mean of x^2 + 1e-6)^(-1/2), so df/dx_j = -f^3 x_j / width:
// dL/dg_i = sum over rows of dy_i x_i f; dL/dx_j = f dy_j g_j - f^3 x_j / width sum_i dy_i g_i x_i.
VjpValues NormVjp(const VjpValues& x, const Tensor& gain, const VjpValues& d_y, VjpValues* d_gain) {
  const int64_t width = gain.elements();
  const float* g = gain.as<float>();
  VjpValues d_x(x.size());
  d_gain->assign(static_cast<size_t>(width), 0.0);
  for (size_t row = 0; row < x.size(); row += static_cast<size_t>(width)) {
    double squares = 1e-6 * static_cast<double>(width), dot = 0.0;
    for (int64_t i = 0; i < width; ++i) {
      squares += x[row + i] * x[row + i];
      dot += d_y[row + i] * g[i] * x[row + i];
    }
    const double f = 1.0 / std::sqrt(squares / static_cast<double>(width));
    for (int64_t i = 0; i < width; ++i) {
      (*d_gain)[i] += d_y[row + i] * x[row + i] * f;
      d_x[row + i] =
          f * d_y[row + i] * g[i] - f * f * f * x[row + i] * dot / static_cast<double>(width);
    }
  }
  return d_x;
}

struct AttentionVjp {
  VjpValues d_q, d_k, d_v;
};

// One query row of one head: a = softmax(q k_s / sqrt(d)) over s <= r, y = sum a_s v_s, so with
// da_s = <dy, v_s>: d logit_s = a_s (da_s - sum a da).
void AttendRowVjp(const VjpValues& q, const VjpValues& k, const VjpValues& v, const VjpValues& d_y,
                  int64_t r, int64_t head, AttentionVjp* out) {
  constexpr int64_t kWidth = SyntheticBlock::kHeads * SyntheticBlock::kHeadDim;
  constexpr int64_t kKvWidth = SyntheticBlock::kKvHeads * SyntheticBlock::kHeadDim;
  constexpr int64_t kDim = SyntheticBlock::kHeadDim;
  const double scale = 1.0 / std::sqrt(static_cast<double>(kDim));
  const int64_t kv = head / (SyntheticBlock::kHeads / SyntheticBlock::kKvHeads);
  const int64_t own = r * kWidth + head * kDim;
  VjpValues weight(static_cast<size_t>(r + 1)), slope(weight.size(), 0.0);
  double total = 0.0, mean = 0.0;
  for (int64_t s = 0; s <= r; ++s) {
    double dot = 0.0;
    for (int64_t d = 0; d < kDim; ++d) dot += q[own + d] * k[s * kKvWidth + kv * kDim + d];
    weight[s] = std::exp(dot * scale);
    total += weight[s];
  }
  for (int64_t s = 0; s <= r; ++s) {
    weight[s] /= total;
    for (int64_t d = 0; d < kDim; ++d) {
      slope[s] += d_y[own + d] * v[s * kKvWidth + kv * kDim + d];
      out->d_v[s * kKvWidth + kv * kDim + d] += weight[s] * d_y[own + d];
    }
    mean += weight[s] * slope[s];
  }
  for (int64_t s = 0; s <= r; ++s) {
    const double d_logit = weight[s] * (slope[s] - mean) * scale;
    for (int64_t d = 0; d < kDim; ++d) {
      out->d_q[own + d] += d_logit * k[s * kKvWidth + kv * kDim + d];
      out->d_k[s * kKvWidth + kv * kDim + d] += d_logit * q[own + d];
    }
  }
}

AttentionVjp AttendVjp(const VjpValues& q, const VjpValues& k, const VjpValues& v,
                       const VjpValues& d_y) {
  AttentionVjp out = {VjpValues(q.size(), 0.0), VjpValues(k.size(), 0.0), VjpValues(v.size(), 0.0)};
  for (int64_t r = 0; r < SyntheticBlock::kRows; ++r) {
    for (int64_t head = 0; head < SyntheticBlock::kHeads; ++head) {
      AttendRowVjp(q, k, v, d_y, r, head, &out);
    }
  }
  return out;
}

void AddTo(const VjpValues& values, VjpValues* sum) {
  for (size_t i = 0; i < sum->size(); ++i) (*sum)[i] += values[i];
}

}  // namespace

BlockOutputs SyntheticBlock::Gradients(const BlockTensors& tensors, int64_t window,
                                       const std::vector<double>& d_out) const {
  const auto full = [&](const char* part) { return absl::StrCat(name_, ".", part); };
  BlockOutputs outputs, gradients;
  const BlockOutputs inputs = Inputs(tensors, window, &outputs);
  const auto linear = [&](const char* part, const VjpValues& d_y) {
    const std::string weight = full(part) + ".weight";
    return LinearVjp(inputs.at(full(part)), tensors.at(weight), d_y, &gradients[weight]);
  };
  const auto norm = [&](const char* part, const VjpValues& x, const VjpValues& d_y) {
    const std::string weight = full(part) + ".weight";
    return NormVjp(x, tensors.at(weight), d_y, &gradients[weight]);
  };
  const float* first = windows_.as<float>() + window * kRows * kHidden;
  const VjpValues x(first, first + kRows * kHidden);
  VjpValues middle = x;
  AddTo(outputs.at("self_attn"), &middle);

  // MLP: down(silu(gate) up), silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
  const VjpValues d_gated = linear("mlp.down_proj", d_out);
  const VjpValues& gate = outputs.at(full("mlp.gate_proj"));
  const VjpValues& up = outputs.at(full("mlp.up_proj"));
  VjpValues d_gate(gate.size()), d_up(gate.size());
  for (size_t i = 0; i < gate.size(); ++i) {
    const double s = 1.0 / (1.0 + std::exp(-gate[i]));
    d_up[i] = d_gated[i] * gate[i] * s;
    d_gate[i] = d_gated[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
  }
  VjpValues d_m = linear("mlp.gate_proj", d_gate);
  AddTo(linear("mlp.up_proj", d_up), &d_m);
  VjpValues d_middle = d_out;
  AddTo(norm("post_attention_layernorm", middle, d_m), &d_middle);

  const VjpValues d_attended = linear("self_attn.o_proj", d_middle);
  const AttentionVjp d =
      AttendVjp(outputs.at(full("self_attn.q_proj")), outputs.at(full("self_attn.k_proj")),
                outputs.at(full("self_attn.v_proj")), d_attended);
  VjpValues d_h = linear("self_attn.q_proj", d.d_q);
  AddTo(linear("self_attn.k_proj", d.d_k), &d_h);
  AddTo(linear("self_attn.v_proj", d.d_v), &d_h);
  norm("input_layernorm", x, d_h);
  return gradients;
}

}  // namespace quantmill::check
