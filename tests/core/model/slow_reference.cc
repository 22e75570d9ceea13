#include "tests/core/model/slow_reference.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

namespace quantmill::testing {
namespace {

using Vector = std::vector<double>;

class SlowDecoder {
 public:
  SlowDecoder(const nlohmann::json& config, const NamedMatrices& tensors)
      : config_(config),
        tensors_(tensors),
        heads_(config.at("num_attention_heads")),
        kv_heads_(config.at("num_key_value_heads")),
        head_dim_(config.at("head_dim")),
        eps_(config.at("rms_norm_eps")) {}

  SlowResult Run(const std::vector<int32_t>& ids);

 private:
  Vector Norm(const Vector& x, const std::string& name) const {
    return NormWith(x, tensors_.at(name)[0]);
  }
  Vector NormWith(const Vector& x, const Vector& weight) const;
  Vector Linear(const std::string& module, const Vector& x);
  Vector Rotate(const Vector& head, int64_t position) const;
  double InverseFrequency(int64_t pair) const;
  Vector HeadNorm(const Vector& x, const std::string& name) const;
  Vector Rope(const Vector& x, int64_t position) const;
  Vector Attend(const Vector& q, const Matrix& keys, const Matrix& values, int64_t position) const;
  Matrix Attention(int64_t layer, const Matrix& x);
  Vector Mlp(const std::string& gate, const std::string& up, const std::string& down,
             const Vector& x);
  Vector Experts(const std::string& module, const Vector& x);
  Vector Feed(int64_t layer, const Vector& x);
  bool IsMoe(int64_t layer) const;

  const nlohmann::json& config_;
  const NamedMatrices& tensors_;
  int64_t heads_, kv_heads_, head_dim_;
  double eps_;
  SlowResult result_;
};

Vector SlowDecoder::NormWith(const Vector& x, const Vector& weight) const {
  double squares = 0;
  for (double value : x) squares += value * value;
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(x.size()) + eps_);
  Vector out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * weight[i];
  return out;
}

Vector SlowDecoder::Linear(const std::string& module, const Vector& x) {
  result_.inputs[module].push_back(x);
  const Matrix& weight = tensors_.at(module + ".weight");
  Vector out;
  for (const Vector& row : weight) {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) sum += row[i] * x[i];
    out.push_back(sum);
  }
  const auto bias = tensors_.find(module + ".bias");
  if (bias == tensors_.end()) return out;
  for (size_t i = 0; i < out.size(); ++i) out[i] += bias->second[0][i];
  return out;
}

double SlowDecoder::InverseFrequency(int64_t pair) const {
  const double theta = config_.at("rope_theta");
  const double frequency =
      1.0 / std::pow(theta, 2.0 * static_cast<double>(pair) / static_cast<double>(head_dim_));
  if (!config_.contains("rope_scaling") || config_["rope_scaling"].is_null()) return frequency;
  const nlohmann::json& scaling = config_["rope_scaling"];
  const double factor = scaling.at("factor");
  if (scaling.at("rope_type") == "linear") return frequency / factor;
  const double original = scaling.at("original_max_position_embeddings");
  const double low = scaling.at("low_freq_factor"), high = scaling.at("high_freq_factor");
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength < original / high) return frequency;
  if (wavelength > original / low) return frequency / factor;
  const double smooth = (original / wavelength - low) / (high - low);
  return (1 - smooth) * frequency / factor + smooth * frequency;
}

Vector SlowDecoder::Rotate(const Vector& head, int64_t position) const {
  Vector out(head.size());
  const size_t half = head.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * InverseFrequency(static_cast<int64_t>(i));
    out[i] = head[i] * std::cos(angle) - head[i + half] * std::sin(angle);
    out[i + half] = head[i + half] * std::cos(angle) + head[i] * std::sin(angle);
  }
  return out;
}

Vector SlowDecoder::HeadNorm(const Vector& x, const std::string& name) const {
  if (!tensors_.contains(name)) return x;
  Vector out;
  for (size_t begin = 0; begin < x.size(); begin += static_cast<size_t>(head_dim_)) {
    const Vector head(x.begin() + static_cast<int64_t>(begin),
                      x.begin() + static_cast<int64_t>(begin) + head_dim_);
    const Vector normed = Norm(head, name);
    out.insert(out.end(), normed.begin(), normed.end());
  }
  return out;
}

Vector SlowDecoder::Rope(const Vector& x, int64_t position) const {
  Vector out;
  for (int64_t begin = 0; begin < static_cast<int64_t>(x.size()); begin += head_dim_) {
    const Vector turned =
        Rotate(Vector(x.begin() + begin, x.begin() + begin + head_dim_), position);
    out.insert(out.end(), turned.begin(), turned.end());
  }
  return out;
}

Vector SlowDecoder::Attend(const Vector& q, const Matrix& keys, const Matrix& values,
                           int64_t position) const {
  int64_t first = 0;
  if (config_.contains("sliding_window") && config_["sliding_window"].is_number()) {
    first = std::max<int64_t>(0, position - config_["sliding_window"].get<int64_t>() + 1);
  }
  Vector out;
  for (int64_t head = 0; head < heads_; ++head) {
    const int64_t q_begin = head * head_dim_;
    const int64_t kv_begin = head / (heads_ / kv_heads_) * head_dim_;
    Vector weights;
    double total = 0;
    for (int64_t j = first; j <= position; ++j) {
      double score = 0;
      for (int64_t d = 0; d < head_dim_; ++d) {
        score += q[static_cast<size_t>(q_begin + d)] *
                 keys[static_cast<size_t>(j)][static_cast<size_t>(kv_begin + d)];
      }
      weights.push_back(std::exp(score / std::sqrt(static_cast<double>(head_dim_))));
      total += weights.back();
    }
    for (int64_t d = 0; d < head_dim_; ++d) {
      double sum = 0;
      for (int64_t j = first; j <= position; ++j) {
        sum += weights[static_cast<size_t>(j - first)] *
               values[static_cast<size_t>(j)][static_cast<size_t>(kv_begin + d)];
      }
      out.push_back(sum / total);
    }
  }
  return out;
}

