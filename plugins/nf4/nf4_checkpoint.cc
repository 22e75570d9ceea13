// The checkpoint layout of bitsandbytes: QuantState.as_dict and from_dict in
// bitsandbytes/functional.py (names, the JSON description), Params4bit in
// bitsandbytes/nn/modules.py.
//
//   weight                 U8 [bytes, 1]; or these bytes as another dtype ("quant_storage")
//   weight.absmax          F32 [blocks], or U8 [blocks] when double quantized
//   weight.quant_map       F32 [16]
//   weight.nested_absmax, weight.nested_quant_map
//   weight.quant_state.bitsandbytes__nf4 (or __fp4): U8, the bytes of a JSON object
//
// The half byte behind an odd last weight is kept as it is.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "flat_json.h"
#include "nf4.h"
#include "nf4_math.h"

namespace quantmill::nf4 {
namespace {

constexpr const char* kStateName[2] = {"weight.quant_state.bitsandbytes__nf4",
                                       "weight.quant_state.bitsandbytes__fp4"};
// Of a description as it is written; the longest is about 200.
constexpr size_t kStateBytes = 224;
constexpr const char* kDTypeNames[3] = {"bfloat16", "float16", "float32"};
constexpr qm_dtype kDTypes[3] = {QM_BF16, QM_F16, QM_F32};

const char* TorchName(qm_dtype dtype) {
  for (int i = 0; i < 3; ++i) {
    if (kDTypes[i] == dtype) return kDTypeNames[i];
  }
  return "";
}

// The tensors of one layer in a file.
struct Layer {
  qm_call* call;
  const char* name;
  const qm_named_tensor* tensors;
  uint64_t count;

  const qm_tensor* Find(const char* tensor) const {
    for (uint64_t i = 0; i < count; ++i) {
      if (std::strcmp(tensors[i].name, tensor) == 0) return &tensors[i].tensor;
    }
    return nullptr;
  }
  // A tensor of that many elements, in any shape.
  qm_status Need(const char* tensor, qm_dtype dtype, int64_t elements, const void** data) const {
    const qm_tensor* t = Find(tensor);
    if (t == nullptr) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", name, " has no tensor '", tensor, "'");
    }
    if (t->dtype != dtype || Elements(*t) != elements || !IsContiguous(*t)) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", tensor, "' of layer ", name,
                      " must hold ", elements, dtype == QM_U8 ? " bytes" : " F32 numbers",
                      "; the file is damaged or of another layout");
    }
    *data = t->data;
    return QM_OK;
  }
  template <class... Parts>
  qm_status Bad(const Parts&... parts) const {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "the quant_state of layer ", name, " ", parts...);
  }
};

// What the JSON description says.
struct State {
  Params params;
  int64_t out = 0, in = 0;
  float offset = 0.0f;
};

bool WholeNumber(const FlatJson& json, const char* key, int64_t* out) {
  const auto found = json.find(key);
  if (found == json.end() || found->second.kind != JsonValue::Kind::kNumber) return false;
  const double value = found->second.number;
  if (value != std::floor(value) || std::fabs(value) > 0x1p53) return false;
  *out = static_cast<int64_t>(value);
  return true;
}

std::string Text(const FlatJson& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->second.kind == JsonValue::Kind::kString ? found->second.text
                                                                               : std::string();
}

qm_status ReadShape(const Layer& layer, const FlatJson& json, State* state) {
  const auto shape = json.find("shape");
  if (shape == json.end() || shape->second.kind != JsonValue::Kind::kList ||
      shape->second.numbers.size() != 2) {
    return layer.Bad("has no 'shape' of two numbers");
  }
  constexpr double kMost = 0x1p31;
  for (const double extent : shape->second.numbers) {
    if (extent >= 1 && extent < kMost && extent == std::floor(extent)) continue;
    return layer.Bad("has a 'shape' with the extent ", extent);
  }
  state->out = static_cast<int64_t>(shape->second.numbers[0]);
  state->in = static_cast<int64_t>(shape->second.numbers[1]);
  return QM_OK;
}

