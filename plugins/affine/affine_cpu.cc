// Dequantizing and few-row products on the CPU.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "affine.h"

namespace affine {
namespace {

// Rows of the weight handled at once by a thread: enough to hide the cost of a task, few enough to
// balance two threads on a small layer.
constexpr int64_t kRowGrain = 32;

std::atomic<int> g_level_limit{static_cast<int>(CpuLevel::kAvx512)};

CpuLevel Level() {
  static const CpuLevel detected = DetectCpuLevel();
  return std::min(detected, static_cast<CpuLevel>(g_level_limit.load()));
}

float Convert(float value, float) { return value; }
qm::F16 Convert(float value, qm::F16) { return qm::ToF16(value); }
qm::BF16 Convert(float value, qm::BF16) { return qm::ToBF16(value); }

// Codes of at most 4 bits: the 2^bits values a group can take are computed once and looked up.
template <class T>
void DequantizeByTable(const Weight& w, int64_t row, const uint8_t* codes, T* out) {
  const int values = 1 << w.params.bits;
  T table[16];
  for (int64_t g = 0; g < w.groups; ++g) {
    const ScaleZero sz = LoadScaleZero(w, row, g);
    for (int c = 0; c < values; ++c) {
      table[c] = Convert(sz.scale * (static_cast<float>(c) - sz.zero), T{});
    }
    const int64_t end = (g + 1) * w.group_size;
    for (int64_t i = g * w.group_size; i < end; ++i) out[i] = table[codes[i]];
  }
}

template <class T>
qm_status DequantizeTo(qm_call* call, const Weight& w, T* out) {
  const bool table =
      w.params.bits <= 4 && w.group_size >= 16 && w.group_index == nullptr && w.params.axis == 1;
  return qm::ParallelFor(call, w.out, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<uint8_t> codes(w.in);
    std::vector<float> values(table ? 0 : w.in);
    std::vector<T> sorted(w.permutation != nullptr ? w.in : 0);
    for (int64_t o = begin; o < end; ++o) {
      T* row = w.permutation != nullptr ? sorted.data() : out + o * w.in;
      if (table) {
        UnpackCodes(w.codes + o * w.words, w.in, w.params.bits, codes.data());
        DequantizeByTable(w, o, codes.data(), row);
      } else {
        DequantizeRow(w, o, codes.data(), values.data());
        for (int64_t i = 0; i < w.in; ++i) row[i] = Convert(values[i], T{});
      }
      for (int64_t i = 0; w.permutation != nullptr && i < w.in; ++i) {
        out[o * w.in + w.permutation[i]] = row[i];
      }
    }
    return QM_OK;
  });
}

// Unpacks each row and multiplies: any parameters, any machine.
qm_status MatmulByRows(qm_call* call, const Weight& w, const float* x, int64_t m, float* y) {
  return qm::ParallelFor(call, w.out, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<uint8_t> codes(w.in);
    std::vector<float> row(w.in);
    for (int64_t o = begin; o < end; ++o) {
      DequantizeRow(w, o, codes.data(), row.data());
      for (int64_t r = 0; r < m; ++r) {
        // Sixteen sums in a fixed order let the compiler use vectors without reordering.
        float sums[16] = {};
        const float* xr = x + r * w.in;
        int64_t i = 0;
        for (; i + 16 <= w.in; i += 16) {
          for (int l = 0; l < 16; ++l) sums[l] += row[i + l] * xr[i + l];
        }
        for (; i < w.in; ++i) sums[i % 16] += row[i] * xr[i];
        float sum = 0;
        for (float part : sums) sum += part;
        y[r * w.out + o] = sum;
      }
    }
    return QM_OK;
  });
}

// Groups along the outputs: the rows that share their scales are taken together, and x is
// multiplied by the scales once for all of them: y[o] = sum (code - zero) (scale x).
qm_status MatmulByColumnGroups(qm_call* call, const Weight& w, const float* x, int64_t m,
                               float* y) {
  return qm::ParallelFor(call, w.groups, 1, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<uint8_t> codes(w.in);
    std::vector<float> zero(w.in), scaled(m * w.in);
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t i = 0; i < w.in; ++i) {
        const ScaleZero sz = LoadScaleZeroAt(w, g * w.in + i);
        zero[i] = sz.zero;
        for (int64_t r = 0; r < m; ++r) scaled[r * w.in + i] = sz.scale * x[r * w.in + i];
      }
      for (int64_t o = g; o < w.out; o += w.groups) {
        UnpackCodes(w.codes + o * w.words, w.in, w.params.bits, codes.data());
        for (int64_t r = 0; r < m; ++r) {
          float sums[16] = {};
          const float* xr = scaled.data() + r * w.in;
          int64_t i = 0;
          for (; i + 16 <= w.in; i += 16) {
            for (int l = 0; l < 16; ++l) {
              sums[l] += (static_cast<float>(codes[i + l]) - zero[i + l]) * xr[i + l];
            }
          }
          for (; i < w.in; ++i) sums[i % 16] += (static_cast<float>(codes[i]) - zero[i]) * xr[i];
          float sum = 0;
          for (float part : sums) sum += part;
          y[r * w.out + o] = sum;
        }
      }
    }
    return QM_OK;
  });
}

