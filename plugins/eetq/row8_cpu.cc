// Dequantizing and products on the CPU.
//
//   y[r, o] = scale[o] * sum_i x[r, i] * value(code[o, i])
//
// Rows of codes are widened in registers, sixteen at a time, and meet up to four rows of x. The
// sums run in sixteen lanes in a fixed order, so that the result depends neither on the threads nor
// on the instructions used. A weight that quantizes activations serves any number of rows: beyond a
// few, widened rows of codes and rounded rows of x go through the host's matrix product, whose sums
// of whole numbers are exact as long as they stay below 2^24.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "quantmill/sdk/float8.hpp"
#include "row8.h"

namespace eetq {
namespace {

constexpr int kLanes = 16;
// Rows of the weight handled at once by a thread.
constexpr int64_t kRowGrain = 32;
// Rows of the weight and of x widened at once for the host's product: bounds of the scratch memory.
constexpr int64_t kTileOutputs = 512, kTileRows = 1024;

std::atomic<bool> g_portable{false};

struct Int8Value {
  static float Of(uint8_t code) { return static_cast<float>(static_cast<int8_t>(code)); }
};
struct E4M3Value {
  static float Of(uint8_t code) { return qm::FromE4M3(code); }
};
struct E5M2Value {
  static float Of(uint8_t code) { return qm::FromE5M2(code); }
};

float Convert(float value, float) { return value; }
qm::F16 Convert(float value, qm::F16) { return qm::ToF16(value); }
qm::BF16 Convert(float value, qm::BF16) { return qm::ToBF16(value); }

template <class Value, class T>
inline void WidenRow(const uint8_t* codes, int64_t n, float scale, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Convert(scale * Value::Of(codes[i]), T{});
}

// sums[r] = sum over i of x[r, i] * value(codes[i]) for M rows of x.
template <class Value, int M>
inline void DotRows(const uint8_t* codes, const float* x, int64_t n, float* sums) {
  float lanes[M][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    float values[kLanes];
    for (int l = 0; l < kLanes; ++l) values[l] = Value::Of(codes[i + l]);
    for (int r = 0; r < M; ++r) {
      for (int l = 0; l < kLanes; ++l) lanes[r][l] += values[l] * x[r * n + i + l];
    }
  }
  for (int l = 0; i + l < n; ++l) {
    for (int r = 0; r < M; ++r) lanes[r][l] += Value::Of(codes[i + l]) * x[r * n + i + l];
  }
  for (int r = 0; r < M; ++r) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[r][l] += lanes[r][l + half];
    }
    sums[r] = lanes[r][0];
  }
}

template <class Value>
inline void DotAllRows(const uint8_t* codes, const float* x, int64_t m, int64_t n, float* sums) {
  for (; m >= 4; m -= 4, x += 4 * n, sums += 4) DotRows<Value, 4>(codes, x, n, sums);
  if (m == 3) DotRows<Value, 3>(codes, x, n, sums);
  if (m == 2) DotRows<Value, 2>(codes, x, n, sums);
  if (m == 1) DotRows<Value, 1>(codes, x, n, sums);
}

using DotFn = void (*)(const uint8_t* codes, const float* x, int64_t m, int64_t n, float* sums);
using WidenFn = void (*)(const uint8_t* codes, int64_t n, float scale, float* out);

template <class Value>
void DotPortable(const uint8_t* codes, const float* x, int64_t m, int64_t n, float* sums) {
  DotAllRows<Value>(codes, x, m, n, sums);
}
template <class Value>
void WidenPortable(const uint8_t* codes, int64_t n, float scale, float* out) {
  WidenRow<Value>(codes, n, scale, out);
}
#if defined(__x86_64__)
template <class Value>
__attribute__((target("avx2"), flatten)) void DotAvx2(const uint8_t* codes, const float* x,
                                                      int64_t m, int64_t n, float* sums) {
  DotAllRows<Value>(codes, x, m, n, sums);
}
template <class Value>
__attribute__((target("avx2"), flatten)) void WidenAvx2(const uint8_t* codes, int64_t n,
                                                        float scale, float* out) {
  WidenRow<Value>(codes, n, scale, out);
}
#endif

struct Loops {
  DotFn dot;
  WidenFn widen;
};

template <class Value>
Loops LoopsOf() {
#if defined(__x86_64__)
  if (!g_portable && __builtin_cpu_supports("avx2")) return {DotAvx2<Value>, WidenAvx2<Value>};
#endif
  return {DotPortable<Value>, WidenPortable<Value>};
}

Loops ChooseLoops(Code code) {
  if (code == Code::kInt8) return LoopsOf<Int8Value>();
  return code == Code::kE4M3 ? LoopsOf<E4M3Value>() : LoopsOf<E5M2Value>();
}

float ScaleOf(const Weight& w, int64_t row) {
  return qm::LoadScale(w.scale, w.scale_dtype, w.params.per_tensor ? 0 : row);
}

template <class T>
qm_status DequantizeTo(qm_call* call, const Weight& w, T* out) {
  const WidenFn widen = ChooseLoops(w.params.code).widen;
  return qm::ParallelFor(call, w.out, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<float> row(static_cast<size_t>(w.in));
    for (int64_t o = begin; o < end; ++o) {
      widen(w.codes + o * w.in, w.in, ScaleOf(w, o), row.data());
      for (int64_t i = 0; i < w.in; ++i) out[o * w.in + i] = Convert(row[i], T{});
    }
    return QM_OK;
  });
}

