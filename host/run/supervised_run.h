// A run in worker processes, with its journal: what `run` does, and `bench` for each of its cells.
#ifndef QUANTMILL_HOST_RUN_SUPERVISED_RUN_H_
#define QUANTMILL_HOST_RUN_SUPERVISED_RUN_H_

#include <memory>

#include "absl/status/statusor.h"
#include "host/pipeline/pipeline.h"
#include "host/run/job.h"
#include "host/supervisor/journal.h"
#include "host/supervisor/process.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Checks the files of the pipeline, makes its work directory and opens the journal there. Refused
// (exit code 3): a journal of an earlier run without `resume`, and what CheckFiles refuses.
absl::StatusOr<std::unique_ptr<Journal>> OpenRunJournal(const Pipeline& pipeline, bool resume);

// A run that was refused leaves no work directory behind, unless something else is in it.
void RemoveWorkDir(const Pipeline& pipeline);

// Runs the request until it is done, with further workers after a crash. Events other than those
// for the journal go to `sink`. What `run --json` writes; peak_rss_bytes is the largest of all
// workers.
absl::StatusOr<nlohmann::ordered_json> RunSupervised(JobRequest request, const Pipeline& pipeline,
                                                     Journal& journal, const EventSink& sink);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_SUPERVISED_RUN_H_
