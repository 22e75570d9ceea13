// Group options: what the option table offers is what the method takes.
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "sdk/check/case.h"
#include "sdk/check/quantize_call.h"

namespace quantmill::check {
namespace {

struct Trial {
  std::string value;
  bool run = true;  // false: plan() alone; the far end of a range may mean hours of work
};

// Every choice, both ends of a range, both truth values.
std::vector<Trial> Trials(const qm_option& option) {
  if (option.type == QM_OPT_BOOL) return {{"false"}, {"true"}};
  if (option.type == QM_OPT_STR || option.choices == nullptr) return {};
  const std::string choices = option.choices;
  const size_t dots = choices.find("..");
  if (option.type != QM_OPT_ENUM && dots != std::string::npos) {
    return {{choices.substr(0, dots), true}, {choices.substr(dots + 2), false}};
  }
  std::vector<Trial> trials;
  for (const absl::string_view choice : absl::StrSplit(choices, '|')) {
    trials.push_back({std::string(choice)});
  }
  return trials;
}

Verdict DefaultsAccepted(Subject& subject) {
  AcceptedLayer accepted;
  auto verdict = FindAcceptedLayer(subject, DefaultSetup(subject), &accepted);
  if (verdict && verdict->state == State::kSkipped) {
    return Failed("QM-P-016", verdict->text);
  }
  if (verdict) return *verdict;
  const RunAnswer run =
      Run(subject, accepted.layer, accepted.info, accepted.plan, DefaultSetup(subject));
  if (run.violation) return *run.violation;
  if (run.code == QM_OK) return Passed();
  return Failed("QM-P-012",
                absl::StrCat("plan() accepts the defaults for ", accepted.info.out_features, "x",
                             accepted.info.in_features, ", run() gives ", run.outcome));
}

// One value of one option, the others as by default; a verdict when a rule is broken.
std::optional<Verdict> TryValue(Subject& subject, const AcceptedLayer& accepted,
                                const std::string& name, const Trial& trial, int* refused) {
  CallSetup setup = DefaultSetup(subject);
  setup.options[name] = trial.value;
  const PlanAnswer plan = Plan(subject, accepted.info, setup);
  const std::string what = absl::StrCat(name, ": ", trial.value, ": ");
  if (plan.violation) {
    return Verdict{plan.violation->state, plan.violation->rule, what + plan.violation->text};
  }
  if (plan.code != QM_OK) {
    ++*refused;
    return std::nullopt;
  }
  if (!trial.run) return std::nullopt;
  const RunAnswer run = Run(subject, accepted.layer, accepted.info, plan, setup);
  if (run.violation) {
    return Verdict{run.violation->state, run.violation->rule, what + run.violation->text};
  }
  if (run.code == QM_OK) return std::nullopt;
  return Failed("QM-P-012", absl::StrCat(what, "plan() accepts it, run() gives ", run.outcome));
}

Verdict Values(Subject& subject) {
  AcceptedLayer accepted;
  if (auto verdict = FindAcceptedLayer(subject, DefaultSetup(subject), &accepted)) return *verdict;
  int tried = 0, refused = 0;
  for (uint64_t i = 0; i < subject.method->option_count; ++i) {
    const qm_option& option = subject.method->options[i];
    const std::vector<Trial> trials = Trials(option);
    const int refused_before = refused;
    for (const Trial& trial : trials) {
      ++tried;
      if (auto bad = TryValue(subject, accepted, option.name, trial, &refused)) return *bad;
    }
    // The ends of a range may not suit this layer; of a list or a switch something must.
    const bool is_range = option.choices != nullptr && absl::StrContains(option.choices, "..");
    if (!is_range && !trials.empty() &&
        refused - refused_before == static_cast<int>(trials.size())) {
      return Failed("QM-P-016",
                    absl::StrCat("plan() refuses every value the table lists for ", option.name));
    }
  }
  return Passed(absl::StrCat(tried, " values, ", refused, " refused with text"));
}

Verdict Documented(Subject& subject) {
  for (uint64_t i = 0; i < subject.method->option_count; ++i) {
    const qm_option& option = subject.method->options[i];
    if (option.doc != nullptr && *option.doc != '\0') continue;
    return Warning("QM-P-016", absl::StrCat("option ", option.name,
                                            " has no doc; quantmill describe shows nothing for "
                                            "it; write one sentence with units"));
  }
  return Passed();
}

}  // namespace

std::vector<Case> OptionsCases() {
  return {
      {"options.documented",
       {"QM-P-016"},
       "Every option says what it means.",
       Scope::kMethod,
       "",
       Documented},
      {"options.defaults",
       {"QM-P-016", "QM-P-012"},
       "plan() and run() accept the defaults for an ordinary layer.",
       Scope::kMethod,
       QM_EXT_QUANTIZE_LINEAR,
       DefaultsAccepted},
      {"options.values",
       {"QM-P-016", "QM-P-012"},
       "Every choice and both ends of every range work or are refused by plan() with text.",
       Scope::kMethod,
       QM_EXT_QUANTIZE_LINEAR,
       Values,
       60},
  };
}

}  // namespace quantmill::check
