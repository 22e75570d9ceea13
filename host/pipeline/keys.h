// The keys a pipeline file and a bench file may have, by section: what the parsers accept and what
// docs/schema/ lists.
#ifndef QUANTMILL_HOST_PIPELINE_KEYS_H_
#define QUANTMILL_HOST_PIPELINE_KEYS_H_

#include <string>
#include <vector>

namespace quantmill {

// Names as in error messages: "" is the whole file; "stages[]" one stage, "overrides[]" one
// override, "on_error" its {use, options} form.
const std::vector<std::string>& PipelineKeys(const std::string& section);
std::vector<std::string> PipelineSections();

// The same for bench files and docs/schema/bench.schema.json: "models[]" is one model, "rows[]" one
// row, "rows[].export" its export. `calibration`, `evaluate` and the stages are those of a
// pipeline.
const std::vector<std::string>& BenchKeys(const std::string& section);
std::vector<std::string> BenchSections();

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_KEYS_H_
