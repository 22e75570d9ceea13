// The inputs of a call that transforms a block, on disk: the folder of host/run/crash_bundle.h with
//   call.json               as there, and the block's number, its linears, the next roundings
//   config.json             of the model
//   model.safetensors       every tensor of the block as it was       }
//   statistics.safetensors  "GROUP.ID" of the linears' input groups   } not for plan()
//   windows.safetensors     "0", "1", ...: inputs of the block        }
// Windows beyond kMostWindowBytes are left out: the call can be repeated on fewer of them.
#ifndef QUANTMILL_HOST_RUN_TRANSFORM_BUNDLE_H_
#define QUANTMILL_HOST_RUN_TRANSFORM_BUNDLE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/calib/statistics.h"
#include "core/formats/packed.h"
#include "core/io/checkpoint_files.h"
#include "core/model/config.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "host/run/transform_runner.h"
#include "nlohmann/json.hpp"

namespace quantmill {

inline constexpr int64_t kMostWindowBytes = int64_t{256} << 20;

struct BundledBlock {
  ModelConfig config;
  TransformBlock block;
  DType activation_dtype = DType::kF32;  // of the run
  // Of run() only.
  std::shared_ptr<const Checkpoint> weights;
  std::vector<NamedTensor> statistics;  // "GROUP.ID", on the host
  std::map<int, int64_t> row_counts;    // by input group
  std::vector<Tensor> windows;          // the first of `window_count`; [length, hidden] on the host
  int64_t window_count = 0;
  std::vector<PackedWeight> packed;  // of a tuning: per linear, on the host (tune_bundle.h)
  // All that run() sees was kept.
  bool complete() const { return window_count == static_cast<int64_t>(windows.size()); }

  // The block on a backend.
  absl::StatusOr<BlockWeights> Load(Backend& backend) const;
  // What a plan asks for, out of what was kept. FAILED_PRECONDITION when that is not there: the
  // plugin may have been built anew since.
  absl::StatusOr<Statistics> StatisticsFor(const TransformPlan& plan, Backend& backend) const;
};

// What call.json says of a call, but for the plugin's digest and what WriteTransformBundle adds.
// `config_file`: where the model's config.json is.
nlohmann::json DescribeTransformCall(const LoadedMethod& method, const std::string& stage,
                                     const std::string& function, const TransformTask& task,
                                     const Backend& backend, const std::string& config_file);

// `call`: as DescribeTransformCall made it. System errors as WriteFile.
absl::Status WriteTransformBundle(const std::string& directory, Backend& backend,
                                  nlohmann::json call, const TransformTask& task);

// `call`: the content of call.json. DATA_LOSS naming what is missing or damaged.
absl::StatusOr<BundledBlock> ReadBundledBlock(const std::string& directory,
                                              const nlohmann::json& call, DType scale_dtype,
                                              bool with_tensors);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRANSFORM_BUNDLE_H_
