// The search for scales against brute force in f64: norms, values under grouped queries, experts;
// what the host's block service is asked.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "awq_testing.h"

namespace quantmill::awq {
namespace {

// Sum of squared errors of the linear's outputs when its inputs are scaled by s.
double SlowLoss(const Linear& linear, const std::vector<float>& s) {
  std::vector<float> scaled = linear.weight;
  for (size_t i = 0; i < scaled.size(); ++i) scaled[i] *= s[i % linear.in];
  std::vector<float> rounded = SlowRound(scaled);
  double loss = 0;
  for (int64_t r = 0; r < linear.rows(); ++r) {
    for (int64_t o = 0; o < linear.out; ++o) {
      double error = 0;
      for (int64_t i = 0; i < linear.in; ++i) {
        const size_t at = static_cast<size_t>(o * linear.in + i);
        error += double{linear.x[r * linear.in + i]} *
                 (double{rounded[at]} / s[i] - double{linear.weight[at]});
      }
      loss += error * error;
    }
  }
  return loss;
}

// Mean |x| and mean relative |w| by channel; map empty = identity.
void SlowMeans(const std::vector<const Linear*>& linears, const std::vector<int32_t>& map,
               int64_t channels, std::vector<double>* x, std::vector<double>* w) {
  x->assign(channels, 0);
  w->assign(channels, 0);
  std::vector<double> nx(channels, 0), nw(channels, 0);
  for (const Linear* linear : linears) {
    for (int64_t i = 0; i < linear->in; ++i) {
      const int64_t c = map.empty() ? i : map[i];
      for (int64_t r = 0; r < linear->rows(); ++r) {
        (*x)[c] += std::abs(double{linear->x[r * linear->in + i]});
        ++nx[c];
      }
      for (int64_t o = 0; o < linear->out; ++o) {
        float largest = 0;
        for (int64_t j = i / kGroup * kGroup; j < (i / kGroup + 1) * kGroup; ++j) {
          largest = std::max(largest, std::abs(linear->weight[o * linear->in + j]));
        }
        (*w)[c] += std::abs(double{linear->weight[o * linear->in + i]}) / (largest + 1e-6);
        ++nw[c];
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    (*x)[c] /= std::max(1.0, nx[c]);
    (*w)[c] /= nw[c];
  }
}

// The published formula with duo scaling, all in f64.
std::vector<float> SlowCandidate(const std::vector<double>& x, const std::vector<double>& w,
                                 double ratio) {
  std::vector<double> s;
  for (size_t c = 0; c < x.size(); ++c) {
    s.push_back(std::max(1e-4, std::pow(x[c], ratio) / (std::pow(w[c], 1 - ratio) + 1e-4)));
  }
  const double middle =
      std::sqrt(*std::max_element(s.begin(), s.end()) * *std::min_element(s.begin(), s.end()));
  std::vector<float> out;
  for (const double value : s) out.push_back(static_cast<float>(value / middle));
  return out;
}

std::vector<float> Spread(const std::vector<float>& by_channel, const std::vector<int32_t>& map) {
  if (map.empty()) return by_channel;
  std::vector<float> out;
  for (const int32_t c : map) out.push_back(by_channel[static_cast<size_t>(c)]);
  return out;
}

// The scale of a site must be as good as the best of the identity and the 19 candidates.
void ExpectBestScale(const Layer& layer, const std::vector<Edit>& edits, const std::string& site,
                     const std::vector<std::string>& names, const std::vector<int32_t>& map,
                     int64_t channels) {
  SCOPED_TRACE(site);
  std::vector<const Linear*> linears;
  for (const std::string& name : names) linears.push_back(layer.Find(name));
  std::vector<double> x, w;
  SlowMeans(linears, map, channels, &x, &w);
  const auto loss = [&](const std::vector<float>& s) {
    double sum = 0;
    for (const Linear* linear : linears) sum += SlowLoss(*linear, Spread(s, map));
    return sum;
  };
  double best = loss(std::vector<float>(channels, 1.0f));
  const double plain = best;
  for (int k = 0; k < 19; ++k) best = std::min(best, loss(SlowCandidate(x, w, k / 18.0)));
  const Edit* edit = FindEdit(edits, site, QM_EDIT_SCALE);
  ASSERT_NE(edit, nullptr);
  ASSERT_EQ(static_cast<int64_t>(edit->value.size()), channels);
  // Codes next to a tie may fall to the other side.
  EXPECT_LE(loss(edit->value), best * 1.002);
  EXPECT_LT(loss(edit->value), plain * 0.9);
}

TEST(AwqScale, FindsTheBestCandidateOfEverySite) {
  FakeCall call;
  call.Threads(2).Defaults(Method("awq.scale"));
  Layer layer(&call);
  AddAttention(&layer);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  ASSERT_EQ(Table("awq.scale").plan(call.get(), layer.info(), &plan), QM_OK) << call.error();
  EXPECT_EQ(plan.stat_count, 2u);
  for (uint64_t i = 0; i < plan.stat_count; ++i) {
    EXPECT_EQ(plan.stats[i].flags, QM_STAT_FROM_ORIGINAL);
  }
  std::vector<Edit> edits;
  ASSERT_EQ(Propose(&call, &layer, "awq.scale", &edits), QM_OK) << call.error();
  ASSERT_EQ(edits.size(), 2u);
  ExpectBestScale(layer, edits, "l.norm", {"l.q", "l.k", "l.v"}, {}, 48);
  ExpectBestScale(layer, edits, "l.v", {"l.o"}, HeadMap(), 16);
  EXPECT_LE(call.scratch_bytes(), plan.scratch_bytes);
  EXPECT_TRUE(call.CanariesIntact());
}

TEST(AwqScale, GpuGivesTheSame) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  FakeCall cpu, gpu({QM_CUDA, 0});
  std::vector<Edit> a, b;
  for (FakeCall* call : {&cpu, &gpu}) {
    call->Defaults(Method("awq"));
    Layer layer(call);
    AddAttention(&layer);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    ASSERT_EQ(Table("awq").plan(call->get(), layer.info(), &plan), QM_OK) << call->error();
    ASSERT_EQ(Propose(call, &layer, "awq", call == &cpu ? &a : &b), QM_OK) << call->error();
    EXPECT_LE(call->scratch_bytes(), plan.scratch_bytes);
  }
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].target, b[i].target);
    EXPECT_EQ(a[i].value, b[i].value);
  }
}

