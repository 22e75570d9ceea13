// A thin C++ layer over one open call: options, scratch, services, threads, tables from classes.
// Header-only, standard library only.
#ifndef QUANTMILL_SDK_PLUGIN_HPP_
#define QUANTMILL_SDK_PLUGIN_HPP_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <type_traits>

#include "quantmill/host_ext.h"
#include "quantmill/plugin.h"
#include "quantmill/quantize_linear.h"
#include "quantmill/sdk/status.hpp"

// Defines the one exported function; `plugin` is a qm_plugin with static storage.
#define QM_PLUGIN_ENTRY(plugin)                        \
  QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void); \
  const qm_plugin* qm_plugin_entry_v1(void) { return &(plugin); }

namespace qm {

// ---- options -----------------------------------------------------------------------------------
// Value of an integer option.
inline int64_t OptionI64(qm_call* call, const char* name) { return call->opt_i64(call, name); }
// Value of a BOOL option.
inline bool OptionBool(qm_call* call, const char* name) { return call->opt_i64(call, name) != 0; }
// Value of a real option.
inline double OptionF64(qm_call* call, const char* name) { return call->opt_f64(call, name); }
// Value of an ENUM or STR option; dies with the call.
inline std::string_view OptionStr(qm_call* call, const char* name) {
  return call->opt_str(call, name);
}

// ---- memory, progress, services ----------------------------------------------------------------
// `count` elements of scratch on `device` in *out, or RESOURCE_EXHAUSTED naming `what`. A count of
// 0 gives a null pointer.
template <class T>
qm_status Scratch(qm_call* call, qm_device device, int64_t count, const char* what, T** out) {
  static_assert(std::is_trivially_copyable_v<T>);
  *out = nullptr;
  if (count == 0) return QM_OK;
  const uint64_t bytes = static_cast<uint64_t>(count) * sizeof(T);
  *out = static_cast<T*>(call->scratch(call, device, bytes));
  if (*out != nullptr) return QM_OK;
  return Fail(call, QM_RESOURCE_EXHAUSTED, "no scratch memory for ", what, " (", bytes,
              " bytes); raise run.memory or free memory on the device");
}

// A copy of `text` in scratch on the host, or RESOURCE_EXHAUSTED naming `what`.
inline qm_status ScratchString(qm_call* call, const std::string& text, const char* what,
                               const char** out) {
  char* copy = nullptr;
  QM_TRY(Scratch(call, {QM_CPU, 0}, static_cast<int64_t>(text.size()) + 1, what, &copy));
  std::memcpy(copy, text.c_str(), text.size() + 1);
  *out = copy;
  return QM_OK;
}

// QM_CANCELLED when the host wants the plugin to stop.
inline qm_status Progress(qm_call* call, double fraction) {
  return call->progress(call, fraction) != 0 ? QM_CANCELLED : QM_OK;
}

// The host's threads, or null; ParallelFor uses them.
inline const qm_host_threads* HostThreads(qm_call* call) {
  return static_cast<const qm_host_threads*>(call->host_ext(call, QM_HOST_THREADS));
}
// The host's linear algebra, or null.
inline const qm_host_linalg* HostLinalg(qm_call* call) {
  return static_cast<const qm_host_linalg*>(call->host_ext(call, QM_HOST_LINALG));
}

// The statistic `id`, or null.
inline const qm_tensor* FindStat(const qm_stats* stats, const char* id) {
  if (stats == nullptr) return nullptr;
  for (uint64_t i = 0; i < stats->count; ++i) {
    if (std::strcmp(stats->items[i].name, id) == 0) return &stats->items[i].tensor;
  }
  return nullptr;
}

// Fills a plan that asks for no statistics.
inline void FillPlan(qm_quant_plan* out, const char* format_id, uint64_t scratch_bytes,
                     double flops = 0) {
  out->stats = nullptr;
  out->stat_count = 0;
  out->scratch_bytes = scratch_bytes;
  out->scratch_bytes_shared = 0;
  out->format_id = format_id;
  out->flops = flops;
}

// Says of a plan which format is emitted, with which parameters (copied to scratch), and how large:
// all bits over the weights. A host of minor 0 hears only the format.
inline qm_status PlanFormat(qm_call* call, const char* format_id, const std::string& format_json,
                            double bits_per_weight, qm_quant_plan* out) {
  out->format_id = format_id;
  if (out->struct_size < offsetof(qm_quant_plan, bits_per_weight) + sizeof(double)) return QM_OK;
  QM_TRY(ScratchString(call, format_json, "the plan", &out->format_json));
  out->bits_per_weight = bits_per_weight;
  return QM_OK;
}

// ---- threads -----------------------------------------------------------------------------------
// Workers that ParallelFor may use; `worker` in a body is below this.
inline int32_t WorkerCount(qm_call* call) {
  const qm_host_threads* threads = HostThreads(call);
  return threads == nullptr ? 1 : std::max<int32_t>(1, threads->worker_count(call));
}

// body(begin, end, worker) -> qm_status over [0, n) cut into ranges of `grain`: by the host's
// threads, or inline where the host offers none. The cut does not depend on the number of threads.
template <class Body>
qm_status ParallelFor(qm_call* call, int64_t n, int64_t grain, Body&& body) {
  using BodyType = std::remove_reference_t<Body>;
  struct Context {
    qm_call* call;
    BodyType* body;
  } context{call, &body};
  const qm_range_fn range = [](void* arg, int64_t begin, int64_t end,
                               int32_t worker) noexcept -> qm_status {
    Context* c = static_cast<Context*>(arg);
    return guard(c->call, [&]() -> qm_status { return (*c->body)(begin, end, worker); });
  };
  if (const qm_host_threads* threads = HostThreads(call)) {
    return threads->parallel_for(call, n, grain, range, &context);
  }
  for (int64_t begin = 0; begin < n; begin += grain) {
    QM_TRY(range(&context, begin, std::min(n, begin + grain), 0));
  }
  return QM_OK;
}

// ---- capability tables -------------------------------------------------------------------------
// For the other capabilities: tables.hpp.
// qm.quantize-linear/1 from a class with static functions
//   qm_status Plan(qm_call*, const qm_linear_info&, qm_quant_plan*);
//   qm_status Run(qm_call*, const qm_linear_info&, const qm_tensor&, const qm_stats*, qm_packed*);
// and, if it has one,
//   qm_status RunGroup(qm_call*, uint64_t count, const qm_linear_info* const*, const qm_tensor*,
//                      const qm_stats* const*, qm_packed*);
// which may throw: exceptions become status codes.
template <class Method>
class QuantizeLinearTable {
 public:
  // The table, for a constant of static storage.
  static constexpr qm_quantize_linear Make() {
    qm_quantize_linear table{sizeof(qm_quantize_linear), &Plan, &Run, nullptr};
    if constexpr (requires { &Method::RunGroup; }) table.run_group = &RunGroup;
    return table;
  }

