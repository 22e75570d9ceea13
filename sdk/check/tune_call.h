// The functions of qm.block-tune/1 as every case calls them: fenced, on a small block whose linears
// the method itself has packed.
#ifndef QUANTMILL_SDK_CHECK_TUNE_CALL_H_
#define QUANTMILL_SDK_CHECK_TUNE_CALL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/formats/packed.h"
#include "core/tensor/tensor.h"
#include "sdk/check/block_call.h"
#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/synthetic_block.h"

namespace quantmill::check {

// A block the method has packed, with options that want it tuned.
struct PackedBlock {
  explicit PackedBlock(uint64_t seed) : block(seed) {}

  SyntheticBlock block;
  std::string options;  // the one that is not as by default, for messages
  CallSetup setup;
  uint64_t scratch_bytes = 0;  // of the plan
  // One per linear, its floats moved a little so that there is something to tune; without a format:
  // left dense.
  std::vector<PackedWeight> packed;
};

// Finds options with which plan() takes the block, and packs its linears. A verdict when there is
// nothing to go on with: no quantizer beside, no such options, linears that are refused.
std::optional<Verdict> PackBlock(Subject& subject, PackedBlock* out);

// What run() answered, copied out of the call.
struct TuneAnswer {
  struct Edit {
    qm_edit_kind kind = 0;
    std::string target;
    Tensor value;     // F32 on the host; empty with `why`
    std::string why;  // what is wrong with the value as such
  };

  qm_status code = QM_OK;
  std::string outcome;               // CheckedCall::Outcome()
  std::optional<Verdict> violation;  // a broken rule; nothing else is worth looking at then
  // By item: that of a linear, and further ones where nothing should be.
  std::vector<std::vector<NamedTensor>> emitted;
  std::vector<Edit> edits;
  int64_t scratch_calls = 0, emit_calls = 0, progress_calls = 0;
  uint64_t scratch_bytes = 0;
  double seconds_since_cancel = 0;
};
TuneAnswer Tune(Subject& subject, const PackedBlock& packed, const CallSetup& setup,
                BlockCall::Service service = BlockCall::Service::kWhole);

// The packed weights with what was emitted in place of their tensors, and norms with the edits;
// failed when names, dtypes, shapes or values are not those a host takes.
struct TunedBlock {
  std::vector<PackedWeight> packed;
  BlockTensors tensors;  // the block with weights as packed, and norms
};
std::optional<Verdict> TakeTuned(Subject& subject, const PackedBlock& packed,
                                 const TuneAnswer& answer, TunedBlock* out);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_TUNE_CALL_H_
