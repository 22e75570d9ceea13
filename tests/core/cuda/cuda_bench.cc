// Speed of the CUDA backend's operations. Each case is checked against the CPU backend at a reduced
// size first, and timed only if it is right: median of several CUDA-graph replays, inputs rotated
// through more than the L2 cache, fractions of the ceilings the same run measures (a large device
// copy, a large bf16 product). --json FILE writes all figures, --filter TEXT picks cases, --list
// names them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/base/status.h"
#include "core/tensor/backend.h"
#include "tests/bench/cuda_timing.h"

namespace quantmill {
namespace {

using bench::Row;
using bench::SetsFor;

// One operation over sets of tensors, so that successive runs find cold caches.
struct Case {
  std::string name;
  double bytes = 0;       // least traffic of one run
  double operations = 0;  // multiplications and additions of one run
  int64_t sets = 1;
  std::function<absl::Status(int64_t set)> run;
  std::function<absl::Status()> check;  // OK when the result is right
};

class Bench {
 public:
  Bench(std::unique_ptr<Backend> cuda, std::unique_ptr<Backend> cpu)
      : cuda_(std::move(cuda)), cpu_(std::move(cpu)) {}

  Backend& cuda() { return *cuda_; }
  Backend& cpu() { return *cpu_; }

  // Normally distributed values of a dtype, in host memory. Large tensors repeat a megabyte-sized
  // sample: zeros would run faster than real data.
  Tensor HostRandom(DType dtype, const Shape& shape) {
    std::normal_distribution<float> normal;
    const int64_t distinct = std::min<int64_t>(shape.elements(), 1 << 20);
    Tensor sample = Tensor::Host(DType::kF32, {distinct}).value();
    for (int64_t i = 0; i < distinct; ++i) sample.as<float>()[i] = normal(generator_);
    Tensor typed = Tensor::Host(dtype, {distinct}).value();
    if (!cpu_->Copy(sample, &typed).ok()) std::abort();
    Tensor all = Tensor::Host(dtype, shape).value();
    for (int64_t done = 0; done < all.bytes(); done += typed.bytes()) {
      std::memcpy(all.as<char>() + done, typed.data(),
                  static_cast<size_t>(std::min(typed.bytes(), all.bytes() - done)));
    }
    return all;
  }
  Tensor Random(DType dtype, const Shape& shape) {
    return cuda_->ToDevice(HostRandom(dtype, shape)).value();
  }
  Tensor Like(const Tensor& tensor) {
    return cuda_->Allocate(tensor.dtype(), tensor.shape()).value();
  }
  Tensor InF32(const Tensor& host) {
    Tensor copy = Tensor::Host(DType::kF32, host.shape()).value();
    if (!cpu_->Copy(host, &copy).ok()) std::abort();
    return copy;
  }
  // ||gpu - expected|| / ||expected|| at most `limit`; NaN is an error.
  absl::Status Compare(const Tensor& gpu, const Tensor& expected, double limit) {
    Tensor host = Tensor::Host(gpu.dtype(), gpu.shape()).value();
    QM_RETURN_IF_ERROR(cuda_->Copy(gpu, &host));
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < host.elements(); ++i) {
      const double e = LoadFloat(expected, i), d = LoadFloat(host, i) - e;
      difference += d * d;
      norm += e * e;
    }
    const double error = std::sqrt(difference / norm);
    if (error <= limit) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("relative error ", error, ", limit ", limit));
  }

  absl::StatusOr<Row> Time(const Case& c) {
    QM_RETURN_IF_ERROR(c.check ? c.check() : absl::OkStatus());
    QM_ASSIGN_OR_RETURN(const double seconds, bench::MedianSeconds(*cuda_, c.sets, c.run));
    return Row{c.name, seconds * 1e6, c.bytes / seconds * 1e-9, c.operations / seconds * 1e-12};
  }

 private:
  std::unique_ptr<Backend> cuda_, cpu_;
  std::mt19937 generator_{1};
};

using Sets = std::vector<std::vector<Tensor>>;

