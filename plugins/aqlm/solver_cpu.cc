// The array operations of the solver on the CPU: the reference of solver.cu. Loops over the vectors
// of a codebook run over 32 neighbouring ones at a time, in the same arithmetic with and without
// AVX2.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "solver.h"

#if defined(__x86_64__)
#define QM_FLATTEN_AVX2 __attribute__((target("avx2"), flatten))
#endif

namespace quantmill::aqlm {
namespace {

constexpr int kLanes = 32;
// Rows that one task of a search or an assignment takes.
constexpr int64_t kTaskRows = 8;
// Partial sums of a scatter, a fixed number so that the sums depend on the shape alone.
constexpr int64_t kScatterTiles = 16;

int64_t PaddedLength(const Params& p) {
  return (static_cast<int64_t>(p.length()) + kLanes - 1) / kLanes * kLanes;
}

struct Candidate {
  float score = std::numeric_limits<float>::infinity();
  int32_t index = 0;
};

// The least of scale * table[c] - 2 <g, vector c>, the lower of two alike. columns: [d, padded],
// the codebook transposed; table is infinite beyond its length.
inline Candidate Scan(const float* columns, int64_t padded, int64_t d, const float* table,
                      float scale, const float* g) {
  float best[kLanes];
  int32_t block[kLanes] = {};
  std::fill(best, best + kLanes, std::numeric_limits<float>::infinity());
  for (int64_t c = 0; c < padded; c += kLanes) {
    float score[kLanes];
    for (int l = 0; l < kLanes; ++l) score[l] = scale * table[c + l];
    for (int64_t a = 0; a < d; ++a) {
      const float twice = 2.0f * g[a];
      const float* values = columns + a * padded + c;
      for (int l = 0; l < kLanes; ++l) score[l] -= twice * values[l];
    }
    const int32_t number = static_cast<int32_t>(c);
    for (int l = 0; l < kLanes; ++l) {
      const bool better = score[l] < best[l];
      best[l] = better ? score[l] : best[l];
      block[l] = better ? number : block[l];
    }
  }
  Candidate result;
  for (int l = 0; l < kLanes; ++l) {
    const int32_t index = block[l] + l;
    if (best[l] < result.score || (best[l] == result.score && index < result.index)) {
      result = {best[l], index};
    }
  }
  return result;
}

// Every score, for a beam of more than one.
inline void ScoreAll(const float* columns, int64_t padded, int64_t d, const float* table,
                     float scale, const float* g, float* scores) {
  for (int64_t c = 0; c < padded; ++c) scores[c] = scale * table[c];
  for (int64_t a = 0; a < d; ++a) {
    const float twice = 2.0f * g[a];
    const float* values = columns + a * padded;
    for (int64_t c = 0; c < padded; ++c) scores[c] -= twice * values[c];
  }
}

// What a search of one panel shares between rows.
struct Panel {
  const Options* options;
  const Arrays* arrays;
  const PanelTask* task;
  const float* columns;  // [M, d, padded]
  const float* tables;   // [groups of the panel, M, padded]: c G_jj c^T
  int64_t padded;

