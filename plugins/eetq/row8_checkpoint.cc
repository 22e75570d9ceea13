// Checkpoint layouts of other programs.
//   eetq: eetq_layout.h; transformers src/transformers/integrations/eetq.py (`weight`), and eetq's
//     own saver, python/eetq/modules/qlinear.py (`qweight`), which is read only.
//   compressed-tensors: src/compressed_tensors/compressors/. INT8 with quantized activations is
//     int-quantized, without them pack-quantized; FP8 is float-quantized and naive-quantized.
#include <cstring>

#include "eetq_layout.h"
#include "row8.h"

namespace eetq {
namespace {

constexpr char kEetq[] = "eetq";
constexpr char kCompressed[] = "compressed-tensors";

bool Is(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

const qm_tensor* Find(const qm_named_tensor* tensors, uint64_t count, const char* name) {
  for (uint64_t i = 0; i < count; ++i) {
    if (Is(tensors[i].name, name)) return &tensors[i].tensor;
  }
  return nullptr;
}

// The value of `"key":` in canonical JSON, up to the next comma or brace; "" if absent.
std::string JsonValue(const char* json, const char* key) {
  const std::string pattern = qm::StrCat("\"", key, "\":");
  const char* at = std::strstr(json, pattern.c_str());
  if (at == nullptr) return "";
  at += pattern.size();
  return std::string(at, std::strcspn(at, ",}"));
}

// Collects emitted tensors and their names.
class Emitter {
 public:
  explicit Emitter(qm_call* call) : call_(call) {}
  qm_status Emit(const char* name, qm_dtype dtype, std::initializer_list<int64_t> shape,
                 void** data) {
    qm_named_tensor& named = tensors_[count_];
    named.name = name;
    QM_TRY(call_->emit(call_, 0, name, kHost, dtype, static_cast<int32_t>(shape.size()),
                       shape.begin(), &named.tensor));
    *data = named.tensor.data;
    ++count_;
    return QM_OK;
  }
  qm_status Finish(const qm_named_tensor** tensors, uint64_t* count) {
    qm_named_tensor* copy;
    QM_TRY(qm::Scratch(call_, kHost, static_cast<int64_t>(count_), "the list of tensors", &copy));
    std::memcpy(copy, tensors_, count_ * sizeof *copy);
    *tensors = copy;
    *count = count_;
    return QM_OK;
  }

 private:
  qm_call* call_;
  qm_named_tensor tensors_[3] = {};
  uint64_t count_ = 0;
};

qm_status EmitScale(const Weight& w, const char* name, std::initializer_list<int64_t> shape,
                    Emitter* emitter) {
  void* data;
  QM_TRY(emitter->Emit(name, w.scale_dtype, shape, &data));
  const int64_t scales = w.params.per_tensor ? 1 : w.out;
  std::memcpy(data, w.scale, static_cast<size_t>(scales * qm::ElementSize(w.scale_dtype)));
  return QM_OK;
}

// ---- eetq
// ----------------------------------------------------------------------------------------

qm_status ToEetq(qm_call* call, const char* layer, const Weight& w, Emitter* emitter) {
  if (w.scale_dtype != QM_F16) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, " has scales that are not F16; ",
                    "eetq files hold F16 ones; export as quantmill or compressed-tensors");
  }
  void* stored;
  QM_TRY(emitter->Emit("weight", QM_I8, {w.in, w.out}, &stored));
  ToEetqLayout(w.codes, w.out, w.in, static_cast<uint8_t*>(stored));
  return EmitScale(w, "weight_scales", {w.out}, emitter);
}

// ---- compressed-tensors
// --------------------------------------------------------------------------

// The keys of core/checkpoint/compressed_tensors_config.cc.
std::string CompressedConfig(const Params& params) {
  const bool is_int = params.code == Code::kInt8;
  const char* format = is_int ? (params.activations ? "int-quantized" : "pack-quantized")
                              : (params.activations ? "float-quantized" : "naive-quantized");
  const char* activations = !params.activations ? ""
                            : is_int            ? "\"activations\":\"int8\","
                                                : "\"activations\":\"fp8\",";
  return qm::StrCat("{", activations, "\"actorder\":null,\"format\":\"", format,
                    "\",\"group_size\":null,\"num_bits\":8,\"strategy\":\"",
                    params.per_tensor ? "tensor" : "channel", "\",\"symmetric\":true",
                    is_int ? "" : ",\"type\":\"float\"", "}");
}

int64_t PackedWords(int64_t in) { return (in + 3) / 4; }

qm_status ToCompressed(const Weight& w, Emitter* emitter) {
  void* data;
  if (w.params.code == Code::kInt8 && !w.params.activations) {
    // Signed values plus 128, four in a word, rows padded with zero bits.
    const int64_t bytes = 4 * PackedWords(w.in);
    QM_TRY(emitter->Emit("weight_packed", QM_I32, {w.out, PackedWords(w.in)}, &data));
    uint8_t* packed = static_cast<uint8_t*>(data);
    for (int64_t o = 0; o < w.out; ++o) {
      for (int64_t i = 0; i < bytes; ++i) {
        packed[o * bytes + i] = i < w.in ? w.codes[o * w.in + i] ^ 0x80 : 0;
      }
    }
    QM_TRY(emitter->Emit("weight_shape", QM_I64, {2}, &data));
    static_cast<int64_t*>(data)[0] = w.out;
    static_cast<int64_t*>(data)[1] = w.in;
  } else {
    QM_TRY(emitter->Emit("weight", CodeDType(w.params.code), {w.out, w.in}, &data));
    std::memcpy(data, w.codes, static_cast<size_t>(w.out * w.in));
  }
  if (w.params.per_tensor) return EmitScale(w, "weight_scale", {1}, emitter);
  return EmitScale(w, "weight_scale", {w.out, 1}, emitter);
}

// ---- reading ------------------------------------------------------------------------------------

struct Source {
  qm_call* call;
  const char* layer;
  const qm_named_tensor* tensors;
  uint64_t count;

