// Checkpoint layouts of other programs.
//   gptq, gptq_v2: gptqmodel/nn_modules/qlinear/__init__.py; v1 stores zero points minus one
//     (AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py).
//   hqq: affine_hqq.cc. awq: affine_awq.cc. gguf: affine_gguf.cc.
//   compressed-tensors: src/compressed_tensors/compressors/ (pack-quantized and int-quantized).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <vector>

#include "affine_gguf.h"

namespace affine {
namespace {

enum class Target { kGptq, kGptqV2, kCompressedTensors, kHqq, kAwq, kGguf };

bool FindTarget(const char* name, Target* out) {
  for (size_t i = 0; i < std::size(kAllTargets); ++i) {
    if (std::strcmp(name, kAllTargets[i]) != 0) continue;
    *out = static_cast<Target>(i);
    return true;
  }
  return false;
}

// Appends the low `bits` of a field to a little-endian bit stream held in `words` `stride` apart.
void PutField(uint32_t* words, int64_t stride, int64_t index, int bits, uint32_t field) {
  const int64_t bit = index * bits;
  const uint64_t wide = static_cast<uint64_t>(field) << (bit % 32);
  words[bit / 32 * stride] |= static_cast<uint32_t>(wide);
  if (wide >> 32 != 0) words[(bit / 32 + 1) * stride] |= static_cast<uint32_t>(wide >> 32);
}

uint32_t GetField(const uint32_t* words, int64_t stride, int64_t index, int bits) {
  const int64_t bit = index * bits;
  uint64_t wide = words[bit / 32 * stride];
  if (bit % 32 + bits > 32) wide |= static_cast<uint64_t>(words[(bit / 32 + 1) * stride]) << 32;
  return static_cast<uint32_t>(wide >> (bit % 32)) & ((1u << bits) - 1);
}

// The value of `"key":` in canonical JSON, up to the next comma or brace; "" if absent.
std::string JsonValue(const char* json, const char* key) {
  const std::string pattern = qm::StrCat("\"", key, "\":");
  const char* at = std::strstr(json, pattern.c_str());
  if (at == nullptr) return "";
  at += pattern.size();
  return std::string(at, std::strcspn(at, ",}"));
}

bool AllMiddle(const std::vector<uint8_t>& zeros, int bits) {
  for (uint8_t zero : zeros) {
    if (zero != 1 << (bits - 1)) return false;
  }
  return true;
}

// ---- gptq
// ----------------------------------------------------------------------------------------

int FieldMultiple(int bits) { return bits == 3 ? 32 : 32 / bits; }

qm_status GptqStorable(qm_call* call, const Params& p, int64_t out, int64_t in) {
  const int multiple = FieldMultiple(p.bits);
  QM_TRY(NeedIntegerZeros(call, "gptq", p));
  if (in % multiple != 0 || out % multiple != 0) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "gptq files with ", p.bits, " bits need in and ",
                    "out features in multiples of ", multiple, "; this linear has [", out, ", ", in,
                    "]; leave it dense or export as compressed-tensors");
  }
  return QM_OK;
}

// Zero points as bytes [groups, out], the middle where none are stored.
std::vector<uint8_t> ZerosByGroup(const Weight& w) {
  std::vector<uint8_t> zeros(w.groups * w.out, static_cast<uint8_t>(w.middle()));
  if (w.zero != nullptr) Transpose(w.zero, w.out, w.groups, 1, zeros.data());
  return zeros;
}

