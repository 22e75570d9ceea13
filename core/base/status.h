// Status macros, and the one shape of an error message: what; why; what to do.
#ifndef QUANTMILL_CORE_BASE_STATUS_H_
#define QUANTMILL_CORE_BASE_STATUS_H_

#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace quantmill {

// For absl::StrCat and its kin: in this Abseil, absl::string_view is a type of its own.
inline absl::string_view AbslView(std::string_view text) { return {text.data(), text.size()}; }

// "what; why; what to do". Empty parts are left out.
inline std::string ErrorText(absl::string_view what, absl::string_view why = "",
                             absl::string_view remedy = "") {
  std::string text(what);
  if (!why.empty()) absl::StrAppend(&text, "; ", why);
  if (!remedy.empty()) absl::StrAppend(&text, "; ", remedy);
  return text;
}

// Puts `context` ("cannot open model ./m") before the message of an error; OK stays OK.
inline absl::Status WithContext(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

}  // namespace quantmill

#define QM_STATUS_CONCAT_INNER(a, b) a##b
#define QM_STATUS_CONCAT(a, b) QM_STATUS_CONCAT_INNER(a, b)

#define QM_RETURN_IF_ERROR(expr)             \
  do {                                       \
    absl::Status qm_status_ = (expr);        \
    if (!qm_status_.ok()) return qm_status_; \
  } while (false)

#define QM_ASSIGN_OR_RETURN_IMPL(result, lhs, expr) \
  auto result = (expr);                             \
  if (!result.ok()) return result.status();         \
  lhs = std::move(result).value()

#define QM_ASSIGN_OR_RETURN(lhs, expr) \
  QM_ASSIGN_OR_RETURN_IMPL(QM_STATUS_CONCAT(qm_result_, __LINE__), lhs, expr)

#endif  // QUANTMILL_CORE_BASE_STATUS_H_
