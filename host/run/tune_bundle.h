// The inputs of a call that tunes a block, on disk: the folder of host/run/transform_bundle.h (no
// statistics), and
//   call.json            as there, and format ids and parameters of the packed linears
//   packed.safetensors   "NUMBER.TENSOR": tensors of the packed linears, by their number in the
//   call
#ifndef QUANTMILL_HOST_RUN_TUNE_BUNDLE_H_
#define QUANTMILL_HOST_RUN_TUNE_BUNDLE_H_

#include <string>

#include "absl/status/status.h"
#include "core/tensor/backend.h"
#include "host/run/transform_bundle.h"
#include "host/run/tune_runner.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// As DescribeTransformCall, for a tuning.
nlohmann::json DescribeTuneCall(const LoadedMethod& method, const std::string& stage,
                                const std::string& function, const TuneTask& task,
                                const Backend& backend, const std::string& config_file);

// `call`: as DescribeTuneCall made it; config, dense, windows and inputs of the task are set.
// System errors as WriteFile.
absl::Status WriteTuneBundle(const std::string& directory, Backend& backend, nlohmann::json call,
                             const TuneTask& task);

// Makes a transform's bundle, read before, one of a tuning, which is told of no roundings and no
// sites. with_tensors: the packed linears, too. DATA_LOSS naming what is missing or damaged.
absl::Status ReadTuneParts(const std::string& directory, const nlohmann::json& call,
                           bool with_tensors, BundledBlock* bundle);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TUNE_BUNDLE_H_
