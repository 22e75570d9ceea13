// Cases of qm.block-transform/1: the edits a method proposes for a small block, applied here as
// block_transform.h says.
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "sdk/check/block_call.h"
#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/quantize_call.h"
#include "sdk/check/synthetic_block.h"

namespace quantmill::check {
namespace {

constexpr char kEdits[] = "QM-C-007";
constexpr char kSameEdits[] = "QM-P-011";
constexpr uint64_t kMostEdits = 4096;

// ---- the calls ----

const qm_block_transform* TransformTable(const Subject& subject) {
  return subject.Ext<qm_block_transform>(QM_EXT_BLOCK_TRANSFORM);
}

struct Edit {
  qm_edit_kind kind = 0;
  std::string target;
  Tensor value;     // on the host; empty with `why`
  std::string why;  // what is wrong with the value as such

  bool preserves() const { return kind == QM_EDIT_SCALE || kind == QM_EDIT_ROTATE; }
  std::string Name() const {
    constexpr const char* kNames[] = {"edit of kind 0", "SCALE", "ROTATE", "CLIP", "REPLACE"};
    const bool known = kind >= QM_EDIT_SCALE && kind <= QM_EDIT_REPLACE;
    return absl::StrCat(known ? kNames[kind] : absl::StrCat("edit of kind ", kind), " of '", target,
                        "'");
  }
};

CallSetup Setup(const Subject& subject) {
  CallSetup setup;
  setup.options = DefaultOptions(*subject.method);
  setup.seed = subject.seed;
  return setup;
}

// The statistics wanted; skipped when plan() refuses.
std::optional<Verdict> Plan(Subject& subject, const SyntheticBlock& block, PlanAnswer* out) {
  CheckedCall call(subject, Setup(subject));
  BlockCall raw(call, block, *subject.backend, BlockCall::Service::kWithoutGradients);
  const BlockInput input(call, block, {/*weights=*/false, /*transforms=*/true});
  qm_quant_plan empty = {};
  empty.struct_size = sizeof empty;
  qm_quant_plan* plan = call.Struct("the qm_quant_plan", empty);
  const qm_status code = raw.Invoke(TransformTable(subject)->plan, input.get(), plan);
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK) return Skipped("refused by plan: " + call.Outcome());
  for (uint64_t i = 0; i < plan->stat_count; ++i) {
    const qm_stat_request& request = plan->stats[i];
    out->stats.push_back({request.stat_id, request.max_rows, request.dtype, request.flags});
  }
  return std::nullopt;
}

std::optional<Verdict> Propose(Subject& subject, const SyntheticBlock& block,
                               std::vector<Edit>* out) {
  const auto* table = TransformTable(subject);
  if (!QM_HAS(table, plan) || !QM_HAS(table, run)) {
    return Failed(kEdits, "qm.block-transform/1 needs plan and run");
  }
  PlanAnswer plan;
  if (auto verdict = Plan(subject, block, &plan)) return verdict;
  CheckedCall call(subject, Setup(subject));
  BlockCall raw(call, block, *subject.backend, BlockCall::Service::kWithoutGradients);
  const BlockInput input(call, block, {/*weights=*/true, /*transforms=*/true});
  std::vector<std::unique_ptr<StatInputs>> stats;
  std::vector<const qm_stats*> per_linear;
  for (const SyntheticBlock::Linear& linear : block.linears()) {
    stats.push_back(std::make_unique<StatInputs>(call, subject, block.LayerOf(linear), plan));
    per_linear.push_back(stats.back()->get());
  }
  const qm_edit* edits = nullptr;
  uint64_t count = 0;
  const qm_status code = raw.Invoke(table->run, input.get(), per_linear.data(), &edits, &count);
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK) return Failed("QM-P-012", "plan accepted, run refused: " + call.Outcome());
  if (count > kMostEdits || (count > 0 && edits == nullptr)) {
    return Failed(kEdits,
                  absl::StrCat("run lists ", count, " edits", edits == nullptr ? " at NULL" : ""));
  }
  for (uint64_t i = 0; i < count; ++i) {
    Edit edit;
    edit.kind = edits[i].kind;
    edit.target = edits[i].target == nullptr ? "" : edits[i].target;
    absl::StatusOr<Tensor> value = HostCopyOf(*subject.backend, edits[i].value, /*only_f32=*/true);
    if (value.ok()) edit.value = *std::move(value);
    edit.why = std::string(value.status().message());
    out->push_back(std::move(edit));
  }
  return std::nullopt;
}

// Applies one edit; the verdict says why it cannot be.
std::optional<Verdict> Apply(const SyntheticBlock& block, const Edit& edit, BlockTensors* tensors) {
  if (!edit.why.empty()) return Failed(kEdits, absl::StrCat(edit.Name(), ": ", edit.why));
  qm_edit raw = {};
  raw.kind = edit.kind;
  raw.target = edit.target.c_str();
  const absl::Status status = block.Apply(raw, edit.value, tensors);
  if (status.ok()) return std::nullopt;
  return Failed(kEdits, absl::StrCat(edit.Name(), ": ", std::string(status.message())));
}

// ---- cases ----

Verdict EditsAreValid(Subject& subject) {
  const SyntheticBlock block(subject.seed);
  std::vector<Edit> edits;
  if (auto verdict = Propose(subject, block, &edits)) return *verdict;
  BlockTensors tensors = block.tensors();
  for (const Edit& edit : edits) {
    if (auto verdict = Apply(block, edit, &tensors)) return *verdict;
  }
  return Passed(absl::StrCat(edits.size(), " edits"));
}