qm_status ToGptq(qm_call* call, Target target, const char* layer, const Weight& w, Emitter* emitter,
                 std::string* config) {
  const int bits = w.params.bits;
  const uint32_t mask = (1u << bits) - 1;
  if (w.scale_dtype == QM_F32) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, " has f32 scales; gptq files ",
                    "hold 16-bit ones; export as quantmill or compressed-tensors");
  }
  const std::vector<uint8_t> zeros = ZerosByGroup(w);
  qm_tensor qweight, qzeros, scales, g_idx;
  QM_TRY(emitter->Emit("qweight", kHost, QM_I32, {qm::AffineWordsPerRow(w.in, bits), w.out},
                       &qweight));
  QM_TRY(emitter->Emit("qzeros", kHost, QM_I32, {w.groups, qm::AffineWordsPerRow(w.out, bits)},
                       &qzeros));
  QM_TRY(emitter->Emit("scales", kHost, w.scale_dtype, {w.groups, w.out}, &scales));
  QM_TRY(emitter->Emit("g_idx", kHost, QM_I32, {w.in}, &g_idx));

  // A row of codes is a bit stream along the input channels, and so is a column of qweight: the
  // words are the same ones, transposed.
  Transpose(w.codes, w.out, w.words, 4, qweight.data);
  Transpose(w.scale, w.out, w.groups, 2, scales.data);
  std::memset(qzeros.data, 0, static_cast<size_t>(Bytes(qzeros)));
  const int64_t zero_words = qm::AffineWordsPerRow(w.out, bits);
  for (int64_t g = 0; g < w.groups; ++g) {
    uint32_t* row = static_cast<uint32_t*>(qzeros.data) + g * zero_words;
    for (int64_t o = 0; o < w.out; ++o) {
      const uint32_t zero = zeros[g * w.out + o];
      if (target == Target::kGptq && zero == 0) {
        return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, " has a zero point of 0 ",
                        "(row ", o, ", group ", g, "), which version 1 of the gptq format cannot ",
                        "store safely; export as gptq_v2");
      }
      // Masked field by field: subtracting from whole words would borrow from the neighbour.
      PutField(row, 1, o, bits, (target == Target::kGptq ? zero - 1 : zero) & mask);
    }
  }
  for (int64_t i = 0; i < w.in; ++i) {
    static_cast<int32_t*>(g_idx.data)[i] =
        w.group_index != nullptr ? w.group_index[i] : static_cast<int32_t>(i / w.group_size);
  }
  *config =
      qm::StrCat("{\"bits\":", bits, ",\"desc_act\":", w.group_index != nullptr ? "true" : "false",
                 ",\"group_size\":", w.params.group_size,
                 ",\"sym\":", w.params.zero == Zero::kNone ? "true" : "false", "}");
  return QM_OK;
}

struct GptqConfig {
  int bits = 0;
  bool desc_act = false, sym = false;
  int64_t group_size = 0;
};

qm_status ParseGptqConfig(qm_call* call, const char* json, GptqConfig* out) {
  char desc_act[6] = {}, sym[6] = {};
  long long group_size = 0;
  if (std::sscanf(json, "{\"bits\":%d,\"desc_act\":%5[a-z],\"group_size\":%lld,\"sym\":%5[a-z]}",
                  &out->bits, desc_act, &group_size, sym) != 4) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "gptq parameters '", json, "' are not of the form ",
                    "{\"bits\":4,\"desc_act\":false,\"group_size\":128,\"sym\":true}");
  }
  out->desc_act = std::strcmp(desc_act, "true") == 0;
  out->sym = std::strcmp(sym, "true") == 0;
  out->group_size = group_size;
  return QM_OK;
}

