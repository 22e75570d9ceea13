// What a bench does in worker processes beside its runs: facts of the machine, the score of the
// untouched model, and the time generation takes.
#ifndef QUANTMILL_HOST_BENCH_TASKS_H_
#define QUANTMILL_HOST_BENCH_TASKS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "host/pipeline/bench_file.h"
#include "host/run/backend.h"
#include "host/supervisor/process.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// "mode" of the requests below.
inline constexpr char kBenchMode[] = "bench";

// The worker's side.
absl::StatusOr<nlohmann::ordered_json> RunBenchTask(const nlohmann::json& request,
                                                    const EventSink& sink);

// ---- the supervisor's side; a worker that died is an error that says how ----

absl::StatusOr<DeviceFacts> BenchFacts(const Pipeline& pipeline);

// The model of a pipeline scored as it is, against itself when the pipeline wants a reference: the
// keys of `eval --json`, and `window_nll` and `window_kl` (lists), bits_per_weight of its linears,
// size_bytes (weights, configuration and tokenizer), peak_rss_bytes and peak_device_bytes.
absl::StatusOr<nlohmann::ordered_json> BenchBaseline(const Pipeline& pipeline,
                                                     const EventSink& sink);

// Times generation from `directory` as it lies on the disk, packed if it is quantized: greedy, from
// the first tokens of the pipeline's evaluation text, past any end of text. Keys per entry b of
// speed.batch: prompt_tokens_per_second_bB, tokens_per_second_bB, each with _stderr over the
// repetitions. DATA_LOSS if a generated token is not one that the model scored by `eval` would
// choose: a time of wrong text is none.
absl::StatusOr<nlohmann::ordered_json> BenchGeneration(const Pipeline& pipeline,
                                                       const std::string& directory,
                                                       const std::vector<std::string>& plugins,
                                                       const BenchSpeed& speed,
                                                       const EventSink& sink);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_TASKS_H_
