// Blocks of GGUF files (ggml-org/ggml: src/ggml-common.h, src/ggml-quants.c), 32 weights along a
// row.
//   Q8_0: f16 d, 32 signed bytes; value d * byte
//   Q4_0: f16 d, 16 bytes, byte j holds code j below code j + 16; value d * (code - 8)
//   Q4_1: f16 d, f16 m, the same 16 bytes; value d * code + m
// A weight is one tensor "weight", U8 [out, bytes of a row]; the type is the target's parameter.
//
// Scales of affine-int are positive; a block whose d is not becomes one with the codes turned
// around. An integer zero point z is stored in Q4_1 as m = -d z rounded to f16, and is recognized
// by that when it is read.
#include "affine_gguf.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace affine {
namespace {

constexpr int64_t kBlock = 32;
constexpr float kLeastScale = 0x1p-24f;  // of f16; stands in for a scale of 0

struct BlockType {
  const char* name;
  int bits;
  int header;  // bytes before the codes
  int64_t bytes;
};
constexpr BlockType kQ8_0 = {"Q8_0", 8, 2, 34};
constexpr BlockType kQ4_0 = {"Q4_0", 4, 2, 18};
constexpr BlockType kQ4_1 = {"Q4_1", 4, 4, 20};

const BlockType& TypeOf(const Params& p) {
  if (p.bits == 8) return kQ8_0;
  return p.zero == Zero::kNone ? kQ4_0 : kQ4_1;
}

const BlockType* FindType(const char* config_json) {
  for (const BlockType* type : {&kQ8_0, &kQ4_0, &kQ4_1}) {
    if (qm::StrCat("{\"type\":\"", type->name, "\"}") == config_json) return type;
  }
  return nullptr;
}

void PutHalf(float value, uint8_t* at) {
  const qm::F16 half = qm::ToF16(value);
  std::memcpy(at, &half, sizeof half);
}

float GetHalf(const uint8_t* at) {
  qm::F16 half;
  std::memcpy(&half, at, sizeof half);
  return qm::ToFloat(half);
}

void PutCodes(const BlockType& type, const uint8_t* codes, uint8_t* block) {
  uint8_t* bytes = block + type.header;
  if (type.bits == 8) {
    for (int j = 0; j < kBlock; ++j) bytes[j] = static_cast<uint8_t>(codes[j] - 128);
    return;
  }
  for (int j = 0; j < kBlock / 2; ++j) {
    bytes[j] = static_cast<uint8_t>(codes[j] | codes[j + kBlock / 2] << 4);
  }
}

void GetCodes(const BlockType& type, const uint8_t* block, uint8_t* codes) {
  const uint8_t* bytes = block + type.header;
  if (type.bits == 8) {
    for (int j = 0; j < kBlock; ++j) codes[j] = static_cast<uint8_t>(bytes[j] + 128);
    return;
  }
  for (int j = 0; j < kBlock / 2; ++j) {
    codes[j] = bytes[j] & 15;
    codes[j + kBlock / 2] = bytes[j] >> 4;
  }
}

// A weight while it is read: codes as bytes, scale and zero point per group.
struct Unpacked {
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero;
  Zero kind = Zero::kNone;
};

// One block with a positive scale. False if that is not possible.
bool ReadBlock(const BlockType& type, const uint8_t* block, uint8_t* codes, float* scale,
               float* zero) {
  float d = GetHalf(block);
  float m = type.header == 4 ? GetHalf(block + 2) : 0.0f;
  if (!std::isfinite(d) || !std::isfinite(m)) return false;
  GetCodes(type, block, codes);
  const int middle = 1 << (type.bits - 1), most = 2 * middle - 1;
  const bool shifted = type.header == 4;
  if (d == 0.0f) {  // every weight is m
    *scale = shifted ? 1.0f : kLeastScale;
    *zero = shifted ? -m : static_cast<float>(middle);
    std::memset(codes, shifted ? 0 : middle, kBlock);
    return true;
  }
  float center = static_cast<float>(middle);
  if (d < 0.0f) {
    for (int j = 0; j < kBlock; ++j) codes[j] = static_cast<uint8_t>(most - codes[j]);
    m += d * static_cast<float>(most);
    d = -d;
    center = static_cast<float>(most - middle);
  }
  *scale = d;
  *zero = shifted ? -m / d : center;
  return std::isfinite(*zero);
}

// Do all zero points come from whole numbers?
bool AreWhole(const uint8_t* data, const BlockType& type, std::vector<float>* zero) {
  const int most = (1 << type.bits) - 1;
  std::vector<float> whole(zero->size());
  for (size_t g = 0; g < zero->size(); ++g) {
    const float z = std::nearbyint((*zero)[g]);
    if (!(z >= 0.0f && z <= static_cast<float>(most))) return false;
    const uint8_t* block = data + static_cast<int64_t>(g) * type.bytes;
    const float d = GetHalf(block);
    if (!(d > 0.0f) || qm::ToFloat(qm::ToF16(-d * z)) != GetHalf(block + 2)) return false;
    whole[g] = z;
  }
  *zero = std::move(whole);
  return true;
}

qm_status Unpack(qm_call* call, const char* layer, const uint8_t* data, const BlockType& type,
                 int64_t groups, Unpacked* out) {
  out->codes.resize(groups * kBlock);
  out->scale.resize(groups);
  out->zero.resize(groups);
  const auto middle = static_cast<float>(1 << (type.bits - 1));
  for (int64_t g = 0; g < groups; ++g) {
    if (!ReadBlock(type, data + g * type.bytes, out->codes.data() + g * kBlock, &out->scale[g],
                   &out->zero[g])) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "block ", g, " of layer ", layer,
                      " has a scale or minimum that is no finite number");
    }
    if (out->zero[g] != middle) out->kind = Zero::kInt;
  }
  if (type.header == 4) out->kind = AreWhole(data, type, &out->zero) ? Zero::kInt : Zero::kFloat;
  return QM_OK;
}

}  // namespace

