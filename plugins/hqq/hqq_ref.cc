// HQQ on the CPU: the reference of hqq.cu.
//
//   1. per group: range -> scale (rounded as stored), low
//   2. per tile of 32 groups: all iterations; error of each = sum |W - (q - z) S|
//   3. the iteration at which the error of the whole layer stops falling
//   4. per group: iterations up to and including that one -> zero point (rounded as stored)
//   5. per row: codes
//
// Iterations run twice, so that nothing has to be kept of every iteration but a number per tile.
// Sums over a group: axis 1, 32 lanes joined pairwise; axis 0, one after the other, 32 groups side
// by side. Errors of a tile are added in f64: axis 1 in the order of the groups, axis 0 pairwise.
#include <algorithm>
#include <atomic>
#include <limits>

#include "hqq_math.h"

#if defined(__x86_64__)
#define QM_FLATTEN_AVX2 __attribute__((target("avx2"), flatten))
#endif

namespace quantmill::hqq {
namespace {

constexpr int kLanes = 32;
constexpr qm_device kHost = {QM_CPU, 0};

template <class T>
T JoinLanes(T* lane) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

// The groups a layer is cut into, with scale and zero point of each; `zero` holds the low end of
// the range until step 4.
struct Work {
  const Options* options;
  const std::vector<Step>* steps;
  qm::TensorView<const float> weight;
  float* scale;
  float* zero;
};

// ---- axis 1: a group is contiguous -------------------------------------------------------------
struct Sums {
  float error, zero;
};

// One iteration over a group of n weights: sum of |R|, and of q - (W - E) / S.
inline Sums IterateRow(const float* w, int64_t n, const Group& g, const Step& step, float norm,
                       float max_code) {
  float error[kLanes] = {}, zero[kLanes] = {}, largest[kLanes] = {};
  const auto one = [&](int64_t i, int l) {
    const float q = Encode(w[i], g, max_code);
    const float r = w[i] - (q - g.zero) * g.scale;
    const float size = r < 0.0f ? -r : r;
    error[l] += size;
    zero[l] += q - w[i] * g.inverse;
    largest[l] = size > largest[l] ? size : largest[l];
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) one(i + l, l);
  }
  for (int l = 0; i + l < n; ++l) one(i + l, l);
  bool shrinks = false;
  for (const float size : largest) shrinks |= size > step.threshold;
  if (shrinks) {  // rare: E is 0 for errors below the threshold
    std::fill(zero, zero + kLanes, 0.0f);
    for (i = 0; i < n; ++i) {
      const float q = Encode(w[i], g, max_code);
      const float r = w[i] - (q - g.zero) * g.scale;
      zero[i % kLanes] += q - (w[i] - Shrink(r, step, norm)) * g.inverse;
    }
  }
  return {JoinLanes(error), JoinLanes(zero)};
}

inline void SolveTileOfRows(const Work& work, int64_t tile, int count, double* errors) {
  const Options& o = *work.options;
  const int64_t end = std::min(o.groups(), (tile + 1) * kTileGroups), per_row = o.scale_columns();
  const float n = static_cast<float>(o.group_size), max_code = o.max_code();
  for (int64_t j = tile * kTileGroups; j < end; ++j) {
    const float* w = work.weight.row(j / per_row) + j % per_row * o.group_size;
    Group g = {work.scale[j], 1.0f / work.scale[j], 0.0f};
    g.zero = FirstZero(work.zero[j], g.inverse);
    for (int t = 0; t < count; ++t) {
      const Sums sums = IterateRow(w, o.group_size, g, (*work.steps)[t], o.norm, max_code);
      if (errors != nullptr) errors[t] += static_cast<double>(sums.error);
      g.zero = BoundZero(sums.zero / n);
    }
    if (errors == nullptr) work.zero[j] = g.zero;
  }
}

// ---- axis 0: a tile is 32 neighbouring columns -------------------------------------------------
// values[i][l] = weight i of group first + l; 0 beyond the last group.
inline void GatherTile(const Work& work, int64_t tile, float* values) {
  const Options& o = *work.options;
  const int64_t rows = o.scale_rows(), first = tile * kTileGroups;
  const int used = static_cast<int>(std::min<int64_t>(kTileGroups, o.groups() - first));
  for (int64_t i = 0; i < o.group_size; ++i) {
    for (int l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      values[i * kLanes + l] =
          l < used ? work.weight(j / o.in_features + i * rows, j % o.in_features) : 0.0f;
    }
  }
}

struct Columns {
  float scale[kLanes], inverse[kLanes], zero[kLanes];
  Group At(int l) const { return {scale[l], inverse[l], zero[l]}; }
};

inline void IterateColumns(const float* values, int64_t n, const Step& step, float norm,
                           float max_code, Columns* c, float* error) {
  float zero[kLanes] = {}, largest[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int l = 0; l < kLanes; ++l) {
      const float w = values[i * kLanes + l];
      const float q = Encode(w, c->At(l), max_code);
      const float r = w - (q - c->zero[l]) * c->scale[l];
      const float size = r < 0.0f ? -r : r;
      error[l] += size;
      zero[l] += q - w * c->inverse[l];
      largest[l] = size > largest[l] ? size : largest[l];
    }
  }
  bool shrinks = false;
  for (const float size : largest) shrinks |= size > step.threshold;
  if (shrinks) {
    std::fill(zero, zero + kLanes, 0.0f);
    for (int64_t i = 0; i < n * kLanes; ++i) {
      const int l = static_cast<int>(i % kLanes);
      const float q = Encode(values[i], c->At(l), max_code);
      const float r = values[i] - (q - c->zero[l]) * c->scale[l];
      zero[l] += q - (values[i] - Shrink(r, step, norm)) * c->inverse[l];
    }
  }
  for (int l = 0; l < kLanes; ++l) c->zero[l] = BoundZero(zero[l] / static_cast<float>(n));
}