qm_status FromGptq(qm_call* call, Target target, const char* layer, const qm_named_tensor* tensors,
                   uint64_t count, const char* config_json, qm_packed* out) {
  GptqConfig config;
  QM_TRY(ParseGptqConfig(call, config_json, &config));
  const qm_tensor *qweight, *qzeros, *scales;
  QM_TRY(Need(call, layer, tensors, count, "qweight", 2, {QM_I32}, &qweight));
  QM_TRY(Need(call, layer, tensors, count, "qzeros", 2, {QM_I32}, &qzeros));
  QM_TRY(Need(call, layer, tensors, count, "scales", 2, {QM_F16, QM_BF16, QM_F32}, &scales));
  const qm_tensor* g_idx = FindTensor(tensors, count, "g_idx");
  Params p{config.bits, config.group_size, Zero::kNone};
  const int bits = p.bits;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has ", bits,
                    " bits; 2, 3, 4 and 8 are supported");
  }
  const int64_t n = qweight->shape[1], words = qweight->shape[0];
  const int64_t k = words * 32 / bits;
  QM_TRY(CheckParams(call, layer, p, k));
  if (n % FieldMultiple(bits) != 0 || k % FieldMultiple(bits) != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'qweight' of layer ", layer, " stands for ",
                    "a weight [", n, ", ", k, "], which does not fill whole words of ", bits,
                    "-bit fields");
  }
  const int64_t groups = p.group_size == -1 ? 1 : k / p.group_size;
  QM_TRY(NeedShape(call, layer, "qzeros", *qzeros, groups, qm::AffineWordsPerRow(n, bits)));
  QM_TRY(NeedShape(call, layer, "scales", *scales, groups, n));

  const uint32_t mask = (1u << bits) - 1;
  std::vector<uint8_t> zeros(n * groups);
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t* row = static_cast<const uint32_t*>(qzeros->data) + g * qzeros->shape[1];
    for (int64_t o = 0; o < n; ++o) {
      const uint32_t stored = GetField(row, 1, o, bits);
      zeros[o * groups + g] =
          static_cast<uint8_t>(target == Target::kGptq ? (stored + 1) & mask : stored);
    }
  }
  // A file that calls itself symmetric but is not keeps its zero points.
  if (!config.sym || !AllMiddle(zeros, bits)) p.zero = Zero::kInt;

  Emitter emitter(call);
  qm_tensor codes, scale, zero, index;
  QM_TRY(emitter.Emit("codes", kHost, QM_I32, {n, words}, &codes));
  Transpose(qweight->data, words, n, 4, codes.data);
  QM_TRY(emitter.Emit("scale", kHost, scales->dtype, {n, groups}, &scale));
  Transpose(scales->data, groups, n, qm::ElementSize(scales->dtype), scale.data);
  if (p.zero == Zero::kInt) {
    QM_TRY(emitter.Emit("zero", kHost, QM_U8, {n, groups}, &zero));
    std::memcpy(zero.data, zeros.data(), zeros.size());
  }
  bool keep_index = false;
  if (g_idx != nullptr) {
    if (g_idx->dtype != QM_I32 || g_idx->rank != 1 || g_idx->shape[0] != k) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'g_idx' of layer ", layer,
                      " must be I32 [", k, "]");
    }
    const int32_t* values = static_cast<const int32_t*>(g_idx->data);
    keep_index = config.desc_act;
    for (int64_t i = 0; i < k; ++i) keep_index = keep_index || values[i] != i / (k / groups);
  } else if (config.desc_act) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has desc_act but no 'g_idx'");
  }
  if (keep_index) {
    QM_TRY(emitter.Emit("group_index", kHost, QM_I32, {k}, &index));
    std::memcpy(index.data, g_idx->data, static_cast<size_t>(k) * 4);
  }
  return emitter.FinishPacked(ParamsJson(p), n, k, out);
}

// ---- compressed-tensors
// --------------------------------------------------------------------------

qm_status CompressedStorable(qm_call* call, const Params& p) {
  return NeedIntegerZeros(call, "compressed-tensors", p);
}

std::string CompressedConfig(const Weight& w) {
  const bool grouped = w.params.group_size != -1;
  return qm::StrCat("{\"actorder\":", w.group_index != nullptr ? "\"group\"" : "null",
                    ",\"format\":\"pack-quantized\",\"group_size\":",
                    grouped ? std::to_string(w.params.group_size) : "null",
                    ",\"num_bits\":", w.params.bits,
                    ",\"strategy\":", grouped ? "\"group\"" : "\"channel\"",
                    ",\"symmetric\":", w.params.zero == Zero::kNone ? "true" : "false", "}");
}