// Sets of random tensors of the given shapes, made when a case first runs.
std::function<std::vector<Tensor>&(int64_t)> Lazily(Bench& bench, int64_t count,
                                                    std::vector<std::pair<DType, Shape>> shapes) {
  auto sets = std::make_shared<Sets>();
  return [&bench, count, shapes = std::move(shapes), sets](int64_t i) -> std::vector<Tensor>& {
    while (static_cast<int64_t>(sets->size()) < count) {
      sets->emplace_back();
      for (const auto& [dtype, shape] : shapes) sets->back().push_back(bench.Random(dtype, shape));
    }
    return (*sets)[static_cast<size_t>(i)];
  };
}

Case CopyCeiling(Bench& bench) {
  Case c;
  c.name = "ceiling: copy";
  c.sets = 2;
  const int64_t bytes = int64_t{512} << 20;
  c.bytes = 2.0 * static_cast<double>(bytes);
  const Shape shape = {bytes / 4};
  auto at = Lazily(bench, c.sets, {{DType::kF32, shape}, {DType::kF32, shape}});
  c.run = [&bench, at](int64_t i) { return bench.cuda().Copy(at(i)[0], &at(i)[1]); };
  return c;
}

Case NormCase(Bench& bench, int64_t rows, int64_t width) {
  Case c;
  c.name = absl::StrCat("norm ", rows, "x", width);
  c.bytes = 4.0 * static_cast<double>(rows * width);
  c.sets = SetsFor(c.bytes);
  auto at = Lazily(
      bench, c.sets,
      {{DType::kBF16, {rows, width}}, {DType::kBF16, {rows, width}}, {DType::kBF16, {width}}});
  c.run = [&bench, at](int64_t i) {
    return bench.cuda().RmsNorm(at(i)[0], at(i)[2], 1e-5f, &at(i)[1]);
  };
  c.check = [&bench, width]() -> absl::Status {
    const Tensor x = bench.HostRandom(DType::kBF16, {7, width});
    const Tensor weight = bench.HostRandom(DType::kBF16, {width});
    Tensor expected = Tensor::Host(DType::kF32, {7, width}).value();
    QM_RETURN_IF_ERROR(bench.cpu().RmsNorm(bench.InF32(x), weight, 1e-5f, &expected));
    QM_ASSIGN_OR_RETURN(const Tensor gpu, bench.cuda().ToDevice(x));
    QM_ASSIGN_OR_RETURN(const Tensor gpu_weight, bench.cuda().ToDevice(weight));
    Tensor out = bench.Like(gpu);
    QM_RETURN_IF_ERROR(bench.cuda().RmsNorm(gpu, gpu_weight, 1e-5f, &out));
    return bench.Compare(out, expected, 0x1p-8);
  };
  return c;
}

Case LinearCase(Bench& bench, const std::string& name, int64_t rows, int64_t k, int64_t n) {
  Case c;
  c.name = absl::StrCat("linear ", name, " m=", rows);
  c.bytes = 2.0 * static_cast<double>(n * k + rows * (n + k));
  c.operations = 2.0 * static_cast<double>(rows) * static_cast<double>(n * k);
  c.sets = SetsFor(c.bytes);
  auto at = Lazily(bench, c.sets,
                   {{DType::kBF16, {rows, k}}, {DType::kBF16, {n, k}}, {DType::kBF16, {rows, n}}});
  c.run = [&bench, at](int64_t i) {
    return bench.cuda().Linear(at(i)[0], at(i)[1], Tensor(), &at(i)[2]);
  };
  c.check = [&bench, rows, k]() -> absl::Status {
    const int64_t r = std::min<int64_t>(rows, 20), outputs = 64;
    const Tensor x = bench.HostRandom(DType::kBF16, {r, k});
    const Tensor weight = bench.HostRandom(DType::kBF16, {outputs, k});
    Tensor expected = Tensor::Host(DType::kF32, {r, outputs}).value();
    QM_RETURN_IF_ERROR(bench.cpu().Linear(bench.InF32(x), weight, Tensor(), &expected));
    QM_ASSIGN_OR_RETURN(const Tensor gpu, bench.cuda().ToDevice(x));
    QM_ASSIGN_OR_RETURN(const Tensor gpu_weight, bench.cuda().ToDevice(weight));
    QM_ASSIGN_OR_RETURN(Tensor out, bench.cuda().Allocate(DType::kBF16, {r, outputs}));
    QM_RETURN_IF_ERROR(bench.cuda().Linear(gpu, gpu_weight, Tensor(), &out));
    return bench.Compare(out, expected, 0x1p-8);
  };
  return c;
}