  qm_status Need(const char* name, int32_t rank, std::initializer_list<qm_dtype> dtypes,
                 const qm_tensor** out) const {
    *out = Find(tensors, count, name);
    if (*out == nullptr) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has no tensor '", name, "'");
    }
    bool known = false;
    for (const qm_dtype dtype : dtypes) known = known || (*out)->dtype == dtype;
    if (known && (*out)->rank == rank && IsContiguous(**out)) return QM_OK;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' of layer ", layer,
                    " has the wrong dtype or rank (", rank, " expected)");
  }
};

// A weight being read: emits its tensors.
class Reading {
 public:
  Reading(const Source& source, const Params& params) : source_(source), params_(params) {}

  qm_status Begin(int64_t out, int64_t in, uint8_t** codes) {
    if (out < 1 || in < 1) {
      return qm::Fail(source_.call, QM_INVALID_ARGUMENT, "layer ", source_.layer,
                      " has an empty weight [", out, ", ", in, "]");
    }
    layout_.format_id = FormatId(params_);
    layout_.format_json = ParamsJson(params_);
    layout_.code_dtype = CodeDType(params_.code);
    layout_.scales = params_.per_tensor ? 1 : out;
    layout_.out_features = out;
    layout_.in_features = in;
    QM_TRY(Emit("codes", layout_.code_dtype, {out, in}, &tensors_.codes));
    *codes = static_cast<uint8_t*>(tensors_.codes.data);
    return QM_OK;
  }

