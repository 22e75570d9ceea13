// Cases of to_adapter and from_adapter of qm.reparametrize/1: the description of an adapter in
// another tool's words, and the way back to options.
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "host/plugins/option_value.h"
#include "nlohmann/json.hpp"
#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/option_variants.h"
#include "sdk/check/reparam_call.h"

namespace quantmill::check {
namespace {

using nlohmann::json;

constexpr char kAdapters[] = "QM-C-014";
constexpr char kPeft[] = "peft";
constexpr int64_t kAdapterRows = 8;
constexpr int kMostParts = 16;  // prefixes of a description that are tried

bool HasAdapters(const Subject& subject) {
  const auto* table = ReparamTable(subject);
  return QM_HAS(table, to_adapter) && table->to_adapter != nullptr && QM_HAS(table, from_adapter) &&
         table->from_adapter != nullptr;
}

// One of the two functions, and the text it gave.
struct AdapterAnswer {
  qm_status code = QM_OK;
  std::string outcome, text;
  std::optional<Verdict> violation;
};

AdapterAnswer Describe(Subject& subject, const OptionValues& options, const char* target) {
  AdapterAnswer answer;
  CallSetup setup;
  setup.options = options;
  CheckedCall call(subject, setup);
  const char* text = nullptr;
  answer.code = Invoke(call, ReparamTable(subject)->to_adapter, target, &text);
  if (answer.code == QM_OK && text != nullptr) answer.text = text;  // it dies with the call
  answer.violation = call.Finish(answer.code);
  answer.outcome = call.Outcome();
  return answer;
}

// A host knows no options before it has been told them.
AdapterAnswer ReadBack(Subject& subject, const std::string& config, const char* target) {
  AdapterAnswer answer;
  CheckedCall call(subject, CallSetup());
  const char* given = call.Array<char>("the description of the adapter",
                                       absl::MakeConstSpan(config.c_str(), config.size() + 1));
  const char* text = nullptr;
  answer.code = Invoke(call, ReparamTable(subject)->from_adapter, target, given, &text);
  if (answer.code == QM_OK && text != nullptr) answer.text = text;
  answer.violation = call.Finish(answer.code);
  answer.outcome = call.Outcome();
  return answer;
}

const qm_option* FindOption(const qm_method& method, const std::string& name) {
  for (uint64_t i = 0; i < method.option_count; ++i) {
    if (name == method.options[i].name) return &method.options[i];
  }
  return nullptr;
}

// The defaults with the values of an object of texts over them, as the method's table has them.
std::optional<Verdict> TakeOptions(Subject& subject, const std::string& text, OptionValues* out) {
  *out = DefaultOptions(*subject.method);
  const json parsed = json::parse(text, nullptr, false);
  if (!parsed.is_object()) {
    return Failed(kAdapters, "from_adapter gave no JSON object of options: " + text);
  }
  for (const auto& [name, value] : parsed.items()) {
    const qm_option* option = FindOption(*subject.method, name);
    if (option == nullptr || !value.is_string()) {
      return Failed(kAdapters, absl::StrCat("from_adapter gave '", name, "': ", value.dump(),
                                            "; options of the method are expected, as texts"));
    }
    OptionInfo info;
    info.name = name;
    info.type = option->type;
    info.choices = option->choices == nullptr ? "" : option->choices;
    const auto checked = CheckOptionValue(info, value.get<std::string>());
    if (!checked.ok()) {
      return Failed(kAdapters, "from_adapter gave an option its own table refuses: " +
                                   std::string(checked.status().message()));
    }
    (*out)[name] = *checked;
  }
  return std::nullopt;
}

// Every choice and switch with every other option changed.
std::vector<OptionVariant> AdapterVariants(const qm_method& method) {
  std::vector<OptionVariant> variants = OptionVariants(method);
  const std::vector<OptionVariant> singles = variants;
  const OptionValues& defaults = singles.front().values;
  for (uint64_t i = 0; i < method.option_count; ++i) {
    if (method.options[i].type != QM_OPT_ENUM) continue;
    const std::string name = method.options[i].name;
    for (const OptionVariant& kind : singles) {
      if (kind.values.at(name) == defaults.at(name)) continue;
      for (const OptionVariant& other : singles) {
        if (other.values.at(name) != defaults.at(name) || &other == &singles.front()) continue;
        OptionVariant both = {absl::StrCat(kind.what, ", ", other.what), other.values};
        both.values[name] = kind.values.at(name);
        variants.push_back(std::move(both));
      }
    }
  }
  return variants;
}

std::string ParamsOf(const Reparametrized& model) {
  std::string text = absl::StrCat("kind ", model.kind);
  for (const Reparametrized::Param& param : model.params) {
    absl::StrAppend(&text, ", ", param.name, " ", param.shape.ToString());
  }
  return text;
}

// Parameters trained under `before` do the same under `after`: names, shapes, and every bit of
// forward.
std::optional<Verdict> SameFunction(Subject& subject, const std::string& what,
                                    const OptionValues& before, const OptionValues& after) {
  constexpr int64_t kOut = 64, kIn = 128;
  auto layer =
      MakeSyntheticLayer(SyntheticKind::kGaussian, kOut, kIn, 2 * kAdapterRows, subject.seed);
  if (!layer.ok()) return Failed("", std::string(layer.status().message()));
  Reparametrized one, two;
  for (Reparametrized* model : {&one, &two}) {
    model->linear = LinearInfo(kOut, kIn);
    model->layer = *layer;
  }
  Subject with_before = subject, with_after = subject;
  with_before.options = before;
  with_after.options = after;
  bool accepted = false, accepted_after = false;
  std::string outcome;
  if (auto verdict = PlanReparam(with_before, &one, &accepted, &outcome)) return verdict;
  if (!accepted) return std::nullopt;  // of another shape
  if (auto verdict = PlanReparam(with_after, &two, &accepted_after, &outcome)) return verdict;
  if (!accepted_after || ParamsOf(one) != ParamsOf(two)) {
    return Failed(kAdapters, absl::StrCat(what, ": the plan has ", ParamsOf(one),
                                          "; with the options that came back ",
                                          accepted_after ? ParamsOf(two) : "it is refused"));
  }
  if (auto verdict = InitReparam(with_before, &one)) return verdict;
  float step = 0.0f;
  for (size_t i = 0; i < one.params.size(); ++i) {
    Tensor& value = one.params[i].value;
    for (int64_t e = 0; e < value.elements(); ++e) {
      step = step > 0.06f ? -0.05f : step + 0.01f;  // a saw: nothing at rest, nothing large
      value.as<float>()[e] += step;
    }
    two.params[i].value = value;
  }
  const Tensor in = one.BaseInput(kAdapterRows);
  ForwardResult first, second;
  if (auto verdict = Forward(with_before, one, in, &first)) return verdict;
  if (auto verdict = Forward(with_after, two, in, &second)) return verdict;
  if (first.out.bytes() == second.out.bytes() &&
      std::memcmp(first.out.data(), second.out.data(), static_cast<size_t>(first.out.bytes())) ==
          0) {
    return std::nullopt;
  }
  return Failed(kAdapters, what + ": forward gives other bytes with the options that came back");
}

// What was written: an object that says which kind of adapter it is.
std::optional<Verdict> JudgeDescription(const std::string& what, const std::string& text) {
  const json config = json::parse(text, nullptr, false);
  if (!config.is_object()) {
    return Failed(kAdapters, absl::StrCat(what, ": to_adapter gave no JSON object: ", text));
  }
  const auto type = config.find("peft_type");
  if (type != config.end() && type->is_string()) return std::nullopt;
  return Failed(kAdapters, what + ": the description has no text 'peft_type'");
}

Verdict AdapterRoundTrip(Subject& subject) {
  if (!HasAdapters(subject)) return Skipped("no to_adapter or no from_adapter");
  int written = 0;
  std::string refusal;
  for (const OptionVariant& variant : AdapterVariants(*subject.method)) {
    const AdapterAnswer config = Describe(subject, variant.values, kPeft);
    if (config.violation) return *config.violation;
    if (config.code != QM_OK) {
      refusal = config.outcome;
      continue;
    }
    ++written;
    if (auto bad = JudgeDescription(variant.what, config.text)) return *bad;
    const AdapterAnswer back = ReadBack(subject, config.text, kPeft);
    if (back.violation) return *back.violation;
    if (back.code != QM_OK) {
      return Failed(kAdapters, absl::StrCat(variant.what,
                                            ": from_adapter refuses what to_adapter "
                                            "wrote: ",
                                            back.outcome));
    }
    OptionValues options;
    if (auto bad = TakeOptions(subject, back.text, &options)) return *bad;
    const AdapterAnswer again = Describe(subject, options, kPeft);
    if (again.violation) return *again.violation;
    if (again.code != QM_OK || again.text != config.text) {
      return Failed(kAdapters, absl::StrCat(variant.what, ": written again, the description is ",
                                            again.code == QM_OK ? again.text : again.outcome,
                                            "; it was ", config.text));
    }
    if (auto bad = SameFunction(subject, variant.what, variant.values, options)) return *bad;
  }
  if (written == 0) return Skipped("to_adapter writes none for peft: " + refusal);
  return Passed(absl::StrCat(written, " sets of options"));
}

// A refusal with text, of the code wanted (QM_OK: of any).
std::optional<Verdict> WantRefusal(const AdapterAnswer& answer, const std::string& what,
                                   qm_status wanted) {
  if (answer.violation) return answer.violation;
  if (answer.code != QM_OK && (wanted == QM_OK || answer.code == wanted)) return std::nullopt;
  return Failed(kAdapters,
                absl::StrCat(what, " gave ", answer.outcome, "; ",
                             wanted == QM_OK ? "an error" : "UNIMPLEMENTED", " is expected"));
}

Verdict AdapterRefusesForeign(Subject& subject) {
  if (!HasAdapters(subject)) return Skipped("no to_adapter or no from_adapter");
  constexpr char kNoTarget[] = "org.example.no-such-target";
  const AdapterAnswer own = Describe(subject, DefaultOptions(*subject.method), kPeft);
  if (own.violation) return *own.violation;
  const std::string config = own.code == QM_OK ? own.text : R"({"peft_type":"LORA"})";
  if (auto bad = WantRefusal(Describe(subject, DefaultOptions(*subject.method), kNoTarget),
                             "to_adapter for an unknown target", QM_UNIMPLEMENTED)) {
    return *bad;
  }
  if (auto bad = WantRefusal(ReadBack(subject, config, kNoTarget),
                             "from_adapter for an unknown target", QM_UNIMPLEMENTED)) {
    return *bad;
  }
  if (auto bad = WantRefusal(ReadBack(subject, R"({"peft_type":"NO_SUCH_KIND"})", kPeft),
                             "from_adapter of an adapter of another kind", QM_UNIMPLEMENTED)) {
    return *bad;
  }
  std::vector<std::string> broken = {"", "[]", "null", "7", "{", "{}x", std::string(100000, '[')};
  for (int part = 1; part < kMostParts; ++part) {
    broken.push_back(config.substr(0, config.size() * static_cast<size_t>(part) / kMostParts));
  }
  for (const std::string& text : broken) {
    const std::string what = absl::StrCat("from_adapter of ", text.size(), " bytes that are no ",
                                          "JSON object ('", text.substr(0, 40), "')");
    if (auto bad = WantRefusal(ReadBack(subject, text, kPeft), what, QM_OK)) return *bad;
  }
  return Passed();
}

// Each member of a description with a value of another type: refused, or options that are valid.
Verdict AdapterWithWrongTypes(Subject& subject) {
  if (!HasAdapters(subject)) return Skipped("no to_adapter or no from_adapter");
  const AdapterAnswer own = Describe(subject, DefaultOptions(*subject.method), kPeft);
  if (own.violation) return *own.violation;
  const json config = json::parse(own.code == QM_OK ? own.text : "", nullptr, false);
  if (!config.is_object()) return Skipped("to_adapter writes none with the defaults");
  int refused = 0, tried = 0;
  for (const auto& [key, value] : config.items()) {
    for (const json& wrong : {json(nullptr), json("x"), json(-1), json(1e300), json(0.5),
                              json::array(), json::object(), json(true)}) {
      json damaged = config;
      damaged[key] = wrong;
      const AdapterAnswer answer = ReadBack(subject, damaged.dump(), kPeft);
      if (answer.violation) return *answer.violation;
      ++tried;
      if (answer.code != QM_OK) {
        ++refused;
        continue;
      }
      OptionValues options;
      if (auto bad = TakeOptions(subject, answer.text, &options)) {
        return Verdict{bad->state, bad->rule,
                       absl::StrCat("with '", key, "': ", wrong.dump(), ": ", bad->text)};
      }
    }
  }
  return Passed(absl::StrCat(tried, " descriptions, ", refused, " refused with text"));
}

Case AdapterCase(std::string name, std::string asserts, Verdict (*run)(Subject&)) {
  return {"adapter." + std::move(name),
          {kAdapters},
          std::move(asserts),
          Scope::kMethod,
          QM_EXT_REPARAMETRIZE,
          run,
          60,
          false};
}

}  // namespace

std::vector<Case> AdapterCases() {
  return {
      AdapterCase("round_trip",
                  "What to_adapter writes comes back from from_adapter as options with which the "
                  "same parameters do the same, bit for bit.",
                  AdapterRoundTrip),
      AdapterCase("refuses_foreign",
                  "Other targets and kinds are UNIMPLEMENTED, and what is no JSON object an error.",
                  AdapterRefusesForeign),
      AdapterCase("wrong_types",
                  "A member of another type is refused with text, or options are valid all the "
                  "same.",
                  AdapterWithWrongTypes),
  };
}

}  // namespace quantmill::check
