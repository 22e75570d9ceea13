// The method's table: options, what a linear gets, checks of tensors.
#include "quantmill/sdk/plugin.hpp"

#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>
#include <variant>

#include "linear.h"
#include "oftq.h"
#include "quantmill/sdk/tables.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::oftq {
namespace {

constexpr qm_option kOptions[] = {
    {"method", "oft", "oft|lora",
     "oft: block-diagonal rotations of the input; lora: a low-rank addition to the output.",
     QM_OPT_ENUM, 0},
    {"block", "32", "2..128", "oft: channels that one rotation mixes; should divide in_features.",
     QM_OPT_I64, 0},
    {"neumann_terms", "5", "0..64",
     "oft: terms of the series for the Cayley transform, from 2; 0 = the exact transform.",
     QM_OPT_I64, 0},
    {"rank", "8", "1..4096", "lora: rank of the addition.", QM_OPT_I64, 0},
    {"alpha", "16", nullptr, "lora: the addition is multiplied by alpha / rank.", QM_OPT_F64, 0},
    {"target", "*", nullptr,
     "Linears that get parameters: comma-separated patterns of * and ? for the whole name or its "
     "last part.",
     QM_OPT_STR, 0},
    {"merge", "false", nullptr, "Fold the parameters into dense weights after training.",
     QM_OPT_BOOL, 0},
};

// The linear of a call, by its options.
struct Subject {
  Options options;
  std::variant<RotatedLinear, LowRankLinear> linear;
  ParamShape params[kMostParams];
  int param_count = 0;
};

qm_status ReadSubject(qm_call* call, const qm_linear_info& info, Subject* out) {
  QM_TRY(ReadOptions(call, &out->options));
  const Options& o = out->options;
  const int64_t in = info.in_features, features = info.out_features;
  if (in <= 0 || features <= 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "the linear has shape [", features, ", ", in,
                    "]; both features must be positive");
  }
  if (o.lora) {
    out->linear = LowRankLinear{in, features, o.rank,
                                static_cast<float>(o.alpha / static_cast<double>(o.rank))};
    out->params[0] = {"lora_A", o.rank, in};
    out->params[1] = {"lora_B", features, o.rank};
    out->param_count = 2;
    return QM_OK;
  }
  const int64_t block = NearestBlock(in, o.block);
  if (block < 2 || block > kMaxBlock) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "block ", o.block, " does not divide ", in,
                    " input features, and the nearest divisor is ", block,
                    "; use a divisor from 2 to ", kMaxBlock,
                    ", or leave this linear out by target");
  }
  const Rotation rotation = {in, block, o.neumann_terms};
  out->linear = RotatedLinear{rotation, features};
  out->params[0] = {"oft_R", rotation.blocks(), rotation.numbers()};
  out->param_count = 1;
  return QM_OK;
}

// ---- tensors -----------------------------------------------------------------------------------

bool Contiguous(const qm_tensor& t) {
  return t.rank == 2 && (t.shape[1] <= 1 || t.stride[1] == 1) &&
         (t.shape[0] <= 1 || t.stride[0] == t.shape[1]);
}

// rows < 0: any number.
qm_status CheckMatrix(qm_call* call, const qm_tensor& t, const char* what, int64_t rows,
                      int64_t columns, bool f32_only) {
  if (t.rank != 2 || t.shape[1] != columns || (rows >= 0 && t.shape[0] != rows)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " has rank ", t.rank, " and shape [",
                    t.shape[0], ", ", t.shape[1], "]; expected ",
                    rows >= 0 ? qm::StrCat("[", rows, ", ", columns, "]")
                              : qm::StrCat("[rows, ", columns, "]"));
  }
  if (t.dtype != QM_F32 && (f32_only || (t.dtype != QM_F16 && t.dtype != QM_BF16))) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " has dtype code ", t.dtype, "; use F32",
                    f32_only ? "" : ", F16 or BF16");
  }
  if (!Contiguous(t)) return qm::Fail(call, QM_INVALID_ARGUMENT, what, " must be contiguous");
  if (t.device.kind != call->device.kind || t.device.index != call->device.index) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " is not on the device of the call");
  }
  return QM_OK;
}

