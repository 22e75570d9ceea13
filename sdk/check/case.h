// Conformance cases of `quantmill check`. A case asserts one thing about a plugin and runs in a
// process of its own: it may crash, hang or leave the process in any state. A file cases_GROUP.cc
// defines GroupCases() for each group below; AllCases() (case.cc) joins them.
#ifndef QUANTMILL_SDK_CHECK_CASE_H_
#define QUANTMILL_SDK_CHECK_CASE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/formats/packed.h"
#include "core/tensor/backend.h"
#include "quantmill/all.h"

namespace quantmill::check {

// The last two are given by the runner, never by a case.
enum class State { kPassed, kSkipped, kWarning, kFailed, kCrashed, kTimedOut };
// "passed", ..., "timed out".
std::string_view StateName(State state);

// What a case found. `text` says what was seen and, when that was wrong, what would be right.
struct Verdict {
  State state = State::kPassed;
  std::string rule;  // id of the rule that was broken (RULES.md); empty when none was
  std::string text;
};
// What was measured, where that says something; else nothing.
Verdict Passed(std::string text = "");
// The case does not apply: no such capability, a shape the method refuses, no GPU.
Verdict Skipped(std::string why);
Verdict Warning(std::string rule, std::string text);
Verdict Failed(std::string rule, std::string text);

// What a plugin may offer.
inline constexpr const char* kExtIds[] = {QM_EXT_QUANTIZE_LINEAR, QM_EXT_BLOCK_TRANSFORM,
                                          QM_EXT_BLOCK_TUNE,      QM_EXT_REPARAMETRIZE,
                                          QM_EXT_LINEAR_KERNEL,   QM_EXT_FORMAT};

// Rules that several files test (RULES.md).
inline constexpr char kContents[] = "QM-P-010";
inline constexpr char kPlanRefuses[] = "QM-P-012";

// What a case is run on.
struct Subject {
  std::string path;                   // of the plugin
  const qm_plugin* plugin = nullptr;  // loaded and its descriptor checked; null for Scope::kFile
  const qm_method* method = nullptr;  // null for Scope::kFile and Scope::kPlugin
  // Where to run: a CPU backend or one of a GPU (f32 activations). Null for Scope::kFile, whose
  // cases look at what the plugin does by itself.
  Backend* backend = nullptr;
  Backend* host = nullptr;  // a CPU backend; equal to `backend` on the CPU
  // The formats of this plugin, of the files named with --plugin, and those whose reference is
  // built in.
  FormatRegistry* formats = nullptr;
  std::string device = "cpu";  // "cpu" or "cuda:N": set for every scope
  uint64_t seed = 1;           // of everything a case draws at random
  // Of calls of qm.reparametrize/1; empty: the method's defaults.
  std::map<std::string, std::string> options;

  bool on_cuda() const { return device != "cpu"; }
  // A capability table of the method, or null.
  template <typename Table>
  const Table* Ext(const char* id) const {
    return static_cast<const Table*>(method->ext(method, id));
  }
};

enum class Scope {
  kFile,    // once; the runner has not loaded the plugin
  kPlugin,  // once; the plugin is loaded
  kMethod,  // for every method that has `capability` (every method when that is empty)
};

struct Case {
  std::string name;                // "GROUP.what_is_checked", unique
  std::vector<std::string> rules;  // ids of the rules it tests
  std::string asserts;             // one sentence: what a plugin that passes does
  Scope scope = Scope::kMethod;
  std::string capability;  // QM_EXT_...; only for Scope::kMethod
  std::function<Verdict(Subject&)> run;
  double limit_seconds = 20;
  bool slow = false;  // large shapes: on a GPU always, on the CPU with --slow only
};

// ---- groups, one file each ----
std::vector<Case> LoadCases();
std::vector<Case> AbiCases();
std::vector<Case> OptionsCases();
std::vector<Case> MemoryCases();
std::vector<Case> QuantizeCases();
std::vector<Case> KernelCases();
std::vector<Case> TransformCases();
std::vector<Case> TuneCases();
std::vector<Case> ReparamCases();
std::vector<Case> AdapterCases();
std::vector<Case> FormatCases();

// All groups in the order above.
const std::vector<Case>& AllCases();

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_CASE_H_
