// A made-up layer for the tests of the searches: linears, sites and statistics as a host hands them
// over, and rounding written out again.
#ifndef QUANTMILL_PLUGINS_AWQ_AWQ_TESTING_H_
#define QUANTMILL_PLUGINS_AWQ_AWQ_TESTING_H_

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "awq.h"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace quantmill::awq {

using qm::testing::FakeCall;

inline const qm_method& Method(const std::string& id) {
  const qm_plugin& plugin = *qm_plugin_entry_v1();
  for (uint32_t i = 0; i < plugin.method_count; ++i) {
    if (id == plugin.methods[i]->id) return *plugin.methods[i];
  }
  std::abort();
}
inline const qm_block_transform& Table(const std::string& id) {
  return *static_cast<const qm_block_transform*>(
      Method(id).ext(&Method(id), QM_EXT_BLOCK_TRANSFORM));
}

inline constexpr int64_t kTokens = 200;
inline constexpr int kGroup = 16;

inline std::vector<float> Normal(int64_t count, float deviation, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

struct Linear {
  std::string name, role;
  int64_t out, in;
  int32_t input_group;
  std::vector<float> weight, x;  // x: [rows, in]
  int64_t rows() const { return static_cast<int64_t>(x.size()) / in; }
};

// Rows with a few loud channels.
inline std::vector<float> Inputs(int64_t rows, int64_t in, uint32_t seed) {
  std::vector<float> x = Normal(rows * in, 1.0f, seed);
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t channel = static_cast<int64_t>(i) % in;
    if (channel % 7 == 3) x[i] *= 12.0f;
    if (channel % 11 == 5) x[i] *= 0.05f;
  }
  return x;
}

// A layer's linears, sites and statistics, as a host would hand them over.
class Layer {
 public:
  explicit Layer(FakeCall* call) : call_(call) {}

  void Add(const std::string& name, const std::string& role, int64_t out, int64_t in,
           int32_t input_group, int64_t rows = kTokens) {
    linears.push_back({name, role, out, in, input_group,
                       Normal(out * in, 0.1f, static_cast<uint32_t>(linears.size()) + 1),
                       Inputs(rows, in, 100 + static_cast<uint32_t>(input_group))});
    roundings.push_back({4, 0, kGroup});
  }
  void AddSite(const std::string& producer, const std::vector<std::string>& consumers,
               int64_t channels, const std::vector<int32_t>& map = {}) {
    site_names_.push_back(producer);
    maps_.push_back(std::make_unique<std::vector<int32_t>>(map));
    auto list = std::make_unique<std::vector<qm_site_consumer>>();
    for (const std::string& name : consumers) {
      names_.push_back(std::make_unique<std::string>(name));
      const bool slot = Find(name) != nullptr;
      list->push_back({names_.back()->c_str(), map.empty() ? nullptr : maps_.back()->data(),
                       slot ? Find(name)->in : channels, slot ? 0 : QM_CONSUMER_NOT_A_SLOT});
    }
    names_.push_back(std::make_unique<std::string>(producer));
    sites.push_back(
        {names_.back()->c_str(), names_.back()->c_str(), list->data(), list->size(), channels, 0});
    consumers_.push_back(std::move(list));
  }
  const Linear* Find(const std::string& name) const {
    for (const Linear& linear : linears) {
      if (linear.name == name) return &linear;
    }
    return nullptr;
  }

  const qm_block_info* info() {
    infos_.clear();
    pointers_.clear();
    weights_.clear();
    for (const Linear& linear : linears) {
      auto info = std::make_unique<qm_linear_info>();
      *info = {};
      info->struct_size = sizeof(qm_linear_info);
      info->name = linear.name.c_str();
      info->role = linear.role.c_str();
      info->out_features = linear.out;
      info->in_features = linear.in;
      info->input_group = linear.input_group;
      info->scale_dtype = QM_F16;
      pointers_.push_back(info.get());
      infos_.push_back(std::move(info));
      weights_.push_back(call_->Tensor(linear.weight, {linear.out, linear.in}));
    }
    info_ = {};
    info_.struct_size = sizeof info_;
    info_.name = "l";
    info_.linears = pointers_.data();
    info_.weights = weights_.data();
    info_.next_roundings = roundings.data();
    info_.linear_count = linears.size();
    info_.sites = sites.data();
    info_.site_count = sites.size();
    return &info_;
  }

  const qm_stats* const* stats() {
    items_.clear();
    stats_.clear();
    stats_pointers_.clear();
    items_.resize(linears.size());
    stats_.resize(linears.size());
    for (size_t l = 0; l < linears.size(); ++l) {
      const Linear& linear = linears[l];
      std::vector<float> hessian(static_cast<size_t>(linear.in * linear.in), 0.0f);
      std::vector<float> mean(static_cast<size_t>(linear.in), 0.0f);
      for (int64_t r = 0; r < linear.rows(); ++r) {
        const float* x = linear.x.data() + r * linear.in;
        for (int64_t i = 0; i < linear.in; ++i) {
          mean[i] += std::abs(x[i]) / static_cast<float>(linear.rows());
          for (int64_t j = 0; j < linear.in; ++j) hessian[i * linear.in + j] += x[i] * x[j];
        }
      }
      if (spoil_statistics) mean[1] = hessian[5] = NAN;
      items_[l] = {{QM_STAT_HESSIAN, call_->Tensor(hessian, {linear.in, linear.in})},
                   {QM_STAT_ABSMEAN, call_->Tensor(mean, {linear.in})}};
      stats_[l] = {sizeof(qm_stats), items_[l].data(), 2, linear.rows()};
    }
    for (const qm_stats& stats : stats_) stats_pointers_.push_back(&stats);
    return stats_pointers_.data();
  }

  std::vector<Linear> linears;
  std::vector<qm_next_rounding> roundings;
  std::vector<qm_scale_site> sites;
  bool spoil_statistics = false;

 private:
  FakeCall* call_;
  std::vector<std::string> site_names_;
  std::vector<std::unique_ptr<std::string>> names_;
  std::vector<std::unique_ptr<std::vector<int32_t>>> maps_;
  std::vector<std::unique_ptr<std::vector<qm_site_consumer>>> consumers_;
  std::vector<std::unique_ptr<qm_linear_info>> infos_;
  std::vector<const qm_linear_info*> pointers_;
  std::vector<qm_tensor> weights_;
  qm_block_info info_ = {};
  std::vector<std::vector<qm_named_tensor>> items_;
  std::vector<qm_stats> stats_;
  std::vector<const qm_stats*> stats_pointers_;
};

struct Edit {
  std::string target;
  qm_edit_kind kind;
  std::vector<float> value;
  int64_t rows, columns;
};

inline qm_status Propose(FakeCall* call, Layer* layer, const std::string& method,
                         std::vector<Edit>* out) {
  const qm_edit* edits = nullptr;
  uint64_t count = 0;
  const qm_status status =
      Table(method).run(call->get(), layer->info(), layer->stats(), &edits, &count);
  for (uint64_t i = 0; status == QM_OK && i < count; ++i) {
    const qm_tensor& value = edits[i].value;
    const float* data = static_cast<const float*>(value.data);
    const int64_t n = value.rank == 1 ? value.shape[0] : value.shape[0] * value.shape[1];
    out->push_back({edits[i].target, edits[i].kind, std::vector<float>(data, data + n),
                    value.shape[0], value.rank == 1 ? 1 : value.shape[1]});
  }
  return status;
}

inline const Edit* FindEdit(const std::vector<Edit>& edits, const std::string& target,
                            qm_edit_kind kind) {
  for (const Edit& edit : edits) {
    if (edit.target == target && edit.kind == kind) return &edit;
  }
  return nullptr;
}

// Rounded to nearest, 4 bits, asymmetric, f16 steps.
inline std::vector<float> SlowRound(const std::vector<float>& w) {
  std::vector<float> out(w.size());
  for (size_t first = 0; first < w.size(); first += kGroup) {
    float low = 0, high = 0;
    for (size_t i = first; i < first + kGroup; ++i) {
      low = std::min(low, w[i]);
      high = std::max(high, w[i]);
    }
    if (low == high) high = 1, low = -1;
    const float step = qm::ToFloat(qm::ToF16((high - low) / 15.0f));
    const float zero = std::min(15.0f, std::nearbyint(-low / step));
    for (size_t i = first; i < first + kGroup; ++i) {
      out[i] = step * (std::clamp(std::nearbyint(w[i] / step) + zero, 0.0f, 15.0f) - zero);
    }
  }
  return out;
}

// q, k, v behind a norm; o behind v with two query heads for each key/value head of 8.
inline const std::vector<int32_t>& HeadMap() {
  static const auto* const map = [] {
    auto* m = new std::vector<int32_t>;
    for (int i = 0; i < 32; ++i) m->push_back(i / 8 / 2 * 8 + i % 8);
    return m;
  }();
  return *map;
}
inline void AddAttention(Layer* layer) {
  layer->Add("l.q", "attn.q", 32, 48, 0);
  layer->Add("l.k", "attn.k", 16, 48, 0);
  layer->Add("l.v", "attn.v", 16, 48, 0);
  layer->Add("l.o", "attn.o", 48, 32, 1);
  layer->AddSite("l.norm", {"l.q", "l.k", "l.v"}, 48);
  layer->AddSite("l.v", {"l.o"}, 16, HeadMap());
}

}  // namespace quantmill::awq

#endif  // QUANTMILL_PLUGINS_AWQ_AWQ_TESTING_H_