qm_status ToCompressed(qm_call* call, const char* layer, const Weight& w, const qm_packed& packed,
                       Emitter* emitter, std::string* config) {
  if (w.group_index != nullptr && w.params.group_size == -1) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, " has a group_index with one ",
                    "group per row, which compressed-tensors cannot express; export as quantmill");
  }
  if (w.group_index != nullptr) {
    qm::Log(
        call, qm::Severity::kWarning,
        "groups in act-order are stored with actorder 'group', which compressed-tensors 0.20 and "
        "later refuse to read; quantize with static_groups: true, or export as gptq");
  }
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const qm_named_tensor& named = packed.tensors[i];
    const std::string name = named.name;
    // Codes are the signed values plus 2^(bits-1), in the same little-endian stream.
    if (name == "codes") QM_TRY(emitter->EmitCopy("weight_packed", named.tensor));
    if (name == "scale") QM_TRY(emitter->EmitCopy("weight_scale", named.tensor));
    if (name == "group_index") QM_TRY(emitter->EmitCopy("weight_g_idx", named.tensor));
  }
  qm_tensor shape;
  QM_TRY(emitter->Emit("weight_shape", kHost, QM_I64, {2}, &shape));
  static_cast<int64_t*>(shape.data)[0] = w.out;
  static_cast<int64_t*>(shape.data)[1] = w.in;
  if (w.zero != nullptr) {
    qm_tensor zero;
    const int bits = w.params.bits;
    QM_TRY(emitter->Emit("weight_zero_point", kHost, QM_I32,
                         {qm::AffineWordsPerRow(w.out, bits), w.groups}, &zero));
    std::memset(zero.data, 0, static_cast<size_t>(Bytes(zero)));
    for (int64_t o = 0; o < w.out; ++o) {
      for (int64_t g = 0; g < w.groups; ++g) {
        PutField(static_cast<uint32_t*>(zero.data) + g, w.groups, o, bits,
                 static_cast<const uint8_t*>(w.zero)[o * w.groups + g]);
      }
    }
  }
  *config = CompressedConfig(w);
  return QM_OK;
}

struct CompressedParams {
  Params params;
  bool packed = true;  // pack-quantized; else int-quantized
};

qm_status ParseCompressedConfig(qm_call* call, const char* json, CompressedParams* out) {
  const std::string format = JsonValue(json, "format"), strategy = JsonValue(json, "strategy"),
                    bits = JsonValue(json, "num_bits"), group = JsonValue(json, "group_size"),
                    symmetric = JsonValue(json, "symmetric");
  const auto wrong = [&](const char* key) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "compressed-tensors parameters '", json,
                    "' have a wrong or missing '", key, "'");
  };
  // 8-bit floats, and weights whose products quantize their input, are other formats' (FORMATS.md).
  if (JsonValue(json, "type") == "\"float\"" || !JsonValue(json, "activations").empty()) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "compressed-tensors parameters '", json,
                    "' are not those of affine-int");
  }
  if (format != "\"pack-quantized\"" && format != "\"int-quantized\"") return wrong("format");
  out->packed = format == "\"pack-quantized\"";
  if (strategy != "\"group\"" && strategy != "\"channel\"") return wrong("strategy");
  out->params.bits = std::atoi(bits.c_str());
  if (bits != "2" && bits != "3" && bits != "4" && bits != "8") return wrong("num_bits");
  out->params.group_size = strategy == "\"channel\"" ? -1 : std::atoll(group.c_str());
  if (out->params.group_size == 0) return wrong("group_size");
  if (symmetric != "true" && symmetric != "false") return wrong("symmetric");
  out->params.zero = symmetric == "true" ? Zero::kNone : Zero::kInt;
  return QM_OK;
}

