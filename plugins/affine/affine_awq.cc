// Checkpoint layout of AWQ, version "gemm": AutoAWQ awq/modules/linear/gemm.py (tensors),
// awq/utils/packing_utils.py (order of the nibbles).
//
// qweight I32 [in, out/8], qzeros I32 [groups, out/8], scales F16 [groups, out]. Nibble p of word c
// holds output 8 c + kOrder[p]; zero points are stored as they are.
#include <cstdio>
#include <cstring>
#include <vector>

#include "affine.h"

namespace affine {
namespace {

constexpr int kPerWord = 8;
constexpr int kOrder[kPerWord] = {0, 2, 4, 6, 1, 3, 5, 7};

// One word from `value(j)`, the values of its 8 outputs.
template <class Value>
uint32_t PackOutputs(Value&& value) {
  uint32_t word = 0;
  for (int p = 0; p < kPerWord; ++p) word |= static_cast<uint32_t>(value(kOrder[p])) << (4 * p);
  return word;
}

template <class Store>
void UnpackOutputs(uint32_t word, Store&& store) {
  for (int p = 0; p < kPerWord; ++p) store(kOrder[p], (word >> (4 * p)) & 15u);
}

struct AwqConfig {
  int bits = 0;
  int64_t group_size = 0;
  bool zero_point = true;
};

qm_status ParseAwqConfig(qm_call* call, const char* json, AwqConfig* out) {
  char zero_point[6] = {};
  long long group_size = 0;
  if (std::sscanf(json, "{\"bits\":%d,\"group_size\":%lld,\"zero_point\":%5[a-z]}", &out->bits,
                  &group_size, zero_point) != 3) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "awq parameters '", json, "' are not of the form ",
                    "{\"bits\":4,\"group_size\":128,\"zero_point\":true}");
  }
  out->group_size = group_size;
  out->zero_point = std::strcmp(zero_point, "true") == 0;
  return QM_OK;
}

// zeros [out, groups] from the file's words; whether all are the middle.
bool ReadZeros(const uint32_t* qzeros, int64_t out, int64_t groups, std::vector<uint8_t>* zeros) {
  bool middle = true;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < out / kPerWord; ++c) {
      UnpackOutputs(qzeros[g * (out / kPerWord) + c], [&](int j, uint32_t zero) {
        (*zeros)[static_cast<size_t>((c * kPerWord + j) * groups + g)] = static_cast<uint8_t>(zero);
        middle = middle && zero == 8;
      });
    }
  }
  return middle;
}

// codes [out, in/8] as the format has them.
void ReadCodes(const uint32_t* qweight, int64_t out, int64_t in, uint32_t* codes) {
  const int64_t words = qm::AffineWordsPerRow(in, 4);
  std::memset(codes, 0, static_cast<size_t>(out * words) * sizeof(uint32_t));
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t c = 0; c < out / kPerWord; ++c) {
      UnpackOutputs(qweight[i * (out / kPerWord) + c], [&](int j, uint32_t code) {
        codes[(c * kPerWord + j) * words + i / kPerWord] |= code << (4 * (i % kPerWord));
      });
    }
  }
}

}  // namespace

qm_status AwqStorable(qm_call* call, const Params& p, int64_t out) {
  QM_TRY(NeedIntegerZeros(call, "awq", p));
  if (p.bits != 4) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "awq files hold 4-bit codes only, not ", p.bits,
                    " bits; export as gptq, compressed-tensors or quantmill");
  }
  if (out % kPerWord != 0) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "awq files need out features in multiples of ",
                    kPerWord, "; this linear has ", out,
                    "; leave it dense or export as compressed-tensors");
  }
  return QM_OK;
}