inline void SolveTileOfColumns(const Work& work, int64_t tile, int count, float* values,
                               double* errors) {
  const Options& o = *work.options;
  const int64_t first = tile * kTileGroups;
  const int used = static_cast<int>(std::min<int64_t>(kTileGroups, o.groups() - first));
  GatherTile(work, tile, values);
  Columns c;
  for (int l = 0; l < kLanes; ++l) {
    c.scale[l] = l < used ? work.scale[first + l] : 1.0f;
    c.inverse[l] = 1.0f / c.scale[l];
    c.zero[l] = l < used ? FirstZero(work.zero[first + l], c.inverse[l]) : 0.0f;
  }
  for (int t = 0; t < count; ++t) {
    float error[kLanes] = {};
    IterateColumns(values, o.group_size, (*work.steps)[t], o.norm, o.max_code(), &c, error);
    double wide[kLanes];
    for (int l = 0; l < kLanes; ++l) wide[l] = l < used ? static_cast<double>(error[l]) : 0.0;
    if (errors != nullptr) errors[t] = JoinLanes(wide);
  }
  for (int l = 0; errors == nullptr && l < used; ++l) work.zero[first + l] = c.zero[l];
}

// ---- both --------------------------------------------------------------------------------------
// `count` iterations over the groups of a tile. errors: one sum per iteration is added (set, for
// axis 0), and the zero points stay as they were; null: the zero points are kept. values: room for
// 32 group_size floats, axis 0 only.
inline void SolveTile(const Work& work, int64_t tile, int count, float* values, double* errors) {
  if (work.options->axis == 1) return SolveTileOfRows(work, tile, count, errors);
  SolveTileOfColumns(work, tile, count, values, errors);
}

