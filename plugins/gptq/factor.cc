// From statistics to the matrices the solver walks over: order of columns, damping, factor,
// asymmetric correction.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "gptq.h"

namespace quantmill::gptq {
namespace {

constexpr double kDampStep = 0.01;    // added after each failed factorization, up to 1
constexpr int kFloorAttempts = 6;     // then the diagonal is raised, by 10 times more each time
constexpr double kFirstFloor = 1e-6;  // of the largest diagonal entry
constexpr int64_t kPanel = 512;       // columns of the correction made at once

// Positions sorted by falling diagonal; equal entries keep their order.
std::vector<int32_t> DescendingOrder(const std::vector<float>& diagonal) {
  std::vector<int32_t> channel(diagonal.size());
  std::iota(channel.begin(), channel.end(), 0);
  std::stable_sort(channel.begin(), channel.end(),
                   [&](int32_t a, int32_t b) { return diagonal[a] > diagonal[b]; });
  return channel;
}

template <class T>
qm_status UploadVector(qm_call* call, Kernels& kernels, const std::vector<T>& values,
                       const char* what, const T** out) {
  T* device = nullptr;
  const int64_t count = static_cast<int64_t>(values.size());
  QM_TRY(qm::Scratch(call, call->device, count, what, &device));
  *out = device;
  return kernels.Upload(values.data(), count * static_cast<int64_t>(sizeof(T)), device);
}

// Zero diagonal entries mean dead inputs: they become 1, and the channels are marked.
qm_status ChooseOrder(qm_call* call, Kernels& kernels, const Options& options,
                      std::vector<float>* diagonal, Factor* out) {
  const size_t n = diagonal->size();
  std::vector<uint8_t> dead(n, 0);
  bool any_dead = false;
  for (size_t j = 0; j < n; ++j) {
    if ((*diagonal)[j] != 0.0f) continue;
    (*diagonal)[j] = 1.0f;
    dead[j] = 1;
    any_dead = true;
  }
  if (any_dead) QM_TRY(UploadVector(call, kernels, dead, "dead channels", &out->order.dead));
  if (!options.act_order) return QM_OK;
  out->channel = DescendingOrder(*diagonal);
  std::vector<int32_t> position(n);
  std::vector<float> ordered(n);
  for (size_t j = 0; j < n; ++j) {
    position[out->channel[j]] = static_cast<int32_t>(j);
    ordered[j] = (*diagonal)[out->channel[j]];
  }
  *diagonal = ordered;
  QM_TRY(UploadVector(call, kernels, out->channel, "column order", &out->order.channel));
  return UploadVector(call, kernels, position, "column order", &out->order.position);
}

// Tries damp, damp + 0.01, ... below 1. *found is false when none works.
qm_status FactorWithDamping(qm_call* call, const qm_host_linalg& linalg, const qm_tensor& h,
                            double first_damp, qm_tensor* u, bool* found, double* used) {
  *found = false;
  for (int step = 0;; ++step) {
    const double damp = first_damp + step * kDampStep;
    if (step > 0 && damp >= 1.0) return QM_OK;
    const qm_status status = linalg.inverse_cholesky(call, &h, damp, u);
    if (status == QM_OK) {
      *found = true;
      *used = damp;
      return QM_OK;
    }
    if (status != QM_FAILED_PRECONDITION) return status;
    QM_TRY(qm::Progress(call, -1.0));
  }
}

// As above; then with a diagonal raised by a floor.
qm_status FactorWithRecovery(qm_call* call, Kernels& kernels, const Options& options,
                             const qm_host_linalg& linalg, const std::vector<float>& diagonal,
                             float* h, float* u, bool* found) {
  const int64_t n = static_cast<int64_t>(diagonal.size());
  const qm_tensor ht = qm::MakeMatrix(h, n, n, n, call->device);
  qm_tensor ut = qm::MakeMatrix(u, n, n, n, call->device);
  double used = 0.0;
  QM_TRY(FactorWithDamping(call, linalg, ht, options.damp, &ut, found, &used));
  if (*found && used != options.damp) {
    qm::Log(call, qm::Severity::kWarning, "the Hessian needed damp ", used, " instead of ",
            options.damp, " to be positive definite");
  }
  float largest = 0.0f;
  for (const float d : diagonal) largest = std::max(largest, std::fabs(d));
  double floor = kFirstFloor * largest;
  float* raised_device = nullptr;
  for (int attempt = 0; attempt < kFloorAttempts && !*found; ++attempt, floor *= 10.0) {
    std::vector<float> raised(diagonal);
    const float f = static_cast<float>(floor);
    for (float& d : raised) d = std::max(d + f, f);
    if (raised_device == nullptr) {
      QM_TRY(qm::Scratch(call, call->device, n, "diagonal", &raised_device));
    }
    QM_TRY(kernels.Upload(raised.data(), n * static_cast<int64_t>(sizeof(float)), raised_device));
    QM_TRY(kernels.SetDiagonal(h, n, raised_device));
    QM_TRY(FactorWithDamping(call, linalg, ht, options.damp, &ut, found, &used));
    if (*found) {
      qm::Log(call, qm::Severity::kWarning, "the Hessian needed its diagonal raised by ", f,
              " and damp ", used, " to be positive definite");
    }
  }
  return QM_OK;
}

// Part [r0, r1) x [c0, c1) of a square matrix of width n.
qm_tensor Part(const float* m, int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
               qm_device device) {
  return qm::MakeMatrix(m + r0 * n + c0, r1 - r0, c1 - c0, n, device);
}

// p = alpha triu(D u^T, 1) u with D = cross in solving order; its columns of dead inputs are 0 by
// nature. u is upper, so for columns [a, b) only these parts count:
//   t[0..b, a..b) = D[0..b, a..n) u[a..b, a..n)^T        p[0..b, a..b) = t[0..b, 0..b) u[0..b,
//   a..b)
// which is a sixth and a third of the full products. `buffer` (which held the Hessian) becomes D
// and then p; what it holds below the diagonal is never read.
qm_status MakeCorrection(qm_call* call, Kernels& kernels, const Options& options,
                         const qm_host_linalg& linalg, qm::TensorView<const float> cross,
                         float* buffer, Factor* out) {
  const int64_t n = cross.shape(0);
  const qm_device device = call->device;
  float* product = nullptr;
  QM_TRY(qm::Scratch(call, device, n * n, "the asymmetric correction", &product));
  QM_TRY(kernels.PermuteSquare(cross, out->order, buffer));
  for (int64_t a = 0; a < n; a += kPanel) {
    const int64_t b = std::min(a + kPanel, n);
    const qm_tensor d = Part(buffer, n, 0, b, a, n, device);
    const qm_tensor u = Part(out->u, n, a, b, a, n, device);
    qm_tensor t = Part(product, n, 0, b, a, b, device);
    QM_TRY(linalg.gemm(call, 0, 1, 1.0, &d, &u, 0.0, &t));
  }
  QM_TRY(kernels.KeepAboveDiagonal(product, n, static_cast<float>(options.asymmetric_error)));
  for (int64_t a = 0; a < n; a += kPanel) {
    QM_TRY(qm::Progress(call, -1.0));
    const int64_t b = std::min(a + kPanel, n);
    const qm_tensor t = Part(product, n, 0, b, 0, b, device);
    const qm_tensor u = Part(out->u, n, 0, b, a, b, device);
    qm_tensor p = Part(buffer, n, 0, b, a, b, device);
    QM_TRY(linalg.gemm(call, 0, 0, 1.0, &t, &u, 0.0, &p));
  }
  out->p = buffer;
  return QM_OK;
}

// 1 / u_ii^2 by position and by channel.
qm_status MakeImportance(qm_call* call, Kernels& kernels, const float* u, int64_t n, Factor* out) {
  std::vector<float> by_position(static_cast<size_t>(n));
  const qm_tensor matrix = qm::MakeMatrix(u, n, n, n, call->device);
  qm::TensorView<const float> view;
  QM_TRY(qm::ViewMatrix<float>(call, matrix, "the factor", call->device, n, n, &view));
  bool finite = true;
  QM_TRY(kernels.ReadDiagonal(view, by_position.data(), &finite));
  for (float& value : by_position) value = 1.0f / (value * value);
  QM_TRY(UploadVector(call, kernels, by_position, "importance", &out->importance));
  out->channel_importance = out->importance;
  if (out->channel.empty()) return QM_OK;
  std::vector<float> by_channel(static_cast<size_t>(n));
  for (int64_t j = 0; j < n; ++j) by_channel[out->channel[j]] = by_position[j];
  return UploadVector(call, kernels, by_channel, "importance", &out->channel_importance);
}

qm_status FindMatrix(qm_call* call, const qm_stats* stats, const char* id, int64_t n,
                     qm::TensorView<const float>* out) {
  const qm_tensor* tensor = qm::FindStat(stats, id);
  if (tensor == nullptr) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "the statistic \"", id,
                    "\" is missing; gptq needs calibration data");
  }
  return qm::ViewMatrix<float>(call, *tensor, id, call->device, n, n, out);
}

}  // namespace