qm_status ToAwq(qm_call* call, const char* layer, const Weight& w, Emitter* emitter,
                std::string* config) {
  if (w.group_index != nullptr) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, " has groups in act-order, ",
                    "which awq files cannot express; quantize with static_groups: true, or export ",
                    "as gptq");
  }
  if (w.scale_dtype != QM_F16) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "layer ", layer, " has scales that are not F16, ",
                    "which awq files hold; export as compressed-tensors or quantmill");
  }
  const int64_t columns = w.out / kPerWord;
  qm_tensor qweight, qzeros, scales;
  QM_TRY(emitter->Emit("qweight", kHost, QM_I32, {w.in, columns}, &qweight));
  QM_TRY(emitter->Emit("qzeros", kHost, QM_I32, {w.groups, columns}, &qzeros));
  QM_TRY(emitter->Emit("scales", kHost, QM_F16, {w.groups, w.out}, &scales));
  auto* words = static_cast<uint32_t*>(qweight.data);
  for (int64_t i = 0; i < w.in; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      words[i * columns + c] = PackOutputs(
          [&](int j) { return qm::UnpackCode(w.codes + (c * kPerWord + j) * w.words, 4, i); });
    }
  }
  auto* zeros = static_cast<uint32_t*>(qzeros.data);
  auto* steps = static_cast<uint16_t*>(scales.data);
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t c = 0; c < columns; ++c) {
      zeros[g * columns + c] = PackOutputs([&](int j) -> uint32_t {
        const int64_t at = (c * kPerWord + j) * w.groups + g;
        return w.zero == nullptr ? 8u : static_cast<const uint8_t*>(w.zero)[at];
      });
    }
    for (int64_t o = 0; o < w.out; ++o) {
      steps[g * w.out + o] = static_cast<const uint16_t*>(w.scale)[o * w.groups + g];
    }
  }
  *config = qm::StrCat("{\"bits\":4,\"group_size\":", w.params.group_size,
                       ",\"zero_point\":", w.zero == nullptr ? "false" : "true", "}");
  return QM_OK;
}

qm_status FromAwq(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
                  const char* config_json, qm_packed* out) {
  AwqConfig config;
  QM_TRY(ParseAwqConfig(call, config_json, &config));
  if (config.bits != 4) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "layer ", layer, " has ", config.bits,
                    " bits; awq files of version gemm have 4");
  }
  const qm_tensor *qweight, *qzeros, *scales;
  QM_TRY(Need(call, layer, tensors, count, "qweight", 2, {QM_I32}, &qweight));
  QM_TRY(Need(call, layer, tensors, count, "qzeros", 2, {QM_I32}, &qzeros));
  QM_TRY(Need(call, layer, tensors, count, "scales", 2, {QM_F16, QM_BF16, QM_F32}, &scales));
  const int64_t k = qweight->shape[0], n = qweight->shape[1] * kPerWord;
  if (k < 1 || n < 1) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensor 'qweight' of layer ", layer, " is empty");
  }
  Params p{4, config.group_size, Zero::kInt};
  QM_TRY(CheckParams(call, layer, p, k));
  const int64_t groups = p.group_size == -1 ? 1 : k / p.group_size;
  QM_TRY(NeedShape(call, layer, "qzeros", *qzeros, groups, n / kPerWord));
  QM_TRY(NeedShape(call, layer, "scales", *scales, groups, n));

  std::vector<uint8_t> zeros(static_cast<size_t>(n * groups));
  const bool middle = ReadZeros(static_cast<const uint32_t*>(qzeros->data), n, groups, &zeros);
  if (!config.zero_point && middle) p.zero = Zero::kNone;
  Emitter emitter(call);
  qm_tensor codes, scale, zero;
  QM_TRY(emitter.Emit("codes", kHost, QM_I32, {n, qm::AffineWordsPerRow(k, 4)}, &codes));
  ReadCodes(static_cast<const uint32_t*>(qweight->data), n, k, static_cast<uint32_t*>(codes.data));
  QM_TRY(emitter.Emit("scale", kHost, scales->dtype, {n, groups}, &scale));
  Transpose(scales->data, groups, n, qm::ElementSize(scales->dtype), scale.data);
  if (p.zero == Zero::kInt) {
    QM_TRY(emitter.Emit("zero", kHost, QM_U8, {n, groups}, &zero));
    std::memcpy(zero.data, zeros.data(), zeros.size());
  }
  return emitter.FinishPacked(ParamsJson(p), n, k, out);
}

}  // namespace affine