// x[row][block][field][lane] from x[row][in]; see FusedInput.
void Rearrange(const float* x, int64_t in, int fields, int lanes, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (int j = 0; j < fields; ++j) {
      for (int l = 0; l < lanes; ++l) {
        const int64_t i = (b * lanes + l) * fields + j;
        *out++ = i < in ? x[i] : 0.0f;
      }
    }
  }
}

qm_status MatmulFused(qm_call* call, const Weight& w, CpuLevel level, const float* x, int64_t m,
                      float* y) {
  const int fields = 32 / w.params.bits;
  const int lanes = level == CpuLevel::kAvx512 ? 16 : 8;
  FusedInput input;
  input.weight = &w;
  input.blocks = (w.words + lanes - 1) / lanes;
  input.row_stride = input.blocks * fields * lanes;
  input.uniform = w.groups == 1 || w.group_size % (fields * lanes) == 0;
  float* rearranged;
  int32_t* group;
  QM_TRY(qm::Scratch(call, kHost, m * input.row_stride, "rearranged activations", &rearranged));
  QM_TRY(qm::Scratch(call, kHost, input.blocks * lanes, "group numbers", &group));
  for (int64_t r = 0; r < m; ++r) {
    Rearrange(x + r * w.in, w.in, fields, lanes, input.blocks, rearranged + r * input.row_stride);
  }
  for (int64_t i = 0; i < input.blocks * lanes; ++i) {
    group[i] = static_cast<int32_t>(std::min(i * fields / w.group_size, w.groups - 1));
  }
  input.x = rearranged;
  input.group = group;
  return qm::ParallelFor(call, w.out, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
    // 16 floats beyond the last group may be loaded, never used.
    std::vector<float> scale(w.groups + 16), zero(w.groups + 16);
    const auto rows = level == CpuLevel::kAvx512 ? FusedRowsAvx512 : FusedRowsAvx2;
    rows(input, static_cast<int>(m), begin, end, scale.data(), zero.data(), y, w.out);
    return QM_OK;
  });
}

}  // namespace

CpuLevel DetectCpuLevel() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
    return CpuLevel::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kPortable;
}

void LimitCpuLevel(CpuLevel limit) { g_level_limit = static_cast<int>(limit); }

qm_status CpuDequantize(qm_call* call, const Weight& w, qm_tensor* out) {
  switch (out->dtype) {
    case QM_F32:
      return DequantizeTo(call, w, static_cast<float*>(out->data));
    case QM_F16:
      return DequantizeTo(call, w, static_cast<qm::F16*>(out->data));
    default:
      return DequantizeTo(call, w, static_cast<qm::BF16*>(out->data));
  }
}

qm_status CpuPrepack(qm_call* call, const qm_packed& packed, const Weight& w, qm_packed* out) {
  if (w.group_index == nullptr) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "the format's own layout is the best one here");
  }
  Emitter emitter(call);
  qm_tensor permutation, codes;
  QM_TRY(emitter.Emit("permutation", kHost, QM_I32, {w.in}, &permutation));
  int32_t* order = static_cast<int32_t*>(permutation.data);
  if (!SortByGroup(w.group_index, w.in, w.groups, order)) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "groups of unequal size cannot be sorted");
  }
  QM_TRY(emitter.Emit("codes", kHost, QM_I32, {w.out, w.words}, &codes));
  QM_TRY(qm::ParallelFor(call, w.out, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<uint8_t> row(w.in);
    for (int64_t o = begin; o < end; ++o) {
      UnpackCodes(w.codes + o * w.words, w.in, w.params.bits, row.data());
      uint32_t* words = static_cast<uint32_t*>(codes.data) + o * w.words;
      for (int64_t k = 0; k < w.words; ++k) {
        words[k] = qm::PackWord(row.data(), w.in, w.params.bits, k, order);
      }
    }
    return QM_OK;
  }));
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const qm_named_tensor& named = packed.tensors[i];
    const bool per_group =
        std::strncmp(named.name, "scale", 5) == 0 || std::strncmp(named.name, "zero", 4) == 0;
    if (per_group) QM_TRY(emitter.EmitCopy(named.name, named.tensor));
  }
  return emitter.FinishPacked(ParamsJson(w.params), w.out, w.in, out);
}

qm_status CpuMatmul(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  const int64_t m = x.shape[0];
  if (x.dtype != QM_F32 || m > kCpuMaxRows) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "on the CPU products with packed weights are served ",
                    "for up to ", kCpuMaxRows, " f32 rows");
  }
  const float* input = static_cast<const float*>(x.data);
  if (w.permutation != nullptr) {
    float* gathered;
    QM_TRY(qm::Scratch(call, kHost, m * w.in, "permuted activations", &gathered));
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t i = 0; i < w.in; ++i) {
        gathered[r * w.in + i] = input[r * w.in + w.permutation[i]];
      }
    }
    input = gathered;
  }
  float* output = static_cast<float*>(y->data);
  if (w.params.axis == 0) return MatmulByColumnGroups(call, w, input, m, output);
  const CpuLevel level = Level();
  const bool fused = level != CpuLevel::kPortable && w.params.bits != 3 && w.params.bits != 1 &&
                     w.group_index == nullptr &&
                     (w.groups == 1 || w.group_size % (32 / w.params.bits) == 0);
  return fused ? MatmulFused(call, w, level, input, m, output)
               : MatmulByRows(call, w, input, m, output);
}

}  // namespace affine