 private:
  static qm_status Plan(qm_call* call, const qm_linear_info* info, qm_quant_plan* out) noexcept {
    return guard(call, [&] { return Method::Plan(call, *info, out); });
  }
  static qm_status Run(qm_call* call, const qm_linear_info* info, const qm_tensor* weight,
                       const qm_stats* stats, qm_packed* out) noexcept {
    return guard(call, [&] { return Method::Run(call, *info, *weight, stats, out); });
  }
  static qm_status RunGroup(qm_call* call, uint64_t count, const qm_linear_info* const* infos,
                            const qm_tensor* weights, const qm_stats* const* stats,
                            qm_packed* out) noexcept {
    return guard(call, [&]() -> qm_status {
      if constexpr (requires { &Method::RunGroup; }) {
        return Method::RunGroup(call, count, infos, weights, stats, out);
      } else {
        return Fail(call, QM_UNIMPLEMENTED, "this method has no group call");
      }
    });
  }
};

// A plugin of one method that quantizes linears: the class of QuantizeLinearTable with the
// constants kId, kVersion, kSummary (text) and kOptions (array of qm_option). Promises
// QM_METHOD_DETERMINISTIC.
template <class Method>
class QuantizeLinearPlugin {
 public:
  // The descriptor. `license` is an SPDX identifier.
  static constexpr qm_plugin Make(const char* vendor, const char* license) {
    return {sizeof(qm_plugin), QM_ABI_MAJOR,      QM_ABI_MINOR, 0, 1, kMethods, vendor,
            license,           "C++ " __VERSION__};
  }

 private:
  static constexpr qm_quantize_linear kTable = QuantizeLinearTable<Method>::Make();
  static const void* Ext(const qm_method*, const char* id) noexcept {
    return std::string_view(id) == QM_EXT_QUANTIZE_LINEAR ? &kTable : nullptr;
  }
  static constexpr qm_method kMethod = {sizeof(qm_method),       Method::kId,
                                        Method::kVersion,        Method::kSummary,
                                        Method::kOptions,        std::size(Method::kOptions),
                                        QM_METHOD_DETERMINISTIC, &Ext};
  static constexpr const qm_method* kMethods[] = {&kMethod};
};

}  // namespace qm

// Makes `Method`, a class as QuantizeLinearPlugin wants it, the plugin of this file.
#define QM_QUANTIZE_LINEAR_PLUGIN(Method, vendor, license)     \
  static constexpr qm_plugin qm_plugin_data_ =                 \
      qm::QuantizeLinearPlugin<Method>::Make(vendor, license); \
  QM_PLUGIN_ENTRY(qm_plugin_data_)

#endif  // QUANTMILL_SDK_PLUGIN_HPP_
