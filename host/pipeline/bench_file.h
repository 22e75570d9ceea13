// A bench file as data (schema: docs/schema/bench.schema.json): pipelines side by side, each on
// every model. A cell is one row on one model.
#ifndef QUANTMILL_HOST_PIPELINE_BENCH_FILE_H_
#define QUANTMILL_HOST_PIPELINE_BENCH_FILE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "host/pipeline/pipeline.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct BenchModel {
  std::string name;
  std::string path;  // absolute
  SourceLocation location;
};

// What generation is timed with.
struct BenchSpeed {
  int64_t prompt = 128;  // tokens of the prompt
  int64_t new_tokens = 64;
  std::vector<int64_t> batch = {1};  // sequences at once; each is a measurement of its own
  SourceLocation location;
};

struct BenchCell {
  std::string model, row;
  bool baseline = false;  // a row without stages: the untouched model
  // With the places of the bench file. Of a baseline only model, evaluation and run are set.
  Pipeline pipeline;
  // The same as a pipeline file of its own with absolute paths.
  nlohmann::json tree;
};

struct BenchFile {
  std::string file;
  std::vector<BenchModel> models;
  std::vector<std::string> rows;  // names, in the order of the table
  std::optional<BenchSpeed> speed;
  std::vector<BenchCell> cells;  // by model, then by row
};

// The folder of a cell in the bench's directory: its pipeline, checkpoint and result.
std::string BenchCellPath(const std::string& directory, const BenchCell& cell);

// All errors found are returned in one status, one per line: "file:line:column: what; remedy".
// Relative paths become absolute against the file's folder. Cells write below `directory`. `device`
// overrides run.device unless empty. A file in which every row has stages gets the row "original"
// in front.
absl::StatusOr<BenchFile> ParseBenchFile(const std::string& path, const std::string& directory,
                                         const std::string& device = "");
absl::StatusOr<BenchFile> ParseBenchText(const std::string& text, const std::string& file,
                                         const std::string& directory,
                                         const std::string& device = "");

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_BENCH_FILE_H_