  const float* Vector(int32_t m, int32_t index) const {
    const Params& p = options->params;
    return arrays->codebooks + (static_cast<int64_t>(m) * p.length() + index) * p.group_size;
  }
  // Row a of G_j,panel for group j of the panel.
  const float* GramRow(int64_t j, int64_t a) const {
    const int64_t first = task->first_group * options->params.group_size;
    return task->gram + (first + j * options->params.group_size + a) * options->in + first;
  }
  int64_t width() const { return task->groups * options->params.group_size; }
  const float* Columns(int32_t m) const {
    return columns + m * options->params.group_size * padded;
  }
  const float* Table(int64_t j, int32_t m) const {
    return tables + (j * options->params.codebooks + m) * padded;
  }
};

// g = P_j + s c G_jj: what P would be without the code.
inline void WithoutCode(const Panel& panel, int64_t j, const float* vector, float scale,
                        const float* product, float* g) {
  const int64_t d = panel.options->params.group_size;
  for (int64_t b = 0; b < d; ++b) g[b] = product[j * d + b];
  for (int64_t a = 0; a < d; ++a) {
    const float* row = panel.GramRow(j, a) + j * d;
    const float v = scale * vector[a];
    for (int64_t b = 0; b < d; ++b) g[b] += v * row[b];
  }
}

// The code of group j changes by delta (in weights).
inline void Change(const Panel& panel, int64_t j, const float* from, const float* to, float scale,
                   float* residual, float* product) {
  const int64_t d = panel.options->params.group_size, width = panel.width();
  for (int64_t a = 0; a < d; ++a) {
    const float delta = scale * (to[a] - from[a]);
    residual[j * d + a] -= delta;
    const float* row = panel.GramRow(j, a);
    for (int64_t b = 0; b < width; ++b) product[b] -= delta * row[b];
  }
}

inline void SearchRow(const Panel& panel, int64_t r, float* g) {
  const Options& o = *panel.options;
  const Params& p = o.params;
  const float scale = panel.arrays->scales[r];
  if (!(scale > 0)) return;
  float* product = panel.task->product + r * panel.width();
  float* residual = panel.task->residual + r * o.in + panel.task->first_group * p.group_size;
  uint16_t* indices =
      panel.arrays->indices + (r * o.groups() + panel.task->first_group) * p.codebooks;
  for (int64_t j = 0; j < panel.task->groups; ++j) {
    for (int32_t m = 0; m < p.codebooks; ++m) {
      uint16_t& index = indices[j * p.codebooks + m];
      const float* vector = panel.Vector(m, index);
      WithoutCode(panel, j, vector, scale, product, g);
      const Candidate best =
          Scan(panel.Columns(m), panel.padded, p.group_size, panel.Table(j, m), scale, g);
      if (best.index == index || !(best.score < std::numeric_limits<float>::infinity())) continue;
      Change(panel, j, vector, panel.Vector(m, best.index), scale, residual, product);
      index = static_cast<uint16_t>(best.index);
    }
  }
}

// A hypothesis inside a panel.
struct Hypothesis {
  float loss = 0;
  int32_t root = 0;  // the hypothesis it was when the panel began
  std::vector<float> product, residual;
  std::vector<uint16_t> indices;
};

struct Child {
  float loss = std::numeric_limits<float>::infinity();
  int32_t parent = 0, index = 0;
};

// The `beam` best of all candidates, in order; of two alike the one found first.
inline void Offer(std::vector<Child>& children, const Child& child) {
  if (!(child.loss < children.back().loss)) return;
  size_t at = children.size() - 1;
  for (; at > 0 && child.loss < children[at - 1].loss; --at) children[at] = children[at - 1];
  children[at] = child;
}

inline void SearchRowWithBeam(const Panel& panel, int64_t r, std::vector<float>& scores, float* g) {
  const Options& o = *panel.options;
  const Params& p = o.params;
  const PanelTask& task = *panel.task;
  const float scale = panel.arrays->scales[r];
  const int64_t width = panel.width(), codes = task.groups * p.codebooks;
  const int64_t first = task.first_group * p.group_size;
  const int64_t row_codes = o.groups() * p.codebooks;
  std::vector<Hypothesis> beam(static_cast<size_t>(task.live[r]));
  for (int32_t h = 0; h < task.live[r]; ++h) {
    const int64_t at = h * o.out + r;
    const uint16_t* indices =
        panel.arrays->indices + at * row_codes + task.first_group * p.codebooks;
    beam[h] = {task.losses[at],
               h,
               {task.product + at * width, task.product + (at + 1) * width},
               {task.residual + at * o.in + first, task.residual + at * o.in + first + width},
               {indices, indices + codes}};
  }
  for (int64_t i = 0; scale > 0 && i < codes; ++i) {
    const int64_t j = i / p.codebooks;
    const int32_t m = static_cast<int32_t>(i % p.codebooks);
    std::vector<Child> children(static_cast<size_t>(o.beam));
    for (size_t h = 0; h < beam.size(); ++h) {
      const int32_t old = beam[h].indices[i];
      WithoutCode(panel, j, panel.Vector(m, old), scale, beam[h].product.data(), g);
      ScoreAll(panel.Columns(m), panel.padded, p.group_size, panel.Table(j, m), scale, g,
               scores.data());
      const float base = beam[h].loss - scale * scores[old];
      for (int32_t c = 0; c < p.length(); ++c) {
        Offer(children, {base + scale * scores[c], static_cast<int32_t>(h), c});
      }
    }
    std::vector<Hypothesis> next;
    for (const Child& child : children) {
      if (!(child.loss < std::numeric_limits<float>::infinity())) break;
      next.push_back(beam[child.parent]);
      Hypothesis& h = next.back();
      h.loss = child.loss;
      if (h.indices[i] == child.index) continue;
      Change(panel, j, panel.Vector(m, h.indices[i]), panel.Vector(m, child.index), scale,
             h.residual.data(), h.product.data());
      h.indices[i] = static_cast<uint16_t>(child.index);
    }
    if (!next.empty()) beam = std::move(next);
  }
  task.live[r] = static_cast<int32_t>(beam.size());
  for (size_t h = 0; h < beam.size(); ++h) {
    const int64_t to = static_cast<int64_t>(h) * o.out + r, from = beam[h].root * o.out + r;
    std::copy_n(task.residual + from * o.in, o.in, task.next_residual + to * o.in);
    std::copy_n(panel.arrays->indices + from * row_codes, row_codes,
                task.next_indices + to * row_codes);
    std::copy(beam[h].residual.begin(), beam[h].residual.end(),
              task.next_residual + to * o.in + first);
    std::copy(beam[h].indices.begin(), beam[h].indices.end(),
              task.next_indices + to * row_codes + task.first_group * p.codebooks);
    task.losses[to] = beam[h].loss;
  }
}

inline void SearchRows(const Panel& panel, int64_t begin, int64_t end) {
  std::vector<float> g(static_cast<size_t>(panel.options->params.group_size));
  std::vector<float> scores;
  if (panel.options->beam > 1) scores.resize(static_cast<size_t>(panel.padded));
  for (int64_t r = begin; r < end; ++r) {
    if (panel.options->beam == 1) {
      SearchRow(panel, r, g.data());
    } else {
      SearchRowWithBeam(panel, r, scores, g.data());
    }
  }
}

// Nearest vectors of one codebook for rows of x.
struct Assignment {
  const Options* options;
  const float* x;
  const float* columns;  // [d, padded]
  const float* table;    // [padded]: squared norms
  int64_t padded;
  int32_t m;
  uint16_t* indices;
};

inline void AssignRows(const Assignment& task, int64_t begin, int64_t end) {
  const Params& p = task.options->params;
  const int64_t groups = task.options->groups();
  for (int64_t i = begin * groups; i < end * groups; ++i) {
    const Candidate best =
        Scan(task.columns, task.padded, p.group_size, task.table, 1.0f, task.x + i * p.group_size);
    task.indices[i * p.codebooks + task.m] = static_cast<uint16_t>(best.index);
  }
}

#if defined(QM_FLATTEN_AVX2)
QM_FLATTEN_AVX2 void SearchRowsAvx2(const Panel& panel, int64_t begin, int64_t end) {
  SearchRows(panel, begin, end);
}
QM_FLATTEN_AVX2 void AssignRowsAvx2(const Assignment& task, int64_t begin, int64_t end) {
  AssignRows(task, begin, end);
}
bool HaveAvx2() { return __builtin_cpu_supports("avx2") != 0; }
#endif

class CpuKernels : public Kernels {
 public:
  CpuKernels(qm_call* call, const Options& options) : call_(call), o_(options) {}