// Relative difference of both halves between two sets of tensors.
double HalvesDiffer(const SyntheticBlock& block, const BlockTensors& before,
                    const BlockTensors& after) {
  double worst = 0.0;
  for (const char* half : {"self_attn", "mlp"}) {
    double error = 0.0, energy = 0.0;
    for (int64_t window = 0; window < SyntheticBlock::kWindows; ++window) {
      const std::vector<double> a = block.Run(before, window).at(half);
      const std::vector<double> b = block.Run(after, window).at(half);
      for (size_t i = 0; i < a.size(); ++i) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        energy += a[i] * a[i];
      }
    }
    const double relative = std::sqrt(error / energy);
    worst = relative <= worst ? worst : relative;  // keeps NaN
  }
  return worst;
}

Verdict PreservingEditsPreserve(Subject& subject) {
  constexpr double kBound = 1e-5;  // block_transform.h
  const SyntheticBlock block(subject.seed);
  std::vector<Edit> edits;
  if (auto verdict = Propose(subject, block, &edits)) return *verdict;
  BlockTensors tensors = block.tensors();
  int64_t preserving = 0;
  double worst = 0.0;
  for (const Edit& edit : edits) {
    const BlockTensors before = tensors;
    if (auto verdict = Apply(block, edit, &tensors)) return *verdict;
    if (!edit.preserves()) continue;
    ++preserving;
    const double difference = HalvesDiffer(block, before, tensors);
    if (!(difference <= kBound)) {
      return Failed(kEdits, absl::StrFormat("%s: the block's output changed by %.3g of itself; an "
                                            "edit of this kind may change it by %.0e",
                                            edit.Name(), difference, kBound));
    }
    worst = std::max(worst, difference);
  }
  if (preserving == 0) return Skipped("no SCALE or ROTATE edits");
  return Passed(
      absl::StrFormat("%d edits, the output changed by %.2g of itself at most", preserving, worst));
}

// Of the block whose linears are rounded plainly, as the method was told they would be.
Verdict LossDoesNotIncrease(Subject& subject) {
  constexpr double kTolerance = 1.02;
  const SyntheticBlock block(subject.seed);
  std::vector<Edit> edits;
  if (auto verdict = Propose(subject, block, &edits)) return *verdict;
  if (edits.empty()) return Skipped("no edits");
  BlockTensors tensors = block.tensors();
  bool preserving = true;
  for (const Edit& edit : edits) {
    if (auto verdict = Apply(block, edit, &tensors)) return *verdict;
    preserving = preserving && edit.preserves();
  }
  const double before = block.Loss(block.Rounded(block.tensors()), "", 0, SyntheticBlock::kWindows);
  const double after = block.Loss(block.Rounded(tensors), "", 0, SyntheticBlock::kWindows);
  const std::string text =
      absl::StrFormat("the rounded block (%s) is off by %.4g without the edits, by %.4g with them",
                      block.NextRounding().ToString(), before, after);
  if (after <= kTolerance * before) return Passed(text);
  // Edits that preserve may serve activations to be rounded at the price of the weights.
  return preserving ? Warning(kEdits, text) : Failed(kEdits, text);
}

Verdict SameEditsTwice(Subject& subject) {
  if ((subject.method->flags & QM_METHOD_DETERMINISTIC) == 0) {
    return Skipped("the method does not say that it is deterministic");
  }
  const SyntheticBlock block(subject.seed);
  std::vector<Edit> first, second;
  if (auto verdict = Propose(subject, block, &first)) return *verdict;
  if (auto verdict = Propose(subject, block, &second)) return *verdict;
  if (first.size() != second.size()) {
    return Failed(kSameEdits, absl::StrCat(first.size(), " edits, then ", second.size(), " edits"));
  }
  for (size_t i = 0; i < first.size(); ++i) {
    const Tensor &a = first[i].value, &b = second[i].value;
    if (first[i].Name() == second[i].Name() && a.shape() == b.shape() &&
        std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0) {
      continue;
    }
    return Failed(kSameEdits, absl::StrCat("edit ", i, ": ", first[i].Name(), ", then ",
                                           second[i].Name(), " with other bytes"));
  }
  return Passed(absl::StrCat(first.size(), " edits, the same bytes twice"));
}

Case Transform(std::string name, std::vector<std::string> rules, std::string asserts,
               Verdict (*run)(Subject&)) {
  return {"transform." + std::move(name),
          std::move(rules),
          std::move(asserts),
          Scope::kMethod,
          QM_EXT_BLOCK_TRANSFORM,
          run,
          60,
          false};
}

}  // namespace

std::vector<Case> TransformCases() {
  return {
      Transform("edits_are_valid", {kEdits},
                "Edits name sites, linears and tensors of the block, with values of their shapes.",
                EditsAreValid),
      Transform("preserving_edits_preserve", {kEdits},
                "SCALE and ROTATE edits leave what the block computes as it is.",
                PreservingEditsPreserve),
      Transform("loss_does_not_increase", {kEdits},
                "With the edits, the block rounded as announced is no further from the original.",
                LossDoesNotIncrease),
      Transform("same_edits_twice", {kSameEdits},
                "A deterministic method proposes the same edits for the same block.",
                SameEditsTwice),
  };
}

}  // namespace quantmill::check
