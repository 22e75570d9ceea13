// Array operations of GPTQ on the CPU: the reference of gptq.cu.
//
// A block of columns is solved for 32 rows at a time: their part of W is copied into a tile
// [columns, 32], so that the update of a column by another is a loop over 32 neighbours, which
// vectorises. Tiles are independent, hence the result does not depend on the threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "gptq.h"

namespace quantmill::gptq {
namespace {

constexpr int kTileRows = 32;
constexpr int64_t kRowsPerTask = 32;

struct RowTile {
  int64_t first_row;
  int rows;  // of kTileRows
};

// Rows past `tile.rows` hold zeros and the scale 1; nothing of them is stored.
inline void SolveTile(const BlockTask& task, const Options& options,
                      const qm::AffineTensors& groups, RowTile tile) {
  alignas(64) float w[kMaxBlockSize][kTileRows] = {};
  alignas(64) float scale[kTileRows], zero[kTileRows], err[kTileRows], q[kTileRows];
  const int64_t width = task.end - task.begin, group_count = options.shape.groups();
  const qm_dtype scale_dtype = options.shape.rule.scale_dtype;
  const uint8_t* zeros = static_cast<const uint8_t*>(groups.zero.data);
  const float max_code = options.shape.rule.max_code();
  for (int r = 0; r < kTileRows; ++r) {
    scale[r] = 1.0f;
    zero[r] = 0.5f * (max_code + 1.0f);
  }
  for (int r = 0; r < tile.rows; ++r) {
    const float* row = task.work + (tile.first_row + r) * task.cols + task.begin;
    for (int64_t i = 0; i < width; ++i) w[i][r] = row[i];
  }
  int32_t group = -1;
  for (int64_t i = 0; i < width; ++i) {
    const int64_t column = task.begin + i;
    if (task.group_of[column] != group) {
      group = task.group_of[column];
      for (int r = 0; r < tile.rows; ++r) {
        const int64_t at = (tile.first_row + r) * group_count + group;
        scale[r] = qm::LoadScale(groups.scale.data, scale_dtype, at);
        if (zeros != nullptr) zero[r] = static_cast<float>(zeros[at]);
      }
    }
    const float d = task.u != nullptr ? task.u[column * task.cols + column] : 1.0f;
    float codes[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      const qm::AffineGroup g = {scale[r], zero[r]};
      codes[r] = qm::EncodeAffine(w[i][r], g, max_code);
      q[r] = qm::DecodeAffine(codes[r], g);
      err[r] = (w[i][r] - q[r]) / d;
    }
    if (task.u != nullptr) {
      const float* u = task.u + column * task.cols + task.begin;
      if (task.p == nullptr) {
        for (int64_t j = i + 1; j < width; ++j) {
          for (int r = 0; r < kTileRows; ++r) w[j][r] -= err[r] * u[j];
        }
      } else {
        const float* p = task.p + column * task.cols + task.begin;
        for (int64_t j = i + 1; j < width; ++j) {
          for (int r = 0; r < kTileRows; ++r) w[j][r] -= err[r] * u[j] - w[i][r] * p[j];
        }
        std::memcpy(task.q_t + i * task.rows + tile.first_row, q, tile.rows * sizeof(float));
      }
      std::memcpy(task.err_t + i * task.rows + tile.first_row, err, tile.rows * sizeof(float));
    }
    for (int r = 0; r < kTileRows; ++r) w[i][r] = codes[r];
  }
  for (int r = 0; r < tile.rows; ++r) {
    uint8_t* codes = task.codes + (tile.first_row + r) * task.cols + task.begin;
    for (int64_t i = 0; i < width; ++i) codes[i] = static_cast<uint8_t>(w[i][r]);
  }
}

inline void FindGroupsOfRow(const GroupTask& task, const Options& options, int64_t row,
                            const qm::AffineTensors& out) {
  const qm::AffineShape& shape = options.shape;
  const float* w = task.source + row * task.row_stride + task.first_column;
  uint8_t* zeros = static_cast<uint8_t*>(out.zero.data);
  const int64_t width = shape.group_width();
  for (int64_t g = 0; g < task.count; ++g) {
    const float* importance =
        task.importance != nullptr ? task.importance + task.first_column + g * width : nullptr;
    const qm::AffineGroup group =
        qm::FindAffineGroup(w + g * width, width, shape.rule, options.search, importance);
    const int64_t at = row * shape.groups() + task.first_group + g;
    qm::StoreScale(out.scale.data, shape.rule.scale_dtype, at, group.scale);
    if (zeros != nullptr) zeros[at] = static_cast<uint8_t>(group.zero);
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"), flatten)) void SolveTileAvx2(const BlockTask& task,
                                                            const Options& options,
                                                            const qm::AffineTensors& groups,
                                                            RowTile tile) {
  SolveTile(task, options, groups, tile);
}
__attribute__((target("avx2"), flatten)) void FindGroupsOfRowAvx2(const GroupTask& task,
                                                                  const Options& options,
                                                                  int64_t row,
                                                                  const qm::AffineTensors& out) {
  FindGroupsOfRow(task, options, row, out);
}
#endif

bool HasAvx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

class CpuKernels final : public Kernels {
 public:
  explicit CpuKernels(qm_call* call) : call_(call) {}

  qm_status Upload(const void* host, int64_t bytes, void* device) override {
    std::memcpy(device, host, static_cast<size_t>(bytes));
    return QM_OK;
  }

  qm_status ReadDiagonal(qm::TensorView<const float> m, float* host, bool* finite) override {
    const int64_t n = m.shape(0);
    for (int64_t i = 0; i < n; ++i) host[i] = m.row(i)[i];
    std::atomic<bool> good{true};
    QM_TRY(qm::ParallelFor(call_, n, kRowsPerTask, [&](int64_t begin, int64_t end, int32_t) {
      for (int64_t i = begin; i < end; ++i) {
        if (qm::FirstNotFinite(m.row(i), n) >= 0) good = false;
      }
      return QM_OK;
    }));
    *finite = good;
    return QM_OK;
  }

  qm_status PermuteSquare(qm::TensorView<const float> m, const ColumnOrder& order,
                          float* out) override {
    const int64_t n = m.shape(0);
    return ForRows(n, [&](int64_t i) {
      const float* row = m.row(order.channel != nullptr ? order.channel[i] : i);
      CopyColumns(row, n, order.channel, out + i * n);
    });
  }

  qm_status SetDiagonal(float* m, int64_t n, const float* diagonal) override {
    for (int64_t i = 0; i < n; ++i) m[i * n + i] = diagonal[i];
    return QM_OK;
  }

  qm_status KeepAboveDiagonal(float* m, int64_t n, float factor) override {
    return ForRows(n, [&](int64_t i) {
      float* row = m + i * n;
      std::fill(row, row + i + 1, 0.0f);
      for (int64_t j = i + 1; j < n; ++j) row[j] *= factor;
    });
  }

  qm_status FindNotFinite(qm::TensorView<const float> weight, int64_t* index) override {
    constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
    const int64_t cols = weight.shape(1);
    std::atomic<int64_t> first{kNone};
    QM_TRY(ForRows(weight.shape(0), [&](int64_t r) {
      const int64_t column = qm::FirstNotFinite(weight.row(r), cols);
      if (column < 0) return;
      const int64_t at = r * cols + column;
      int64_t seen = first.load();
      while (at < seen && !first.compare_exchange_weak(seen, at)) {
      }
    }));
    *index = first == kNone ? -1 : first.load();
    return QM_OK;
  }

  qm_status GatherColumns(qm::TensorView<const float> weight, const ColumnOrder& order,
                          float* out) override {
    const int64_t cols = weight.shape(1);
    return ForRows(weight.shape(0), [&](int64_t r) {
      float* row = out + r * cols;
      CopyColumns(weight.row(r), cols, order.channel, row);
      if (order.dead == nullptr) return;
      for (int64_t j = 0; j < cols; ++j) {
        if (order.dead[order.channel != nullptr ? order.channel[j] : j] != 0) row[j] = 0.0f;
      }
    });
  }

  qm_status FindGroups(const GroupTask& task, const Options& options,
                       const qm::AffineTensors& out) override {
    const auto find = Choose(FindGroupsOfRow, kFindGroupsAvx2);
    return ForRows(task.rows, [&](int64_t r) { find(task, options, r, out); });
  }

  qm_status SolveBlock(const BlockTask& task, const Options& options,
                       const qm::AffineTensors& groups) override {
    const auto solve = Choose(SolveTile, kSolveTileAvx2);
    return qm::ParallelFor(call_, task.rows, kTileRows, [&](int64_t begin, int64_t end, int32_t) {
      solve(task, options, groups, RowTile{begin, static_cast<int>(end - begin)});
      return QM_OK;
    });
  }

  qm_status Pack(const uint8_t* codes, const qm::AffineShape& shape, const ColumnOrder& order,
                 const qm::AffineTensors& out) override {
    const int64_t cols = shape.in_features;
    const int64_t words = qm::AffineWordsPerRow(cols, shape.rule.bits);
    return ForRows(shape.out_features, [&](int64_t r) {
      int32_t* packed = static_cast<int32_t*>(out.codes.data) + r * words;
      for (int64_t w = 0; w < words; ++w) {
        packed[w] = static_cast<int32_t>(
            qm::PackWord(codes + r * cols, cols, shape.rule.bits, w, order.position));
      }
    });
  }

 private:
#if defined(__x86_64__)
  static constexpr auto kFindGroupsAvx2 = FindGroupsOfRowAvx2;
  static constexpr auto kSolveTileAvx2 = SolveTileAvx2;
#else
  static constexpr auto kFindGroupsAvx2 = FindGroupsOfRow;
  static constexpr auto kSolveTileAvx2 = SolveTile;
#endif
  template <class Function>
  static Function Choose(Function plain, Function avx2) {
    static const bool has_avx2 = HasAvx2();
    return has_avx2 ? avx2 : plain;
  }

  template <class Body>
  qm_status ForRows(int64_t rows, const Body& body) {
    return qm::ParallelFor(call_, rows, kRowsPerTask, [&](int64_t begin, int64_t end, int32_t) {
      for (int64_t r = begin; r < end; ++r) body(r);
      return QM_OK;
    });
  }

  static void CopyColumns(const float* from, int64_t n, const int32_t* channel, float* to) {
    if (channel == nullptr) {
      std::copy(from, from + n, to);
      return;
    }
    for (int64_t j = 0; j < n; ++j) to[j] = from[channel[j]];
  }

  qm_call* call_;
};

}  // namespace

std::unique_ptr<Kernels> MakeCpuKernels(qm_call* call) {
  return std::make_unique<CpuKernels>(call);
}

}  // namespace quantmill::gptq
