// Cases of qm.block-tune/1: a method packs the linears of a small block, tunes it, and what comes
// back is put in place as a host would.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "sdk/check/case.h"
#include "sdk/check/tune_call.h"

namespace quantmill::check {
namespace {

constexpr char kTuned[] = "QM-C-012";
constexpr char kTuneMemory[] = "QM-P-017";
constexpr char kTuneStop[] = "QM-P-008";
constexpr double kTuneStopSeconds = 2;
constexpr int64_t kMostTuneFailures = 32;  // requests made to fail, spread over all

// A run that gave QM_OK; else a verdict.
std::optional<Verdict> TuneOnce(Subject& subject, PackedBlock* packed, TuneAnswer* answer) {
  if (auto verdict = PackBlock(subject, packed)) return verdict;
  *answer = Tune(subject, *packed, packed->setup);
  if (answer->violation) return answer->violation;
  if (answer->code == QM_OK) return std::nullopt;
  return Failed("QM-P-012", absl::StrCat("plan accepted (", packed->options,
                                         "), run refused: ", answer->outcome));
}

// "" when both gave the same bytes.
std::string TuneDifference(const TuneAnswer& a, const TuneAnswer& b) {
  const auto same = [](const Tensor& x, const Tensor& y) {
    return x.shape() == y.shape() && x.dtype() == y.dtype() &&
           std::memcmp(x.data(), y.data(), static_cast<size_t>(x.bytes())) == 0;
  };
  for (size_t item = 0; item < a.emitted.size(); ++item) {
    const auto &first = a.emitted[item], &second = b.emitted[item];
    if (first.size() != second.size()) {
      return absl::StrCat("item ", item, " has ", first.size(), " tensors, then ", second.size());
    }
    for (size_t i = 0; i < first.size(); ++i) {
      if (first[i].name == second[i].name && same(first[i].tensor, second[i].tensor)) continue;
      return absl::StrCat("'", first[i].name, "' of item ", item, " has other bytes");
    }
  }
  if (a.edits.size() != b.edits.size()) return "another number of edits";
  for (size_t i = 0; i < a.edits.size(); ++i) {
    if (a.edits[i].target == b.edits[i].target && same(a.edits[i].value, b.edits[i].value))
      continue;
    return absl::StrCat("the edit of '", a.edits[i].target, "' has other bytes");
  }
  return "";
}

Verdict TuneResultsFit(Subject& subject) {
  PackedBlock packed(subject.seed);
  TuneAnswer answer;
  if (auto verdict = TuneOnce(subject, &packed, &answer)) return *verdict;
  TunedBlock tuned;
  if (auto verdict = TakeTuned(subject, packed, answer, &tuned)) return *verdict;
  size_t emitted = 0;
  for (const auto& item : answer.emitted) emitted += item.size();
  return Passed(absl::StrCat(packed.options, ": ", emitted, " tensors emitted, ",
                             answer.edits.size(), " norms and biases"));
}

Verdict TuneIsNotWorse(Subject& subject) {
  constexpr double kTolerance = 1.001;
  PackedBlock packed(subject.seed);
  TuneAnswer answer;
  if (auto verdict = TuneOnce(subject, &packed, &answer)) return *verdict;
  TunedBlock before, after;
  if (auto verdict = TakeTuned(subject, packed, TuneAnswer(), &before)) return *verdict;
  if (auto verdict = TakeTuned(subject, packed, answer, &after)) return *verdict;
  const auto loss = [&](const TunedBlock& block) {
    return packed.block.Loss(block.tensors, "", 0, SyntheticBlock::kWindows);
  };
  const double packed_loss = loss(before), tuned_loss = loss(after);
  const std::string text = absl::StrFormat("the packed block is off by %.4g, the tuned one by %.4g",
                                           packed_loss, tuned_loss);
  return tuned_loss <= kTolerance * packed_loss ? Passed(text) : Failed(kTuned, text);
}

Verdict TuneSameBytesTwice(Subject& subject) {
  if ((subject.method->flags & QM_METHOD_DETERMINISTIC) == 0) {
    return Skipped("the method does not say that it is deterministic");
  }
  PackedBlock packed(subject.seed);
  TuneAnswer first;
  if (auto verdict = TuneOnce(subject, &packed, &first)) return *verdict;
  const TuneAnswer second = Tune(subject, packed, packed.setup);
  if (second.violation) return *second.violation;
  if (second.code != QM_OK) return Failed("QM-P-011", "the second run gave " + second.outcome);
  const std::string difference = TuneDifference(first, second);
  return difference.empty() ? Passed() : Failed("QM-P-011", "the second time " + difference);
}

// As after a packing that was refused here and there: every second linear, then all of them.
Verdict TuneWithDenseSlots(Subject& subject) {
  PackedBlock packed(subject.seed);
  if (auto verdict = PackBlock(subject, &packed)) return *verdict;
  for (const size_t step : {size_t{2}, size_t{1}}) {
    for (size_t i = 0; i < packed.packed.size(); i += step) {
      const SyntheticBlock::Linear& linear = packed.block.linears()[i];
      packed.packed[i] = PackedWeight();
      packed.packed[i].out_features = linear.out;
      packed.packed[i].in_features = linear.in;
    }
    const TuneAnswer answer = Tune(subject, packed, packed.setup);
    if (answer.violation) return *answer.violation;
    const char* which = step == 2 ? "every second linear is" : "all linears are";
    if (answer.code != QM_OK) {
      return Failed(kTuned,
                    absl::StrCat("where ", which, " left dense, run gave ", answer.outcome));
    }
    TunedBlock tuned;
    if (auto verdict = TakeTuned(subject, packed, answer, &tuned)) return *verdict;
  }
  return Passed();
}

std::optional<Verdict> JudgeTuneStop(const TuneAnswer& answer, int64_t stop_at) {
  if (answer.violation) return answer.violation;
  if (answer.progress_calls <= stop_at) return std::nullopt;  // never asked
  if (answer.seconds_since_cancel > kTuneStopSeconds) {
    return Failed(kTuneStop, absl::StrFormat("progress() asked it to stop; it came back %.1f s "
                                             "later; 2 s are allowed",
                                             answer.seconds_since_cancel));
  }
  const int64_t after = answer.progress_calls - stop_at - 1;
  if (answer.code == QM_CANCELLED || (answer.code == QM_OK && after == 0)) return std::nullopt;
  return Failed(kTuneStop, absl::StrCat("progress() asked it to stop; it called progress() ", after,
                                        " times more and gave ", answer.outcome,
                                        "; QM_CANCELLED is expected"));
}

Verdict TuneCancel(Subject& subject) {
  PackedBlock packed(subject.seed);
  TuneAnswer whole;
  if (auto verdict = TuneOnce(subject, &packed, &whole)) return *verdict;
  if (whole.progress_calls == 0) {
    return Warning(kTuneStop,
                   "run() never calls progress(); call it at every step, so that a run "
                   "can be stopped");
  }
  for (const int64_t stop_at : {int64_t{0}, whole.progress_calls / 2}) {
    CallSetup setup = packed.setup;
    setup.cancel_at = stop_at;
    if (auto bad = JudgeTuneStop(Tune(subject, packed, setup), stop_at)) return *bad;
  }
  return Passed(absl::StrCat(whole.progress_calls, " calls of progress()"));
}

Verdict TuneScratchBound(Subject& subject) {
  PackedBlock packed(subject.seed);
  TuneAnswer answer;
  if (auto verdict = TuneOnce(subject, &packed, &answer)) return *verdict;
  if (packed.scratch_bytes == 0) {
    return Warning("QM-P-015", absl::StrCat("plan() says that the scratch of run() is not known; "
                                            "it was ",
                                            answer.scratch_bytes, " bytes"));
  }
  const std::string text = absl::StrCat(answer.scratch_bytes, " bytes of scratch, plan() said ",
                                        packed.scratch_bytes, " at most");
  return answer.scratch_bytes <= packed.scratch_bytes ? Passed(text) : Failed("QM-P-015", text);
}

// Requests of a kind, of which some are refused, one in each run. `count`: how many a clean run
// makes.
Verdict TuneRefused(Subject& subject, int64_t TuneAnswer::*count, int64_t CallSetup::*which,
                    const char* what) {
  PackedBlock packed(subject.seed);
  TuneAnswer clean;
  if (auto verdict = TuneOnce(subject, &packed, &clean)) return *verdict;
  const int64_t total = clean.*count;
  const int64_t step = std::max<int64_t>(1, total / kMostTuneFailures);
  for (int64_t nth = 0; nth < total; nth += step) {
    CallSetup setup = packed.setup;
    setup.*which = nth;
    const TuneAnswer answer = Tune(subject, packed, setup);
    if (answer.violation) return *answer.violation;
    if (answer.code == QM_RESOURCE_EXHAUSTED) continue;
    if (answer.code == QM_OK && TuneDifference(answer, clean).empty()) continue;
    return Failed(kTuneMemory, absl::StrCat(what, " ", nth, " was refused and run() gave ",
                                            answer.outcome, "; RESOURCE_EXHAUSTED is expected"));
  }
  return Passed(absl::StrCat(total, " requests"));
}

Verdict TuneScratchFails(Subject& subject) {
  return TuneRefused(subject, &TuneAnswer::scratch_calls, &CallSetup::fail_scratch_at,
                     "scratch request");
}

Verdict TuneEmitFails(Subject& subject) {
  return TuneRefused(subject, &TuneAnswer::emit_calls, &CallSetup::fail_emit_at, "emit request");
}

// A host without autograd, and one without any service.
Verdict TuneWithoutServices(Subject& subject) {
  PackedBlock packed(subject.seed);
  if (auto verdict = PackBlock(subject, &packed)) return *verdict;
  for (const auto service : {BlockCall::Service::kWithoutGradients, BlockCall::Service::kNone}) {
    const bool none = service == BlockCall::Service::kNone;
    CallSetup setup = packed.setup;
    setup.services = !none;
    const TuneAnswer answer = Tune(subject, packed, setup, service);
    if (answer.violation) return *answer.violation;
    if (answer.code == QM_FAILED_PRECONDITION) continue;
    if (answer.code == QM_OK) {
      TunedBlock tuned;
      if (auto verdict = TakeTuned(subject, packed, answer, &tuned)) return *verdict;
      continue;
    }
    return Failed("QM-P-018", absl::StrCat(none ? "without any service" : "without the block's vjp",
                                           " run() gave ", answer.outcome,
                                           "; FAILED_PRECONDITION is expected"));
  }
  return Passed();
}

Case TuneCase(std::string name, std::vector<std::string> rules, std::string asserts,
              Verdict (*run)(Subject&)) {
  return {"tune." + std::move(name),
          std::move(rules),
          std::move(asserts),
          Scope::kMethod,
          QM_EXT_BLOCK_TUNE,
          run,
          120,
          false};
}

}  // namespace

std::vector<Case> TuneCases() {
  return {
      TuneCase("results_fit", {kTuned, "QM-P-010", "QM-P-012"},
               "What run emits has names, dtypes and shapes of the tensors it replaces, edits "
               "replace norms and biases alone, and all of it is finite.",
               TuneResultsFit),
      TuneCase("not_worse", {kTuned},
               "The tuned block is no further from the dense one than the packed block.",
               TuneIsNotWorse),
      TuneCase("some_slots_dense", {kTuned},
               "run does with linears left dense, and emits nothing for them.", TuneWithDenseSlots),
      TuneCase("same_bytes_twice", {"QM-P-011"},
               "A deterministic method tunes the same block to the same bytes.",
               TuneSameBytesTwice),
      TuneCase("cancel", {kTuneStop}, "run stops when progress() says so.", TuneCancel),
      TuneCase("scratch_bound", {"QM-P-015"}, "run asks for no more scratch than plan said.",
               TuneScratchBound),
      TuneCase("scratch_fails", {kTuneMemory},
               "Each refused scratch request ends in RESOURCE_EXHAUSTED.", TuneScratchFails),
      TuneCase("emit_fails", {kTuneMemory}, "Each failed emit ends in RESOURCE_EXHAUSTED.",
               TuneEmitFails),
      TuneCase("no_services", {"QM-P-018"},
               "Without the block's gradients, or without any service, run says what it misses.",
               TuneWithoutServices),
  };
}

}  // namespace quantmill::check
