// Speed of the CPU backend's operations, at the shapes of a 19 M parameter model (hidden 384) and
// of an 8 B one (hidden 4096). GFLOP/s count the operations the result needs (causal attention:
// half the square), GB/s the bytes that must be read and written.
//
//   cpu_bench --benchmark_filter=Linear --benchmark_min_time=0.3
//
// On a busy machine compare by the CPU column, which adds up the time of all threads.
//
// Ceilings to compare with: sgemm of OpenBLAS on one thread times the threads (BM_Sgemm), and a
// plain copy (BM_Copy/1/1).
#include <cblas.h>

#include <cstring>
#include <memory>
#include <vector>

#include "benchmark/benchmark.h"
#include "core/tensor/backend.h"

namespace quantmill {
namespace {

Backend& Cpu() {
  static const std::unique_ptr<Backend> backend = MakeCpuBackend().value();
  return *backend;
}

// Values that are neither constant nor denormal.
Tensor Filled(Shape shape, DType dtype = DType::kF32) {
  Cpu();  // made here, outside of what is timed
  const Tensor values = Tensor::Host(DType::kF32, shape).value();
  uint32_t state = 1;
  for (int64_t i = 0; i < values.elements(); ++i) {
    state = state * 1664525u + 1013904223u;
    values.as<float>()[i] = static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
  }
  if (dtype == DType::kF32) return values;
  Tensor converted = Tensor::Host(dtype, shape).value();
  (void)Cpu().Copy(values, &converted);
  return converted;
}

void Require(benchmark::State& state, const absl::Status& status) {
  if (!status.ok()) state.SkipWithError(status.ToString().c_str());
}

void ReportFlops(benchmark::State& state, double flops) {
  state.counters["GFLOP/s"] =
      benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void ReportBytes(benchmark::State& state, double bytes) {
  state.counters["GB/s"] =
      benchmark::Counter(bytes * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

// Argument `index` as a dtype: 1 = F32, 2 = F16, 3 = BF16 are the values of qm_dtype.
DType DTypeArgument(const benchmark::State& state, int index) {
  return static_cast<DType>(state.range(index));
}

void BM_Sgemm(benchmark::State& state) {
  const int64_t n = state.range(0);
  const Tensor a = Filled({n, n}), b = Filled({n, n}), c = Filled({n, n});
  openblas_set_num_threads(1);
  const blasint size = static_cast<blasint>(n);
  for (auto _ : state) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, size, size, size, 1.0f, a.as<float>(),
                size, b.as<float>(), size, 0.0f, c.as<float>(), size);
  }
  ReportFlops(state, 2.0 * n * n * n);
}
BENCHMARK(BM_Sgemm)
    ->Arg(512)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

// rows, k, n, dtype
void BM_Linear(benchmark::State& state) {
  const int64_t rows = state.range(0), k = state.range(1), n = state.range(2);
  const DType dtype = DTypeArgument(state, 3);
  const Tensor x = Filled({rows, k}), weight = Filled({n, k}, dtype);
  Tensor out = Filled({rows, n});
  for (auto _ : state) Require(state, Cpu().Linear(x, weight, Tensor(), &out));
  ReportFlops(state, 2.0 * rows * k * n);
  ReportBytes(state, static_cast<double>(weight.bytes() + x.bytes() + out.bytes()));
}
void LinearArguments(benchmark::internal::Benchmark* benchmark) {
  for (int dtype : {QM_F32, QM_BF16, QM_F16}) {
    benchmark->Args({1024, 384, 384, dtype});
    benchmark->Args({1024, 384, 128, dtype});
    benchmark->Args({1024, 384, 1024, dtype});
    benchmark->Args({1024, 1024, 384, dtype});
    benchmark->Args({1024, 384, 8192, dtype});
    benchmark->Args({256, 4096, 4096, dtype});
    for (int rows : {1, 4, 8}) benchmark->Args({rows, 4096, 4096, dtype});
    benchmark->Args({1, 384, 1024, dtype});
    benchmark->Args({16, 4096, 4096, dtype});
  }
}
BENCHMARK(BM_Linear)
    ->Apply(LinearArguments)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

// queries, past, heads, kv_heads, head_dim
void BM_Attention(benchmark::State& state) {
  const int64_t queries = state.range(0), past = state.range(1);
  const AttentionShape shape = {1, queries, past, state.range(2), state.range(3), state.range(4),
                                0, 0.125f};
  const int64_t width = shape.heads * shape.head_dim, kv_width = shape.kv_heads * shape.head_dim;
  const Tensor q = Filled({queries, width});
  const Tensor keys = Filled({past + queries, kv_width}),
               values = Filled({past + queries, kv_width});
  Tensor out = Filled({queries, width});
  for (auto _ : state) Require(state, Cpu().Attention(shape, q, keys, values, &out));
  const double pairs = static_cast<double>(queries) * (past + 0.5 * (queries + 1));
  ReportFlops(state, 4.0 * pairs * width);
}
BENCHMARK(BM_Attention)
    ->Args({1024, 0, 6, 2, 64})
    ->Args({2048, 0, 8, 2, 128})
    ->Args({1, 1023, 6, 2, 64})
    ->Args({1, 4095, 32, 8, 128})
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_Gram(benchmark::State& state) {
  const int64_t rows = state.range(0), k = state.range(1);
  const Tensor x = Filled({rows, k});
  Tensor gram = Tensor::HostZeros(DType::kF32, {k, k}).value();
  for (auto _ : state) Require(state, Cpu().AccumulateGram(x, &gram));
  ReportFlops(state, 1.0 * rows * k * (k + 1));
}
BENCHMARK(BM_Gram)
    ->Args({1024, 384})
    ->Args({1024, 1024})
    ->Args({1024, 4096})
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_Cross(benchmark::State& state) {
  const int64_t rows = state.range(0), k = state.range(1);
  const Tensor x = Filled({rows, k}), original = Filled({rows, k});
  Tensor cross = Tensor::HostZeros(DType::kF32, {k, k}).value();
  for (auto _ : state) Require(state, Cpu().AccumulateCross(original, x, &cross));
  ReportFlops(state, 2.0 * rows * k * k);
}
BENCHMARK(BM_Cross)
    ->Args({1024, 384})
    ->Args({1024, 1024})
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_Abs(benchmark::State& state) {
  const Tensor x = Filled({1024, state.range(0)});
  Tensor sum = Filled({state.range(0)}), maximum = Filled({state.range(0)});
  for (auto _ : state) Require(state, Cpu().AccumulateAbs(x, &sum, &maximum));
  ReportBytes(state, static_cast<double>(x.bytes()));
}
BENCHMARK(BM_Abs)
    ->Arg(384)
    ->Arg(4096)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_RmsNorm(benchmark::State& state) {
  const Tensor x = Filled({1024, state.range(0)}), weight = Filled({state.range(0)});
  Tensor out = Filled(x.shape());
  for (auto _ : state) Require(state, Cpu().RmsNorm(x, weight, 1e-5f, &out));
  ReportBytes(state, 2.0 * x.bytes());
}
BENCHMARK(BM_RmsNorm)
    ->Arg(384)
    ->Arg(4096)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_Rope(benchmark::State& state) {
  const Tensor table = Filled({1024, 32});
  Tensor x = Filled({1024, state.range(0)});
  for (auto _ : state) Require(state, Cpu().Rope(table, table, 0, 1024, 64, &x));
  ReportBytes(state, 2.0 * x.bytes());
}
BENCHMARK(BM_Rope)
    ->Arg(384)
    ->Arg(4096)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_SiluMultiply(benchmark::State& state) {
  const Tensor gate = Filled({1024, state.range(0)}), up = Filled(gate.shape());
  Tensor out = Filled(gate.shape());
  for (auto _ : state) Require(state, Cpu().SiluMultiply(gate, up, &out));
  ReportBytes(state, 3.0 * out.bytes());
}
BENCHMARK(BM_SiluMultiply)
    ->Arg(1024)
    ->Arg(14336)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_ScoreRows(benchmark::State& state) {
  const Tensor logits = Filled({64, state.range(0)});
  const Tensor targets = Tensor::FromI32({64}, std::vector<int32_t>(64, 1));
  Tensor nll = Filled({64}), argmax = Tensor::Host(DType::kI32, {64}).value();
  for (auto _ : state) Require(state, Cpu().ScoreRows(logits, targets, &nll, &argmax));
  ReportBytes(state, static_cast<double>(logits.bytes()));
}
BENCHMARK(BM_ScoreRows)
    ->Arg(8192)
    ->Arg(128256)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_KlRows(benchmark::State& state) {
  const Tensor reference = Filled({64, state.range(0)}), logits = Filled(reference.shape());
  Tensor kl = Filled({64});
  for (auto _ : state) Require(state, Cpu().KlRows(reference, logits, &kl));
  ReportBytes(state, 2.0 * logits.bytes());
}
BENCHMARK(BM_KlRows)
    ->Arg(8192)
    ->Arg(128256)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

// from dtype, to dtype
void BM_Copy(benchmark::State& state) {
  const Tensor source = Filled({1024, 4096}, DTypeArgument(state, 0));
  Tensor target = Filled(source.shape(), DTypeArgument(state, 1));
  for (auto _ : state) Require(state, Cpu().Copy(source, &target));
  ReportBytes(state, static_cast<double>(source.bytes() + target.bytes()));
}
BENCHMARK(BM_Copy)
    ->Args({QM_F32, QM_F32})
    ->Args({QM_BF16, QM_F32})
    ->Args({QM_F16, QM_F32})
    ->Args({QM_F32, QM_BF16})
    ->Args({QM_F32, QM_F16})
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_Gemm(benchmark::State& state) {
  const int64_t n = state.range(0);
  const Tensor a = Filled({n, n}), b = Filled({n, n}), c = Filled({n, n});
  for (auto _ : state) {
    Require(state, Cpu().Gemm(false, true, 1, a.View(), b.View(), 0, c.View()));
  }
  ReportFlops(state, 2.0 * n * n * n);
}
BENCHMARK(BM_Gemm)
    ->Arg(384)
    ->Arg(1024)
    ->Unit(benchmark::kMicrosecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

// Counted as n^3 / 3 for the factorisation and n^3 / 3 for the triangular inverse.
void BM_InverseCholesky(benchmark::State& state) {
  const int64_t n = state.range(0);
  Tensor h = Tensor::HostZeros(DType::kF32, {n, n}).value();
  Require(state, Cpu().AccumulateGram(Filled({512, n}), &h));
  const Tensor out = Filled({n, n});
  for (auto _ : state) Require(state, Cpu().InverseCholesky(h.View(), 0.01, out.View()));
  ReportFlops(state, 2.0 / 3.0 * n * n * n);
}
BENCHMARK(BM_InverseCholesky)
    ->Arg(384)
    ->Arg(1024)
    ->Arg(4096)
    ->Arg(5120)
    ->Unit(benchmark::kMillisecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

}  // namespace
}  // namespace quantmill

BENCHMARK_MAIN();
