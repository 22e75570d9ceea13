// Group memory: failing allocations, bounds, inputs, and what is kept when a call is over.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "sdk/check/case.h"
#include "sdk/check/quantize_call.h"

namespace quantmill::check {
namespace {

constexpr int64_t kMostFailures = 32;  // requests made to fail, one after the other
constexpr double kCancelSeconds = 2;
constexpr int64_t kLargeRows = 14336, kLargeCols = 4096;  // an up projection of a 7-billion model

bool SameBytes(const PackedWeight& a, const PackedWeight& b) {
  if (a.tensors.size() != b.tensors.size() || a.format_json != b.format_json) return false;
  for (const NamedTensor& t : a.tensors) {
    const Tensor* other = b.Find(t.name);
    if (other == nullptr || other->bytes() != t.tensor.bytes() ||
        memcmp(other->data(), t.tensor.data(), static_cast<size_t>(other->bytes())) != 0) {
      return false;
    }
  }
  return true;
}

// Runs once with defaults; a verdict when there is nothing to go on with.
std::optional<Verdict> CleanRun(Subject& subject, AcceptedLayer* accepted, RunAnswer* run) {
  if (auto verdict = FindAcceptedLayer(subject, DefaultSetup(subject), accepted)) return verdict;
  *run = Run(subject, accepted->layer, accepted->info, accepted->plan, DefaultSetup(subject));
  if (run->violation) return run->violation;
  if (run->code != QM_OK) return Skipped(absl::StrCat("run() gives ", run->outcome));
  return std::nullopt;
}

// Rules that CheckedCall looks after: canaries, read-only inputs, text of errors.
Verdict Fences(Subject& subject) {
  AcceptedLayer accepted;
  RunAnswer run;
  if (auto verdict = CleanRun(subject, &accepted, &run)) return *verdict;
  return Passed(
      absl::StrCat(run.scratch_calls, " scratch requests, ", run.emit_calls, " tensors emitted"));
}

Verdict ScratchFails(Subject& subject) {
  AcceptedLayer accepted;
  RunAnswer clean;
  if (auto verdict = CleanRun(subject, &accepted, &clean)) return *verdict;
  for (int64_t nth = 0; nth < std::min(clean.scratch_calls, kMostFailures); ++nth) {
    CallSetup setup = DefaultSetup(subject);
    setup.fail_scratch_at = nth;
    const RunAnswer run = Run(subject, accepted.layer, accepted.info, accepted.plan, setup);
    if (run.violation) return *run.violation;
    if (run.code == QM_RESOURCE_EXHAUSTED) continue;
    if (run.code == QM_OK && SameBytes(run.packed, clean.packed)) continue;  // it could do without
    return Failed("QM-P-017",
                  absl::StrCat("scratch request ", nth, " was refused and run() gave ", run.outcome,
                               run.code == QM_OK ? " with another result" : "",
                               "; RESOURCE_EXHAUSTED is expected"));
  }
  return Passed(absl::StrCat(clean.scratch_calls, " requests"));
}

Verdict EmitFails(Subject& subject) {
  AcceptedLayer accepted;
  RunAnswer clean;
  if (auto verdict = CleanRun(subject, &accepted, &clean)) return *verdict;
  for (int64_t nth = 0; nth < std::min(clean.emit_calls, kMostFailures); ++nth) {
    CallSetup setup = DefaultSetup(subject);
    setup.fail_emit_at = nth;
    const RunAnswer run = Run(subject, accepted.layer, accepted.info, accepted.plan, setup);
    if (run.violation) return *run.violation;
    if (run.code == QM_RESOURCE_EXHAUSTED) continue;
    return Failed("QM-P-017", absl::StrCat("emit request ", nth, " failed and run() gave ",
                                           run.outcome, "; RESOURCE_EXHAUSTED is expected"));
  }
  return Passed(absl::StrCat(clean.emit_calls, " requests"));
}

std::optional<Verdict> WithinBound(Subject& subject, const SyntheticLayer& layer,
                                   const qm_linear_info& info, const PlanAnswer& plan,
                                   RunAnswer* run) {
  *run = Run(subject, layer, info, plan, DefaultSetup(subject));
  if (run->violation) return run->violation;
  if (run->code != QM_OK) return Skipped(absl::StrCat("run() gives ", run->outcome));
  if (plan.scratch_bytes == 0 || run->scratch_bytes <= plan.scratch_bytes) return std::nullopt;
  return Failed("QM-P-015",
                absl::StrCat("run() asked for ", run->scratch_bytes, " bytes of scratch on a ",
                             info.out_features, "x", info.in_features,
                             " layer, plan() said at most ", plan.scratch_bytes));
}

Verdict ScratchBound(Subject& subject) {
  AcceptedLayer accepted;
  if (auto verdict = FindAcceptedLayer(subject, DefaultSetup(subject), &accepted)) return *verdict;
  RunAnswer run;
  const PlanAnswer& plan = accepted.plan;
  if (auto bad = WithinBound(subject, accepted.layer, accepted.info, plan, &run)) return *bad;
  if (plan.scratch_bytes == 0) {
    return Warning("QM-P-015",
                   absl::StrCat("plan() says that the scratch of run() is not known; it was ",
                                run.scratch_bytes, " bytes; a bound lets the host plan memory"));
  }
  return Passed(absl::StrCat(run.scratch_bytes, " of at most ", plan.scratch_bytes, " bytes"));
}

// Two calls one after the other, and some time for threads the plugin may have left running.
Verdict NothingKept(Subject& subject) {
  AcceptedLayer accepted;
  RunAnswer run;
  if (auto verdict = CleanRun(subject, &accepted, &run)) return *verdict;
  if (auto verdict = CleanRun(subject, &accepted, &run)) return *verdict;
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  return Passed();
}

// A refusal the plugin must find itself: the host would never ask for it.
Verdict RefusesWithText(Subject& subject) {
  qm_linear_info info = LinearInfo(8, 256);
  info.in_features = 7;  // prime, and fewer than any group
  info.out_features = 3;
  const PlanAnswer plan = Plan(subject, info, DefaultSetup(subject));
  if (plan.violation) return *plan.violation;
  if (plan.code != QM_OK) return Passed(absl::StrCat("plan() gives ", plan.outcome));
  const auto layer = MakeSyntheticLayer(SyntheticKind::kGaussian, 3, 7, 16, subject.seed);
  if (!layer.ok()) return Skipped(std::string(layer.status().message()));
  const RunAnswer run = Run(subject, *layer, info, plan, DefaultSetup(subject));
  if (run.violation) return *run.violation;
  if (run.code == QM_OK) return Passed("it takes a layer of 3x7");
  return Failed("QM-P-012",
                absl::StrCat("plan() accepts a layer of 3x7, run() gives ", run.outcome));
}

std::optional<Verdict> JudgeCancel(const RunAnswer& run) {
  if (run.violation) return run.violation;
  if (run.progress_calls == 0) return std::nullopt;
  if (run.seconds_since_cancel > kCancelSeconds) {
    return Failed("QM-P-008", absl::StrCat("progress() asked it to stop; it came back ",
                                           run.seconds_since_cancel, " s later (", run.outcome,
                                           "); 2 s are allowed"));
  }
  if (run.code == QM_OK && run.progress_calls > 1) {
    return Failed("QM-P-008",
                  absl::StrCat("progress() asked it to stop; it went on, called progress() ",
                               run.progress_calls - 1,
                               " times more and returned OK; return "
                               "QM_CANCELLED when progress() gives anything but 0"));
  }
  if (run.code != QM_OK && run.code != QM_CANCELLED) {
    return Failed("QM-P-008", absl::StrCat("progress() asked it to stop; it gave ", run.outcome,
                                           " instead of QM_CANCELLED"));
  }
  return std::nullopt;
}

Verdict Cancel(Subject& subject) {
  AcceptedLayer accepted;
  if (auto verdict = FindAcceptedLayer(subject, DefaultSetup(subject), &accepted)) return *verdict;
  CallSetup setup = DefaultSetup(subject);
  setup.cancel_at = 0;
  const RunAnswer run = Run(subject, accepted.layer, accepted.info, accepted.plan, setup);
  if (auto bad = JudgeCancel(run)) return *bad;
  if (run.progress_calls == 0) {
    return Warning("QM-P-008",
                   absl::StrCat("run() never calls progress() on a ", accepted.info.out_features,
                                "x", accepted.info.in_features,
                                " layer; call it at least every two seconds of work, "
                                "so that a run can be stopped"));
  }
  return Passed(run.code == QM_OK ? "its only call of progress() is the last thing it does" : "");
}

// Real size: the bound of the plan, and a stop in time.
Verdict Large(Subject& subject) {
  const qm_linear_info info = LinearInfo(kLargeRows, kLargeCols);
  const PlanAnswer plan = Plan(subject, info, DefaultSetup(subject));
  if (plan.violation) return *plan.violation;
  if (plan.code != QM_OK) return Skipped(absl::StrCat("plan() gives ", plan.outcome));
  const auto layer = MakeSyntheticLayer(SyntheticKind::kOutlierChannels, kLargeRows, kLargeCols,
                                        512, subject.seed);
  if (!layer.ok()) return Skipped(std::string(layer.status().message()));
  RunAnswer run;
  if (auto bad = WithinBound(subject, *layer, info, plan, &run)) return *bad;
  const double per_progress = run.seconds / static_cast<double>(run.progress_calls + 1);
  CallSetup setup = DefaultSetup(subject);
  setup.cancel_at = run.progress_calls / 2;
  const RunAnswer stopped = Run(subject, *layer, info, plan, setup);
  if (auto bad = JudgeCancel(stopped)) return *bad;
  if (per_progress > kCancelSeconds) {
    return Warning("QM-P-008", absl::StrCat("run() took ", run.seconds, " s and called progress() ",
                                            run.progress_calls, " times"));
  }
  return Passed(absl::StrCat(run.seconds, " s, ", run.scratch_bytes, " bytes of scratch, stopped ",
                             stopped.seconds_since_cancel, " s after being asked"));
}

}  // namespace

std::vector<Case> MemoryCases() {
  const char* quantize = QM_EXT_QUANTIZE_LINEAR;
  return {
      {"memory.fences",
       {"QM-P-014", "QM-P-004", "QM-P-009"},
       "run() stays inside its buffers, leaves its inputs alone and emits what it lists.",
       Scope::kMethod,
       quantize,
       Fences},
      {"memory.scratch_fails",
       {"QM-P-017"},
       "Each refused scratch request ends in RESOURCE_EXHAUSTED.",
       Scope::kMethod,
       quantize,
       ScratchFails,
       60},
      {"memory.emit_fails",
       {"QM-P-017"},
       "Each failed emit ends in RESOURCE_EXHAUSTED.",
       Scope::kMethod,
       quantize,
       EmitFails,
       60},
      {"memory.scratch_bound",
       {"QM-P-015"},
       "run() asks for no more scratch than plan() said.",
       Scope::kMethod,
       quantize,
       ScratchBound},
      {"memory.nothing_kept",
       {"QM-P-003"},
       "Nothing of a call is used when it is over.",
       Scope::kMethod,
       quantize,
       NothingKept},
      {"memory.refuses_with_text",
       {"QM-P-005", "QM-P-012"},
       "plan() refuses what run() would refuse, with text.",
       Scope::kMethod,
       quantize,
       RefusesWithText},
      {"memory.cancel",
       {"QM-P-008"},
       "run() stops when progress() says so.",
       Scope::kMethod,
       quantize,
       Cancel},
      {"memory.large",
       {"QM-P-015", "QM-P-008"},
       "A 14336 x 4096 layer stays within the plan's bound and is stopped within 2 s.",
       Scope::kMethod,
       quantize,
       Large,
       600,
       true},
  };
}

}  // namespace quantmill::check