qm_status GgufStorable(qm_call* call, const Params& p, int64_t in) {
  if (p.bits != 4 && p.bits != 8) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "gguf files hold 4 and 8 bits, not ", p.bits,
                    "; use bits: 4 or 8 with group_size: 32, or export as quantmill");
  }
  if (p.group_size != kBlock || p.axis != 1 || in % kBlock != 0) {
    return qm::Fail(
        call, QM_FAILED_PRECONDITION, "gguf files hold groups of 32 input channels; ",
        "this weight has ", in, " of them and ",
        p.axis != 1 ? std::string("groups of outputs") : qm::StrCat("group_size ", p.group_size),
        "; use group_size: 32 (Q8_0: bits 8, symmetric; Q4_0: bits 4, symmetric; ",
        "Q4_1: bits 4, not symmetric)");
  }
  if (p.zero == Zero::kFloat || p.zero == Zero::kQ8 || p.q8_scale) {
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "gguf files hold no zero points as floats and no ",
                    "scales as bytes; quantize with ptq or gptq, or export as hqq or quantmill");
  }
  if (p.bits == 8 && p.zero != Zero::kNone) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "gguf files with 8 bits (Q8_0) hold no zero ",
                    "points; use symmetric: true, or bits: 4");
  }
  return QM_OK;
}

qm_status ToGguf(qm_call* call, const char* layer, const Weight& w, Emitter* emitter,
                 std::string* config) {
  if (w.group_index != nullptr) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer,
                    " has a group_index, which gguf ",
                    "files cannot hold; quantize with static_groups, or export as quantmill");
  }
  if (w.scale_dtype != QM_F16) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, " has scales that are not F16; ",
                    "gguf files hold F16 ones; export as quantmill");
  }
  const BlockType& type = TypeOf(w.params);
  const int64_t row_bytes = w.groups * type.bytes;
  qm_tensor weight;
  QM_TRY(emitter->Emit("weight", kHost, QM_U8, {w.out, row_bytes}, &weight));
  std::vector<uint8_t> codes(w.in);
  for (int64_t o = 0; o < w.out; ++o) {
    UnpackCodes(w.codes + o * w.words, w.in, w.params.bits, codes.data());
    uint8_t* row = static_cast<uint8_t*>(weight.data) + o * row_bytes;
    for (int64_t g = 0; g < w.groups; ++g) {
      uint8_t* block = row + g * type.bytes;
      const ScaleZero pair = LoadScaleZero(w, o, g);
      PutHalf(pair.scale, block);
      if (type.header == 4) {
        const float m = -pair.scale * pair.zero;
        if (!(std::fabs(m) <= 65504.0f)) {
          return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, ", row ", o, ", group ", g,
                          ": the minimum ", m, " is beyond F16; export as quantmill");
        }
        PutHalf(m, block + 2);
      }
      PutCodes(type, codes.data() + g * kBlock, block);
    }
  }
  *config = qm::StrCat("{\"type\":\"", type.name, "\"}");
  return QM_OK;
}

qm_status FromGguf(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
                   const char* config_json, qm_packed* out) {
  const BlockType* type = FindType(config_json);
  if (type == nullptr) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "gguf parameters '", config_json,
                    "' name none of Q8_0, Q4_0 and Q4_1");
  }
  const qm_tensor* weight = FindTensor(tensors, count, "weight");
  if (weight == nullptr || weight->dtype != QM_U8 || weight->rank != 2 || !IsContiguous(*weight) ||
      weight->shape[0] < 1 || weight->shape[1] < 1 || weight->shape[1] % type->bytes != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has no tensor 'weight' of whole ",
                    "blocks, U8 [out, n * ", type->bytes, "]");
  }
  const int64_t n = weight->shape[0], groups = weight->shape[1] / type->bytes, k = groups * kBlock;
  Unpacked unpacked;
  QM_TRY(
      Unpack(call, layer, static_cast<const uint8_t*>(weight->data), *type, n * groups, &unpacked));
  const Params params = {type->bits, kBlock, unpacked.kind};
  const int64_t words = qm::AffineWordsPerRow(k, type->bits);
  Emitter emitter(call);
  qm_tensor codes, scale, zero;
  QM_TRY(emitter.Emit("codes", kHost, QM_I32, {n, words}, &codes));
  for (int64_t o = 0; o < n; ++o) {
    for (int64_t word = 0; word < words; ++word) {
      static_cast<uint32_t*>(codes.data)[o * words + word] =
          qm::PackWord(unpacked.codes.data() + o * k, k, type->bits, word);
    }
  }
  QM_TRY(emitter.Emit("scale", kHost, QM_F16, {n, groups}, &scale));
  for (int64_t g = 0; g < n * groups; ++g) {
    static_cast<qm::F16*>(scale.data)[g] = qm::ToF16(unpacked.scale[g]);
  }
  if (params.zero == Zero::kInt) {
    QM_TRY(emitter.Emit("zero", kHost, QM_U8, {n, groups}, &zero));
    for (int64_t g = 0; g < n * groups; ++g) {
      static_cast<uint8_t*>(zero.data)[g] = static_cast<uint8_t>(unpacked.zero[g]);
    }
  } else if (params.zero == Zero::kFloat) {
    QM_TRY(emitter.Emit("zero", kHost, QM_F32, {n, groups}, &zero));
    std::memcpy(zero.data, unpacked.zero.data(), static_cast<size_t>(Bytes(zero)));
  }
  return emitter.FinishPacked(ParamsJson(params), n, k, out);
}

}  // namespace affine