qm_status ReadNested(const Layer& layer, const FlatJson& json, State* state) {
  const bool described = json.count("nested_blocksize") != 0;
  if (described != (layer.Find("weight.nested_absmax") != nullptr)) {
    return layer.Bad("and the tensors of the layer do not agree on double quantization");
  }
  if (!described) return QM_OK;
  int64_t size = 0;
  if (!WholeNumber(json, "nested_blocksize", &size) || size < 1 || size > 1 << 20) {
    return layer.Bad("has no usable 'nested_blocksize'");
  }
  if (Text(json, "nested_dtype") != "float32") {
    return layer.Bad("has the nested_dtype '", Text(json, "nested_dtype"), "'; float32 is known");
  }
  const auto offset = json.find("nested_offset");
  if (offset == json.end() || offset->second.kind != JsonValue::Kind::kNumber) {
    return layer.Bad("has no number 'nested_offset'");
  }
  state->params.nested_block_size = size;
  state->offset = static_cast<float>(offset->second.number);
  return QM_OK;
}

qm_status ReadState(const Layer& layer, State* state) {
  const qm_tensor* blob[2] = {layer.Find(kStateName[0]), layer.Find(kStateName[1])};
  if ((blob[0] == nullptr) == (blob[1] == nullptr)) {
    return qm::Fail(layer.call, QM_INVALID_ARGUMENT, "layer ", layer.name,
                    blob[0] == nullptr ? " has no tensor '" : " has both '", kStateName[0],
                    "' and '", kStateName[1], "'; one of them is expected");
  }
  state->params.fp4 = blob[1] != nullptr;
  const qm_tensor& bytes = *blob[state->params.fp4 ? 1 : 0];
  if (bytes.dtype != QM_U8 || !IsContiguous(bytes)) return layer.Bad("must be bytes");
  FlatJson json;
  const std::string_view text(static_cast<const char*>(bytes.data),
                              static_cast<size_t>(Elements(bytes)));
  if (!ParseFlatJson(text, &json)) return layer.Bad("is not a JSON object of plain values");
  if (Text(json, "quant_type") != (state->params.fp4 ? "fp4" : "nf4")) {
    return layer.Bad("has the quant_type '", Text(json, "quant_type"), "', its name says ",
                     state->params.fp4 ? "fp4" : "nf4");
  }
  int64_t block = 0;
  if (!WholeNumber(json, "blocksize", &block) || !ValidBlockSize(block)) {
    return layer.Bad("has no usable 'blocksize'; a power of two from 32 to 4096 is expected");
  }
  state->params.block_size = block;
  const std::string dtype = Text(json, "dtype");
  state->params.dtype = dtype == "float16" ? QM_F16 : dtype == "float32" ? QM_F32 : QM_BF16;
  if (dtype != TorchName(state->params.dtype)) {
    return layer.Bad("has the dtype '", dtype, "'; bfloat16, float16 and float32 are known");
  }
  QM_TRY(ReadShape(layer, json, state));
  return ReadNested(layer, json, state);
}

std::string StateJson(const Params& p, int64_t out, int64_t in, float offset) {
  std::string json =
      qm::StrCat("{\"quant_type\": \"", p.fp4 ? "fp4" : "nf4", "\", \"blocksize\": ", p.block_size,
                 ", \"dtype\": \"", TorchName(p.dtype), "\", \"shape\": [", out, ", ", in, "]");
  if (p.nested_block_size > 0) {
    char number[40];
    std::snprintf(number, sizeof number, "%.17g", static_cast<double>(offset));
    json += qm::StrCat(", \"nested_blocksize\": ", p.nested_block_size,
                       ", \"nested_dtype\": \"float32\", \"nested_offset\": ", number);
  }
  json += "}";
  // Files are laid out before every number is known, so the length must not depend on them; spaces
  // behind an object belong to JSON.
  json.resize(kStateBytes, ' ');
  return json;
}

qm_status CheckTarget(qm_call* call, const char* target) {
  if (std::strcmp(target, kTarget) == 0) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, "codebook-absmax weights cannot be stored as '",
                  target, "'; use bitsandbytes or quantmill");
}

// The bytes of the codes, whatever dtype they are declared as.
qm_status NeedCodes(const Layer& layer, int64_t bytes, const void** data) {
  const qm_tensor* t = layer.Find("weight");
  if (t == nullptr) {
    return qm::Fail(layer.call, QM_INVALID_ARGUMENT, "layer ", layer.name,
                    " has no tensor 'weight'");
  }
  if (!IsContiguous(*t) || Elements(*t) * qm::ElementSize(t->dtype) != bytes) {
    return qm::Fail(layer.call, QM_INVALID_ARGUMENT, "tensor 'weight' of layer ", layer.name,
                    " holds ", Elements(*t) * qm::ElementSize(t->dtype), " bytes; its shape needs ",
                    bytes);
  }
  *data = t->data;
  return QM_OK;
}

}  // namespace