// Codes and shape of a pack-quantized layer.
qm_status ReadPackedCodes(qm_call* call, const char* layer, const qm_named_tensor* tensors,
                          uint64_t count, int bits, Emitter* emitter, int64_t* n, int64_t* k) {
  const qm_tensor *packed, *shape;
  QM_TRY(Need(call, layer, tensors, count, "weight_packed", 2, {QM_I32}, &packed));
  QM_TRY(Need(call, layer, tensors, count, "weight_shape", 1, {QM_I64, QM_I32}, &shape));
  if (shape->shape[0] != 2) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'weight_shape' of layer ", layer,
                    " must have two elements");
  }
  const auto extent = [&](int i) {
    return shape->dtype == QM_I64 ? static_cast<const int64_t*>(shape->data)[i]
                                  : static_cast<const int32_t*>(shape->data)[i];
  };
  *n = extent(0);
  *k = extent(1);
  if (*n != packed->shape[0] || *k < 1 || qm::AffineWordsPerRow(*k, bits) != packed->shape[1]) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'weight_packed' of layer ", layer,
                    " has shape [", packed->shape[0], ", ", packed->shape[1], "]; a weight [", *n,
                    ", ", *k, "] with ", bits, " bits needs ", qm::AffineWordsPerRow(*k, bits),
                    " words per row. 3-bit files of compressed-tensors before ",
                    "June 2026 hold 10 codes per word and are not supported");
  }
  return emitter->EmitCopy("codes", *packed);
}

// int-quantized: signed values in bytes.
qm_status ReadByteCodes(qm_call* call, const char* layer, const qm_named_tensor* tensors,
                        uint64_t count, int bits, Emitter* emitter, int64_t* n, int64_t* k) {
  const qm_tensor* weight;
  QM_TRY(Need(call, layer, tensors, count, "weight", 2, {QM_I8}, &weight));
  *n = weight->shape[0];
  *k = weight->shape[1];
  const int64_t words = qm::AffineWordsPerRow(*k, bits);
  qm_tensor codes;
  QM_TRY(emitter->Emit("codes", kHost, QM_I32, {*n, words}, &codes));
  std::memset(codes.data, 0, static_cast<size_t>(Bytes(codes)));
  const int half = 1 << (bits - 1);
  const int8_t* values = static_cast<const int8_t*>(weight->data);
  for (int64_t o = 0; o < *n; ++o) {
    uint32_t* row = static_cast<uint32_t*>(codes.data) + o * words;
    for (int64_t i = 0; i < *k; ++i) {
      const int value = int{values[o * *k + i]};
      if (value < -half || value >= half) {
        return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'weight' of layer ", layer, " holds ",
                        value, ", which is no ", bits, "-bit value");
      }
      PutField(row, 1, i, bits, static_cast<uint32_t>(value + half));
    }
  }
  return QM_OK;
}

qm_status ReadCompressedZero(qm_call* call, const char* layer, const qm_named_tensor* tensors,
                             uint64_t count, const CompressedParams& config, int64_t n,
                             int64_t groups, Emitter* emitter) {
  const int bits = config.params.bits, half = 1 << (bits - 1);
  const qm_tensor* stored;
  QM_TRY(Need(call, layer, tensors, count, "weight_zero_point", 2, {config.packed ? QM_I32 : QM_I8},
              &stored));
  QM_TRY(NeedShape(call, layer, "weight_zero_point", *stored,
                   config.packed ? qm::AffineWordsPerRow(n, bits) : n, groups));
  qm_tensor zero;
  QM_TRY(emitter->Emit("zero", kHost, QM_U8, {n, groups}, &zero));
  for (int64_t o = 0; o < n; ++o) {
    for (int64_t g = 0; g < groups; ++g) {
      const int value = config.packed
                            ? static_cast<int>(GetField(
                                  static_cast<const uint32_t*>(stored->data) + g, groups, o, bits))
                            : int{static_cast<const int8_t*>(stored->data)[o * groups + g]} + half;
      if (value < 0 || value >= 2 * half) {
        return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'weight_zero_point' of layer ", layer,
                        " holds ", value - half, ", which is no ", bits, "-bit value");
      }
      static_cast<uint8_t*>(zero.data)[o * groups + g] = static_cast<uint8_t>(value);
    }
  }
  return QM_OK;
}