uint64_t FactorBytes(const Options& options) {
  const uint64_t n = static_cast<uint64_t>(options.shape.in_features);
  const uint64_t squares = options.asymmetric_error > 0.0 ? 3 : 2;
  constexpr uint64_t kVectors = 8;  // order, its inverse, diagonals, importance twice
  constexpr uint64_t kRounding = uint64_t{16} * 256;
  return squares * n * n * sizeof(float) + n * (kVectors * sizeof(float) + 1) + kRounding;
}

qm_status MakeFactor(qm_call* call, Kernels& kernels, const Options& options, const qm_stats* stats,
                     Factor* out) {
  const int64_t n = options.shape.in_features;
  *out = {};
  if (stats != nullptr && stats->row_count == 0) {
    qm::Log(call, qm::Severity::kWarning,
            "no calibration row reached this linear; its weights are rounded to nearest");
    return QM_OK;
  }
  qm::TensorView<const float> hessian, cross;
  QM_TRY(FindMatrix(call, stats, QM_STAT_HESSIAN, n, &hessian));
  const bool correct = options.asymmetric_error > 0.0;
  if (correct) QM_TRY(FindMatrix(call, stats, QM_STAT_CROSS, n, &cross));

  std::vector<float> diagonal(static_cast<size_t>(n)), unused(static_cast<size_t>(n));
  bool finite = true, cross_finite = true;
  QM_TRY(kernels.ReadDiagonal(hessian, diagonal.data(), &finite));
  if (correct) QM_TRY(kernels.ReadDiagonal(cross, unused.data(), &cross_finite));
  if (!finite || !cross_finite) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "the statistic \"",
                    finite ? QM_STAT_CROSS : QM_STAT_HESSIAN,
                    "\" holds NaN or infinity: an activation overflowed; calibrate in f32");
  }
  if (std::all_of(diagonal.begin(), diagonal.end(), [](float d) { return d == 0.0f; })) {
    qm::Log(call, qm::Severity::kWarning,
            "all calibration inputs of this linear are 0; its weights are rounded to nearest");
    return QM_OK;
  }
  const qm_host_linalg* linalg = qm::HostLinalg(call);
  if (!QM_HAS(linalg, gemm) || !QM_HAS(linalg, inverse_cholesky)) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "the host does not offer ", QM_HOST_LINALG,
                    ", which gptq needs");
  }

  QM_TRY(ChooseOrder(call, kernels, options, &diagonal, out));
  float *h = nullptr, *u = nullptr, *diagonal_device = nullptr;
  QM_TRY(qm::Scratch(call, call->device, n * n, "the Hessian", &h));
  QM_TRY(qm::Scratch(call, call->device, n * n, "the factor", &u));
  QM_TRY(qm::Scratch(call, call->device, n, "diagonal", &diagonal_device));
  QM_TRY(kernels.PermuteSquare(hessian, out->order, h));
  QM_TRY(kernels.Upload(diagonal.data(), n * static_cast<int64_t>(sizeof(float)), diagonal_device));
  QM_TRY(kernels.SetDiagonal(h, n, diagonal_device));
  bool found = false;
  QM_TRY(FactorWithRecovery(call, kernels, options, *linalg, diagonal, h, u, &found));
  if (!found) {
    *out = {};
    qm::Log(call, qm::Severity::kWarning,
            "no damping makes the Hessian positive definite; the weights are rounded to nearest");
    return QM_OK;
  }
  out->u = u;
  if (options.search.clip == qm::AffineClip::kSquaredError) {
    QM_TRY(MakeImportance(call, kernels, u, n, out));
  }
  if (correct) QM_TRY(MakeCorrection(call, kernels, options, *linalg, cross, h, out));
  return QM_OK;
}

}  // namespace quantmill::gptq