  qm_status Upload(const void* host, int64_t bytes, void* device) override {
    std::memcpy(device, host, static_cast<size_t>(bytes));
    return QM_OK;
  }
  qm_status Download(const void* device, int64_t bytes, void* host) override {
    std::memcpy(host, device, static_cast<size_t>(bytes));
    return QM_OK;
  }
  qm_status Copy(const void* from, int64_t bytes, void* to) override {
    return Upload(from, bytes, to);
  }
  qm_status Clear(void* device, int64_t bytes) override {
    std::memset(device, 0, static_cast<size_t>(bytes));
    return QM_OK;
  }

  qm_status FindNotFinite(Rows x, int64_t rows, int64_t cols, int64_t* index) override {
    std::atomic<int64_t> first{std::numeric_limits<int64_t>::max()};
    QM_TRY(ForRows(rows, [&](int64_t r) {
      for (int64_t c = 0; c < cols; ++c) {
        if (std::isfinite(x.data[r * x.stride + c])) continue;
        const int64_t found = r * cols + c;
        int64_t seen = first.load();
        while (found < seen && !first.compare_exchange_weak(seen, found)) {
        }
        break;
      }
    }));
    *index = first.load() == std::numeric_limits<int64_t>::max() ? -1 : first.load();
    return QM_OK;
  }

