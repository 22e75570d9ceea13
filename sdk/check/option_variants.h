// Options of a method, one changed at a time, for cases that need more than the defaults.
#ifndef QUANTMILL_SDK_CHECK_OPTION_VARIANTS_H_
#define QUANTMILL_SDK_CHECK_OPTION_VARIANTS_H_

#include <string>
#include <vector>

#include "quantmill/plugin.h"
#include "sdk/check/checked_call.h"

namespace quantmill::check {

struct OptionVariant {
  std::string what;  // "defaults", "tune: true"
  OptionValues values;
};

// The defaults first; then each truth value, each choice of a list, and of a range of numbers one
// more than the default (or the end of the range), with everything else as by default.
std::vector<OptionVariant> OptionVariants(const qm_method& method);
// Those alone that change an option of this type.
std::vector<OptionVariant> OptionVariants(const qm_method& method, qm_option_type type);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_OPTION_VARIANTS_H_