// Step 1 for the groups of a tile.
inline void StartTile(const Work& work, int64_t tile) {
  const Options& o = *work.options;
  const int64_t end = std::min(o.groups(), (tile + 1) * kTileGroups);
  const int64_t columns = o.scale_columns(), rows = o.scale_rows();
  for (int64_t j = tile * kTileGroups; j < end; ++j) {
    const float* w = o.axis == 1 ? work.weight.row(j / columns) + j % columns * o.group_size
                                 : &work.weight(j / columns, j % columns);
    const int64_t stride = o.axis == 1 ? 1 : rows * work.weight.stride(0);
    float low = w[0], high = w[0];
    for (int64_t i = 1; i < o.group_size; ++i) {
      const float x = w[i * stride];
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    const Start start = StartOfGroup(low, high, o);
    work.scale[j] = start.scale;
    work.zero[j] = start.low;
  }
}

// Step 5 for one row.
inline void EncodeRow(const Work& work, int64_t row, uint8_t* codes, int32_t* words) {
  const Options& o = *work.options;
  const float* w = work.weight.row(row);
  const float max_code = o.max_code();
  for (int64_t i = 0; i < o.in_features; ++i) {
    const int64_t j = o.GroupOf(row, i);
    const Group g = {work.scale[j], 1.0f / work.scale[j], work.zero[j]};
    codes[i] = static_cast<uint8_t>(Encode(w[i], g, max_code));
  }
  for (int64_t k = 0; k < o.words(); ++k) {
    words[k] = static_cast<int32_t>(qm::PackWord(codes, o.in_features, o.bits, k));
  }
}

#if defined(__x86_64__)
QM_FLATTEN_AVX2 void SolveTileAvx2(const Work& work, int64_t tile, int count, float* values,
                                   double* errors) {
  SolveTile(work, tile, count, values, errors);
}
QM_FLATTEN_AVX2 void EncodeRowAvx2(const Work& work, int64_t row, uint8_t* codes, int32_t* words) {
  EncodeRow(work, row, codes, words);
}
#endif

struct Routines {
  void (*solve)(const Work&, int64_t, int, float*, double*) = SolveTile;
  void (*encode)(const Work&, int64_t, uint8_t*, int32_t*) = EncodeRow;
};

Routines ChooseRoutines() {
  Routines routines;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) routines = {SolveTileAvx2, EncodeRowAvx2};
#endif
  return routines;
}

qm_status CheckFinite(qm_call* call, const Work& work) {
  const Options& o = *work.options;
  for (int64_t row = 0; row < o.out_features; ++row) {
    const int64_t column = qm::FirstNotFinite(work.weight.row(row), o.in_features);
    if (column >= 0) return qm::NotFinite(call, row, column);
  }
  return QM_OK;
}

// Scales become bytes with a range per block, and what these stand for.
void QuantizeScales(const Options& o, float* scale, const Result& out) {
  uint8_t* bytes = static_cast<uint8_t*>(out.scale.data);
  float* ranges = static_cast<float*>(out.scale_range.data);
  for (int64_t b = 0; b < o.scale_blocks(); ++b) {
    const int64_t begin = b * kScaleBlock, end = std::min(o.groups(), begin + kScaleBlock);
    const auto [low, high] = std::minmax_element(scale + begin, scale + end);
    const Range range = ByteRange(*low, *high);
    ranges[2 * b] = range.step;
    ranges[2 * b + 1] = range.offset;
    for (int64_t j = begin; j < end; ++j) {
      bytes[j] = ToByte(scale[j], range);
      scale[j] = FromByte(bytes[j], range);
    }
  }
}

void StoreScales(const Options& o, float* scale, const Result& out) {
  if (o.quantize_scale) return QuantizeScales(o, scale, out);
  for (int64_t j = 0; j < o.groups(); ++j) {
    qm::StoreScale(out.scale.data, o.scale_dtype, j, scale[j]);
  }
}

