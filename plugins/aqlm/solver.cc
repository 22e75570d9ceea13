// With W [out, in], Gram matrix G = X^T X (damped), W^ = diag(s) sum over m of C_m[index_m]:
//
//   loss(W^) = trace (W - W^) G (W - W^)^T
//
//   1. s = norm of each row; rows are divided by it
//   2. for each codebook: k-means on what is left of the groups of d weights (Lloyd, started from
//      points drawn at random), subtract the nearest vectors
//   3. repeat
//        a. codes: see SearchCodes
//        b. codebooks: least squares by conjugate gradients, preconditioned with the diagonal; a
//           step costs one product with G
//        c. scales: least squares, row by row
//      until the loss falls by less than `tolerance`
//   4. round codebooks and scales to their stored dtype, search the codes once more
//
// SearchCodes: rows are independent. For each group j of a row and each codebook m, with all other
// codes fixed, D = W - W^ and P = D G:
//
//   D' = D + s c_old in group j,   P' = P + s c_old G_jj
//   loss(c) - loss(no c) = s^2 c G_jj c^T - 2 s <c, P'_j>
//
// The best c is taken; with a beam of b, the b best of all hypotheses' candidates go on. P is
// computed for a panel of columns at once, and kept true inside the panel: a change by delta in
// group j takes delta G[j, panel] from it.
#include "solver.h"

#include <cmath>

namespace quantmill::aqlm {
namespace {

constexpr int kLloydIterations = 30;
// Points k-means learns from, per vector of a codebook.
constexpr int64_t kPointsPerVector = 256;
// Part of the mean of its diagonal that is added to the Hessian's diagonal: directions no input has
// then count a little, so that nothing is undefined.
constexpr double kDamp = 1e-4;
// Conjugate gradients end when a step lowers the loss by less than this part of it.
constexpr double kStepGain = 1e-3;
constexpr int kMaxAlternations = 50;
constexpr double kSmallest = 1e-30;

// Random numbers that depend on the seed alone (splitmix64, G. Steele et al. 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Below(uint64_t n) {
    state_ += 0x9E3779B97F4A7C15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) % n;
  }

 private:
  uint64_t state_;
};

class Solver {
 public:
  Solver(qm_call* call, Kernels& kernels, const Options& options, Rows weight)
      : call_(call), k_(kernels), o_(options), weight_(weight), random_(call->seed) {}

  qm_status Run(const qm_tensor* hessian, const Result& out, double* final_loss) {
    QM_TRY(Prepare(hessian));
    QM_TRY(InitializeScales());
    QM_TRY(InitializeCodebooks());
    QM_TRY(Alternate());
    QM_TRY(Finish(out));
    if (final_loss != nullptr) QM_TRY(Loss(final_loss));
    return QM_OK;
  }

 private:
  const Params& p() const { return o_.params; }
  Rows Dense(const float* data) const { return {data, o_.in}; }

  qm_status Prepare(const qm_tensor* hessian) {
    linalg_ = qm::HostLinalg(call_);
    if (linalg_ == nullptr) {
      return qm::Fail(call_, QM_FAILED_PRECONDITION, "the host offers no linear algebra (",
                      QM_HOST_LINALG, "), which aqlm needs");
    }
    const qm_device device = call_->device;
    const int64_t rows = o_.out, cols = o_.in, beam = o_.beam;
    const int64_t indices = rows * beam * o_.groups() * p().codebooks;
    Arrays& a = k_.arrays;
    QM_TRY(qm::Scratch(call_, device, cols * cols, "the Gram matrix", &gram_));
    QM_TRY(qm::Scratch(call_, device, rows * beam * cols, "residuals", &residual_));
    QM_TRY(qm::Scratch(call_, device, ProductSize(), "products", &product_));
    QM_TRY(qm::Scratch(call_, device, p().values(), "codebooks", &a.codebooks));
    QM_TRY(qm::Scratch(call_, device, p().values(), "a direction", &direction_));
    QM_TRY(qm::Scratch(call_, device, rows, "scales", &a.scales));
    QM_TRY(qm::Scratch(call_, device, std::max(rows, cols), "ones", &a.ones));
    QM_TRY(qm::Scratch(call_, device, cols, "a diagonal", &diagonal_));
    QM_TRY(qm::Scratch(call_, device, indices, "indices", &a.indices));
    if (beam > 1) {
      QM_TRY(qm::Scratch(call_, device, rows * beam * cols, "residuals", &next_residual_));
      QM_TRY(qm::Scratch(call_, device, indices, "indices", &next_indices_));
      QM_TRY(qm::Scratch(call_, device, rows, "counts", &live_));
      QM_TRY(qm::Scratch(call_, device, rows * beam, "losses", &losses_));
    }
    const std::vector<float> ones(static_cast<size_t>(std::max(rows, cols)), 1.0f);
    QM_TRY(k_.Upload(ones.data(), std::max(rows, cols) * 4, a.ones));
    codebooks_.assign(static_cast<size_t>(p().values()), 0.0f);
    return MakeGram(hessian);
  }