qm_status FromCompressed(qm_call* call, const char* layer, const qm_named_tensor* tensors,
                         uint64_t count, const char* config_json, qm_packed* out) {
  CompressedParams config;
  QM_TRY(ParseCompressedConfig(call, config_json, &config));
  const int bits = config.params.bits;
  Emitter emitter(call);
  int64_t n = 0, k = 0;
  QM_TRY(config.packed ? ReadPackedCodes(call, layer, tensors, count, bits, &emitter, &n, &k)
                       : ReadByteCodes(call, layer, tensors, count, bits, &emitter, &n, &k));
  QM_TRY(CheckParams(call, layer, config.params, k));
  const int64_t groups = config.params.group_size == -1 ? 1 : k / config.params.group_size;
  const qm_tensor* scale;
  QM_TRY(Need(call, layer, tensors, count, "weight_scale", 2, {QM_F16, QM_BF16, QM_F32}, &scale));
  QM_TRY(NeedShape(call, layer, "weight_scale", *scale, n, groups));
  QM_TRY(emitter.EmitCopy("scale", *scale));
  if (config.params.zero == Zero::kInt) {
    QM_TRY(ReadCompressedZero(call, layer, tensors, count, config, n, groups, &emitter));
  }
  if (const qm_tensor* g_idx = FindTensor(tensors, count, "weight_g_idx")) {
    if (g_idx->dtype != QM_I32 || g_idx->rank != 1 || g_idx->shape[0] != k) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'weight_g_idx' of layer ", layer,
                      " must be I32 [", k, "]");
    }
    QM_TRY(emitter.EmitCopy("group_index", *g_idx));
  }
  return emitter.FinishPacked(ParamsJson(config.params), n, k, out);
}

qm_status UnknownTarget(qm_call* call, const char* target) {
  return qm::Fail(call, QM_FAILED_PRECONDITION, "affine-int weights cannot be stored as '", target,
                  "'; they can as gptq, gptq_v2, compressed-tensors, hqq, awq and gguf");
}

}  // namespace

qm_status Need(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
               const char* name, int32_t rank, std::initializer_list<qm_dtype> dtypes,
               const qm_tensor** out) {
  const qm_tensor* tensor = FindTensor(tensors, count, name);
  if (tensor == nullptr) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has no tensor '", name, "'");
  }
  bool known = false;
  for (qm_dtype dtype : dtypes) known = known || tensor->dtype == dtype;
  if (!known || tensor->rank != rank || !IsContiguous(*tensor)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' of layer ", layer,
                    " has the wrong dtype or rank (", rank, " expected)");
  }
  *out = tensor;
  return QM_OK;
}

qm_status NeedShape(qm_call* call, const char* layer, const char* name, const qm_tensor& tensor,
                    int64_t rows, int64_t columns) {
  if (tensor.shape[0] == rows && tensor.shape[1] == columns) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor '", name, "' of layer ", layer, " has shape [",
                  tensor.shape[0], ", ", tensor.shape[1], "]; expected [", rows, ", ", columns,
                  "]");
}

void Transpose(const void* source, int64_t rows, int64_t columns, int64_t element, void* target) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(target);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      std::memcpy(to + (c * rows + r) * element, from + (r * columns + c) * element,
                  static_cast<size_t>(element));
    }
  }
}

