// The rotation on the CPU. The small matrices of a block are computed in f64.
#include <algorithm>
#include <vector>

#include "oftq.h"
#include "oftq_cpu.h"
#include "oftq_math.h"
#include "quantmill/sdk/plugin.hpp"

namespace quantmill::oftq {
namespace {

using Matrix = std::vector<double>;  // [b, b]

Matrix Skew(const float* q, int64_t b) {
  Matrix out(static_cast<size_t>(b * b), 0.0);
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t j = i + 1; j < b; ++j) {
      out[i * b + j] = q[TriangleIndex(i, j, b)];
      out[j * b + i] = -out[i * b + j];
    }
  }
  return out;
}

// sum += x y
void AddProduct(const Matrix& x, const Matrix& y, int64_t b, Matrix* sum) {
  for (int64_t i = 0; i < b; ++i) {
    double* row = sum->data() + i * b;
    for (int64_t k = 0; k < b; ++k) {
      const double factor = x[i * b + k];
      for (int64_t j = 0; j < b; ++j) row[j] += factor * y[k * b + j];
    }
  }
}

Matrix TransposeOf(const Matrix& x, int64_t b) {
  Matrix out(x.size());
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t j = 0; j < b; ++j) out[j * b + i] = x[i * b + j];
  }
  return out;
}

Matrix ScaledIdentity(double value, int64_t b) {
  Matrix out(static_cast<size_t>(b * b), 0.0);
  for (int64_t i = 0; i < b; ++i) out[i * b + i] = value;
  return out;
}

// In place, by Gauss-Jordan. No pivoting: the symmetric part of I + Q is I, and elimination keeps
// it at I or above, so that every pivot is at least 1.
void Invert(int64_t b, Matrix* a) {
  for (int64_t p = 0; p < b; ++p) {
    double* row = a->data() + p * b;
    const double inverse = 1.0 / row[p];
    row[p] = 1.0;
    for (int64_t j = 0; j < b; ++j) row[j] *= inverse;
    for (int64_t i = 0; i < b; ++i) {
      double* other = a->data() + i * b;
      if (i == p) continue;
      const double factor = other[p];
      other[p] = 0.0;
      for (int64_t j = 0; j < b; ++j) other[j] -= factor * row[j];
    }
  }
}

// (I - Q)(I + Q)^-1 = 2 (I + Q)^-1 - I
Matrix Exact(Matrix q, int64_t b) {
  for (int64_t i = 0; i < b; ++i) q[i * b + i] += 1.0;
  Invert(b, &q);
  for (double& x : q) x *= 2.0;
  for (int64_t i = 0; i < b; ++i) q[i * b + i] -= 1.0;
  return q;
}

// By Horner's rule.
Matrix Series(const Matrix& q, int64_t b, int terms) {
  const int degree = Degree(terms);
  Matrix sum = ScaledIdentity(Coefficient(degree, degree), b);
  for (int power = degree - 1; power >= 0; --power) {
    Matrix next = ScaledIdentity(Coefficient(power, degree), b);
    AddProduct(q, sum, b, &next);
    sum = std::move(next);
  }
  return sum;
}

// dL/dQ from G = dL/dR, R = (I - Q)(I + Q)^-1: with M = (I + Q)^-1 = (R + I) / 2, dM = -M dQ M, so
// dL/dQ = -2 M^T G M^T.
Matrix ExactGradient(const float* r, const Matrix& g, int64_t b) {
  Matrix m(static_cast<size_t>(b * b));
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t j = 0; j < b; ++j) m[j * b + i] = 0.5 * (r[i * b + j] + (i == j ? 1.0 : 0.0));
  }
  Matrix right(g.size(), 0.0), out(g.size(), 0.0);
  AddProduct(g, m, b, &right);
  AddProduct(m, right, b, &out);
  for (double& x : out) x *= -2.0;
  return out;
}

// dL/dQ from G = dL/dR, R = sum c_k Q^k: with U = Q^T, sum c_k sum_{i+j=k-1} U^i G U^j. That is the
// upper right part of the polynomial of [[U, G], [0, U]], again by Horner's rule.
Matrix SeriesGradient(const Matrix& q, const Matrix& g, int64_t b, int terms) {
  const int degree = Degree(terms);
  const Matrix u = TransposeOf(q, b);
  Matrix sum = ScaledIdentity(Coefficient(degree, degree), b), right(g.size(), 0.0);
  for (int power = degree - 1; power >= 0; --power) {
    Matrix next = ScaledIdentity(Coefficient(power, degree), b), next_right(g.size(), 0.0);
    AddProduct(u, right, b, &next_right);
    AddProduct(g, sum, b, &next_right);
    AddProduct(u, sum, b, &next);
    sum = std::move(next);
    right = std::move(next_right);
  }
  return right;
}