AttentionShape ShapeOf(int64_t queries, int64_t past, int64_t heads, int64_t kv_heads,
                       int64_t head_dim) {
  return {1,        queries,  past, heads,
          kv_heads, head_dim, 0,    1.0f / std::sqrt(static_cast<float>(head_dim))};
}

absl::Status CheckAttention(Bench& bench, DType dtype, const AttentionShape& s) {
  const int64_t capacity = s.past_length + s.query_length;
  const Tensor q = bench.HostRandom(dtype, {s.query_length, s.heads * s.head_dim});
  const Tensor k = bench.HostRandom(dtype, {capacity, s.kv_heads * s.head_dim});
  const Tensor v = bench.HostRandom(dtype, {capacity, s.kv_heads * s.head_dim});
  Tensor expected = Tensor::Host(DType::kF32, q.shape()).value();
  QM_RETURN_IF_ERROR(
      bench.cpu().Attention(s, bench.InF32(q), bench.InF32(k), bench.InF32(v), &expected));
  QM_ASSIGN_OR_RETURN(const Tensor q_gpu, bench.cuda().ToDevice(q));
  QM_ASSIGN_OR_RETURN(const Tensor k_gpu, bench.cuda().ToDevice(k));
  QM_ASSIGN_OR_RETURN(const Tensor v_gpu, bench.cuda().ToDevice(v));
  Tensor out = bench.Like(q_gpu);
  QM_RETURN_IF_ERROR(bench.cuda().Attention(s, q_gpu, k_gpu, v_gpu, &out));
  return bench.Compare(out, expected, dtype == DType::kF32 ? 1e-5 : 0x1p-7);
}

Case AttentionCase(Bench& bench, DType dtype, const AttentionShape& s) {
  Case c;
  const int64_t capacity = s.past_length + s.query_length;
  c.name = absl::StrCat("attention ", AbslView(DTypeName(dtype)), " q=", s.query_length,
                        " keys=", capacity, " heads=", s.heads, "/", s.kv_heads, " d=", s.head_dim);
  const auto size = static_cast<double>(ElementSize(dtype));
  const double pairs =
      static_cast<double>(s.query_length) *
      (static_cast<double>(s.past_length) + 0.5 * static_cast<double>(s.query_length + 1));
  c.operations = 4 * pairs * static_cast<double>(s.heads * s.head_dim);
  c.bytes = size * static_cast<double>(2 * s.query_length * s.heads * s.head_dim +
                                       2 * capacity * s.kv_heads * s.head_dim);
  c.sets = std::min<int64_t>(SetsFor(c.bytes), 16);
  const Shape q = {s.query_length, s.heads * s.head_dim};
  const Shape kv = {capacity, s.kv_heads * s.head_dim};
  auto at = Lazily(bench, c.sets, {{dtype, q}, {dtype, kv}, {dtype, kv}, {dtype, q}});
  c.run = [&bench, at, s](int64_t i) {
    return bench.cuda().Attention(s, at(i)[0], at(i)[1], at(i)[2], &at(i)[3]);
  };
  c.check = [&bench, dtype, s] {
    AttentionShape small = s;
    small.query_length = std::min<int64_t>(s.query_length, 200);
    small.past_length = std::min<int64_t>(s.past_length, 500);
    small.heads = 2 * s.heads / s.kv_heads;
    small.kv_heads = 2;
    return CheckAttention(bench, dtype, small);
  };
  return c;
}

