// Calling a function of a plugin's table with exceptions contained.
#ifndef QUANTMILL_HOST_WORKER_INVOKE_H_
#define QUANTMILL_HOST_WORKER_INVOKE_H_

#include <exception>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "host/plugins/rule_note.h"
#include "host/worker/call.h"

namespace quantmill {

// Runs fn(call, args...) and finishes the call. Table functions are noexcept by type; taking them
// through a plain function pointer is the second net for plugins built without that (QM-P-007).
template <typename... P>
absl::Status Invoke(PluginCall& call, qm_status (*fn)(qm_call*, P...),
                    std::type_identity_t<P>... args) {
  qm_call* raw = call.get();
  qm_status code = QM_INTERNAL;
  try {
    code = fn(raw, args...);
  } catch (const std::exception& error) {
    code = raw->fail(
        raw, QM_INTERNAL,
        absl::StrCat("an exception left the plugin: ", error.what(), RuleNote("QM-P-007")).c_str());
  } catch (...) {
    code = raw->fail(raw, QM_INTERNAL,
                     ("an exception left the plugin" + RuleNote("QM-P-007")).c_str());
  }
  return call.Finish(code);
}

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_INVOKE_H_
