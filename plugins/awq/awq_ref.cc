// The operations of awq.h on the CPU: the reference of awq.cu, which gives the same bits (both are
// compiled without contraction).
//
// A group's range is taken from the scaled values, zero always inside; the scale is rounded to its
// stored type before codes are chosen (sdk/affine_int.hpp). Sums over a row run over 32 lanes
// (element i in lane i % 32) joined pairwise; sums over rows are made of parts of kRowsPerSum in
// f32, added up in f64. The loops are written to be vectorised.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "awq.h"

namespace quantmill::awq {
namespace {

constexpr int64_t kRowsPerTask = 8;

struct Range {
  float low = 0.0f, high = 0.0f;
};

// Of n values; 0 lies inside.
inline Range RangeOf(const float* v, int64_t n) {
  float low[kLanes] = {}, high[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      low[l] = v[i + l] < low[l] ? v[i + l] : low[l];
      high[l] = v[i + l] > high[l] ? v[i + l] : high[l];
    }
  }
  for (int l = 0; i + l < n; ++l) {
    low[l] = v[i + l] < low[l] ? v[i + l] : low[l];
    high[l] = v[i + l] > high[l] ? v[i + l] : high[l];
  }
  Range range;
  for (int l = 0; l < kLanes; ++l) {
    range.low = low[l] < range.low ? low[l] : range.low;
    range.high = high[l] > range.high ? high[l] : range.high;
  }
  return range;
}

inline qm::AffineGroup GroupOf(Range range, const qm::AffineRule& rule) {
  qm::WidenRange(rule.symmetric, &range.low, &range.high);
  return qm::GroupForRange(range.low, range.high, rule);
}

// v = w s.
inline void Scaled(const float* w, const float* scale, int64_t n, float* v) {
  if (scale == nullptr) {
    std::copy(w, w + n, v);
  } else {
    for (int64_t i = 0; i < n; ++i) v[i] = w[i] * scale[i];
  }
}

inline void FakeQuantGroup(const float* w, const float* scale, const Rounding& rounding,
                           bool difference, float* v, float* out) {
  const int64_t n = rounding.width;
  Scaled(w, scale, n, v);
  const qm::AffineGroup group = GroupOf(RangeOf(v, n), rounding.rule);
  const float most = rounding.rule.max_code();
  for (int64_t i = 0; i < n; ++i) {
    out[i] = qm::DecodeAffine(qm::EncodeAffine(v[i], group, most), group);
  }
  if (scale != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] /= scale[i];
  }
  if (difference) {
    for (int64_t i = 0; i < n; ++i) out[i] -= w[i];
  }
}

inline void ClipGroup(const float* w, const float* scale, const Rounding& rounding,
                      const ClipGrid& grid, float* v, float* delta, float* maximum) {
  const int64_t n = rounding.width;
  Scaled(w, scale, n, v);
  const Range range = RangeOf(v, n);
  const float largest = range.high > -range.low ? range.high : -range.low;
  *maximum = largest;
  const float most = rounding.rule.max_code();
  for (int32_t t = 0; t < grid.steps; ++t, delta += n) {
    const float limit = largest * grid.factor(t);
    const Range clipped = {range.low > -limit ? range.low : -limit,
                           range.high < limit ? range.high : limit};
    const qm::AffineGroup group = GroupOf(clipped, rounding.rule);
    for (int64_t i = 0; i < n; ++i) {
      float x = v[i] > -limit ? v[i] : -limit;
      x = x < limit ? x : limit;
      delta[i] = qm::DecodeAffine(qm::EncodeAffine(x, group, most), group) - v[i];
    }
    if (scale != nullptr) {
      for (int64_t i = 0; i < n; ++i) delta[i] /= scale[i];
    }
  }
}

inline float Dot(const float* a, const float* b, int64_t n) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i + l < n; ++l) lane[l] += a[i + l] * b[i + l];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

inline float LargestMagnitude(const float* w, int64_t n) {
  const Range range = RangeOf(w, n);
  return range.high > -range.low ? range.high : -range.low;
}

