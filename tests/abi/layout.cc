#include "tests/abi/layout.h"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>

#include "quantmill/all.h"

namespace quantmill::testing {
namespace {

// A type as the headers would write it, with typedefs of integers resolved: int32_t (*)(qm_call*).
template <class T>
struct TypeName;

#define NAMED(type)                             \
  template <>                                   \
  struct TypeName<type> {                       \
    static std::string Text() { return #type; } \
  };
NAMED(void)
NAMED(char)
NAMED(double)
NAMED(int32_t)
NAMED(uint32_t)
NAMED(int64_t)
NAMED(uint64_t)
NAMED(qm_device)
NAMED(qm_tensor)
NAMED(qm_named_tensor)
NAMED(qm_call)
NAMED(qm_option)
NAMED(qm_method)
NAMED(qm_plugin)
NAMED(qm_packed)
NAMED(qm_stat_request)
NAMED(qm_linear_info)
NAMED(qm_quant_plan)
NAMED(qm_stats)
NAMED(qm_quantize_linear)
NAMED(qm_linear_kernel)
NAMED(qm_format)
NAMED(qm_host_threads)
NAMED(qm_host_linalg)
NAMED(qm_host_cuda)
NAMED(qm_override)
NAMED(qm_host_block)
NAMED(qm_site_consumer)
NAMED(qm_scale_site)
NAMED(qm_next_rounding)
NAMED(qm_edit)
NAMED(qm_block_info)
NAMED(qm_block_transform)
NAMED(qm_param)
NAMED(qm_reparam_info)
NAMED(qm_reparam_plan)
NAMED(qm_reparametrize)
NAMED(qm_block_tune)

template <class T>
struct TypeName<const T> {
  static std::string Text() {
    return std::is_pointer_v<T> ? TypeName<T>::Text() + " const" : "const " + TypeName<T>::Text();
  }
};
template <class T>
struct TypeName<T*> {
  static std::string Text() { return TypeName<T>::Text() + "*"; }
};
template <class T, size_t n>
struct TypeName<T[n]> {
  static std::string Text() { return TypeName<T>::Text() + "[" + std::to_string(n) + "]"; }
};
template <class Result, class... Args>
struct TypeName<Result (*)(Args...)> {
  static std::string Text() {
    std::string list;
    ((list += (list.empty() ? "" : ", ") + TypeName<Args>::Text()), ...);
    return TypeName<Result>::Text() + " (*)(" + list + ")";
  }
};
template <class Result, class... Args>
struct TypeName<Result (*)(Args...) noexcept> {
  static std::string Text() { return TypeName<Result (*)(Args...)>::Text() + " noexcept"; }
};

class Printer {
 public:
  template <typename... Args>
  void Line(const char* format, Args... args) {
    char buffer[512];
    std::snprintf(buffer, sizeof buffer, format, args...);
    text_ += buffer;
    text_ += '\n';
  }
  std::string text_;
};

}  // namespace

#define STRUCT(type, kind) \
  printer.Line("%s %s size %zu align %zu", kind, #type, sizeof(type), alignof(type))
#define FIELD(type, field)                                                                  \
  printer.Line("  %s.%s offset %zu size %zu type %s", #type, #field, offsetof(type, field), \
               sizeof(static_cast<type*>(nullptr)->field),                                  \
               TypeName<decltype(type::field)>::Text().c_str())
#define TYPE(name) printer.Line("type %s %s", #name, TypeName<name>::Text().c_str())
#define CONSTANT(name) printer.Line("constant %s %lld", #name, static_cast<long long>(name))
#define ID(name) printer.Line("id %s %s", #name, name)

std::string CurrentLayout() {
  Printer printer;

  CONSTANT(QM_ABI_MAJOR);
  CONSTANT(QM_ABI_MINOR);
  CONSTANT(QM_MAX_RANK);
  TYPE(qm_status);
  CONSTANT(QM_OK);
  CONSTANT(QM_CANCELLED);
  CONSTANT(QM_UNKNOWN);
  CONSTANT(QM_INVALID_ARGUMENT);
  CONSTANT(QM_NOT_FOUND);
  CONSTANT(QM_RESOURCE_EXHAUSTED);
  CONSTANT(QM_FAILED_PRECONDITION);
  CONSTANT(QM_UNIMPLEMENTED);
  CONSTANT(QM_INTERNAL);
  TYPE(qm_dtype);
  CONSTANT(QM_F32);
  CONSTANT(QM_F16);
  CONSTANT(QM_BF16);
  CONSTANT(QM_F64);
  CONSTANT(QM_F8_E4M3);
  CONSTANT(QM_F8_E5M2);
  CONSTANT(QM_I8);
  CONSTANT(QM_U8);
  CONSTANT(QM_I16);
  CONSTANT(QM_I32);
  CONSTANT(QM_I64);
  TYPE(qm_device_kind);
  CONSTANT(QM_CPU);
  CONSTANT(QM_CUDA);
  CONSTANT(QM_CUDA_PINNED);
  STRUCT(qm_device, "FROZEN");
  FIELD(qm_device, kind);
  FIELD(qm_device, index);
  STRUCT(qm_tensor, "FROZEN");
  FIELD(qm_tensor, data);
  FIELD(qm_tensor, dtype);
  FIELD(qm_tensor, rank);
  FIELD(qm_tensor, device);
  FIELD(qm_tensor, shape);
  FIELD(qm_tensor, stride);
  FIELD(qm_tensor, flags);
  FIELD(qm_tensor, reserved);
  CONSTANT(QM_TENSOR_READONLY);
  STRUCT(qm_named_tensor, "FROZEN");
  FIELD(qm_named_tensor, name);
  FIELD(qm_named_tensor, tensor);
  STRUCT(qm_call, "GROWABLE");
  FIELD(qm_call, struct_size);
  FIELD(qm_call, host_data);
  FIELD(qm_call, fail);
  FIELD(qm_call, log);
  FIELD(qm_call, progress);
  FIELD(qm_call, scratch);
  FIELD(qm_call, emit);
  FIELD(qm_call, opt_i64);
  FIELD(qm_call, opt_f64);
  FIELD(qm_call, opt_str);
  FIELD(qm_call, seed);
  FIELD(qm_call, device);
  FIELD(qm_call, cuda_stream);
  FIELD(qm_call, host_ext);
  TYPE(qm_option_type);
  CONSTANT(QM_OPT_I64);
  CONSTANT(QM_OPT_F64);
  CONSTANT(QM_OPT_STR);
  CONSTANT(QM_OPT_ENUM);
  CONSTANT(QM_OPT_BOOL);
  STRUCT(qm_option, "FROZEN");
  FIELD(qm_option, name);
  FIELD(qm_option, default_value);
  FIELD(qm_option, choices);
  FIELD(qm_option, doc);
  FIELD(qm_option, type);
  FIELD(qm_option, reserved);
  STRUCT(qm_method, "GROWABLE");
  FIELD(qm_method, struct_size);
  FIELD(qm_method, id);
  FIELD(qm_method, version);
  FIELD(qm_method, summary);
  FIELD(qm_method, options);
  FIELD(qm_method, option_count);
  FIELD(qm_method, flags);
  FIELD(qm_method, ext);
  CONSTANT(QM_METHOD_DETERMINISTIC);
  CONSTANT(QM_METHOD_NO_STAGE);
  STRUCT(qm_plugin, "GROWABLE");
  FIELD(qm_plugin, struct_size);
  FIELD(qm_plugin, abi_major);
  FIELD(qm_plugin, abi_minor);
  FIELD(qm_plugin, min_host_minor);
  FIELD(qm_plugin, method_count);
  FIELD(qm_plugin, methods);
  FIELD(qm_plugin, vendor);
  FIELD(qm_plugin, license);
  FIELD(qm_plugin, build_info);
  TYPE(qm_plugin_entry_v1_fn);
  ID(QM_ENTRY_SYMBOL);
  STRUCT(qm_packed, "FROZEN");
  FIELD(qm_packed, format_id);
  FIELD(qm_packed, format_json);
  FIELD(qm_packed, tensors);
  FIELD(qm_packed, tensor_count);
  FIELD(qm_packed, out_features);
  FIELD(qm_packed, in_features);
  ID(QM_EXT_QUANTIZE_LINEAR);
  ID(QM_STAT_HESSIAN);
  ID(QM_STAT_CROSS);
  ID(QM_STAT_ABSMEAN);
  ID(QM_STAT_ABSMAX);
  ID(QM_STAT_ROWS);
  STRUCT(qm_stat_request, "FROZEN");
  FIELD(qm_stat_request, stat_id);
  FIELD(qm_stat_request, max_rows);
  FIELD(qm_stat_request, dtype);
  FIELD(qm_stat_request, flags);
  CONSTANT(QM_STAT_OPTIONAL);
  CONSTANT(QM_STAT_FROM_ORIGINAL);
  STRUCT(qm_linear_info, "GROWABLE");
  FIELD(qm_linear_info, struct_size);
  FIELD(qm_linear_info, name);
  FIELD(qm_linear_info, role);
  FIELD(qm_linear_info, out_features);
  FIELD(qm_linear_info, in_features);
  FIELD(qm_linear_info, weight_dtype);
  FIELD(qm_linear_info, input_group);
  FIELD(qm_linear_info, scale_dtype);
  FIELD(qm_linear_info, reserved);
  STRUCT(qm_quant_plan, "GROWABLE");
  FIELD(qm_quant_plan, struct_size);
  FIELD(qm_quant_plan, stats);
  FIELD(qm_quant_plan, stat_count);
  FIELD(qm_quant_plan, scratch_bytes);
  FIELD(qm_quant_plan, scratch_bytes_shared);
  FIELD(qm_quant_plan, format_id);
  FIELD(qm_quant_plan, flops);
  FIELD(qm_quant_plan, format_json);
  FIELD(qm_quant_plan, bits_per_weight);
  STRUCT(qm_stats, "GROWABLE");
  FIELD(qm_stats, struct_size);
  FIELD(qm_stats, items);
  FIELD(qm_stats, count);
  FIELD(qm_stats, row_count);
  STRUCT(qm_quantize_linear, "GROWABLE");
  FIELD(qm_quantize_linear, struct_size);
  FIELD(qm_quantize_linear, plan);
  FIELD(qm_quantize_linear, run);
  FIELD(qm_quantize_linear, run_group);
  ID(QM_EXT_LINEAR_KERNEL);
  STRUCT(qm_linear_kernel, "GROWABLE");
  FIELD(qm_linear_kernel, struct_size);
  FIELD(qm_linear_kernel, accepts);
  FIELD(qm_linear_kernel, dequantize);
  FIELD(qm_linear_kernel, prepack);
  FIELD(qm_linear_kernel, workspace_bytes);
  FIELD(qm_linear_kernel, matmul);
  FIELD(qm_linear_kernel, matmul_transposed);
  ID(QM_EXT_FORMAT);
  STRUCT(qm_format, "GROWABLE");
  FIELD(qm_format, struct_size);
  FIELD(qm_format, format_id);
  FIELD(qm_format, targets);
  FIELD(qm_format, target_count);
  FIELD(qm_format, flags);
  FIELD(qm_format, check);
  FIELD(qm_format, can_store);
  FIELD(qm_format, to_checkpoint);
  FIELD(qm_format, from_checkpoint);
  CONSTANT(QM_FORMAT_CONCAT_ROWS);
  ID(QM_HOST_THREADS);
  TYPE(qm_range_fn);
  STRUCT(qm_host_threads, "GROWABLE");
  FIELD(qm_host_threads, struct_size);
  FIELD(qm_host_threads, worker_count);
  FIELD(qm_host_threads, parallel_for);
  ID(QM_HOST_LINALG);
  STRUCT(qm_host_linalg, "GROWABLE");
  FIELD(qm_host_linalg, struct_size);
  FIELD(qm_host_linalg, gemm);
  FIELD(qm_host_linalg, inverse_cholesky);
  ID(QM_HOST_CUDA);
  STRUCT(qm_host_cuda, "GROWABLE");
  FIELD(qm_host_cuda, struct_size);
  FIELD(qm_host_cuda, runtime_version);
  FIELD(qm_host_cuda, driver_version);
  FIELD(qm_host_cuda, cublas_version);
  FIELD(qm_host_cuda, sm);
  FIELD(qm_host_cuda, cublas_handle);
  ID(QM_HOST_BLOCK);
  STRUCT(qm_override, "FROZEN");
  FIELD(qm_override, tensor);
  FIELD(qm_override, value);
  STRUCT(qm_host_block, "GROWABLE");
  FIELD(qm_host_block, struct_size);
  FIELD(qm_host_block, sample_count);
  FIELD(qm_host_block, forward);
  FIELD(qm_host_block, loss);
  FIELD(qm_host_block, vjp);
  ID(QM_EXT_BLOCK_TRANSFORM);
  STRUCT(qm_site_consumer, "FROZEN");
  FIELD(qm_site_consumer, name);
  FIELD(qm_site_consumer, channel_map);
  FIELD(qm_site_consumer, in_features);
  FIELD(qm_site_consumer, flags);
  CONSTANT(QM_CONSUMER_NOT_A_SLOT);
  STRUCT(qm_scale_site, "FROZEN");
  FIELD(qm_scale_site, id);
  FIELD(qm_scale_site, producer);
  FIELD(qm_scale_site, consumers);
  FIELD(qm_scale_site, consumer_count);
  FIELD(qm_scale_site, channels);
  FIELD(qm_scale_site, flags);
  CONSTANT(QM_SITE_ROTATABLE);
  STRUCT(qm_next_rounding, "FROZEN");
  FIELD(qm_next_rounding, bits);
  FIELD(qm_next_rounding, symmetric);
  FIELD(qm_next_rounding, group_size);
  TYPE(qm_edit_kind);
  CONSTANT(QM_EDIT_SCALE);
  CONSTANT(QM_EDIT_ROTATE);
  CONSTANT(QM_EDIT_CLIP);
  CONSTANT(QM_EDIT_REPLACE);
  STRUCT(qm_edit, "FROZEN");
  FIELD(qm_edit, target);
  FIELD(qm_edit, value);
  FIELD(qm_edit, kind);
  FIELD(qm_edit, reserved);
  STRUCT(qm_block_info, "GROWABLE");
  FIELD(qm_block_info, struct_size);
  FIELD(qm_block_info, name);
  FIELD(qm_block_info, linears);
  FIELD(qm_block_info, weights);
  FIELD(qm_block_info, next_roundings);
  FIELD(qm_block_info, linear_count);
  FIELD(qm_block_info, sites);
  FIELD(qm_block_info, site_count);
  STRUCT(qm_block_transform, "GROWABLE");
  FIELD(qm_block_transform, struct_size);
  FIELD(qm_block_transform, plan);
  FIELD(qm_block_transform, run);
  ID(QM_EXT_REPARAMETRIZE);
  CONSTANT(QM_METHOD_TRAINS_TO_PACKED);
  TYPE(qm_reparam_kind);
  CONSTANT(QM_REPARAM_WEIGHT);
  CONSTANT(QM_REPARAM_INPUT);
  CONSTANT(QM_REPARAM_DELTA);
  TYPE(qm_reparam_phase);
  CONSTANT(QM_PHASE_BLOCK);
  CONSTANT(QM_PHASE_END_TO_END);
  STRUCT(qm_param, "FROZEN");
  FIELD(qm_param, name);
  FIELD(qm_param, shape);
  FIELD(qm_param, lr_scale);
  FIELD(qm_param, dtype);
  FIELD(qm_param, rank);
  FIELD(qm_param, flags);
  CONSTANT(QM_PARAM_TRAINABLE);
  CONSTANT(QM_PARAM_NO_DECAY);
  STRUCT(qm_reparam_info, "GROWABLE");
  FIELD(qm_reparam_info, struct_size);
  FIELD(qm_reparam_info, linear);
  FIELD(qm_reparam_info, base);
  FIELD(qm_reparam_info, phase);
  FIELD(qm_reparam_info, reserved);
  STRUCT(qm_reparam_plan, "GROWABLE");
  FIELD(qm_reparam_plan, struct_size);
  FIELD(qm_reparam_plan, params);
  FIELD(qm_reparam_plan, param_count);
  FIELD(qm_reparam_plan, saved_bytes_per_row);
  FIELD(qm_reparam_plan, saved_bytes_fixed);
  FIELD(qm_reparam_plan, scratch_bytes);
  FIELD(qm_reparam_plan, stats);
  FIELD(qm_reparam_plan, stat_count);
  FIELD(qm_reparam_plan, kind);
  FIELD(qm_reparam_plan, reserved);
  FIELD(qm_reparam_plan, weight_lr_scale);
  FIELD(qm_reparam_plan, format_id);
  FIELD(qm_reparam_plan, format_json);
  FIELD(qm_reparam_plan, bits_per_weight);
  FIELD(qm_reparam_plan, flags);
  CONSTANT(QM_REPARAM_FOLD);
  STRUCT(qm_reparametrize, "GROWABLE");
  FIELD(qm_reparametrize, struct_size);
  FIELD(qm_reparametrize, plan);
  FIELD(qm_reparametrize, init);
  FIELD(qm_reparametrize, forward);
  FIELD(qm_reparametrize, vjp);
  FIELD(qm_reparametrize, finalize);
  FIELD(qm_reparametrize, to_adapter);
  FIELD(qm_reparametrize, from_adapter);
  ID(QM_EXT_BLOCK_TUNE);
  STRUCT(qm_block_tune, "GROWABLE");
  FIELD(qm_block_tune, struct_size);
  FIELD(qm_block_tune, plan);
  FIELD(qm_block_tune, run);
  return printer.text_;
}

}  // namespace quantmill::testing
