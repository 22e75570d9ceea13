// Calls at block scope (transforms, tuning) as cases make them: the call with the service
// qm.host.block/1 over a SyntheticBlock, and the block as the plugin is told of it.
#ifndef QUANTMILL_SDK_CHECK_BLOCK_CALL_H_
#define QUANTMILL_SDK_CHECK_BLOCK_CALL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/statusor.h"
#include "core/tensor/backend.h"
#include "core/tensor/tensor.h"
#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/synthetic_block.h"

namespace quantmill::check {

// A host F32 copy of a contiguous tensor a plugin describes, on the CPU or the backend's device.
// INVALID_ARGUMENT: it is none of F32, F16 and BF16 (F32 alone with `only_f32`), empty, or has
// gaps.
absl::StatusOr<Tensor> HostCopyOf(Backend& backend, const qm_tensor& view, bool only_f32);

// The call as the plugin sees it: that of a CheckedCall, with one service more. Both and the block
// must outlive it.
class BlockCall : public qm_call {
 public:
  enum class Service { kNone, kWithoutGradients, kWhole };
  BlockCall(CheckedCall& call, const SyntheticBlock& block, Backend& backend, Service service);
  BlockCall(const BlockCall&) = delete;
  BlockCall& operator=(const BlockCall&) = delete;

  // As check::Invoke().
  template <typename... P>
  qm_status Invoke(qm_status (*function)(qm_call*, P...), std::type_identity_t<P>... arguments) {
    try {
      return function(this, arguments...);
    } catch (...) {
      return kThrewException;
    }
  }

 private:
  static const void* HostExt(qm_call* call, const char* id) QM_NOEXCEPT;
  static int64_t SampleCount(qm_call* call) QM_NOEXCEPT;
  static qm_status Forward(qm_call* call, int64_t sample, const qm_override* overrides,
                           uint64_t count, qm_tensor* out) QM_NOEXCEPT;
  static qm_status Loss(qm_call* call, const char* submodule, int64_t first, int64_t count,
                        const qm_override* overrides, uint64_t override_count,
                        double* out) QM_NOEXCEPT;
  static qm_status Vjp(qm_call* call, int64_t sample, const qm_override* overrides, uint64_t count,
                       const qm_tensor* d_out, qm_named_tensor* grads,
                       uint64_t grad_count) QM_NOEXCEPT;

  qm_status Override(const qm_override* overrides, uint64_t count, BlockTensors* tensors);

  CheckedCall& checked_;
  const SyntheticBlock& block_;
  Backend& backend_;
  qm_host_block service_ = {};  // of struct_size 0: not offered
  const void* (*other_ext_)(qm_call*, const char*)QM_NOEXCEPT = nullptr;
  qm_tensor output_ = {};  // of Forward; the same memory each time
};

// The block as the plugin is told of it, in memory of the call; arrays live here.
class BlockInput {
 public:
  // Which members say something.
  struct Parts {
    bool weights = false;     // dense weights of the linears
    bool transforms = false;  // next roundings and sites
  };
  BlockInput(CheckedCall& call, const SyntheticBlock& block, Parts parts);
  BlockInput(const BlockInput&) = delete;
  BlockInput& operator=(const BlockInput&) = delete;
  const qm_block_info* get() const { return given_; }

 private:
  void AddSite(const SyntheticBlock::Site& site);

  std::vector<const qm_linear_info*> infos_;
  std::vector<qm_next_rounding> roundings_;
  std::vector<qm_tensor> weights_;
  std::vector<std::unique_ptr<std::vector<qm_site_consumer>>> consumers_;
  std::vector<qm_scale_site> sites_;
  const qm_block_info* given_ = nullptr;
};

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_BLOCK_CALL_H_
