// The search for limits against brute force in f64; what is refused; a block without calibration
// rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "awq_testing.h"

namespace quantmill::awq {
namespace {

// ---- clipping -----------------------------------------------------------------------------------

// The error of a group's part of the output when its weights are clamped to `limit` and rounded.
double SlowClipLoss(const Linear& linear, const std::vector<float>& weight,
                    const std::vector<float>& s, int64_t row, int64_t g, float limit) {
  std::vector<float> v;
  for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
    v.push_back(std::clamp(weight[row * linear.in + i], -limit, limit));
  }
  const std::vector<float> q = SlowRound(v);
  double loss = 0;
  for (int64_t r = 0; r < linear.rows(); ++r) {
    double error = 0;
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t column = g * kGroup + i;
      error += double{linear.x[r * linear.in + column]} / s[column] *
               (double{q[i]} - double{weight[row * linear.in + column]});
    }
    loss += error * error;
  }
  return loss;
}

// `weight`: of the linear as all edits before the clipping leave it; s: how its inputs are divided.
void ExpectBestLimits(const Linear& linear, const std::vector<float>& weight,
                      const std::vector<float>& s, const Edit& edit) {
  SCOPED_TRACE(linear.name);
  const int64_t groups = linear.in / kGroup;
  ASSERT_EQ(edit.rows, linear.out);
  ASSERT_EQ(edit.columns, groups);
  int64_t clipped = 0;
  double chosen = 0, best_sum = 0, plain = 0;
  for (int64_t row = 0; row < linear.out; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      float largest = 0;
      for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
        largest = std::max(largest, std::abs(weight[row * linear.in + i]));
      }
      double best = 1e300;
      for (int t = 0; t < 10; ++t) {
        const float limit = t == 0 ? kNoLimit : largest * (1.0f - static_cast<float>(t) / 20.0f);
        best = std::min(best, SlowClipLoss(linear, weight, s, row, g, limit));
      }
      const float limit = edit.value[static_cast<size_t>(row * groups + g)];
      clipped += limit < largest;
      chosen += SlowClipLoss(linear, weight, s, row, g, limit);
      plain += SlowClipLoss(linear, weight, s, row, g, kNoLimit);
      best_sum += best;
    }
  }
  EXPECT_GT(clipped, 0);
  EXPECT_LT(clipped, linear.out * groups);
  EXPECT_LE(chosen, best_sum * 1.01);
  EXPECT_LT(chosen, plain);
}

TEST(AwqClip, FindsTheBestLimitOfEveryGroup) {
  FakeCall call;
  call.Threads(2).Defaults(Method("awq.clip"));
  Layer layer(&call);
  AddAttention(&layer);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  ASSERT_EQ(Table("awq.clip").plan(call.get(), layer.info(), &plan), QM_OK) << call.error();
  EXPECT_EQ(plan.stat_count, 1u);
  std::vector<Edit> edits;
  ASSERT_EQ(Propose(&call, &layer, "awq.clip", &edits), QM_OK) << call.error();
  ASSERT_EQ(edits.size(), 2u);  // neither q nor k
  for (const char* name : {"l.v", "l.o"}) {
    const Linear& linear = *layer.Find(name);
    const Edit* edit = FindEdit(edits, name, QM_EDIT_CLIP);
    ASSERT_NE(edit, nullptr);
    ExpectBestLimits(linear, linear.weight, std::vector<float>(linear.in, 1.0f), *edit);
  }
  EXPECT_LE(call.scratch_bytes(), plan.scratch_bytes);
  EXPECT_TRUE(call.CanariesIntact());
}

TEST(AwqClip, LimitsAreThoseOfTheScaledWeights) {
  FakeCall call;
  call.Defaults(Method("awq"));
  Layer layer(&call);
  AddAttention(&layer);
  std::vector<Edit> edits;
  ASSERT_EQ(Propose(&call, &layer, "awq", &edits), QM_OK) << call.error();
  const Edit* in = FindEdit(edits, "l.norm", QM_EDIT_SCALE);
  const Edit* out = FindEdit(edits, "l.v", QM_EDIT_SCALE);
  ASSERT_NE(in, nullptr);
  ASSERT_NE(out, nullptr);
  const Linear& v = *layer.Find("l.v");
  std::vector<float> weight = v.weight;
  for (int64_t row = 0; row < v.out; ++row) {
    for (int64_t i = 0; i < v.in; ++i) {
      weight[row * v.in + i] = weight[row * v.in + i] * in->value[i] / out->value[row];
    }
  }
  const Edit* clip = FindEdit(edits, "l.v", QM_EDIT_CLIP);
  ASSERT_NE(clip, nullptr);
  ExpectBestLimits(v, weight, in->value, *clip);
  // Clipping comes after all scales.
  EXPECT_EQ(edits.front().kind, QM_EDIT_SCALE);
  EXPECT_EQ(edits.back().kind, QM_EDIT_CLIP);

  call.Set("clip", "false");
  edits.clear();
  ASSERT_EQ(Propose(&call, &layer, "awq", &edits), QM_OK) << call.error();
  for (const Edit& edit : edits) EXPECT_EQ(edit.kind, QM_EDIT_SCALE);
}

