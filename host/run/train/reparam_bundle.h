// The inputs of a call of qm.reparametrize/1 on disk: the folder of host/run/crash_bundle.h with
//   call.json            as there, and the phase, the base's format, which results are wanted
//   inputs.safetensors   "weight", "in", "saved", "d_out", "param.NAME", "base.NAME": what the
//                        function is given of them; not for plan()
#ifndef QUANTMILL_HOST_RUN_TRAIN_REPARAM_BUNDLE_H_
#define QUANTMILL_HOST_RUN_TRAIN_REPARAM_BUNDLE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/model/graph.h"
#include "core/tensor/backend.h"
#include "host/run/train/reparam_calls.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// What a call was given beside its subject; empty tensors: NULL, or not of this function.
struct ReparamInputs {
  Tensor weight;                    // init, finalize
  Tensor in;                        // forward, vjp
  Tensor saved, d_out;              // vjp
  std::vector<NamedTensor> params;  // all but init
  Shape out_shape;                  // forward: of its result
  DType out_dtype = DType::kF32;
  bool keeps_saved = false;         // forward: a vjp follows
  bool wants_d_in = false;          // vjp
  std::vector<std::string> wanted;  // vjp: parameters whose gradients are wanted
};

// A call out of its bundle; tensors on the host.
struct BundledReparam {
  std::string function;  // "reparametrize.vjp"
  LinearSlot slot;
  DType weight_dtype = DType::kF32, scale_dtype = DType::kF16;
  qm_reparam_phase phase = QM_PHASE_END_TO_END;
  std::shared_ptr<const PackedWeight> base;  // null: dense; with tensors for init and finalize
  DType activation_dtype = DType::kF32;      // of the run
  ReparamInputs inputs;

  bool plans() const { return function == "reparametrize.plan"; }
};

// Is it one of those whose calls can be made again (plan, init, forward, vjp, finalize)?
bool IsReparamFunction(const std::string& function);

// What call.json says of a call, but for the plugin's digest and what WriteReparamBundle adds.
nlohmann::json DescribeReparamCall(const ReparamSubject& subject, const std::string& function,
                                   const Backend& backend);

// `call`: as DescribeReparamCall made it. System errors as WriteFile.
absl::Status WriteReparamBundle(const std::string& directory, Backend& backend, nlohmann::json call,
                                const ReparamSubject& subject, const ReparamInputs& inputs);

// `call`: the content of call.json. DATA_LOSS naming what is missing or damaged.
absl::StatusOr<BundledReparam> ReadReparamBundle(const std::string& directory,
                                                 const nlohmann::json& call);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_REPARAM_BUNDLE_H_