  int64_t ProductSize() const {
    return std::max(o_.out * o_.in, o_.out * o_.beam * o_.panel_columns());
  }

  qm_status MakeGram(const qm_tensor* hessian) {
    int64_t bad = -1;
    QM_TRY(k_.FindNotFinite(weight_, o_.out, o_.in, &bad));
    if (bad >= 0) {
      return qm::Fail(call_, QM_INVALID_ARGUMENT, "the weight at row ", bad / o_.in, ", column ",
                      bad % o_.in,
                      " is not finite; repair the checkpoint or leave the layer dense");
    }
    double mean = 0;
    Rows h;
    if (hessian != nullptr) {
      h = {static_cast<const float*>(hessian->data), hessian->stride[0]};
      QM_TRY(k_.FindNotFinite(h, o_.in, o_.in, &bad));
      if (bad >= 0) {
        return qm::Fail(call_, QM_INVALID_ARGUMENT, "the Hessian at row ", bad / o_.in, ", column ",
                        bad % o_.in, " is not finite; the calibration text overflows the model");
      }
      std::vector<float> diagonal;
      QM_TRY(k_.Diagonal(h, o_.in, &diagonal));
      for (const float value : diagonal) mean += static_cast<double>(value);
      mean /= static_cast<double>(o_.in);
    }
    if (!(mean > 0)) h = {};  // no inputs, or inputs that were always 0: all count alike
    QM_TRY(k_.MakeGram(h, o_.in, static_cast<float>(kDamp * mean), gram_));
    std::vector<float> diagonal;
    QM_TRY(k_.Diagonal(Dense(gram_), o_.in, &diagonal));
    return k_.Upload(diagonal.data(), o_.in * 4, diagonal_);
  }

  // out[rows, columns] = x[rows, in] G[:, first .. first + columns).
  qm_status TimesGram(const float* x, int64_t rows, int64_t first, int64_t columns, float* out) {
    const qm_tensor a = qm::MakeMatrix(x, rows, o_.in, o_.in, call_->device);
    const qm_tensor b = qm::MakeMatrix(gram_ + first, o_.in, columns, o_.in, call_->device);
    qm_tensor c = qm::MakeMatrix(out, rows, columns, columns, call_->device);
    QM_TRY(qm::Progress(call_, progress_));
    return linalg_->gemm(call_, 0, 0, 1.0, &a, &b, 0.0, &c);
  }

  qm_status UploadScales() { return k_.Upload(scales_.data(), o_.out * 4, k_.arrays.scales); }
  qm_status UploadCodebooks() {
    return k_.Upload(codebooks_.data(), p().values() * 4, k_.arrays.codebooks);
  }

  // ---- steps 1 and 2 ----
  qm_status InitializeScales() {
    std::vector<double> squares;
    QM_TRY(k_.RowDots(weight_, weight_, o_.out, &squares));
    scales_.resize(static_cast<size_t>(o_.out));
    for (int64_t r = 0; r < o_.out; ++r) {
      scales_[r] = RoundToDType(static_cast<float>(std::sqrt(squares[r])), o_.value_dtype);
    }
    return UploadScales();
  }

