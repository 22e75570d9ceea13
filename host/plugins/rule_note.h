// Author mode, $QM_STRICT=1: an error that a plugin caused by breaking a rule of the ABI says which
// rule, and where it is written.
#ifndef QUANTMILL_HOST_PLUGINS_RULE_NOTE_H_
#define QUANTMILL_HOST_PLUGINS_RULE_NOTE_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace quantmill {

bool AuthorMode();

// "; this breaks QM-P-010, see plugin_api/RULES.md#qm-p-010" in author mode, else "".
std::string RuleNote(std::string_view rule);

// Puts the note behind the text of an error; code and payloads stay. OK stays OK. A text that names
// a rule already is left alone: the innermost place knows best.
absl::Status BreaksRule(const absl::Status& status, std::string_view rule);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PLUGINS_RULE_NOTE_H_