  // `scale`: as many elements as there are scales, in any shape.
  qm_status Finish(const char* name, const qm_tensor& scale, qm_packed* out) {
    int64_t elements = 1;
    for (int d = 0; d < scale.rank; ++d) elements *= scale.shape[d];
    if (elements != layout_.scales) {
      return qm::Fail(source_.call, QM_INVALID_ARGUMENT, "tensor '", name, "' of layer ",
                      source_.layer, " has ", elements, " elements; expected ", layout_.scales);
    }
    QM_TRY(Emit("scale", scale.dtype, {layout_.scales}, &tensors_.scale));
    std::memcpy(tensors_.scale.data, scale.data,
                static_cast<size_t>(elements * qm::ElementSize(scale.dtype)));
    QM_TRY(qm::DescribeRow8(source_.call, layout_, tensors_, out));
    Weight weight;
    QM_TRY(ReadWeight(source_.call, *out, &weight));
    return CheckValues(source_.call, weight);
  }

 private:
  qm_status Emit(const char* name, qm_dtype dtype, std::initializer_list<int64_t> shape,
                 qm_tensor* out) {
    return source_.call->emit(source_.call, 0, name, kHost, dtype,
                              static_cast<int32_t>(shape.size()), shape.begin(), out);
  }
  const Source& source_;
  const Params params_;
  qm::Row8Layout layout_;
  qm::Row8Tensors tensors_;
};

qm_status FromEetq(const Source& source, qm_packed* out) {
  const char* name = Find(source.tensors, source.count, "weight") != nullptr ? "weight" : "qweight";
  const qm_tensor *weight, *scale;
  QM_TRY(source.Need(name, 2, {QM_I8}, &weight));
  QM_TRY(source.Need("weight_scales", 1, {QM_F16}, &scale));
  const int64_t in = weight->shape[0], outputs = weight->shape[1];
  if (in % kEetqMultiple != 0 || outputs % kEetqMultiple != 0) {
    return qm::Fail(source.call, QM_INVALID_ARGUMENT, "tensor '", name, "' of layer ", source.layer,
                    " has shape [", in, ", ", outputs, "]; both must be multiples ", "of ",
                    kEetqMultiple);
  }
  Reading reading(source, Params());
  uint8_t* codes;
  QM_TRY(reading.Begin(outputs, in, &codes));
  FromEetqLayout(static_cast<const uint8_t*>(weight->data), outputs, in, codes);
  return reading.Finish("weight_scales", *scale, out);
}

// Which parameters a layer of a compressed-tensors file has; UNIMPLEMENTED if it is not in
// `format_id`.
qm_status ReadCompressedConfig(qm_call* call, const char* format_id, const char* json,
                               Params* out) {
  out->code = JsonValue(json, "type") == "\"float\"" ? Code::kE4M3 : Code::kInt8;
  out->activations = !JsonValue(json, "activations").empty();
  out->per_tensor = JsonValue(json, "strategy") == "\"tensor\"";
  const bool ours = JsonValue(json, "num_bits") == "8" && JsonValue(json, "symmetric") == "true" &&
                    JsonValue(json, "actorder") == "null" &&
                    (JsonValue(json, "strategy") == "\"channel\"" || out->per_tensor);
  if (!ours || !Is(FormatId(*out), format_id)) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "compressed-tensors parameters ", json,
                    " are not those ", "of ", format_id);
  }
  if (out->per_tensor && out->code == Code::kInt8) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "INT8 weights with one scale for all are not ",
                    "supported");
  }
  return QM_OK;
}