  qm_status InitializeCodebooks() {
    const int64_t points = kPointsPerVector * p().length();
    const int64_t wanted = std::clamp<int64_t>(points / o_.groups(), 1, o_.out);
    const int64_t step = std::max<int64_t>(1, o_.out / wanted);
    const int64_t sampled = (o_.out + step - 1) / step;
    for (int32_t m = 0; m < p().codebooks; ++m) {
      QM_TRY(k_.Normalize(weight_, step, sampled, residual_));
      for (int32_t earlier = 0; earlier < m; ++earlier) {
        QM_TRY(k_.Nearest(residual_, sampled, earlier));
        QM_TRY(k_.Subtract(sampled, earlier, residual_));
      }
      QM_TRY(StartCodebook(sampled, m));
      QM_TRY(Lloyd(sampled, m));
    }
    QM_TRY(k_.Normalize(weight_, 1, o_.out, residual_));
    for (int32_t m = 0; m < p().codebooks; ++m) {
      QM_TRY(k_.Nearest(residual_, o_.out, m));
      QM_TRY(k_.Subtract(o_.out, m, residual_));
    }
    return QM_OK;
  }

  // Distinct points drawn at random; all of them, then zeros, where there are too few.
  qm_status StartCodebook(int64_t rows, int32_t m) {
    const int64_t points = rows * o_.groups(), length = p().length();
    std::vector<int64_t> at;
    if (points <= length) {
      for (int64_t i = 0; i < points; ++i) at.push_back(i);
    } else {  // R. Floyd's sample without repetition, in order of the points
      std::vector<bool> taken(static_cast<size_t>(points));
      for (int64_t i = points - length; i < points; ++i) {
        const int64_t drawn = static_cast<int64_t>(random_.Below(static_cast<uint64_t>(i) + 1));
        taken[taken[drawn] ? i : drawn] = true;
      }
      for (int64_t i = 0; i < points; ++i) {
        if (taken[i]) at.push_back(i);
      }
    }
    std::vector<float> vectors;
    QM_TRY(k_.Pick(residual_, at, &vectors));
    std::copy(vectors.begin(), vectors.end(), codebooks_.begin() + CodebookAt(m));
    return UploadCodebooks();
  }

  int64_t CodebookAt(int32_t m) const {
    return static_cast<int64_t>(m) * p().length() * p().group_size;
  }

  qm_status Lloyd(int64_t rows, int32_t m) {
    const int64_t values = static_cast<int64_t>(p().length()) * p().group_size;
    for (int i = 0; i < kLloydIterations; ++i) {
      QM_TRY(qm::Progress(call_, progress_));
      QM_TRY(k_.Nearest(residual_, rows, m));
      std::vector<double> sums, counts;
      QM_TRY(k_.Scatter(Dense(residual_), rows, k_.arrays.ones, 0, m, m + 1, &sums));
      QM_TRY(k_.Scatter({k_.arrays.ones, 0}, rows, k_.arrays.ones, 0, m, m + 1, &counts));
      double moved = 0, size = 0;
      for (int64_t v = 0; v < values; ++v) {
        if (counts[v] == 0) continue;  // an empty cluster stays where it is
        float& value = codebooks_[CodebookAt(m) + v];
        const double mean = sums[v] / counts[v];
        moved += (mean - value) * (mean - value);
        size += mean * mean;
        value = static_cast<float>(mean);
      }
      QM_TRY(UploadCodebooks());
      if (moved <= 1e-6 * size) break;
    }
    return QM_OK;
  }

  // ---- step 3 ----
  qm_status Alternate() {
    double best = 0;
    QM_TRY(FitScales());
    for (int i = 0; i < kMaxAlternations; ++i) {
      progress_ = 0.9 * (1.0 - std::pow(0.8, i));
      QM_TRY(SearchCodes());
      double loss = 0;
      QM_TRY(FitCodebooks(&loss));
      QM_TRY(FitScales());
      if (i > 0 && loss > (1.0 - o_.tolerance) * best) break;
      best = loss;
    }
    return QM_OK;
  }

  // residual_ = W - W^, product_ = residual_ G; *loss = their inner product.
  qm_status Residual(double* loss) {
    QM_TRY(k_.Decode(k_.arrays.codebooks, k_.arrays.scales, weight_, o_.out, residual_));
    QM_TRY(TimesGram(residual_, o_.out, 0, o_.in, product_));
    std::vector<double> rows;
    QM_TRY(k_.RowDots(Dense(residual_), Dense(product_), o_.out, &rows));
    *loss = 0;
    for (const double row : rows) *loss += row;
    return QM_OK;
  }
  qm_status Loss(double* loss) { return Residual(loss); }

