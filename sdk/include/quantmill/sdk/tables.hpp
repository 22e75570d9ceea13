// Tables of the other capabilities from classes with static functions, which may throw: exceptions
// become status codes. A function is optional where it says so; a class that lacks one gets a table
// without it. (qm.quantize-linear/1: plugin.hpp.)
//
//   struct MyKernel { static int32_t Accepts(...); static qm_status Dequantize(...); };
//   constexpr qm_linear_kernel kKernel = qm::LinearKernelTable<MyKernel>::Make();
#ifndef QUANTMILL_SDK_TABLES_HPP_
#define QUANTMILL_SDK_TABLES_HPP_

#include <cstdint>

#include "quantmill/block_transform.h"
#include "quantmill/block_tune.h"
#include "quantmill/format.h"
#include "quantmill/linear_kernel.h"
#include "quantmill/reparametrize.h"
#include "quantmill/sdk/status.hpp"

namespace qm {

// qm.block-transform/1 from
//   qm_status Plan(qm_call*, const qm_block_info&, qm_quant_plan*);
//   qm_status Run(qm_call*, const qm_block_info&, const qm_stats* const* per_linear,
//                 const qm_edit** edits, uint64_t* edit_count);
template <class Method>
class BlockTransformTable {
 public:
  // The table, for a constant of static storage.
  static constexpr qm_block_transform Make() { return {sizeof(qm_block_transform), &Plan, &Run}; }

 private:
  static qm_status Plan(qm_call* call, const qm_block_info* info, qm_quant_plan* out) noexcept {
    return guard(call, [&] { return Method::Plan(call, *info, out); });
  }
  static qm_status Run(qm_call* call, const qm_block_info* info, const qm_stats* const* per_linear,
                       const qm_edit** edits, uint64_t* edit_count) noexcept {
    return guard(call, [&] { return Method::Run(call, *info, per_linear, edits, edit_count); });
  }
};

// qm.block-tune/1 from
//   qm_status Plan(qm_call*, const qm_block_info&, qm_quant_plan*);
//   qm_status Run(qm_call*, const qm_block_info&, const qm_packed* packed, const qm_edit** edits,
//                 uint64_t* edit_count);
template <class Method>
class BlockTuneTable {
 public:
  // The table, for a constant of static storage.
  static constexpr qm_block_tune Make() { return {sizeof(qm_block_tune), &Plan, &Run}; }

 private:
  static qm_status Plan(qm_call* call, const qm_block_info* info, qm_quant_plan* out) noexcept {
    return guard(call, [&] { return Method::Plan(call, *info, out); });
  }
  static qm_status Run(qm_call* call, const qm_block_info* info, const qm_packed* packed,
                       const qm_edit** edits, uint64_t* edit_count) noexcept {
    return guard(call, [&] { return Method::Run(call, *info, packed, edits, edit_count); });
  }
};

// qm.reparametrize/1 from
//   qm_status Plan(qm_call*, const qm_reparam_info&, qm_reparam_plan*);
//   qm_status Init(qm_call*, const qm_reparam_info&, const qm_tensor* weight, const qm_stats*,
//                  qm_named_tensor* params, uint64_t param_count);
//   qm_status Forward(qm_call*, const qm_reparam_info&, const qm_tensor& in,
//                     const qm_named_tensor* params, uint64_t param_count, void* saved,
//                     qm_tensor* out);
//   qm_status Vjp(qm_call*, const qm_reparam_info&, const qm_tensor& in,
//                 const qm_named_tensor* params, uint64_t param_count, const void* saved,
//                 const qm_tensor& d_out, qm_tensor* d_in, qm_named_tensor* d_params);
// and, if it has one,
//   qm_status Finalize(qm_call*, const qm_reparam_info&, const qm_tensor* weight,
//                      const qm_named_tensor* params, uint64_t param_count, qm_packed* out);
//   qm_status ToAdapter(qm_call*, const char* target, const char** config_json);
//   qm_status FromAdapter(qm_call*, const char* target, const char* config_json,
//                         const char** options_json);
template <class Method>
class ReparametrizeTable {
 public:
  // The table, for a constant of static storage.
  static constexpr qm_reparametrize Make() {
    qm_reparametrize table{
        sizeof(qm_reparametrize), &Plan, &Init, &Forward, &Vjp, nullptr, nullptr, nullptr};
    if constexpr (requires { &Method::Finalize; }) table.finalize = &Finalize;
    if constexpr (requires { &Method::ToAdapter; }) table.to_adapter = &ToAdapter;
    if constexpr (requires { &Method::FromAdapter; }) table.from_adapter = &FromAdapter;
    return table;
  }