// Zero points as they are stored; `zero` becomes what the stored ones stand for.
void StoreZeros(const Options& o, float* zero, const Result& out) {
  if (!o.quantize_zero) {
    for (int64_t j = 0; j < o.groups(); ++j) {
      zero[j] = RoundZero(zero[j], o.scale_dtype);
      qm::StoreScale(out.zero.data, o.scale_dtype, j, zero[j]);
    }
    return;
  }
  const auto [low, high] = std::minmax_element(zero, zero + o.groups());
  const Range range = ByteRange(*low, *high);
  static_cast<float*>(out.zero_range.data)[0] = range.step;
  static_cast<float*>(out.zero_range.data)[1] = range.offset;
  uint8_t* bytes = static_cast<uint8_t*>(out.zero.data);
  for (int64_t j = 0; j < o.groups(); ++j) {
    bytes[j] = ToByte(zero[j], range);
    zero[j] = FromByte(bytes[j], range);
  }
}

// Step 3: iterations to run. errors: [tiles, iterations].
int IterationsToRun(const Options& o, const double* errors) {
  double best = std::numeric_limits<double>::infinity();
  for (int t = 0; t < o.iterations; ++t) {
    double lanes[kTotalLanes] = {};
    for (int64_t tile = 0; tile < o.tiles(); ++tile) {
      lanes[tile % kTotalLanes] += errors[tile * o.iterations + t];
    }
    for (int half = kTotalLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    if (!(lanes[0] < best)) return t + 1;
    best = lanes[0];
  }
  return o.iterations;
}

// Tiles a task takes: some thousand weights.
int64_t TilesPerTask(const Options& o) {
  return std::max<int64_t>(1, 8192 / (kTileGroups * o.group_size));
}

qm_status Solve(qm_call* call, const Work& work, const Routines& run, int count, double* errors) {
  const Options& o = *work.options;
  std::atomic<int64_t> done{0};
  return qm::ParallelFor(
      call, o.tiles(), TilesPerTask(o), [&](int64_t begin, int64_t end, int32_t) {
        std::vector<float> values(o.axis == 0 ? kLanes * o.group_size : 0);
        for (int64_t tile = begin; tile < end; ++tile) {
          double* sums = errors == nullptr ? nullptr : errors + tile * o.iterations;
          if (sums != nullptr) std::fill(sums, sums + o.iterations, 0.0);
          run.solve(work, tile, count, values.data(), sums);
        }
        const int64_t finished = done += end - begin;
        const double part = static_cast<double>(finished) / static_cast<double>(o.tiles());
        return qm::Progress(call, 0.5 * part + (errors == nullptr ? 0.5 : 0.0));
      });
}

}  // namespace

uint64_t CpuScratchBytes(const Options& o) {
  const auto padded = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  return static_cast<uint64_t>(2 * padded(o.groups() * 4) + padded(o.tiles() * o.iterations * 8));
}

qm_status QuantizeCpu(qm_call* call, const Options& o, const std::vector<Step>& steps,
                      qm::TensorView<const float> weight, const Result& out) {
  const Routines run = ChooseRoutines();
  Work work = {&o, &steps, weight, nullptr, nullptr};
  QM_TRY(CheckFinite(call, work));
  double* errors = nullptr;
  QM_TRY(qm::Scratch(call, kHost, o.groups(), "scales", &work.scale));
  QM_TRY(qm::Scratch(call, kHost, o.groups(), "zero points", &work.zero));
  QM_TRY(qm::Scratch(call, kHost, o.tiles() * o.iterations, "errors", &errors));
  QM_TRY(
      qm::ParallelFor(call, o.tiles(), TilesPerTask(o), [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t tile = begin; tile < end; ++tile) StartTile(work, tile);
        return QM_OK;
      }));
  StoreScales(o, work.scale, out);
  if (o.iterations > 0) QM_TRY(Solve(call, work, run, o.iterations, errors));
  QM_TRY(Solve(call, work, run, IterationsToRun(o, errors), nullptr));
  StoreZeros(o, work.zero, out);
  return qm::ParallelFor(call, o.out_features, 16, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<uint8_t> codes(o.in_features);
    for (int64_t row = begin; row < end; ++row) {
      run.encode(work, row, codes.data(), static_cast<int32_t*>(out.codes.data) + row * o.words());
    }
    return qm::Progress(call, -1.0);
  });
}

}  // namespace quantmill::hqq
