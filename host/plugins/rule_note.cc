#include "host/plugins/rule_note.h"

#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {

bool AuthorMode() {
  const char* value = getenv("QM_STRICT");
  return value != nullptr && std::string_view(value) == "1";
}

std::string RuleNote(std::string_view rule) {
  if (!AuthorMode()) return "";
  return absl::StrCat("; this breaks ", AbslView(rule), ", see plugin_api/RULES.md#",
                      absl::AsciiStrToLower(AbslView(rule)));
}

absl::Status BreaksRule(const absl::Status& status, std::string_view rule) {
  if (status.ok() || !AuthorMode() || absl::StrContains(status.message(), "; this breaks QM-")) {
    return status;
  }
  absl::Status noted(status.code(), absl::StrCat(status.message(), RuleNote(rule)));
  status.ForEachPayload([&noted](absl::string_view url, const absl::Cord& payload) {
    noted.SetPayload(url, payload);
  });
  return noted;
}

}  // namespace quantmill