 private:
  static qm_status Plan(qm_call* call, const qm_reparam_info* info, qm_reparam_plan* out) noexcept {
    return guard(call, [&] { return Method::Plan(call, *info, out); });
  }
  static qm_status Init(qm_call* call, const qm_reparam_info* info, const qm_tensor* weight,
                        const qm_stats* stats, qm_named_tensor* params,
                        uint64_t param_count) noexcept {
    return guard(call,
                 [&] { return Method::Init(call, *info, weight, stats, params, param_count); });
  }
  static qm_status Forward(qm_call* call, const qm_reparam_info* info, const qm_tensor* in,
                           const qm_named_tensor* params, uint64_t param_count, void* saved,
                           qm_tensor* out) noexcept {
    return guard(
        call, [&] { return Method::Forward(call, *info, *in, params, param_count, saved, out); });
  }
  static qm_status Vjp(qm_call* call, const qm_reparam_info* info, const qm_tensor* in,
                       const qm_named_tensor* params, uint64_t param_count, const void* saved,
                       const qm_tensor* d_out, qm_tensor* d_in,
                       qm_named_tensor* d_params) noexcept {
    return guard(call, [&] {
      return Method::Vjp(call, *info, *in, params, param_count, saved, *d_out, d_in, d_params);
    });
  }
  static qm_status Finalize(qm_call* call, const qm_reparam_info* info, const qm_tensor* weight,
                            const qm_named_tensor* params, uint64_t param_count,
                            qm_packed* out) noexcept {
    return guard(call, [&]() -> qm_status {
      if constexpr (requires { &Method::Finalize; }) {
        return Method::Finalize(call, *info, weight, params, param_count, out);
      } else {
        return Fail(call, QM_UNIMPLEMENTED, "this method has nothing to fold");
      }
    });
  }
  static qm_status ToAdapter(qm_call* call, const char* target, const char** config_json) noexcept {
    return guard(call, [&]() -> qm_status {
      if constexpr (requires { &Method::ToAdapter; }) {
        return Method::ToAdapter(call, target, config_json);
      } else {
        return Fail(call, QM_UNIMPLEMENTED, "this method writes no adapters");
      }
    });
  }
  static qm_status FromAdapter(qm_call* call, const char* target, const char* config_json,
                               const char** options_json) noexcept {
    return guard(call, [&]() -> qm_status {
      if constexpr (requires { &Method::FromAdapter; }) {
        return Method::FromAdapter(call, target, config_json, options_json);
      } else {
        return Fail(call, QM_UNIMPLEMENTED, "this method reads no adapters");
      }
    });
  }
};

// qm.linear-kernel/1 from
//   int32_t Accepts(const char* format_id, const char* format_json, qm_device_kind, int32_t sm,
//                   qm_dtype activation);                       an exception counts as 0
//   qm_status Dequantize(qm_call*, const qm_packed&, qm_tensor* weight);
// and, where it has them,
//   qm_status Prepack(qm_call*, const qm_packed&, qm_packed* out);
//   uint64_t WorkspaceBytes(const qm_packed&, int64_t max_rows) noexcept;
//   qm_status Matmul(qm_call*, const qm_packed&, const qm_tensor& x, void* workspace, qm_tensor*
//   y); qm_status MatmulTransposed(qm_call*, const qm_packed&, const qm_tensor& dy, void*
//   workspace,
//                              qm_tensor* dx);
template <class Kernel>
class LinearKernelTable {
 public:
  // The table, for a constant of static storage.
  static constexpr qm_linear_kernel Make() {
    qm_linear_kernel table{
        sizeof(qm_linear_kernel), &Accepts, &Dequantize, nullptr, nullptr, nullptr, nullptr};
    if constexpr (requires { &Kernel::Prepack; }) table.prepack = &Prepack;
    if constexpr (requires { &Kernel::WorkspaceBytes; }) {
      static_assert(noexcept(Kernel::WorkspaceBytes(qm_packed{}, 0)),
                    "WorkspaceBytes has no call to report an error to: declare it noexcept");
      table.workspace_bytes = &WorkspaceBytes;
    }
    if constexpr (requires { &Kernel::Matmul; }) table.matmul = &Matmul;
    if constexpr (requires { &Kernel::MatmulTransposed; }) {
      table.matmul_transposed = &MatmulTransposed;
    }
    return table;
  }

