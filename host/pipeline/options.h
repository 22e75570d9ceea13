// Options as written against a method's table.
#ifndef QUANTMILL_HOST_PIPELINE_OPTIONS_H_
#define QUANTMILL_HOST_PIPELINE_OPTIONS_H_

#include <string>

#include "host/pipeline/section.h"
#include "host/plugins/catalog.h"
#include "host/worker/call.h"

namespace quantmill {

// `written` with the values of `over` on top, checked against the method's table, defaults filled
// in. Mistakes go to `errors` at the option's place; a required option that is missing at `place`.
ResolvedOptions ResolveOptions(const MethodInfo& method, const OptionMap& written,
                               const OptionMap& over, const SourceLocation& place,
                               ErrorList* errors);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_OPTIONS_H_