  qm_status MakeGram(Rows hessian, int64_t n, float damp, float* gram) override {
    return ForRows(n, [&](int64_t r) {
      for (int64_t c = 0; c < n; ++c) {
        const float value = hessian.data != nullptr ? hessian.data[r * hessian.stride + c]
                                                    : static_cast<float>(r == c);
        gram[r * n + c] = r == c ? value + damp : value;
      }
    });
  }

  qm_status Diagonal(Rows matrix, int64_t n, std::vector<float>* out) override {
    out->resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) (*out)[i] = matrix.data[i * matrix.stride + i];
    return QM_OK;
  }

  qm_status RowDots(Rows a, Rows b, int64_t rows, std::vector<double>* out) override {
    out->resize(static_cast<size_t>(rows));
    return ForRows(rows, [&](int64_t r) {
      double sum = 0;
      for (int64_t c = 0; c < o_.in; ++c) {
        sum += static_cast<double>(a.data[r * a.stride + c]) *
               static_cast<double>(b.data[r * b.stride + c]);
      }
      (*out)[r] = sum;
    });
  }

  qm_status Normalize(Rows x, int64_t row_step, int64_t rows, float* out) override {
    return ForRows(rows, [&](int64_t r) {
      const float scale = arrays.scales[r * row_step];
      for (int64_t c = 0; c < o_.in; ++c) {
        out[r * o_.in + c] = scale > 0 ? x.data[r * row_step * x.stride + c] / scale : 0.0f;
      }
    });
  }

  qm_status Pick(const float* x, const std::vector<int64_t>& at, std::vector<float>* out) override {
    const int64_t d = o_.params.group_size;
    out->clear();
    for (const int64_t i : at) out->insert(out->end(), x + i * d, x + (i + 1) * d);
    return QM_OK;
  }

  qm_status Nearest(const float* x, int64_t rows, int32_t m) override {
    const Params& p = o_.params;
    QM_TRY(Transpose());
    std::vector<float> table(static_cast<size_t>(PaddedLength(p)),
                             std::numeric_limits<float>::infinity());
    for (int64_t c = 0; c < p.length(); ++c) {
      const float* v = arrays.codebooks + (m * p.length() + c) * p.group_size;
      table[c] = 0;
      for (int64_t a = 0; a < p.group_size; ++a) table[c] += v[a] * v[a];
    }
    const Assignment task = {&o_,
                             x,
                             columns_ + m * p.group_size * PaddedLength(p),
                             table.data(),
                             PaddedLength(p),
                             m,
                             arrays.indices};
    return qm::ParallelFor(call_, rows, kTaskRows,
                           [&](int64_t begin, int64_t end, int32_t) -> qm_status {
                             QM_TRY(qm::Progress(call_, -1));
#if defined(QM_FLATTEN_AVX2)
                             if (HaveAvx2()) {
                               AssignRowsAvx2(task, begin, end);
                               return QM_OK;
                             }
#endif
                             AssignRows(task, begin, end);
                             return QM_OK;
                           });
  }

  qm_status Subtract(int64_t rows, int32_t m, float* x) override {
    const Params& p = o_.params;
    return ForRows(rows, [&](int64_t r) {
      for (int64_t i = r * o_.groups(); i < (r + 1) * o_.groups(); ++i) {
        const int64_t index = m * p.length() + arrays.indices[i * p.codebooks + m];
        const float* v = arrays.codebooks + index * p.group_size;
        for (int64_t a = 0; a < p.group_size; ++a) x[i * p.group_size + a] -= v[a];
      }
    });
  }