 private:
  static int32_t Accepts(const char* format_id, const char* format_json, qm_device_kind device,
                         int32_t sm, qm_dtype activation) noexcept {
    try {
      return Kernel::Accepts(format_id, format_json, device, sm, activation);
    } catch (...) {
      return 0;
    }
  }
  static qm_status Dequantize(qm_call* call, const qm_packed* packed, qm_tensor* weight) noexcept {
    return guard(call, [&] { return Kernel::Dequantize(call, *packed, weight); });
  }
  static qm_status Prepack(qm_call* call, const qm_packed* packed, qm_packed* out) noexcept {
    return guard(call, [&] { return Kernel::Prepack(call, *packed, out); });
  }
  static uint64_t WorkspaceBytes(const qm_packed* packed, int64_t max_rows) noexcept {
    return Kernel::WorkspaceBytes(*packed, max_rows);
  }
  static qm_status Matmul(qm_call* call, const qm_packed* packed, const qm_tensor* x,
                          void* workspace, qm_tensor* y) noexcept {
    return guard(call, [&] { return Kernel::Matmul(call, *packed, *x, workspace, y); });
  }
  static qm_status MatmulTransposed(qm_call* call, const qm_packed* packed, const qm_tensor* dy,
                                    void* workspace, qm_tensor* dx) noexcept {
    return guard(call, [&] { return Kernel::MatmulTransposed(call, *packed, *dy, workspace, dx); });
  }
};

// qm.format/1 from
//   const char kFormatId[]; const char* const kTargets[]; uint64_t kFlags;    constants
//   qm_status Check(qm_call*, const qm_packed&);
//   qm_status CanStore(qm_call*, const char* target, const char* format_json, int64_t out_features,
//                      int64_t in_features);
//   qm_status ToCheckpoint(qm_call*, const char* target, const char* layer, const qm_packed&,
//                          const qm_named_tensor** out, uint64_t* count, const char** config_json);
//   qm_status FromCheckpoint(qm_call*, const char* target, const char* layer,
//                            const qm_named_tensor* tensors, uint64_t count,
//                            const char* config_json, qm_packed* out);
template <class Format>
class FormatTable {
 public:
  // The table, for a constant of static storage.
  static constexpr qm_format Make() {
    return {sizeof(qm_format), Format::kFormatId,
            Format::kTargets,  sizeof(Format::kTargets) / sizeof(Format::kTargets[0]),
            Format::kFlags,    &Check,
            &CanStore,         &ToCheckpoint,
            &FromCheckpoint};
  }

 private:
  static qm_status Check(qm_call* call, const qm_packed* packed) noexcept {
    return guard(call, [&] { return Format::Check(call, *packed); });
  }
  static qm_status CanStore(qm_call* call, const char* target, const char* format_json,
                            int64_t out_features, int64_t in_features) noexcept {
    return guard(call, [&] {
      return Format::CanStore(call, target, format_json, out_features, in_features);
    });
  }
  static qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer,
                                const qm_packed* packed, const qm_named_tensor** out,
                                uint64_t* count, const char** config_json) noexcept {
    return guard(call, [&] {
      return Format::ToCheckpoint(call, target, layer, *packed, out, count, config_json);
    });
  }
  static qm_status FromCheckpoint(qm_call* call, const char* target, const char* layer,
                                  const qm_named_tensor* tensors, uint64_t count,
                                  const char* config_json, qm_packed* out) noexcept {
    return guard(call, [&] {
      return Format::FromCheckpoint(call, target, layer, tensors, count, config_json, out);
    });
  }
};

}  // namespace qm

#endif  // QUANTMILL_SDK_TABLES_HPP_