  qm_status FitCodebooks(double* loss) {
    const int64_t n = p().values();
    std::vector<double> gradient, diagonal, image;
    QM_TRY(Residual(loss));
    const double loss_before = *loss;
    QM_TRY(ScatterAll(Dense(product_), 1, &gradient));
    QM_TRY(ScatterAll({diagonal_, 0}, 2, &diagonal));
    std::vector<double> direction(static_cast<size_t>(n)), step(static_cast<size_t>(n));
    std::vector<float> narrow(static_cast<size_t>(n));
    const auto precondition = [&](int64_t i) {
      return diagonal[i] > kSmallest ? gradient[i] / diagonal[i] : 0.0;
    };
    double size = 0;
    for (int64_t i = 0; i < n; ++i) {
      direction[i] = precondition(i);
      size += gradient[i] * direction[i];
    }
    for (int32_t t = 0; t < o_.steps && size > kSmallest; ++t) {
      for (int64_t i = 0; i < n; ++i) narrow[i] = static_cast<float>(direction[i]);
      QM_TRY(k_.Upload(narrow.data(), n * 4, direction_));
      QM_TRY(k_.Decode(direction_, k_.arrays.scales, {}, o_.out, residual_));
      QM_TRY(TimesGram(residual_, o_.out, 0, o_.in, product_));
      QM_TRY(ScatterAll(Dense(product_), 1, &image));
      double curvature = 0;
      for (int64_t i = 0; i < n; ++i) curvature += direction[i] * image[i];
      if (!(curvature > kSmallest)) break;
      const double alpha = size / curvature, gain = alpha * size;
      // A step cannot gain more than all of the loss: what is left is rounding noise.
      if (!(gain <= *loss)) break;
      double next = 0;
      for (int64_t i = 0; i < n; ++i) {
        step[i] += alpha * direction[i];
        gradient[i] -= alpha * image[i];
        next += gradient[i] * precondition(i);
      }
      *loss -= gain;
      for (int64_t i = 0; i < n; ++i) {
        direction[i] = precondition(i) + next / size * direction[i];
      }
      size = next;
      if (gain < kStepGain * *loss) break;
    }
    const std::vector<float> before = codebooks_;
    for (int64_t i = 0; i < n; ++i) {
      codebooks_[i] = static_cast<float>(static_cast<double>(codebooks_[i]) + step[i]);
    }
    QM_TRY(UploadCodebooks());
    QM_TRY(Residual(loss));
    if (*loss <= loss_before) return QM_OK;
    codebooks_ = before;  // the system was singular to f32
    *loss = loss_before;
    return UploadCodebooks();
  }

  qm_status ScatterAll(Rows x, int32_t power, std::vector<double>* sums) {
    return k_.Scatter(x, o_.out, k_.arrays.scales, power, 0, p().codebooks, sums);
  }

  // s = <W, V>_G / <V, V>_G for the unscaled V; a scale that would not be positive stays.
  qm_status FitScales() {
    QM_TRY(k_.Decode(k_.arrays.codebooks, k_.arrays.ones, {}, o_.out, residual_));
    QM_TRY(TimesGram(residual_, o_.out, 0, o_.in, product_));
    std::vector<double> own, other;
    QM_TRY(k_.RowDots(Dense(residual_), Dense(product_), o_.out, &own));
    QM_TRY(k_.RowDots(weight_, Dense(product_), o_.out, &other));
    for (int64_t r = 0; r < o_.out; ++r) {
      if (!(scales_[r] > 0) || !(own[r] > kSmallest) || !(other[r] > 0)) continue;
      const float scale = RoundToDType(static_cast<float>(other[r] / own[r]), o_.value_dtype);
      if (std::isfinite(scale) && scale > 0) scales_[r] = scale;
    }
    return UploadScales();
  }

