// Keys of a bench's cells: hashes of everything a cell's figures depend on, so that a later call
// computes only what is missing or has changed.
#ifndef QUANTMILL_HOST_BENCH_CELL_KEYS_H_
#define QUANTMILL_HOST_BENCH_CELL_KEYS_H_

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/threads/thread_pool.h"
#include "host/pipeline/bench_file.h"
#include "host/plugins/catalog.h"
#include "host/run/backend.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Digests of models and texts. What was read once is not read again while sizes and times of change
// stay as they are: the digests are kept in a file.
class InputDigests {
 public:
  // A cache file that cannot be read counts as empty.
  InputDigests(std::string cache_file, ThreadPool& threads);
  // Tensors, config.json and the tokenizer's files of a model's directory.
  absl::StatusOr<std::string> Model(const std::string& directory);
  absl::StatusOr<std::string> File(const std::string& path);
  absl::Status Save() const;

 private:
  absl::StatusOr<std::string> Cached(const std::string& path, const std::string& stamp,
                                     const std::function<absl::StatusOr<std::string>()>& compute);

  std::string cache_file_;
  ThreadPool& threads_;
  nlohmann::json cache_;  // path -> {stamp, digest}
};

// What all cells share.
struct CellContext {
  const Catalog* catalog = nullptr;
  DeviceFacts facts;
  std::string program_sha256;  // of the binary
};

// Of the cell's quality: model, texts, stages and their plugins, device and binary. Not the places
// of files.
absl::StatusOr<std::string> CellKey(const BenchCell& cell, const CellContext& context,
                                    InputDigests* digests);
// Of the time it takes to generate.
std::string SpeedKey(const std::string& cell_key, const BenchSpeed& speed,
                     const DeviceFacts& facts);
// Of text that a model draws for its own calibration.
std::string SelfTextKey(const std::string& model_digest, const CellContext& context,
                        const Pipeline& pipeline);

// Which plugin, by hash, owns each of the formats in a written checkpoint: {format id: sha256}.
nlohmann::json FormatOwners(const std::string& directory, const Catalog& catalog);
// Whether they are still the same.
bool SameOwners(const nlohmann::json& owners, const Catalog& catalog);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_BENCH_CELL_KEYS_H_