  qm_status Decode(const float* codebooks, const float* factors, Rows base, int64_t rows,
                   float* out) override {
    const Params& p = o_.params;
    return ForRows(rows, [&](int64_t r) {
      for (int64_t j = 0; j < o_.groups(); ++j) {
        float* to = out + r * o_.in + j * p.group_size;
        const uint16_t* indices = arrays.indices + (r * o_.groups() + j) * p.codebooks;
        for (int64_t a = 0; a < p.group_size; ++a) to[a] = 0;
        for (int32_t m = 0; m < p.codebooks; ++m) {
          const float* v =
              codebooks + (static_cast<int64_t>(m) * p.length() + indices[m]) * p.group_size;
          for (int64_t a = 0; a < p.group_size; ++a) to[a] += v[a];
        }
        for (int64_t a = 0; a < p.group_size; ++a) to[a] *= factors[r];
        if (base.data == nullptr) continue;
        const float* w = base.data + r * base.stride + j * p.group_size;
        for (int64_t a = 0; a < p.group_size; ++a) to[a] = w[a] - to[a];
      }
    });
  }

  qm_status Scatter(Rows x, int64_t rows, const float* factors, int32_t power, int32_t first,
                    int32_t last, std::vector<double>* sums) override {
    const Params& p = o_.params;
    const int64_t values = static_cast<int64_t>(last - first) * p.length() * p.group_size;
    if (partial_ == nullptr) {
      QM_TRY(qm::Scratch(call_, kHost, kScatterTiles * p.values(), "partial sums", &partial_));
    }
    const int64_t tile = (rows + kScatterTiles - 1) / kScatterTiles;
    QM_TRY(qm::ParallelFor(call_, kScatterTiles, 1, [&](int64_t t, int64_t, int32_t) {
      float* to = partial_ + t * values;
      std::fill(to, to + values, 0.0f);
      for (int64_t r = t * tile; r < std::min(rows, (t + 1) * tile); ++r) {
        const float factor = power == 0 ? 1.0f : power == 1 ? factors[r] : factors[r] * factors[r];
        AddRow(x.data + r * x.stride, r, factor, first, last, to);
      }
      return QM_OK;
    }));
    sums->assign(static_cast<size_t>(values), 0.0);
    for (int64_t t = 0; t < kScatterTiles; ++t) {
      for (int64_t v = 0; v < values; ++v) {
        (*sums)[v] += static_cast<double>(partial_[t * values + v]);
      }
    }
    return QM_OK;
  }

  qm_status SearchPanel(const PanelTask& task) override {
    const Params& p = o_.params;
    const int64_t padded = PaddedLength(p);
    if (task.first_group == 0) QM_TRY(Transpose());
    if (tables_ == nullptr) {
      QM_TRY(
          qm::Scratch(call_, kHost, o_.panel_groups() * p.codebooks * padded, "tables", &tables_));
    }
    const Panel panel = {&o_, &arrays, &task, columns_, tables_, padded};
    QM_TRY(qm::ParallelFor(call_, task.groups * p.codebooks, 1, [&](int64_t i, int64_t, int32_t) {
      FillTable(panel, i / p.codebooks, static_cast<int32_t>(i % p.codebooks),
                tables_ + i * padded);
      return QM_OK;
    }));
    return qm::ParallelFor(call_, o_.out, kTaskRows,
                           [&](int64_t begin, int64_t end, int32_t) -> qm_status {
                             QM_TRY(qm::Progress(call_, -1));
#if defined(QM_FLATTEN_AVX2)
                             if (HaveAvx2()) {
                               SearchRowsAvx2(panel, begin, end);
                               return QM_OK;
                             }
#endif
                             SearchRows(panel, begin, end);
                             return QM_OK;
                           });
  }

  qm_status StoreCodes(void* codes) override {
    const Params& p = o_.params;
    for (int64_t i = 0; i < o_.out * o_.groups() * p.codebooks; ++i) {
      const int32_t code = CodeOfIndex(arrays.indices[i], p.index_bits);
      if (p.index_bits <= 8) {
        static_cast<int8_t*>(codes)[i] = static_cast<int8_t>(code);
      } else {
        static_cast<int16_t*>(codes)[i] = static_cast<int16_t>(code);
      }
    }
    return QM_OK;
  }