  qm_status SearchCodes() {
    Arrays& a = k_.arrays;
    QM_TRY(k_.Decode(a.codebooks, a.scales, weight_, o_.out, residual_));
    if (o_.beam > 1) {  // one hypothesis per row at first: the codes as they are
      const std::vector<int32_t> live(static_cast<size_t>(o_.out), 1);
      const std::vector<float> losses(static_cast<size_t>(o_.out * o_.beam), 0.0f);
      QM_TRY(k_.Upload(live.data(), o_.out * 4, live_));
      QM_TRY(k_.Upload(losses.data(), o_.out * o_.beam * 4, losses_));
    }
    const int64_t panels = (o_.groups() + o_.panel_groups() - 1) / o_.panel_groups();
    for (int64_t i = 0; i < panels; ++i) {
      PanelTask task;
      task.first_group = i * o_.panel_groups();
      task.groups = std::min(o_.panel_groups(), o_.groups() - task.first_group);
      task.gram = gram_;
      task.residual = residual_;
      task.product = product_;
      task.next_residual = next_residual_;
      task.next_indices = next_indices_;
      task.live = live_;
      task.losses = losses_;
      QM_TRY(TimesGram(residual_, i == 0 ? o_.out : o_.out * o_.beam,
                       task.first_group * p().group_size, task.groups * p().group_size, product_));
      QM_TRY(k_.SearchPanel(task));
      if (o_.beam > 1) {
        std::swap(residual_, next_residual_);
        std::swap(a.indices, next_indices_);
      }
    }
    return QM_OK;  // hypotheses are sorted: the best of each row is in the first `out` rows
  }

  // ---- step 4 ----
  qm_status Finish(const Result& out) {
    progress_ = 0.95;
    for (float& value : codebooks_) {  // not finite only where the weights overflow f32 sums
      value = std::isfinite(value) ? RoundToDType(value, o_.value_dtype) : 0.0f;
    }
    for (float& value : scales_) value = RoundToDType(value, o_.value_dtype);
    QM_TRY(UploadCodebooks());
    QM_TRY(UploadScales());
    QM_TRY(SearchCodes());
    QM_TRY(k_.StoreCodes(out.codes.data));
    QM_TRY(Store(codebooks_, out.codebooks));
    return Store(scales_, out.scales);
  }

  qm_status Store(const std::vector<float>& values, const qm_tensor& out) {
    const int64_t size = qm::ElementSize(o_.value_dtype), n = static_cast<int64_t>(values.size());
    std::vector<uint8_t> bytes(static_cast<size_t>(size * n));
    for (int64_t i = 0; i < n; ++i) StoreValue(bytes.data(), o_.value_dtype, i, values[i]);
    return k_.Upload(bytes.data(), size * n, out.data);
  }

  qm_call* call_;
  Kernels& k_;
  const Options& o_;
  Rows weight_;
  Random random_;
  const qm_host_linalg* linalg_ = nullptr;
  double progress_ = 0;
  std::vector<float> codebooks_, scales_;  // host copies
  float *gram_ = nullptr, *residual_ = nullptr, *next_residual_ = nullptr, *product_ = nullptr;
  float *direction_ = nullptr, *diagonal_ = nullptr, *losses_ = nullptr;
  uint16_t* next_indices_ = nullptr;
  int32_t* live_ = nullptr;
};

}  // namespace

qm_status Solve(qm_call* call, Kernels& kernels, const Options& options, Rows weight,
                const qm_tensor* hessian, const Result& out, double* final_loss) {
  return Solver(call, kernels, options, weight).Run(hessian, out, final_loss);
}

uint64_t SolverBytes(const Options& o) {
  constexpr uint64_t kRounding = uint64_t{16} * 256;  // of each allocation to 256 bytes
  const int64_t rows = o.out * o.beam, indices = rows * o.groups() * o.params.codebooks;
  int64_t bytes = 4 * o.in * o.in + 4 * rows * o.in +
                  4 * std::max(o.out * o.in, rows * o.panel_columns()) + 8 * o.params.values() +
                  4 * (o.out + std::max(o.out, o.in) + o.in) + 2 * indices;
  if (o.beam > 1) bytes += 4 * rows * o.in + 2 * indices + 4 * (o.out + rows);
  return static_cast<uint64_t>(bytes) + kRounding;
}

}  // namespace quantmill::aqlm
