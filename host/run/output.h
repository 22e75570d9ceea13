// Writing the result of a run: provenance, export, the replacement of an output this pipeline wrote
// before.
#ifndef QUANTMILL_HOST_RUN_OUTPUT_H_
#define QUANTMILL_HOST_RUN_OUTPUT_H_

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/checkpoint/export_checkpoint.h"
#include "host/run/engine.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// quantmill_provenance.json: per slot an array with one entry per stage that worked on it. Equal
// inputs give equal bytes: no paths, times or measured sizes.
nlohmann::ordered_json BuildProvenance(const PipelinePlan& plan, const Engine& engine,
                                       const std::string& model_digest,
                                       const std::string& calibration_digest);

// Before any work: FAILED_PRECONDITION if the output directory is there and neither this work
// directory's run wrote it nor could it be its finished result.
absl::Status CheckOutput(const Pipeline& pipeline, bool resume);

// Exports, with trained adapters in a folder beside the weights or, as peft, alone; or finds that
// the output is already there with this provenance. An older output of this work directory is
// replaced. `written` is false if nothing had to be done.
struct OutputResult {
  ExportResult exported;
  bool written = true;
};
absl::StatusOr<OutputResult> WriteOutput(const PipelinePlan& plan, Engine& engine,
                                         DenseSource& original,
                                         const nlohmann::ordered_json& provenance,
                                         PluginFormats& formats, ReparamCalls& training,
                                         Backend& backend, const EventSink& sink);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_OUTPUT_H_