  qm_status LoadCodes(const void* codes) override {
    const Params& p = o_.params;
    for (int64_t i = 0; i < o_.out * o_.groups() * p.codebooks; ++i) {
      arrays.indices[i] = static_cast<uint16_t>(LoadIndex(codes, p.index_bits, i));
    }
    return QM_OK;
  }

  qm_status Difference(const void* a, const void* b, qm_dtype dtype, int64_t count, float factor,
                       float* out, double* sum) override {
    constexpr int64_t kTile = 16384;  // of partial sums, joined in order
    std::vector<double> sums(static_cast<size_t>((count + kTile - 1) / kTile));
    QM_TRY(
        qm::ParallelFor(call_, count, kTile, [&](int64_t begin, int64_t end, int32_t) -> qm_status {
          double& own = sums[begin / kTile];
          for (int64_t i = begin; i < end; ++i) {
            const float difference = LoadValue(a, dtype, i) - LoadValue(b, dtype, i);
            own += static_cast<double>(difference) * static_cast<double>(difference);
            out[i] = factor * difference;
          }
          return QM_OK;
        }));
    *sum = 0;
    for (const double own : sums) *sum += own;
    return QM_OK;
  }

 private:
  template <class Body>
  qm_status ForRows(int64_t rows, Body&& body) {
    return qm::ParallelFor(call_, rows, 16, [&](int64_t begin, int64_t end, int32_t) -> qm_status {
      for (int64_t r = begin; r < end; ++r) body(r);
      return QM_OK;
    });
  }

  void AddRow(const float* x, int64_t r, float factor, int32_t first, int32_t last, float* to) {
    const Params& p = o_.params;
    for (int64_t j = 0; j < o_.groups(); ++j) {
      const uint16_t* indices = arrays.indices + (r * o_.groups() + j) * p.codebooks;
      for (int32_t m = first; m < last; ++m) {
        float* sum =
            to + (static_cast<int64_t>(m - first) * p.length() + indices[m]) * p.group_size;
        for (int64_t a = 0; a < p.group_size; ++a) sum[a] += factor * x[j * p.group_size + a];
      }
    }
  }

  // columns_ = codebooks with their vectors side by side.
  qm_status Transpose() {
    const Params& p = o_.params;
    const int64_t padded = PaddedLength(p);
    if (columns_ == nullptr) {
      QM_TRY(
          qm::Scratch(call_, kHost, p.codebooks * p.group_size * padded, "codebooks", &columns_));
    }
    for (int64_t m = 0; m < p.codebooks; ++m) {
      for (int64_t a = 0; a < p.group_size; ++a) {
        float* to = columns_ + (m * p.group_size + a) * padded;
        for (int64_t c = 0; c < padded; ++c) {
          to[c] = c < p.length() ? arrays.codebooks[(m * p.length() + c) * p.group_size + a] : 0.0f;
        }
      }
    }
    return QM_OK;
  }

  static void FillTable(const Panel& panel, int64_t j, int32_t m, float* table) {
    const Params& p = panel.options->params;
    std::fill(table, table + panel.padded, std::numeric_limits<float>::infinity());
    for (int32_t c = 0; c < p.length(); ++c) {
      const float* v = panel.Vector(m, c);
      float sum = 0;
      for (int64_t a = 0; a < p.group_size; ++a) {
        const float* row = panel.GramRow(j, a) + j * p.group_size;
        float inner = 0;
        for (int64_t b = 0; b < p.group_size; ++b) inner += row[b] * v[b];
        sum += v[a] * inner;
      }
      table[c] = sum;
    }
  }

  qm_call* call_;
  const Options& o_;
  float *columns_ = nullptr, *tables_ = nullptr, *partial_ = nullptr;
};

}  // namespace

std::unique_ptr<Kernels> MakeCpuKernels(qm_call* call, const Options& options) {
  return std::make_unique<CpuKernels>(call, options);
}

uint64_t CpuKernelBytes(const Options& o) {
  const int64_t padded = PaddedLength(o.params);
  return static_cast<uint64_t>(4 * (o.params.codebooks * o.params.group_size * padded +
                                    o.panel_groups() * o.params.codebooks * padded +
                                    kScatterTiles * o.params.values())) +
         3 * 256;
}

}  // namespace quantmill::aqlm