qm_status NeedIntegerZeros(qm_call* call, const char* target, const Params& p) {
  if (p.zero == Zero::kFloat || p.zero == Zero::kQ8) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, target, " files hold integer zero points only; ",
                    "export as quantmill or hqq, or quantize with integer zero points");
  }
  if (p.axis == 0 || p.q8_scale) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, target, " files hold groups of input channels ",
                    "with scales as floats only; export as quantmill");
  }
  return QM_OK;
}

qm_status CheckParams(qm_call* call, const char* layer, const Params& p, int64_t in) {
  std::string why;
  Params parsed;
  if (!ParseParams(ParamsJson(p).c_str(), &parsed, &why)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, ": ", why);
  }
  if (p.group_size != -1 && in % p.group_size != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, ": group_size ", p.group_size,
                    " does not divide in_features ", in);
  }
  return QM_OK;
}

const qm_tensor* FindTensor(const qm_named_tensor* tensors, uint64_t count, const char* name) {
  for (uint64_t i = 0; i < count; ++i) {
    if (std::strcmp(tensors[i].name, name) == 0) return &tensors[i].tensor;
  }
  return nullptr;
}

qm_status CanStore(qm_call* call, const char* target, const char* format_json, int64_t out,
                   int64_t in) {
  Params params;
  std::string why;
  if (!ParseParams(format_json, &params, &why)) return qm::Fail(call, QM_INVALID_ARGUMENT, why);
  Target kind;
  if (!FindTarget(target, &kind)) return UnknownTarget(call, target);
  if (kind == Target::kHqq) return HqqStorable(call, params, out, in);
  if (kind == Target::kAwq) return AwqStorable(call, params, out);
  if (kind == Target::kGguf) return GgufStorable(call, params, in);
  return kind == Target::kCompressedTensors ? CompressedStorable(call, params)
                                            : GptqStorable(call, params, out, in);
}

qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer,
                       const qm_packed& packed, const qm_named_tensor** out, uint64_t* count,
                       const char** config_json) {
  Weight w;
  QM_TRY(ReadWeight(call, packed, /*prepacked=*/false, &w));
  QM_TRY(CanStore(call, target, packed.format_json, w.out, w.in));
  QM_TRY(CheckValues(call, w));
  Target kind = Target::kGptq;
  FindTarget(target, &kind);
  Emitter emitter(call);
  std::string config;
  if (kind == Target::kHqq) {
    QM_TRY(ToHqq(call, layer, w, &emitter, &config));
  } else if (kind == Target::kAwq) {
    QM_TRY(ToAwq(call, layer, w, &emitter, &config));
  } else if (kind == Target::kGguf) {
    QM_TRY(ToGguf(call, layer, w, &emitter, &config));
  } else {
    QM_TRY(kind == Target::kCompressedTensors
               ? ToCompressed(call, layer, w, packed, &emitter, &config)
               : ToGptq(call, kind, layer, w, &emitter, &config));
  }
  QM_TRY(qm::ScratchString(call, config, "the configuration", config_json));
  return emitter.Finish(out, count);
}

qm_status FromCheckpoint(qm_call* call, const char* target, const char* layer,
                         const qm_named_tensor* tensors, uint64_t count, const char* config_json,
                         qm_packed* out) {
  Target kind;
  if (!FindTarget(target, &kind)) return UnknownTarget(call, target);
  if (kind == Target::kHqq) {
    QM_TRY(FromHqq(call, layer, tensors, count, out));
  } else if (kind == Target::kAwq) {
    QM_TRY(FromAwq(call, layer, tensors, count, config_json, out));
  } else if (kind == Target::kGguf) {
    QM_TRY(FromGguf(call, layer, tensors, count, config_json, out));
  } else {
    QM_TRY(kind == Target::kCompressedTensors
               ? FromCompressed(call, layer, tensors, count, config_json, out)
               : FromGptq(call, kind, layer, tensors, count, config_json, out));
  }
  Weight weight;
  QM_TRY(ReadWeight(call, *out, /*prepacked=*/false, &weight));
  return CheckValues(call, weight);
}

}  // namespace affine