// The parameters in the order of the plan. optional: a tensor without data is not wanted.
qm_status ReadParams(qm_call* call, const Subject& subject, const qm_named_tensor* params,
                     uint64_t count, bool optional, Params* out) {
  for (int p = 0; p < subject.param_count; ++p) {
    const ParamShape& shape = subject.params[p];
    const auto* found = std::find_if(params, params + count, [&](const qm_named_tensor& t) {
      return std::string_view(t.name) == shape.name;
    });
    if (found == params + count) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "there is no parameter '", shape.name,
                      "'; pass all parameters of the plan");
    }
    if (optional && found->tensor.data == nullptr) continue;
    const std::string what = qm::StrCat("parameter '", shape.name, "'");
    QM_TRY(CheckMatrix(call, found->tensor, what.c_str(), shape.rows, shape.columns, true));
    out->data[p] = static_cast<float*>(found->tensor.data);
  }
  return QM_OK;
}

qm_status CheckFinite(qm_call* call, const Subject& subject, const Params& params) {
  for (int p = 0; p < subject.param_count; ++p) {
    const ParamShape& shape = subject.params[p];
    int64_t index = -1;
    QM_TRY(FindNotFinite(call, params.data[p], shape.rows * shape.columns, &index));
    if (index < 0) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "parameter '", shape.name, "' has a value at [",
                    index / shape.columns, ", ", index % shape.columns,
                    "] that is NaN or infinite; train with a smaller learning rate, or load an "
                    "intact adapter");
  }
  return QM_OK;
}

Rows AllRows(const qm_tensor& t) { return {t.data, t.dtype, t.shape[0]}; }

// ---- qm.reparametrize/1 ------------------------------------------------------------------------

struct Method {
  static qm_status Plan(qm_call* call, const qm_reparam_info& info, qm_reparam_plan* out) {
    Subject subject;
    QM_TRY(ReadOptions(call, &subject.options));
    if (!Targets(subject.options.target, info.linear->name)) {
      return qm::Fail(call, QM_UNIMPLEMENTED, "no pattern of target '", subject.options.target,
                      "' names ", info.linear->name);
    }
    QM_TRY(ReadSubject(call, *info.linear, &subject));
    qm_param* params = nullptr;
    QM_TRY(qm::Scratch(call, {QM_CPU, 0}, subject.param_count, "the plan", &params));
    for (int p = 0; p < subject.param_count; ++p) {
      const ParamShape& shape = subject.params[p];
      params[p] = {shape.name,        {shape.rows, shape.columns, 1, 1}, 1.0, QM_F32, 2,
                   QM_PARAM_TRAINABLE};
    }
    out->params = params;
    out->param_count = static_cast<uint64_t>(subject.param_count);
    out->saved_bytes_per_row = 0;
    out->saved_bytes_fixed = 0;
    out->stats = nullptr;
    out->stat_count = 0;
    out->kind = subject.options.lora ? QM_REPARAM_DELTA : QM_REPARAM_INPUT;
    constexpr uint64_t kDescription = 4096;
    out->scratch_bytes =
        kDescription +
        std::visit([&](const auto& linear) { return linear.ScratchBytes(call->device.kind); },
                   subject.linear);
    if (const auto* low_rank = std::get_if<LowRankLinear>(&subject.linear)) {
      out->saved_bytes_per_row = static_cast<uint64_t>(low_rank->rank) * sizeof(float);
    } else {
      const Rotation& rotation = std::get<RotatedLinear>(subject.linear).rotation;
      out->saved_bytes_fixed = static_cast<uint64_t>(rotation.elements()) * sizeof(float);
      SayBlock(call, subject.options, rotation, info.linear->name);
    }
    if (subject.options.merge) SetFold(out);
    return QM_OK;
  }

  static qm_status Init(qm_call* call, const qm_reparam_info& info, const qm_tensor*,
                        const qm_stats*, qm_named_tensor* params, uint64_t count) {
    Subject subject;
    QM_TRY(ReadSubject(call, *info.linear, &subject));
    Params theta;
    QM_TRY(ReadParams(call, subject, params, count, /*optional=*/false, &theta));
    return std::visit([&](const auto& linear) { return linear.Start(call, theta); },
                      subject.linear);
  }

