// Cases of qm.format/1: what check lets through, and the way to a checkpoint and back.
#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/packed_samples.h"

namespace quantmill::check {
namespace {

constexpr char kRoundTrip[] = "QM-C-011";
constexpr char kLayer[] = "model.layers.0.mlp.up_proj";

const qm_format* FormatTable(const Subject& subject) {
  return subject.Ext<qm_format>(QM_EXT_FORMAT);
}

// Checks and checkpoints are work of the host, wherever the model is.
Subject OnHost(const Subject& subject) {
  Subject host = subject;
  host.backend = subject.host;
  host.device = "cpu";
  return host;
}

std::optional<Verdict> FindSamples(Subject& subject, std::vector<PackedSample>* out) {
  absl::StatusOr<std::vector<PackedSample>> samples =
      MakePackedSamples(subject, FormatTable(subject)->format_id);
  if (!samples.ok()) return Failed("", std::string(samples.status().message()));
  *out = *std::move(samples);
  if (!out->empty()) return std::nullopt;
  return Skipped(absl::StrCat("no weight in ", FormatTable(subject)->format_id,
                              ": no quantizer of this plugin emits it"));
}

// ---- check ----

std::optional<Verdict> RunCheck(Subject& subject, const PackedWeight& packed, qm_status* code,
                                std::string* outcome) {
  CheckedCall call(subject, CallSetup());
  *code = Invoke(call, FormatTable(subject)->check, call.InputPacked(packed));
  auto verdict = call.Finish(*code);
  *outcome = call.Outcome();
  return verdict;
}

Verdict CheckAcceptsValid(Subject& given) {
  Subject subject = OnHost(given);
  if (!QM_HAS(FormatTable(subject), check)) return Skipped("no check");
  std::vector<PackedSample> samples;
  if (auto verdict = FindSamples(subject, &samples)) return *verdict;
  for (const PackedSample& sample : samples) {
    qm_status code = QM_OK;
    std::string outcome;
    if (auto verdict = RunCheck(subject, sample.packed, &code, &outcome)) return *verdict;
    if (code != QM_OK) return Failed(kContents, absl::StrCat(sample.name, ": ", outcome));
  }
  return Passed(absl::StrCat(samples.size(), " weights"));
}

// A copy of a weight that is no longer in its format.
struct Damage {
  std::string name;
  std::function<void(PackedWeight*)> apply;
};

std::vector<Damage> DamagesOf(const PackedWeight& packed) {
  std::vector<Damage> damages = {
      {"parameters that are no JSON", [](PackedWeight* w) { w->format_json = "bits=4"; }},
      {"another format id", [](PackedWeight* w) { w->format_id = "org.example.fmt.other/1"; }},
      {"one output row more than there is", [](PackedWeight* w) { w->out_features += 1; }},
      {"no tensors", [](PackedWeight* w) { w->tensors.clear(); }},
  };
  const NamedTensor& first = packed.tensors.front();
  damages.push_back({absl::StrCat("no tensor '", first.name, "'"),
                     [](PackedWeight* w) { w->tensors.erase(w->tensors.begin()); }});
  damages.push_back({absl::StrCat("tensor '", first.name, "' under another name"),
                     [](PackedWeight* w) { w->tensors.front().name = "unheard_of"; }});
  if (first.tensor.rank() == 2 && first.tensor.dim(0) > 1) {
    damages.push_back(
        {absl::StrCat("tensor '", first.name, "' without its last row"), [](PackedWeight* w) {
           Tensor& tensor = w->tensors.front().tensor;
           tensor = tensor.Rows(0, tensor.dim(0) - 1);
         }});
  }
  if (first.tensor.dtype() != DType::kF64) {
    damages.push_back({absl::StrCat("tensor '", first.name, "' as F64"), [](PackedWeight* w) {
                         Tensor& tensor = w->tensors.front().tensor;
                         tensor = *Tensor::HostZeros(DType::kF64, tensor.shape());
                       }});
  }
  return damages;
}

Verdict CheckRefusesDamaged(Subject& given) {
  Subject subject = OnHost(given);
  if (!QM_HAS(FormatTable(subject), check)) return Skipped("no check");
  std::vector<PackedSample> samples;
  if (auto verdict = FindSamples(subject, &samples)) return *verdict;
  const PackedSample& sample = samples.front();
  const std::vector<Damage> damages = DamagesOf(sample.packed);
  for (const Damage& damage : damages) {
    PackedWeight packed = sample.packed;
    damage.apply(&packed);
    qm_status code = QM_OK;
    std::string outcome;
    if (auto verdict = RunCheck(subject, packed, &code, &outcome)) return *verdict;
    if (code == QM_OK) {
      return Failed(kContents,
                    absl::StrCat(sample.name, " with ", damage.name, ": check accepts it"));
    }
  }
  return Passed(absl::StrCat(damages.size(), " kinds of damage refused"));
}

// ---- checkpoints ----

// What to_checkpoint gave.
struct Stored {
  std::vector<NamedTensor> tensors;
  std::string config_json;
};

std::optional<Verdict> CanStore(Subject& subject, const char* target, const PackedSample& sample,
                                qm_status* code, std::string* outcome) {
  *code = QM_OK;
  if (!QM_HAS(FormatTable(subject), can_store)) return std::nullopt;
  CheckedCall call(subject, CallSetup());
  *code = Invoke(call, FormatTable(subject)->can_store, target, sample.packed.format_json.c_str(),
                 sample.packed.out_features, sample.packed.in_features);
  auto verdict = call.Finish(*code);
  *outcome = call.Outcome();
  return verdict;
}

std::optional<Verdict> ToCheckpoint(Subject& subject, const char* target,
                                    const PackedSample& sample, qm_status* code,
                                    std::string* outcome, Stored* out) {
  CheckedCall call(subject, CallSetup());
  const qm_named_tensor* listed = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  *code = Invoke(call, FormatTable(subject)->to_checkpoint, target, kLayer,
                 call.InputPacked(sample.packed), &listed, &count, &config);
  if (*code == QM_OK && config != nullptr) out->config_json = config;
  if (auto verdict = call.Finish(*code)) return verdict;
  *outcome = call.Outcome();
  if (*code != QM_OK) return std::nullopt;
  absl::StatusOr<std::vector<NamedTensor>> emitted = call.Emitted();
  if (!emitted.ok()) return Failed("QM-P-009", std::string(emitted.status().message()));
  if (emitted->size() != count || count == 0) {
    return Failed("QM-P-009", absl::StrCat(sample.name, " to ", target, ": ", count,
                                           " tensors listed, ", emitted->size(), " emitted"));
  }
  out->tensors = *std::move(emitted);
  return std::nullopt;
}

std::optional<Verdict> FromCheckpoint(Subject& subject, const char* target,
                                      const PackedSample& sample, const Stored& stored,
                                      PackedWeight* out) {
  CheckedCall call(subject, CallSetup());
  std::vector<qm_named_tensor> tensors;
  for (const NamedTensor& named : stored.tensors) {
    tensors.push_back({named.name.c_str(), call.Input(named.name, named.tensor)});
  }
  qm_packed packed = {};
  const qm_status code =
      Invoke(call, FormatTable(subject)->from_checkpoint, target, kLayer, tensors.data(),
             tensors.size(), stored.config_json.c_str(), &packed);
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK) {
    return Failed(kRoundTrip,
                  absl::StrCat(sample.name, " from ", target,
                               ": what to_checkpoint wrote is refused: ", call.Outcome()));
  }
  absl::StatusOr<PackedWeight> taken = call.TakePacked(packed);
  if (!taken.ok()) return Failed("QM-P-009", std::string(taken.status().message()));
  *out = *std::move(taken);
  return std::nullopt;
}

// Of one target.
struct Tally {
  int stored = 0;
  int refused = 0;  // by can_store, or by to_checkpoint for what the tensors hold
};

std::optional<Verdict> RoundTripOne(Subject& subject, const char* target,
                                    const PackedSample& sample, Tally* tally) {
  qm_status can = QM_OK, to = QM_OK;
  std::string can_outcome, to_outcome;
  if (auto verdict = CanStore(subject, target, sample, &can, &can_outcome)) return verdict;
  Stored stored;
  if (auto verdict = ToCheckpoint(subject, target, sample, &to, &to_outcome, &stored)) {
    return verdict;
  }
  if (can != QM_OK && to == QM_OK) {
    return Failed(kPlanRefuses, absl::StrCat(sample.name, " as ", target, ": can_store refuses (",
                                             can_outcome, "), to_checkpoint writes it"));
  }
  if (to != QM_OK) {
    ++tally->refused;
    if (can != QM_OK || to == QM_FAILED_PRECONDITION) return std::nullopt;
    return Failed(kPlanRefuses, absl::StrCat(sample.name, " as ", target,
                                             ": can_store says yes, to_checkpoint: ", to_outcome));
  }
  PackedWeight back;
  if (auto verdict = FromCheckpoint(subject, target, sample, stored, &back)) return verdict;
  const std::string difference = PackedDifference(sample.packed, back);
  if (!difference.empty()) {
    return Failed(kRoundTrip, absl::StrCat(sample.name, " to ", target, " and back: ", difference));
  }
  ++tally->stored;
  return std::nullopt;
}

Verdict RoundTrip(Subject& given) {
  Subject subject = OnHost(given);
  const auto* table = FormatTable(subject);
  if (table->target_count == 0) return Skipped("no checkpoint targets");
  if (!QM_HAS(table, to_checkpoint) || !QM_HAS(table, from_checkpoint)) {
    return Failed(kRoundTrip, "checkpoint targets need to_checkpoint and from_checkpoint");
  }
  std::vector<PackedSample> samples;
  if (auto verdict = FindSamples(subject, &samples)) return *verdict;
  std::string seen;
  for (uint64_t i = 0; i < table->target_count; ++i) {
    const char* target = table->targets[i];
    Tally tally;
    for (const PackedSample& sample : samples) {
      if (auto verdict = RoundTripOne(subject, target, sample, &tally)) return *verdict;
    }
    if (tally.stored == 0) {
      return Failed(kRoundTrip, absl::StrCat("target '", target, "' stores none of the ",
                                             samples.size(), " weights tried"));
    }
    absl::StrAppend(&seen, seen.empty() ? "" : "; ", target, ": ", tally.stored, " stored, ",
                    tally.refused, " refused");
  }
  return Passed(seen);
}

Verdict UnknownTarget(Subject& given) {
  Subject subject = OnHost(given);
  if (!QM_HAS(FormatTable(subject), to_checkpoint)) return Skipped("no to_checkpoint");
  std::vector<PackedSample> samples;
  if (auto verdict = FindSamples(subject, &samples)) return *verdict;
  for (const char* target : {"no-such-target", ""}) {
    qm_status can = QM_OK, to = QM_OK;
    std::string outcome;
    Stored stored;
    if (auto verdict = CanStore(subject, target, samples[0], &can, &outcome)) return *verdict;
    if (can == QM_OK && QM_HAS(FormatTable(subject), can_store)) {
      return Failed(kRoundTrip, absl::StrCat("can_store accepts the target \"", target, "\""));
    }
    if (auto verdict = ToCheckpoint(subject, target, samples[0], &to, &outcome, &stored)) {
      return *verdict;
    }
    if (to == QM_OK) {
      return Failed(kRoundTrip, absl::StrCat("to_checkpoint writes the target \"", target, "\""));
    }
  }
  return Passed();
}

Case Format(std::string name, std::vector<std::string> rules, std::string asserts,
            Verdict (*run)(Subject&)) {
  return {"format." + std::move(name),
          std::move(rules),
          std::move(asserts),
          Scope::kMethod,
          QM_EXT_FORMAT,
          run,
          20,
          false};
}

}  // namespace

std::vector<Case> FormatCases() {
  return {
      Format("check_accepts_valid", {kContents}, "check accepts weights that are in the format.",
             CheckAcceptsValid),
      Format("check_refuses_damaged", {kContents},
             "check refuses missing, renamed and cut tensors, other dtypes, ids and parameters.",
             CheckRefusesDamaged),
      Format("round_trip", {kRoundTrip, kPlanRefuses},
             "from_checkpoint(to_checkpoint(x)) is x bit by bit for every target; what can_store "
             "refuses is not written, what it allows is.",
             RoundTrip),
      Format("unknown_target", {kRoundTrip}, "A target the format does not list is refused.",
             UnknownTarget),
  };
}

}  // namespace quantmill::check