// Two experts, the router beside them, one of which nobody visited; each expert's w3 feeds its w2.
void AddExperts(Layer* layer) {
  for (const std::string e : {"0", "1"}) {
    const int64_t rows = e == "0" ? kTokens : 0;
    const int32_t group = e == "0" ? 2 : 4;
    layer->Add("l.e" + e + ".w1", "expert.gate", 32, 48, group, rows);
    layer->Add("l.e" + e + ".w3", "expert.up", 32, 48, group, rows);
    layer->Add("l.e" + e + ".w2", "expert.down", 48, 32, group + 1, rows);
  }
  layer->AddSite("l.norm2", {"l.e0.w1", "l.e0.w3", "l.e1.w1", "l.e1.w3", "l.router"}, 48);
  layer->AddSite("l.e0.w3", {"l.e0.w2"}, 32);
  layer->AddSite("l.e1.w3", {"l.e1.w2"}, 32);
}

TEST(AwqScale, ExpertsShareTheNormAndLeaveTheUnvisitedAlone) {
  FakeCall call;
  call.Defaults(Method("awq"));
  Layer layer(&call);
  AddExperts(&layer);
  std::vector<Edit> edits;
  ASSERT_EQ(Propose(&call, &layer, "awq", &edits), QM_OK) << call.error();
  EXPECT_NE(FindEdit(edits, "l.norm2", QM_EDIT_SCALE), nullptr);
  EXPECT_NE(FindEdit(edits, "l.e0.w3", QM_EDIT_SCALE), nullptr);
  EXPECT_NE(FindEdit(edits, "l.e0.w2", QM_EDIT_CLIP), nullptr);
  EXPECT_EQ(FindEdit(edits, "l.e1.w3", QM_EDIT_SCALE), nullptr);
  for (const char* name : {"l.e1.w1", "l.e1.w2", "l.e1.w3"}) {
    EXPECT_EQ(FindEdit(edits, name, QM_EDIT_CLIP), nullptr) << name;
  }
}

TEST(AwqScale, LinearsThatStayDenseCountForNothing) {
  FakeCall call;
  call.Defaults(Method("awq.scale"));
  Layer layer(&call);
  AddAttention(&layer);
  layer.roundings[0] = layer.roundings[1] = {0, 0, -1};  // q and k stay dense
  std::vector<Edit> edits;
  ASSERT_EQ(Propose(&call, &layer, "awq.scale", &edits), QM_OK) << call.error();
  ExpectBestScale(layer, edits, "l.norm", {"l.v"}, {}, 48);
}

TEST(AwqScale, StatisticsThatAreNotNumbersChangeNothing) {
  FakeCall call;
  call.Defaults(Method("awq"));
  Layer layer(&call);
  AddAttention(&layer);
  layer.spoil_statistics = true;
  std::vector<Edit> edits;
  ASSERT_EQ(Propose(&call, &layer, "awq", &edits), QM_OK) << call.error();
  EXPECT_EQ(FindEdit(edits, "l.norm", QM_EDIT_SCALE), nullptr);
  for (const Edit& edit : edits) {
    for (const float value : edit.value) EXPECT_TRUE(std::isfinite(value));
  }
}