// out [b] (+)= in [b] r [b, b]
void RotateOne(const float* in, const float* r, int64_t b, bool accumulate, float* out) {
  float sum[kMaxBlock] = {};
  for (int64_t k = 0; k < b; ++k) {
    const float factor = in[k];
    const float* row = r + k * b;
    for (int64_t c = 0; c < b; ++c) sum[c] += factor * row[c];
  }
  for (int64_t c = 0; c < b; ++c) out[c] = accumulate ? out[c] + sum[c] : sum[c];
}

// G = x^T d_out of one block, summed over the rows in their order.
Matrix BlockGradient(const Rotation& rotation, int64_t block, const Rows& in, const float* d_out) {
  const int64_t b = rotation.block, width = rotation.in_features;
  std::vector<float> sum(static_cast<size_t>(b * b), 0.0f);
  float x[kMaxBlock];
  for (int64_t r = 0; r < in.rows; ++r) {
    const int64_t at = r * width + block * b;
    LoadFloats(in.data, in.dtype, at, b, x);
    for (int64_t k = 0; k < b; ++k) {
      for (int64_t c = 0; c < b; ++c) sum[k * b + c] += x[k] * d_out[at + c];
    }
  }
  return Matrix(sum.begin(), sum.end());
}

}  // namespace

qm_status BuildRotationCpu(qm_call* call, const Rotation& rotation, const float* q, float* r) {
  const int64_t b = rotation.block;
  return qm::ParallelFor(
      call, rotation.blocks(), 1, [&](int64_t begin, int64_t end, int32_t) -> qm_status {
        for (int64_t block = begin; block < end; ++block) {
          const Matrix skew = Skew(q + block * rotation.numbers(), b);
          const Matrix result = rotation.terms == 0
                                    ? Exact(skew, b)
                                    : Series(skew, b, static_cast<int>(rotation.terms));
          std::transform(result.begin(), result.end(), r + block * b * b,
                         [](double x) { return static_cast<float>(x); });
        }
        return QM_OK;
      });
}

qm_status RotateCpu(qm_call* call, const Rotation& rotation, const float* r, bool transposed,
                    const Rows& in, bool accumulate, const Rows& out, float* scratch) {
  const int64_t b = rotation.block, width = rotation.in_features;
  if (transposed) {
    for (int64_t at = 0; at < rotation.elements(); ++at) {
      scratch[at / (b * b) * (b * b) + at % b * b + at / b % b] = r[at];
    }
    r = scratch;
  }
  constexpr int64_t kGrain = 8;
  return qm::ParallelFor(call, in.rows, kGrain,
                         [&](int64_t begin, int64_t end, int32_t) -> qm_status {
                           float from[kMaxBlock], to[kMaxBlock];
                           for (int64_t block = 0; block < rotation.blocks(); ++block) {
                             for (int64_t row = begin; row < end; ++row) {
                               const int64_t at = row * width + block * b;
                               LoadFloats(in.data, in.dtype, at, b, from);
                               if (accumulate) LoadFloats(out.data, out.dtype, at, b, to);
                               RotateOne(from, r + block * b * b, b, accumulate, to);
                               StoreFloats(to, out.dtype, at, b, out.data);
                             }
                           }
                           return QM_OK;
                         });
}

qm_status RotationGradientCpu(qm_call* call, const Rotation& rotation, const float* q,
                              const float* r, const Rows& in, const float* d_out, float* d_q) {
  const int64_t b = rotation.block;
  return qm::ParallelFor(
      call, rotation.blocks(), 1, [&](int64_t begin, int64_t end, int32_t) -> qm_status {
        for (int64_t block = begin; block < end; ++block) {
          const Matrix g = BlockGradient(rotation, block, in, d_out);
          const Matrix d = rotation.terms == 0
                               ? ExactGradient(r + block * b * b, g, b)
                               : SeriesGradient(Skew(q + block * rotation.numbers(), b), g, b,
                                                static_cast<int>(rotation.terms));
          float* stored = d_q + block * rotation.numbers();
          for (int64_t i = 0; i < b; ++i) {
            for (int64_t j = i + 1; j < b; ++j) {
              stored[TriangleIndex(i, j, b)] += static_cast<float>(d[i * b + j] - d[j * b + i]);
            }
          }
        }
        return QM_OK;
      });
}

}  // namespace quantmill::oftq