qm_status CanStore(qm_call* call, const char* target, const char* format_json, int64_t, int64_t) {
  QM_TRY(CheckTarget(call, target));
  Params params;
  std::string why;
  if (!ParseParams(format_json, &params, &why)) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, why);
  }
  return QM_OK;
}

qm_status ToCheckpoint(qm_call* call, const char* target, const char*, const qm_packed& packed,
                       const qm_named_tensor** out, uint64_t* count, const char** config_json) {
  QM_TRY(CheckTarget(call, target));
  Weight w;
  QM_TRY(ReadWeight(call, packed, /*prepacked=*/false, &w));
  QM_TRY(CheckValues(call, w));
  const Params& p = w.params;
  const int64_t n = w.weights(), bytes = (n + 1) / 2;
  const bool nested = p.nested_block_size > 0;
  Emitter emitter(call);
  qm_tensor codes = {};
  QM_TRY(emitter.Emit("weight", kHost, QM_U8, bytes, 1, &codes));
  std::memcpy(codes.data, w.codes, static_cast<size_t>(bytes));
  const void* absmax = nested ? static_cast<const void*>(w.absmax_byte) : w.absmax;
  QM_TRY(emitter.EmitCopy("weight.absmax", nested ? QM_U8 : QM_F32, p.Blocks(n), absmax));
  QM_TRY(emitter.EmitCopy("weight.quant_map", QM_F32, kCodebookSize, w.codebook));
  if (nested) {
    QM_TRY(emitter.EmitCopy("weight.nested_absmax", QM_F32, p.NestedBlocks(n), w.nested_absmax));
    QM_TRY(
        emitter.EmitCopy("weight.nested_quant_map", QM_F32, kByteCodebookSize, w.nested_codebook));
  }
  const std::string state = StateJson(p, w.out, w.in, nested ? w.absmax_offset[0] : 0.0f);
  QM_TRY(emitter.EmitCopy(kStateName[p.fp4 ? 1 : 0], QM_U8, static_cast<int64_t>(state.size()),
                          state.data()));
  QM_TRY(qm::ScratchString(call,
                           qm::StrCat("{\"compute_dtype\":\"", TorchName(p.dtype),
                                      "\",\"double_quant\":", nested ? "true" : "false",
                                      ",\"quant_type\":\"", p.fp4 ? "fp4" : "nf4", "\"}"),
                           "the configuration", config_json));
  return emitter.Finish(out, count);
}

qm_status FromCheckpoint(qm_call* call, const char* target, const char* layer_name,
                         const qm_named_tensor* tensors, uint64_t count, const char*,
                         qm_packed* out) {
  QM_TRY(CheckTarget(call, target));
  const Layer layer = {call, layer_name, tensors, count};
  State state;
  QM_TRY(ReadState(layer, &state));
  const Params& p = state.params;
  const int64_t n = state.out * state.in, bytes = (n + 1) / 2;
  const bool nested = p.nested_block_size > 0;
  const void *codes = nullptr, *absmax = nullptr, *map = nullptr;
  QM_TRY(NeedCodes(layer, bytes, &codes));
  QM_TRY(layer.Need("weight.absmax", nested ? QM_U8 : QM_F32, p.Blocks(n), &absmax));
  QM_TRY(layer.Need("weight.quant_map", QM_F32, kCodebookSize, &map));
  Emitter emitter(call);
  QM_TRY(emitter.EmitCopy("codes", QM_U8, bytes, codes));
  QM_TRY(emitter.EmitCopy("absmax", nested ? QM_U8 : QM_F32, p.Blocks(n), absmax));
  QM_TRY(emitter.EmitCopy("codebook", QM_F32, kCodebookSize, map));
  if (nested) {
    const void *range = nullptr, *values = nullptr;
    QM_TRY(layer.Need("weight.nested_absmax", QM_F32, p.NestedBlocks(n), &range));
    QM_TRY(layer.Need("weight.nested_quant_map", QM_F32, kByteCodebookSize, &values));
    QM_TRY(emitter.EmitCopy("nested_absmax", QM_F32, p.NestedBlocks(n), range));
    QM_TRY(emitter.EmitCopy("nested_codebook", QM_F32, kByteCodebookSize, values));
    QM_TRY(emitter.EmitCopy("absmax_offset", QM_F32, 1, &state.offset));
  }
  qm_packed packed = {};
  QM_TRY(emitter.FinishPacked(p, state.out, state.in, &packed));
  Weight check;
  QM_TRY(ReadWeight(call, packed, /*prepacked=*/false, &check));
  QM_TRY(CheckValues(call, check));
  *out = packed;
  return QM_OK;
}

}  // namespace quantmill::nf4
