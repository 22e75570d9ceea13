// The keys a pipeline file may have, by section: what the parser accepts and what
// docs/schema/pipeline.schema.json lists.
#ifndef QUANTMILL_HOST_PIPELINE_KEYS_H_
#define QUANTMILL_HOST_PIPELINE_KEYS_H_

#include <string>
#include <vector>

namespace quantmill {

// Names as in error messages: "" is the whole file; "stages[]" one stage, "overrides[]" one
// override, "on_error" its {use, options} form.
const std::vector<std::string>& PipelineKeys(const std::string& section);
std::vector<std::string> PipelineSections();

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_KEYS_H_
