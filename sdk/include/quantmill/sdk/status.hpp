// Error handling for plugins: build a message, return a code, let no exception out.
#ifndef QUANTMILL_SDK_STATUS_HPP_
#define QUANTMILL_SDK_STATUS_HPP_

#include <exception>
#include <new>
#include <sstream>
#include <string>

#include "quantmill/plugin.h"

// Returns from the enclosing function when `expr` (a qm_status) is not QM_OK.
#define QM_TRY(expr)                                    \
  do {                                                  \
    const qm_status qm_try_status_ = (expr);            \
    if (qm_try_status_ != QM_OK) return qm_try_status_; \
  } while (false)

namespace qm {

// The parts written one after the other.
template <class... Parts>
std::string StrCat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Records the message made of `parts` and returns `code`. Say what is wrong, why, and what would be
// right: return qm::Fail(call, QM_INVALID_ARGUMENT, "group_size ", gs, " does not divide ...").
template <class... Parts>
qm_status Fail(qm_call* call, qm_status code, const Parts&... parts) {
  return call->fail(call, code, StrCat(parts...).c_str());
}

// How much a log line matters.
enum class Severity : int32_t { kDebug = 0, kInfo = 1, kWarning = 2 };

// Hands the text made of `parts` to the host's log.
template <class... Parts>
void Log(qm_call* call, Severity severity, const Parts&... parts) {
  call->log(call, static_cast<int32_t>(severity), StrCat(parts...).c_str());
}

// Runs body() -> qm_status and turns exceptions into status codes: std::bad_alloc becomes
// QM_RESOURCE_EXHAUSTED, everything else QM_INTERNAL with what(). Put it around every function that
// stands in a table.
template <class Body>
qm_status guard(qm_call* call, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return call->fail(
        call, QM_RESOURCE_EXHAUSTED,
        "the plugin could not allocate host memory; free some or use a smaller model");
  } catch (const std::exception& error) {
    return call->fail(call, QM_INTERNAL, error.what());
  } catch (...) {
    return call->fail(call, QM_INTERNAL, "the plugin threw something that is not a std::exception");
  }
}

}  // namespace qm

#endif  // QUANTMILL_SDK_STATUS_HPP_
