// Keys of units: hashes of everything a unit's result depends on, and of nothing else (no device,
// no number of threads, no paths).
#ifndef QUANTMILL_HOST_RUN_UNIT_KEYS_H_
#define QUANTMILL_HOST_RUN_UNIT_KEYS_H_

#include <map>
#include <string>
#include <vector>

#include "core/io/checkpoint_files.h"
#include "core/threads/thread_pool.h"
#include "host/run/stage_set.h"

namespace quantmill {

// Digests of the original's tensors, computed while a block is worked on and kept.
class ModelDigests {
 public:
  ModelDigests(const Checkpoint& checkpoint, int64_t layers, ThreadPool& threads);
  // Digests by tensor name of decoder layer `block`; block == layers: embedding, norm and head.
  const std::map<std::string, std::string>& Block(int64_t block);
  // Of all tensors: those of blocks nobody asked for are read here.
  std::string Total();

 private:
  const Checkpoint& checkpoint_;
  ThreadPool& threads_;
  std::vector<std::vector<std::string>> names_;  // per block, sorted
  std::map<int64_t, std::map<std::string, std::string>> digests_;
};

struct UnitKeys {
  std::string unit;
  // Without on_error: names the calls, for remembering which of them crashed.
  std::string attempt;
};

// Walks the blocks in order: BeginBlock, Key and AddUnit per stage, EndBlock.
class KeyChain {
 public:
  // calibration: digest of the token windows and the compute type; empty if none are needed.
  KeyChain(const PipelinePlan& plan, const StageSet& stages, std::string calibration,
           ModelDigests& digests);

  void BeginBlock(int64_t block);
  // slots: indices into the stage's slots that lie in this block.
  UnitKeys Key(const PreparedStage& stage, const std::vector<size_t>& slots) const;
  // The stage's output in this block; "?" when it is not known. What a transform or a tuning
  // leaves, and when it was measured, is what every later stage of the block works on.
  void AddUnit(const PreparedStage& stage, const std::string& key, const std::string& digest) {
    block_units_.push_back(digest);
    if (stage.transforms || stage.tunes) block_transforms_.push_back(key + digest);
  }
  void EndBlock();

 private:
  const PipelinePlan& plan_;
  const StageSet& stages_;
  std::string calibration_;
  ModelDigests& digests_;
  int64_t block_ = 0;
  std::string original_stream_, quantized_stream_;  // what the block's inputs depend on
  std::vector<std::string> block_units_, block_transforms_;
};

// Options as JSON with sorted keys.
std::string OptionsJson(const ResolvedOptions& options);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_UNIT_KEYS_H_