TEST(AwqScale, CandidatesFollowTheFormula) {
  const std::vector<double> x = {0.5, 4.0, 1.0, 0.0, 0.25}, w = {0.3, 0.5, 0.9, 0.2, 0.7};
  SearchOptions options;
  options.grid = 5;
  const auto duo = ScaleCandidates(x, w, options);
  ASSERT_EQ(duo.size(), 4u);  // with the identity: 5 trials
  std::vector<double> lx, lw;
  for (size_t c : {0, 1, 2, 4}) lx.push_back(x[c]), lw.push_back(w[c]);
  for (size_t k = 0; k < 4; ++k) {
    const std::vector<float> expected = SlowCandidate(lx, lw, static_cast<double>(k) / 3);
    for (size_t i = 0; i < 4; ++i) EXPECT_FLOAT_EQ(duo[k][i == 3 ? 4 : i], expected[i]);
    EXPECT_EQ(duo[k][3], 1.0f);  // never active
  }
  options.duo_scaling = false;
  const auto plain = ScaleCandidates(x, {}, options);
  ASSERT_EQ(plain.size(), 4u);
  for (size_t k = 0; k < 4; ++k) {
    const double ratio = static_cast<double>(k + 1) / 4;
    EXPECT_FLOAT_EQ(plain[k][0] / plain[k][1], static_cast<float>(std::pow(0.125, ratio)));
  }
}

// ---- the block service --------------------------------------------------------------------------

// A service that prefers the nth scale it is asked about and notes what it is asked.
struct Asked {
  std::vector<std::string> submodules;
  std::vector<int64_t> windows;
  std::vector<std::set<std::string>> tensors;
  int64_t samples = 10, preferred = 5;
  std::vector<std::vector<float>> first_override;  // of each trial
  const void* (*other)(qm_call*, const char*)QM_NOEXCEPT = nullptr;
};
Asked* asked = nullptr;

int64_t SampleCount(qm_call*) QM_NOEXCEPT { return asked->samples; }
qm_status Loss(qm_call*, const char* submodule, int64_t first, int64_t count,
               const qm_override* overrides, uint64_t override_count, double* out) QM_NOEXCEPT {
  asked->submodules.push_back(submodule);
  asked->windows.push_back(first);
  std::set<std::string> names;
  for (uint64_t i = 0; i < override_count; ++i) names.insert(overrides[i].tensor);
  asked->tensors.push_back(names);
  const qm_tensor& value = overrides[0].value;
  const float* data = static_cast<const float*>(value.data);
  const std::vector<float> content(data, data + value.shape[0] * value.shape[1]);
  if (asked->first_override.empty() || asked->first_override.back() != content) {
    asked->first_override.push_back(content);
  }
  const int64_t trial = static_cast<int64_t>(asked->first_override.size()) - 1;
  *out = count == 1 ? std::abs(static_cast<double>(trial - asked->preferred)) : 1e9;
  return QM_OK;
}
const void* WithService(qm_call* call, const char* id) QM_NOEXCEPT {
  static constexpr qm_host_block kService = {sizeof(qm_host_block), SampleCount, nullptr, Loss,
                                             nullptr};
  if (std::string(id) == QM_HOST_BLOCK) return &kService;
  return asked->other(call, id);
}

TEST(AwqScale, ModulesAreComparedByTheHost) {
  Asked notes;
  asked = &notes;
  FakeCall call;
  call.Defaults(Method("awq.scale")).Set("windows", "4");
  notes.other = call.get()->host_ext;
  call.get()->host_ext = &WithService;
  Layer layer(&call);
  AddAttention(&layer);
  std::vector<Edit> edits;
  ASSERT_EQ(Propose(&call, &layer, "awq.scale", &edits), QM_OK) << call.error();
  // The identity and 19 candidates on 4 of 10 windows; the site of one linear needs no service.
  ASSERT_EQ(notes.submodules.size(), 80u);
  EXPECT_EQ(notes.first_override.size(), 20u);
  for (const std::string& name : notes.submodules) EXPECT_EQ(name, "self_attn");
  for (size_t i = 0; i < 80; ++i)
    EXPECT_EQ(notes.windows[i], std::vector<int64_t>({0, 2, 5, 7})[i % 4]);
  EXPECT_EQ(notes.tensors[0], (std::set<std::string>{"l.q.weight", "l.k.weight", "l.v.weight"}));
  EXPECT_EQ(notes.first_override[0], SlowRound(layer.linears[0].weight));
  // The one preferred is trial 5: candidate 4 of 19.
  std::vector<double> x, w;
  SlowMeans({layer.Find("l.q"), layer.Find("l.k"), layer.Find("l.v")}, {}, 48, &x, &w);
  const std::vector<float> expected = SlowCandidate(x, w, 4.0 / 18);
  const Edit* edit = FindEdit(edits, "l.norm", QM_EDIT_SCALE);
  ASSERT_NE(edit, nullptr);
  for (size_t c = 0; c < 48; ++c) EXPECT_NEAR(edit->value[c] / expected[c], 1.0, 1e-5);
  ExpectBestScale(layer, edits, "l.v", {"l.o"}, HeadMap(), 16);
}

}  // namespace
}  // namespace quantmill::awq