// x_scale: per row of x, or null for 1.
qm_status FewRows(qm_call* call, const Weight& w, const float* x, const float* x_scale, int64_t m,
                  float* y) {
  const DotFn dot = ChooseLoops(w.params.code).dot;
  return qm::ParallelFor(call, w.out, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<float> sums(static_cast<size_t>(m));
    for (int64_t o = begin; o < end; ++o) {
      dot(w.codes + o * w.in, x, m, w.in, sums.data());
      const float scale = ScaleOf(w, o);
      for (int64_t r = 0; r < m; ++r) {
        y[r * w.out + o] = (x_scale != nullptr ? sums[r] * x_scale[r] : sums[r]) * scale;
      }
    }
    return QM_OK;
  });
}

// One row of x as whole numbers or E4M3 values, and their scale (FORMATS.md, activations). NaN as
// the scale, and zeros, if a value is not finite.
float QuantizeRow(Code code, const float* x, int64_t n, float* out) {
  if (qm::FirstNotFinite(x, n) >= 0) {
    std::fill(out, out + n, 0.0f);
    return std::numeric_limits<float>::quiet_NaN();
  }
  float scale = qm::LargestMagnitude(x, n) / (code == Code::kInt8 ? 127.5f : 448.0f);
  if (scale == 0.0f) scale = 1.0f;
  if (code == Code::kInt8) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = qm::RoundHalfEven(std::min(std::max(x[i] / scale, -128.0f), 127.0f));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = qm::FromE4M3(qm::ToE4M3(x[i] / scale));
  }
  return scale;
}

// Many rows of quantized activations through the host's product, a tile of outputs at a time.
qm_status ManyRows(qm_call* call, const qm_host_linalg& linalg, const Weight& w, const float* x,
                   const float* x_scale, int64_t m, float* widened, float* y) {
  const WidenFn widen = ChooseLoops(w.params.code).widen;
  for (int64_t first = 0; first < w.out; first += kTileOutputs) {
    const int64_t outputs = std::min(kTileOutputs, w.out - first);
    float scale[kTileOutputs];
    for (int64_t o = 0; o < outputs; ++o) scale[o] = ScaleOf(w, first + o);
    QM_TRY(qm::ParallelFor(call, outputs, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
      for (int64_t o = begin; o < end; ++o) {
        widen(w.codes + (first + o) * w.in, w.in, 1.0f, widened + o * w.in);
      }
      return QM_OK;
    }));
    const qm_tensor a = qm::MakeMatrix(x, m, w.in, w.in, kHost);
    const qm_tensor b = qm::MakeMatrix(widened, outputs, w.in, w.in, kHost);
    qm_tensor c = qm::MakeMatrix(y + first, m, outputs, w.out, kHost);
    QM_TRY(linalg.gemm(call, 0, 1, 1.0, &a, &b, 0.0, &c));
    QM_TRY(qm::ParallelFor(call, m, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
      for (int64_t r = begin; r < end; ++r) {
        float* row = y + r * w.out + first;
        for (int64_t o = 0; o < outputs; ++o) row[o] = row[o] * x_scale[r] * scale[o];
      }
      return QM_OK;
    }));
  }
  return QM_OK;
}

qm_status QuantizedActivations(qm_call* call, const Weight& w, const float* x, int64_t m,
                               float* y) {
  const qm_host_linalg* linalg = m > kCpuMaxRows ? qm::HostLinalg(call) : nullptr;
  const int64_t tile = std::min(m, kTileRows);
  float *rounded, *x_scale, *widened = nullptr;
  QM_TRY(qm::Scratch(call, kHost, tile * w.in, "rounded activations", &rounded));
  QM_TRY(qm::Scratch(call, kHost, tile, "scales of activations", &x_scale));
  if (linalg != nullptr) {
    QM_TRY(
        qm::Scratch(call, kHost, std::min(kTileOutputs, w.out) * w.in, "widened codes", &widened));
  }
  for (int64_t first = 0; first < m; first += tile) {
    const int64_t rows = std::min(tile, m - first);
    QM_TRY(qm::ParallelFor(call, rows, 8, [&](int64_t begin, int64_t end, int32_t) {
      for (int64_t r = begin; r < end; ++r) {
        x_scale[r] = QuantizeRow(w.params.code, x + (first + r) * w.in, w.in, rounded + r * w.in);
      }
      return QM_OK;
    }));
    float* target = y + first * w.out;
    QM_TRY(linalg != nullptr ? ManyRows(call, *linalg, w, rounded, x_scale, rows, widened, target)
                             : FewRows(call, w, rounded, x_scale, rows, target));
  }
  return QM_OK;
}

}  // namespace

void UsePortableLoops(bool portable) { g_portable = portable; }

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

qm_status CpuMatmul(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  const int64_t m = x.shape[0];
  if (x.dtype != QM_F32) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "on the CPU products are served for f32 rows");
  }
  const float* input = static_cast<const float*>(x.data);
  float* output = static_cast<float*>(y->data);
  if (w.params.activations) return QuantizedActivations(call, w, input, m, output);
  if (m > kCpuMaxRows) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "on the CPU products with packed weights are served ",
                    "for up to ", kCpuMaxRows, " rows");
  }
  return FewRows(call, w, input, nullptr, m, output);
}

}  // namespace eetq
