// The inputs of one plugin call on disk, so that a call that failed can be made again: work_dir/
// crash/KEY/SLOT/ with
//   call.json               which plugin, function, layer, options, seed, device (written last)
//   weight.safetensors      "weight", F32 [out, in]           } not for plan(), which sees no
//   statistics.safetensors  by id, as handed to the plugin    } tensors
// Of a call that transforms or tunes a block: host/run/transform_bundle.h, tune_bundle.h;
// of a training: host/run/train/reparam_bundle.h.
#ifndef QUANTMILL_HOST_RUN_CRASH_BUNDLE_H_
#define QUANTMILL_HOST_RUN_CRASH_BUNDLE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/model/graph.h"
#include "core/tensor/backend.h"
#include "host/run/method_runner.h"
#include "host/run/train/reparam_bundle.h"
#include "host/run/transform_bundle.h"
#include "host/run/tune_runner.h"
#include "nlohmann/json.hpp"

namespace quantmill {

inline constexpr char kPlanFunction[] = "quantize-linear.plan";
inline constexpr char kRunFunction[] = "quantize-linear.run";

struct CrashBundle {
  std::string function;  // kPlanFunction or kRunFunction, or those of a transform, a tuning or a
                         // training
  std::string method, version;
  std::string plugin_path, plugin_sha256;  // of the file that was called
  std::string stage;
  std::string device;  // "cpu", "cuda:0"
  // Of a transform or a tuning: has the name of the block only.
  LinearSlot slot;
  DType weight_dtype = DType::kF32, scale_dtype = DType::kF16;
  uint64_t seed = 0;
  ResolvedOptions options;
  // kRunFunction only.
  Tensor weight;                        // on the host
  std::vector<NamedTensor> statistics;  // by StatId, on the host
  int64_t row_count = 0;
  // What a transform or a tuning was given in place of weight and statistics; else null.
  std::shared_ptr<const BundledBlock> block;
  // What a call of a training was given in place of them; else null.
  std::shared_ptr<const BundledReparam> reparam;
  bool tunes() const { return function == kTunePlanFunction || function == kTuneRunFunction; }
  bool plans() const {
    return function == kPlanFunction || function == kTransformPlanFunction ||
           function == kTunePlanFunction || (reparam != nullptr && reparam->plans());
  }
};

// What call.json says of a call, but for the plugin's digest and the number of rows.
nlohmann::json DescribeCall(const LoadedMethod& method, const std::string& stage,
                            const std::string& function, const SlotTask& task, Device device);

// `call`: as DescribeCall made it. System errors as WriteFile.
absl::Status WriteCrashBundle(const std::string& directory, Backend& backend, nlohmann::json call,
                              const SlotTask& task);

// NOT_FOUND when the directory holds no bundle; DATA_LOSS naming what is missing or damaged in it.
absl::StatusOr<CrashBundle> ReadCrashBundle(const std::string& directory);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_CRASH_BUNDLE_H_