Case GramCase(Bench& bench, DType dtype, int64_t rows, int64_t k) {
  Case c;
  c.name = absl::StrCat("gram ", AbslView(DTypeName(dtype)), " ", rows, "x", k);
  // A symmetric result needs half of the products.
  c.operations = static_cast<double>(rows) * static_cast<double>(k) * static_cast<double>(k + 1);
  c.bytes = static_cast<double>(rows * k * ElementSize(dtype)) +
            8.0 * static_cast<double>(k) * static_cast<double>(k);
  c.sets = std::min<int64_t>(SetsFor(c.bytes), 4);
  auto at = Lazily(bench, c.sets, {{dtype, {rows, k}}, {DType::kF32, {k, k}}});
  c.run = [&bench, at](int64_t i) { return bench.cuda().AccumulateGram(at(i)[0], &at(i)[1]); };
  c.check = [&bench, dtype]() -> absl::Status {
    const Tensor x = bench.HostRandom(dtype, {300, 257});
    Tensor expected = Tensor::HostZeros(DType::kF32, {257, 257}).value();
    QM_RETURN_IF_ERROR(bench.cpu().AccumulateGram(bench.InF32(x), &expected));
    QM_ASSIGN_OR_RETURN(const Tensor gpu, bench.cuda().ToDevice(x));
    QM_ASSIGN_OR_RETURN(Tensor gram, bench.cuda().Allocate(DType::kF32, {257, 257}));
    QM_RETURN_IF_ERROR(bench.cuda().Zero(&gram));
    QM_RETURN_IF_ERROR(bench.cuda().AccumulateGram(gpu, &gram));
    return bench.Compare(gram, expected, 1e-5);
  };
  return c;
}

// Shapes of Llama-3-8B.
std::vector<Case> Cases(Bench& bench) {
  std::vector<Case> cases = {CopyCeiling(bench),
                             LinearCase(bench, "ceiling 8192x8192", 8192, 8192, 8192)};
  cases.push_back(NormCase(bench, 2048, 4096));
  cases.push_back(NormCase(bench, 65536, 128));
  for (int64_t rows : {1, 4, 16, 2048}) {
    cases.push_back(LinearCase(bench, "qkv 4096x6144", rows, 4096, 6144));
    cases.push_back(LinearCase(bench, "gate+up 4096x28672", rows, 4096, 28672));
    cases.push_back(LinearCase(bench, "down 14336x4096", rows, 14336, 4096));
  }
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    cases.push_back(AttentionCase(bench, dtype, ShapeOf(2048, 0, 32, 8, 128)));
  }
  cases.push_back(AttentionCase(bench, DType::kBF16, ShapeOf(8192, 0, 32, 8, 128)));
  cases.push_back(AttentionCase(bench, DType::kBF16, ShapeOf(2048, 0, 32, 8, 64)));
  cases.push_back(AttentionCase(bench, DType::kF32, ShapeOf(2048, 0, 32, 8, 128)));
  for (int64_t past : {1023, 8191}) {
    cases.push_back(AttentionCase(bench, DType::kBF16, ShapeOf(1, past, 32, 8, 128)));
  }
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    for (int64_t k : {4096, 14336}) cases.push_back(GramCase(bench, dtype, 2048, k));
  }
  return cases;
}

int Main(int argc, char** argv) {
  bench::Options options;
  if (!bench::ParseOptions(argc, argv, &options)) return 2;
  auto cuda = MakeCudaBackend(0, DType::kBF16, 0);
  if (!cuda.ok()) {
    std::printf("skipped: %s\n", std::string(cuda.status().message()).c_str());
    return 0;
  }
  Bench rig(std::move(cuda).value(), MakeCpuBackend(0).value());
  std::vector<Row> rows;
  bool failed = false;
  bench::PrintHeading();
  for (const std::string& name : [&] {
         std::vector<std::string> names;
         for (const Case& c : Cases(rig)) names.push_back(c.name);
         return names;
       }()) {
    if (name.find(options.filter) == std::string::npos) continue;
    if (options.list) {
      std::printf("%s\n", name.c_str());
      continue;
    }
    // A fresh list per case: the tensors of the case before are released.
    for (const Case& c : Cases(rig)) {
      if (c.name != name) continue;
      const absl::StatusOr<Row> row = rig.Time(c);
      if (!row.ok()) {
        bench::PrintFailure(name, row.status());
        failed = true;
        break;
      }
      bench::Print(*row);
      rows.push_back(*row);
    }
  }
  if (!options.list && !bench::WriteJson(options.json, rows)) return 1;
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace quantmill

int main(int argc, char** argv) { return quantmill::Main(argc, argv); }
