// Group abi: older and newer hosts, missing services, ids, constancy of the descriptor.
#include <dlfcn.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "sdk/check/case.h"
#include "sdk/check/quantize_call.h"

namespace quantmill::check {
namespace {

// plan() and run() with `setup`. Passed when both gave OK or were refused as `may_refuse` allows.
Verdict PlanAndRun(Subject& subject, const CallSetup& setup, const std::string& rule,
                   bool may_refuse) {
  AcceptedLayer accepted;
  if (auto verdict = FindAcceptedLayer(subject, DefaultSetup(subject), &accepted)) return *verdict;
  const PlanAnswer plan = Plan(subject, accepted.info, setup);
  if (plan.violation) return *plan.violation;
  const auto judge = [&](const char* function, qm_status code, const std::string& outcome) {
    if (may_refuse && code == QM_FAILED_PRECONDITION) {
      return Passed(absl::StrCat(function, "() refuses: ", outcome));
    }
    return Failed(rule, absl::StrCat(function, "() gave ", outcome));
  };
  if (plan.code != QM_OK) return judge("plan", plan.code, plan.outcome);
  const RunAnswer run = Run(subject, accepted.layer, accepted.info, plan, setup);
  if (run.violation) return *run.violation;
  if (run.code != QM_OK) return judge("run", run.code, run.outcome);
  return Passed();
}

Verdict OldestHost(Subject& subject) {
  return PlanAndRun(subject, DefaultSetup(subject), "QM-A-005", false);
}

Verdict NewerHost(Subject& subject) {
  CallSetup setup = DefaultSetup(subject);
  setup.newer_host = true;
  return PlanAndRun(subject, setup, "QM-A-005", false);
}

Verdict NoServices(Subject& subject) {
  CallSetup setup = DefaultSetup(subject);
  setup.services = false;
  return PlanAndRun(subject, setup, "QM-P-018", true);
}

// Of no format; {} are those of a format without any.
constexpr char kNoParameters[] = R"({"unheard_of":1})";

// The other capabilities' calls need no layer to show that they read a longer qm_call.
Verdict NewerHostFormat(Subject& subject) {
  const auto* table = subject.Ext<qm_format>(QM_EXT_FORMAT);
  CallSetup setup = DefaultSetup(subject);
  setup.newer_host = true;
  for (uint64_t i = 0; i < table->target_count; ++i) {
    CheckedCall call(subject, setup);
    const qm_status code =
        Invoke(call, table->can_store, table->targets[i], kNoParameters, int64_t{64}, int64_t{256});
    if (auto bad = call.Finish(code)) return *bad;
    if (code == QM_OK) {
      return Failed("QM-P-010", absl::StrCat("can_store() accepts the parameters ", kNoParameters,
                                             " for target ", table->targets[i]));
    }
  }
  return Passed();
}

Verdict UnknownIds(Subject& subject) {
  std::vector<std::string> ids = {"", "qm", "/1", "org.example.no-such-capability/1"};
  for (const char* known : kExtIds) {
    const std::string id = known;
    for (const char* tail : {"0", "x", " ", "/", ".1"}) ids.push_back(id + tail);
    ids.push_back(id.substr(0, id.size() - 1) + "2");
    ids.push_back(id.substr(0, id.size() - 1));
    ids.push_back(id.substr(0, id.size() - 2));
    ids.push_back(" " + id);
    ids.push_back(absl::StrCat("Q", id.substr(1)));
  }
  for (const std::string& id : ids) {
    if (subject.method->ext(subject.method, id.c_str()) == nullptr) continue;
    return Failed("QM-A-007", absl::StrCat("ext(\"", id, "\") gives a table; compare whole ids"));
  }
  return Passed();
}

// Everything a descriptor says, in one text.
std::string Describe(const qm_plugin& plugin) {
  const auto text = [](const char* s) { return s == nullptr ? std::string("-") : std::string(s); };
  std::string all =
      absl::StrCat(plugin.abi_major, plugin.abi_minor, plugin.min_host_minor, plugin.method_count,
                   text(plugin.vendor), text(plugin.license), text(plugin.build_info));
  for (uint32_t i = 0; i < plugin.method_count; ++i) {
    const qm_method& m = *plugin.methods[i];
    absl::StrAppend(&all, "|", text(m.id), text(m.version), text(m.summary), m.option_count,
                    m.flags);
    for (uint64_t o = 0; o < m.option_count; ++o) {
      absl::StrAppend(&all, ";", text(m.options[o].name), text(m.options[o].default_value),
                      text(m.options[o].choices), text(m.options[o].doc), m.options[o].type);
    }
    for (const char* id : kExtIds) {
      absl::StrAppend(&all, ",", reinterpret_cast<uintptr_t>(m.ext(&m, id)));
    }
  }
  return all;
}

Verdict Constant(Subject& subject) {
  void* handle = dlopen(subject.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const auto entry = handle == nullptr
                         ? nullptr
                         : reinterpret_cast<qm_plugin_entry_v1_fn>(dlsym(handle, QM_ENTRY_SYMBOL));
  if (entry == nullptr) return Skipped("it cannot be opened a second time");
  const std::string before = Describe(*subject.plugin);
  if (entry() != subject.plugin) {
    return Failed("QM-P-002", "its entry function returns another descriptor the second time");
  }
  if (Describe(*subject.plugin) != before) {
    return Failed("QM-P-002", "its descriptor or ext() says something else the second time");
  }
  return Passed();
}

// The length of a table as this host's headers have it.
uint64_t KnownSize(const std::string& id) {
  if (id == QM_EXT_QUANTIZE_LINEAR) return sizeof(qm_quantize_linear);
  if (id == QM_EXT_BLOCK_TRANSFORM) return sizeof(qm_block_transform);
  if (id == QM_EXT_BLOCK_TUNE) return sizeof(qm_block_tune);
  if (id == QM_EXT_REPARAMETRIZE) return sizeof(qm_reparametrize);
  if (id == QM_EXT_LINEAR_KERNEL) return sizeof(qm_linear_kernel);
  return sizeof(qm_format);
}

Verdict TableSizes(Subject& subject) {
  // A plugin of a later minor may have longer tables than this host knows.
  const bool newer = subject.plugin->abi_minor > QM_ABI_MINOR;
  const auto lies = [newer](uint64_t size, uint64_t known) {
    return size % 8 != 0 || (!newer && size > known);
  };
  const auto wrong = [](const std::string& what, uint64_t size, uint64_t known) {
    return Failed("QM-A-003", absl::StrCat("struct_size of ", what, " is ", size, "; its headers' ",
                                           "struct has ", known, " bytes; write sizeof"));
  };
  if (lies(subject.plugin->struct_size, sizeof(qm_plugin))) {
    return wrong("the qm_plugin", subject.plugin->struct_size, sizeof(qm_plugin));
  }
  for (uint32_t i = 0; i < subject.plugin->method_count; ++i) {
    const qm_method& method = *subject.plugin->methods[i];
    if (lies(method.struct_size, sizeof(qm_method))) {
      return wrong(absl::StrCat("method ", method.id), method.struct_size, sizeof(qm_method));
    }
    for (const char* id : kExtIds) {
      const auto* size = static_cast<const uint64_t*>(method.ext(&method, id));
      if (size != nullptr && lies(*size, KnownSize(id))) {
        return wrong(absl::StrCat("the table ", id, " of ", method.id), *size, KnownSize(id));
      }
    }
  }
  return Passed();
}

}  // namespace

std::vector<Case> AbiCases() {
  const char* quantize = QM_EXT_QUANTIZE_LINEAR;
  return {
      {"abi.constant",
       {"QM-P-002"},
       "The descriptor says the same each time.",
       Scope::kPlugin,
       "",
       Constant},
      {"abi.table_sizes",
       {"QM-A-003"},
       "struct_size is the size of the struct.",
       Scope::kPlugin,
       "",
       TableSizes},
      {"abi.unknown_ids",
       {"QM-A-007"},
       "ext() gives NULL for ids that are not exactly known.",
       Scope::kMethod,
       "",
       UnknownIds},
      {"abi.oldest_host",
       {"QM-A-005"},
       "It works with structs that end where those of minor 0 end.",
       Scope::kMethod,
       quantize,
       OldestHost},
      {"abi.newer_host",
       {"QM-A-005"},
       "It works with longer structs and does not look behind what it knows.",
       Scope::kMethod,
       quantize,
       NewerHost},
      {"abi.newer_host_format",
       {"QM-A-005", "QM-P-010"},
       "can_store() takes a longer qm_call and refuses parameters that are none.",
       Scope::kMethod,
       QM_EXT_FORMAT,
       NewerHostFormat},
      {"abi.no_services",
       {"QM-P-018"},
       "Without host services it works, or says which it misses (FAILED_PRECONDITION).",
       Scope::kMethod,
       quantize,
       NoServices},
  };
}

}  // namespace quantmill::check