  static qm_status Forward(qm_call* call, const qm_reparam_info& info, const qm_tensor& in,
                           const qm_named_tensor* params, uint64_t count, void* saved,
                           qm_tensor* out) {
    Subject subject;
    QM_TRY(ReadSubject(call, *info.linear, &subject));
    Params theta;
    QM_TRY(ReadParams(call, subject, params, count, /*optional=*/false, &theta));
    QM_TRY(CheckMatrix(call, in, "x", -1, info.linear->in_features, false));
    QM_TRY(CheckMatrix(call, *out, "the result", in.shape[0],
                       subject.options.lora ? info.linear->out_features : info.linear->in_features,
                       false));
    if (in.dtype != out->dtype) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "x and the result must have equal dtypes");
    }
    return std::visit(
        [&](const auto& linear) {
          return linear.Forward(call, theta, AllRows(in), saved, AllRows(*out));
        },
        subject.linear);
  }

  static qm_status Vjp(qm_call* call, const qm_reparam_info& info, const qm_tensor& in,
                       const qm_named_tensor* params, uint64_t count, const void* saved,
                       const qm_tensor& d_out, qm_tensor* d_in, qm_named_tensor* d_params) {
    Subject subject;
    QM_TRY(ReadSubject(call, *info.linear, &subject));
    Params theta, d_theta;
    QM_TRY(ReadParams(call, subject, params, count, /*optional=*/false, &theta));
    QM_TRY(ReadParams(call, subject, d_params, count, /*optional=*/true, &d_theta));
    const int64_t rows = in.shape[0], width = info.linear->in_features;
    QM_TRY(CheckMatrix(call, in, "x", -1, width, false));
    QM_TRY(CheckMatrix(call, d_out, "d_out", rows,
                       subject.options.lora ? info.linear->out_features : width, true));
    if (d_in != nullptr) QM_TRY(CheckMatrix(call, *d_in, "d_in", rows, width, true));
    if (saved == nullptr) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "vjp needs what forward saved");
    }
    return std::visit(
        [&](const auto& linear) {
          return linear.Vjp(call, theta, AllRows(in), saved, static_cast<const float*>(d_out.data),
                            d_in == nullptr ? nullptr : static_cast<float*>(d_in->data), d_theta);
        },
        subject.linear);
  }

  static qm_status Finalize(qm_call* call, const qm_reparam_info& info, const qm_tensor* weight,
                            const qm_named_tensor* params, uint64_t count, qm_packed*) {
    Subject subject;
    QM_TRY(ReadSubject(call, *info.linear, &subject));
    Params theta;
    QM_TRY(ReadParams(call, subject, params, count, /*optional=*/false, &theta));
    QM_TRY(CheckFinite(call, subject, theta));
    const int64_t shape[2] = {info.linear->out_features, info.linear->in_features};
    if (weight == nullptr) return qm::Fail(call, QM_INVALID_ARGUMENT, "finalize needs the weight");
    QM_TRY(CheckMatrix(call, *weight, "the weight", shape[0], shape[1], true));
    qm_tensor merged = {};
    QM_TRY(call->emit(call, 0, "weight", call->device, QM_F32, 2, shape, &merged));
    return std::visit(
        [&](const auto& linear) {
          return linear.Fold(call, theta, static_cast<const float*>(weight->data),
                             static_cast<float*>(merged.data));
        },
        subject.linear);
  }

  static qm_status ToAdapter(qm_call* call, const char* target, const char** config_json) {
    return oftq::ToAdapter(call, target, config_json);
  }
  static qm_status FromAdapter(qm_call* call, const char* target, const char* config_json,
                               const char** options_json) {
    return oftq::FromAdapter(call, target, config_json, options_json);
  }

 private:
  static void SayBlock(qm_call* call, const Options& options, const Rotation& rotation,
                       const char* name) {
    if (rotation.block == options.block) return;
    qm::Log(call, qm::Severity::kWarning, name, ": block ", options.block, " does not divide ",
            rotation.in_features, " input features; rotations of ", rotation.block,
            " channels are used, as PEFT uses them");
  }

  // A host of minor 0 has no such field.
  static void SetFold(qm_reparam_plan* out) {
    if (out->struct_size >= offsetof(qm_reparam_plan, flags) + sizeof out->flags) {
      out->flags = QM_REPARAM_FOLD;
    }
  }
};

constexpr qm_reparametrize kTable = qm::ReparametrizeTable<Method>::Make();

const void* Ext(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_REPARAMETRIZE ? &kTable : nullptr;
}

constexpr qm_method kMethod = {
    sizeof(qm_method),
    "oftq",
    "0.1.0",
    "Fine-tuning of a frozen, possibly packed model: orthogonal rotations of inputs, or LoRA",
    kOptions,
    std::size(kOptions),
    QM_METHOD_DETERMINISTIC,
    &Ext};
constexpr const qm_method* kMethods[] = {&kMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,      0, 1, kMethods,
                               "quantmill",       "Apache-2.0", "C++ " __VERSION__};

}  // namespace
}  // namespace quantmill::oftq

QM_PLUGIN_ENTRY(quantmill::oftq::kPlugin)