// Before a stage that does not say how it rounds, the stage's own options give what it would.
TEST(AwqClip, PreparesForWhatItsOwnOptionsSay) {
  FakeCall call;
  call.Defaults(Method("awq"));
  Layer layer(&call);
  AddAttention(&layer);
  const qm_next_rounding next = layer.roundings[0];
  for (const char* method : {"awq.scale", "awq.clip"}) {
    std::vector<Edit> told, own;
    ASSERT_EQ(Propose(&call, &layer, method, &told), QM_OK) << call.error();
    layer.roundings.assign(4, {0, 0, -1});
    call.Set("bits", std::to_string(next.bits))
        .Set("group_size", std::to_string(next.group_size))
        .Set("symmetric", next.symmetric != 0 ? "true" : "false");
    ASSERT_EQ(Propose(&call, &layer, method, &own), QM_OK) << call.error();
    layer.roundings.assign(4, next);
    ASSERT_EQ(own.size(), told.size());
    EXPECT_FALSE(own.empty()) << method;
    for (size_t i = 0; i < own.size(); ++i) EXPECT_EQ(own[i].value, told[i].value);
  }
}

// ---- refusals -----------------------------------------------------------------------------------

std::string PlanError(FakeCall* call, Layer* layer, const std::string& method) {
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  EXPECT_EQ(Table(method).plan(call->get(), layer->info(), &plan), QM_INVALID_ARGUMENT);
  return call->error();
}

bool Contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

TEST(AwqRefuses, WhatItCannotPrepareFor) {
  FakeCall call;
  call.Defaults(Method("awq"));
  Layer layer(&call);
  AddAttention(&layer);
  const std::vector<qm_next_rounding> good = layer.roundings;
  layer.roundings.assign(4, {0, 0, -1});
  call.Set("bits", "0");
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq.scale"), "later stage")) << call.error();
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq.clip"), "own options (bits: 4"));
  call.Set("bits", "4").Set("group_size", "13");
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq.clip"), "group_size 13"));
  layer.roundings = good;
  layer.roundings[2].group_size = 13;
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq.scale"), "group_size 13")) << call.error();
  layer.roundings = good;
  layer.roundings[3].bits = 9;
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq.scale"), "9 bits"));
  layer.roundings = good;
  call.Set("grid", "1");
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq"), "grid 1"));
  call.Set("grid", "20").Set("loss", "other");
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq"), "module or linear"));
  call.Set("loss", "module").Set("windows", "-1");
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq"), "windows -1"));
  call.Set("windows", "1");
  layer.sites.clear();
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq.scale"), "q, k and v")) << call.error();
  layer.linears.resize(2);
  layer.roundings.resize(2);
  EXPECT_TRUE(Contains(PlanError(&call, &layer, "awq.clip"), "queries and keys"));
}

TEST(AwqRefuses, MissingServicesStatisticsAndMemory) {
  FakeCall call;
  call.WithoutLinalg().Defaults(Method("awq"));
  Layer layer(&call);
  AddAttention(&layer);
  std::vector<Edit> edits;
  EXPECT_EQ(Propose(&call, &layer, "awq", &edits), QM_FAILED_PRECONDITION);
  EXPECT_TRUE(Contains(call.error(), "qm.host.linalg/1"));

  FakeCall other;
  other.Defaults(Method("awq"));
  const qm_stats none = {sizeof(qm_stats), nullptr, 0, 0};
  const std::vector<const qm_stats*> stats(4, &none);
  const qm_edit* list = nullptr;
  uint64_t count = 0;
  EXPECT_EQ(Table("awq").run(other.get(), layer.info(), stats.data(), &list, &count),
            QM_FAILED_PRECONDITION);
  EXPECT_TRUE(Contains(other.error(), "calibration text"));

  FakeCall cancelled;
  cancelled.Defaults(Method("awq")).CancelAt(3);
  Layer one(&cancelled);
  AddAttention(&one);
  EXPECT_EQ(Propose(&cancelled, &one, "awq", &edits), QM_CANCELLED);

  for (int64_t nth = 0; nth < 9; ++nth) {
    FakeCall scarce;
    scarce.Defaults(Method("awq")).FailScratchAt(nth);
    Layer two(&scarce);
    AddAttention(&two);
    const qm_status status = Propose(&scarce, &two, "awq", &edits);
    EXPECT_EQ(status, QM_RESOURCE_EXHAUSTED) << nth;
  }
}

TEST(Awq, NoRowsAtAllProposeNothing) {
  FakeCall call;
  call.Defaults(Method("awq"));
  Layer layer(&call);
  AddAttention(&layer);
  for (Linear& linear : layer.linears) linear.x.clear();
  std::vector<Edit> edits;
  ASSERT_EQ(Propose(&call, &layer, "awq", &edits), QM_OK) << call.error();
  EXPECT_TRUE(edits.empty());
}

}  // namespace
}  // namespace quantmill::awq