qm_status FromCompressed(const Source& source, const char* format_id, const char* config,
                         qm_packed* out) {
  Params params;
  QM_TRY(ReadCompressedConfig(source.call, format_id, config, &params));
  const bool packed = JsonValue(config, "format") == "\"pack-quantized\"";
  const qm_tensor *weight, *scale;
  if (packed) {
    QM_TRY(source.Need("weight_packed", 2, {QM_I32}, &weight));
  } else {
    QM_TRY(source.Need("weight", 2, {CodeDType(params.code)}, &weight));
  }
  const int64_t outputs = weight->shape[0];
  int64_t in = weight->shape[1];
  if (packed) {
    const qm_tensor* shape;
    QM_TRY(source.Need("weight_shape", 1, {QM_I64}, &shape));
    in = shape->shape[0] == 2 ? static_cast<const int64_t*>(shape->data)[1] : 0;
    if (in < 1 || PackedWords(in) != weight->shape[1]) {
      return qm::Fail(source.call, QM_INVALID_ARGUMENT, "tensor 'weight_shape' of layer ",
                      source.layer, " does not fit 'weight_packed'");
    }
  }
  const Source& s = source;
  const bool whole = params.per_tensor && Find(s.tensors, s.count, "weight_scale") != nullptr &&
                     Find(s.tensors, s.count, "weight_scale")->rank < 2;
  const int32_t rank = whole ? Find(s.tensors, s.count, "weight_scale")->rank : 2;
  QM_TRY(source.Need("weight_scale", rank, {QM_F16, QM_BF16, QM_F32}, &scale));
  Reading reading(source, params);
  uint8_t* codes;
  QM_TRY(reading.Begin(outputs, in, &codes));
  const uint8_t* bytes = static_cast<const uint8_t*>(weight->data);
  if (packed) {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        codes[o * in + i] = bytes[o * 4 * PackedWords(in) + i] ^ 0x80;
      }
    }
  } else {
    std::memcpy(codes, bytes, static_cast<size_t>(outputs * in));
  }
  return reading.Finish("weight_scale", *scale, out);
}

}  // namespace

qm_status CanStore(qm_call* call, const char* target, const Params& params, int64_t out,
                   int64_t in) {
  if (Is(target, kCompressed)) {
    if (params.code != Code::kE5M2) return QM_OK;
    return qm::Fail(call, QM_FAILED_PRECONDITION, "compressed-tensors files hold E4M3 only; ",
                    "quantize with fp8_e4m3 or export as quantmill");
  }
  if (!Is(target, kEetq) || params.code != Code::kInt8) {
    return qm::Fail(
        call, QM_FAILED_PRECONDITION, FormatId(params), " weights cannot be stored as '", target,
        "'; they can as ",
        params.code == Code::kInt8 ? "eetq and compressed-tensors" : "compressed-tensors");
  }
  if (params.activations) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "eetq files cannot say that activations are ",
                    "quantized; export as compressed-tensors");
  }
  if (in % kEetqMultiple != 0 || out % kEetqMultiple != 0) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "eetq files need in and out features in ",
                    "multiples of ", kEetqMultiple, "; this linear has [", out, ", ", in,
                    "]; leave it dense or export as compressed-tensors");
  }
  return QM_OK;
}

qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer, const Weight& w,
                       const qm_named_tensor** out, uint64_t* count, const char** config_json) {
  QM_TRY(CanStore(call, target, w.params, w.out, w.in));
  QM_TRY(CheckValues(call, w));
  Emitter emitter(call);
  std::string config = "{\"weights\":\"int8\"}";
  if (Is(target, kEetq)) {
    QM_TRY(ToEetq(call, layer, w, &emitter));
  } else {
    QM_TRY(ToCompressed(w, &emitter));
    config = CompressedConfig(w.params);
  }
  QM_TRY(qm::ScratchString(call, config, "the configuration", config_json));
  return emitter.Finish(out, count);
}

qm_status FromCheckpoint(qm_call* call, const char* format_id, const char* target,
                         const char* layer, const qm_named_tensor* tensors, uint64_t count,
                         const char* config_json, qm_packed* out) {
  const Source source = {call, layer, tensors, count};
  if (Is(target, kCompressed)) return FromCompressed(source, format_id, config_json, out);
  if (Is(target, kEetq) && Is(format_id, qm::kInt8RowFormat)) return FromEetq(source, out);
  return qm::Fail(call, QM_FAILED_PRECONDITION, format_id, " weights are not stored as '", target,
                  "'");
}

}  // namespace eetq