Matrix SlowDecoder::Attention(int64_t layer, const Matrix& x) {
  const std::string module = "model.layers." + std::to_string(layer) + ".self_attn.";
  Matrix keys, values, out;
  for (size_t position = 0; position < x.size(); ++position) {
    const int64_t at = static_cast<int64_t>(position);
    Vector q = Linear(module + "q_proj", x[position]);
    Vector k = Linear(module + "k_proj", x[position]);
    q = Rope(HeadNorm(q, module + "q_norm.weight"), at);
    keys.push_back(Rope(HeadNorm(k, module + "k_norm.weight"), at));
    values.push_back(Linear(module + "v_proj", x[position]));
    out.push_back(Linear(module + "o_proj", Attend(q, keys, values, at)));
  }
  return out;
}

Vector SlowDecoder::Mlp(const std::string& gate, const std::string& up, const std::string& down,
                        const Vector& x) {
  const Vector g = Linear(gate, x), u = Linear(up, x);
  Vector inner(g.size());
  for (size_t i = 0; i < g.size(); ++i) inner[i] = g[i] / (1.0 + std::exp(-g[i])) * u[i];
  return Linear(down, inner);
}

Vector SlowDecoder::Experts(const std::string& module, const Vector& x) {
  const bool mixtral = config_.at("model_type") == "mixtral";
  Vector probabilities = Linear(module + ".gate", x);
  double total = 0;
  for (double& value : probabilities) {
    value = std::exp(value);
    total += value;
  }
  for (double& value : probabilities) value /= total;
  std::vector<size_t> order(probabilities.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return probabilities[a] > probabilities[b]; });
  order.resize(config_.at("num_experts_per_tok").get<size_t>());
  double kept = 1;
  if (mixtral || config_.at("norm_topk_prob").get<bool>()) {
    kept = 0;
    for (size_t expert : order) kept += probabilities[expert];
  }
  Vector out(x.size(), 0.0);
  for (size_t expert : order) {
    const std::string name = module + ".experts." + std::to_string(expert) + ".";
    const Vector y = mixtral ? Mlp(name + "w1", name + "w3", name + "w2", x)
                             : Mlp(name + "gate_proj", name + "up_proj", name + "down_proj", x);
    for (size_t i = 0; i < out.size(); ++i) out[i] += probabilities[expert] / kept * y[i];
  }
  return out;
}

bool SlowDecoder::IsMoe(int64_t layer) const {
  if (config_.at("model_type") == "mixtral") return true;
  if (config_.at("model_type") != "qwen3_moe") return false;
  for (const auto& dense : config_.at("mlp_only_layers")) {
    if (dense.get<int64_t>() == layer) return false;
  }
  return (layer + 1) % config_.at("decoder_sparse_step").get<int64_t>() == 0;
}

Vector SlowDecoder::Feed(int64_t layer, const Vector& x) {
  const std::string block = "model.layers." + std::to_string(layer);
  if (IsMoe(layer)) {
    const bool mixtral = config_.at("model_type") == "mixtral";
    return Experts(block + (mixtral ? ".block_sparse_moe" : ".mlp"), x);
  }
  return Mlp(block + ".mlp.gate_proj", block + ".mlp.up_proj", block + ".mlp.down_proj", x);
}

SlowResult SlowDecoder::Run(const std::vector<int32_t>& ids) {
  const Matrix& table = tensors_.at("model.embed_tokens.weight");
  Matrix hidden;
  for (int32_t id : ids) hidden.push_back(table[static_cast<size_t>(id)]);
  result_.hidden.push_back(hidden);
  for (int64_t layer = 0; layer < config_.at("num_hidden_layers").get<int64_t>(); ++layer) {
    const std::string block = "model.layers." + std::to_string(layer);
    Matrix normed;
    for (const Vector& row : hidden) normed.push_back(Norm(row, block + ".input_layernorm.weight"));
    const Matrix attention = Attention(layer, normed);
    for (size_t i = 0; i < hidden.size(); ++i) {
      for (size_t j = 0; j < hidden[i].size(); ++j) hidden[i][j] += attention[i][j];
      const Vector fed = Feed(layer, Norm(hidden[i], block + ".post_attention_layernorm.weight"));
      for (size_t j = 0; j < hidden[i].size(); ++j) hidden[i][j] += fed[j];
    }
    result_.hidden.push_back(hidden);
  }
  const bool tied = config_.at("tie_word_embeddings");
  for (const Vector& row : hidden) {
    const Vector normed = Norm(row, "model.norm.weight");
    result_.logits.push_back(Linear(tied ? "model.embed_tokens" : "lm_head", normed));
  }
  return std::move(result_);
}

}  // namespace

SlowResult RunSlowReference(const nlohmann::json& config, const NamedMatrices& tensors,
                            const std::vector<int32_t>& ids) {
  return SlowDecoder(config, tensors).Run(ids);
}

}  // namespace quantmill::testing
