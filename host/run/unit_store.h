// Finished units on disk: work_dir/units/KEY/{out.safetensors, unit.json}.
#ifndef QUANTMILL_HOST_RUN_UNIT_STORE_H_
#define QUANTMILL_HOST_RUN_UNIT_STORE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/model/block_edits.h"
#include "core/threads/thread_pool.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// What one stage made of one slot.
struct SlotRecord {
  std::string slot;
  bool packed = false;  // false: kept dense by the stage's on_error, or transformed
  // By a stage that edits dense weights, and its edits of this slot ("scale
  // model.layers.0.input_layernorm").
  bool transformed = false;
  std::vector<std::string> edits;
  // By the tuning of its block; packed: with new contents. The losses are mean squared differences
  // of the block's output to the dense block's; negative: not measured.
  bool tuned = false;
  double loss_before = -1, loss_after = -1;
  // By a training; packed: quantized by it; else an adapter around what it was, or, if `folded`,
  // dense with new values. The losses are means over the first and the last steps.
  bool trained = false;
  bool folded = false;
  std::string method;  // that made it; the fallback's after on_error: use
  std::string version;
  std::string plugin_sha256;
  std::string options;  // canonical JSON
  uint64_t seed = 0;
  std::string error;  // why the stage's own method did not make it; empty = it did
  std::string format_id, format_json;
  int64_t out_features = 0, in_features = 0;
  double bits_per_weight = 0;
  double weight_nmse = 0;
  double output_nmse = -1;  // on a sample of calibration rows; negative: not measured
  int64_t rows = 0;         // calibration rows its input saw
  double seconds = 0;
  int64_t scratch_peak_bytes = 0;
};
nlohmann::ordered_json ToJson(const SlotRecord& record);

// One (stage, block).
struct Unit {
  std::string key;
  std::string stage;
  int64_t block = 0;  // number of layers for the head
  std::vector<SlotRecord> slots;
  std::map<std::string, std::shared_ptr<const PackedWeight>> packed;  // by slot, on the host
  // Of a training: adapters' parameters, F32 on the host, by slot.
  std::map<std::string, std::vector<NamedTensor>> adapters;
  // Of a transform, a tuning or a training: what it proposed, to be applied in this order, and the
  // names of the tensors that changes.
  std::vector<BlockEdit> edits;
  std::set<std::string> changed;
  std::string digest;  // of `packed`, `adapters` and `edits`; set by Save and Load
  double seconds = 0;
};

class UnitStore {
 public:
  explicit UnitStore(std::string work_dir) : work_dir_(std::move(work_dir)) {}

  // Writes the unit so that it is there completely or not at all; sets unit->digest.
  absl::Status Save(Unit* unit, ThreadPool& threads) const;
  // Tensors are views of the mapped file. DATA_LOSS when the content does not have `digest`.
  absl::StatusOr<Unit> Load(const std::string& key, const std::string& digest,
                            ThreadPool& threads) const;

 private:
  std::string Directory(const std::string& key) const { return work_dir_ + "/units/" + key; }
  std::string work_dir_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_UNIT_STORE_H_