void RoundRow(const float* w, const qm::AffineShape& shape, int64_t row, uint8_t* codes,
              const qm::AffineTensors& out) {
  const int64_t width = shape.group_width(), groups = shape.groups();
  const float most = shape.rule.max_code();
  for (int64_t g = 0; g < groups; ++g) {
    const float* v = w + g * width;
    const qm::AffineGroup group = GroupOf(RangeOf(v, width), shape.rule);
    qm::StoreScale(out.scale.data, shape.rule.scale_dtype, row * groups + g, group.scale);
    if (out.zero.data != nullptr) {
      static_cast<uint8_t*>(out.zero.data)[row * groups + g] = static_cast<uint8_t>(group.zero);
    }
    for (int64_t i = 0; i < width; ++i) {
      codes[g * width + i] = static_cast<uint8_t>(qm::EncodeAffine(v[i], group, most));
    }
  }
  const int64_t words = qm::AffineWordsPerRow(shape.in_features, shape.rule.bits);
  int32_t* packed = static_cast<int32_t*>(out.codes.data) + row * words;
  for (int64_t k = 0; k < words; ++k) {
    packed[k] = static_cast<int32_t>(qm::PackWord(codes, shape.in_features, shape.rule.bits, k));
  }
}

}  // namespace

qm_status FakeQuantCpu(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                       bool difference, float* out) {
  return qm::ParallelFor(call, w.count, kRowsPerTask, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<float> v(static_cast<size_t>(rounding.width));
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0; first < w.columns; first += rounding.width) {
        FakeQuantGroup(w.data + row * w.stride + first, scale == nullptr ? nullptr : scale + first,
                       rounding, difference, v.data(), out + row * w.columns + first);
      }
    }
    return QM_OK;
  });
}

qm_status ClipDeltasCpu(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                        const ClipGrid& grid, float* delta, float* maximum) {
  const int64_t width = rounding.width, groups = w.columns / width;
  return qm::ParallelFor(call, w.count, kRowsPerTask, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<float> v(static_cast<size_t>(width));
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        ClipGroup(w.data + row * w.stride + g * width,
                  scale == nullptr ? nullptr : scale + g * width, rounding, grid, v.data(),
                  delta + (g * w.count + row) * grid.steps * width, maximum + row * groups + g);
      }
    }
    return QM_OK;
  });
}

qm_status RowDotsCpu(qm_call* call, const float* a, const float* b, int64_t rows, int64_t columns,
                     float* sums) {
  return qm::ParallelFor(call, rows, 64, [&](int64_t begin, int64_t end, int32_t) {
    for (int64_t row = begin; row < end; ++row) {
      sums[row] = Dot(a + row * columns, b + row * columns, columns);
    }
    return QM_OK;
  });
}

qm_status AddRelativeCpu(qm_call* call, const Rows& w, int64_t width, std::vector<double>* sums) {
  return qm::ParallelFor(call, w.columns / width, 1, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<float> part(static_cast<size_t>(width));
    for (int64_t g = begin; g < end; ++g) {
      double* total = sums->data() + g * width;
      for (int64_t first = 0; first < w.count; first += kRowsPerSum) {
        std::fill(part.begin(), part.end(), 0.0f);
        for (int64_t row = first; row < std::min(w.count, first + kRowsPerSum); ++row) {
          const float* v = w.data + row * w.stride + g * width;
          const float divisor = LargestMagnitude(v, width) + 1e-6f;
          for (int64_t i = 0; i < width; ++i) part[i] += std::abs(v[i]) / divisor;
        }
        for (int64_t i = 0; i < width; ++i) total[i] += static_cast<double>(part[i]);
      }
    }
    return QM_OK;
  });
}

qm_status RoundCpu(qm_call* call, const qm::AffineShape& shape, qm::TensorView<const float> weight,
                   const qm::AffineTensors& out) {
  const int64_t rows = shape.out_features, columns = shape.in_features;
  // Index of the first bad weight, so that the message does not depend on the threads.
  std::atomic<int64_t> bad{std::numeric_limits<int64_t>::max()};
  std::atomic<int64_t> done{0};
  QM_TRY(qm::ParallelFor(call, rows, kRowsPerTask, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<uint8_t> codes(static_cast<size_t>(columns));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t column = qm::FirstNotFinite(weight.row(row), columns);
      if (column < 0) {
        RoundRow(weight.row(row), shape, row, codes.data(), out);
        continue;
      }
      const int64_t index = row * columns + column;
      int64_t seen = bad.load();
      while (index < seen && !bad.compare_exchange_weak(seen, index)) {
      }
    }
    const int64_t finished = done += end - begin;
    return qm::Progress(call, static_cast<double>(finished) / static_cast<double>(rows));
  }));
  if (bad == std::numeric_limits<int64_t>::max()) return QM_OK;
  return qm::NotFinite(call, bad / columns, bad % columns);
}

}  // namespace quantmill::awq
