// Cases of qm.linear-kernel/1: dense values against the reference, products against f64, and what a
// host relies on when it captures or overlaps them.
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/formats/activations.h"
#include "core/formats/distortion.h"
#include "core/formats/reference.h"
#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/cuda_capture.h"
#include "sdk/check/packed_samples.h"

namespace quantmill::check {
namespace {

constexpr char kDequantize[] = "QM-C-004";
constexpr char kProduct[] = "QM-C-005";
constexpr char kPrepack[] = "QM-C-006";
constexpr char kCapture[] = "QM-P-013";
constexpr char kStream[] = "QM-P-006";

constexpr int64_t kRowCounts[] = {1, 2, 8, 16, 17, 32, 33, 256};

// ---- samples this kernel computes with ----

const qm_linear_kernel* KernelTable(const Subject& subject) {
  return subject.Ext<qm_linear_kernel>(QM_EXT_LINEAR_KERNEL);
}

bool Accepts(const Subject& subject, const PackedWeight& packed, DType activation) {
  return KernelTable(subject)->accepts(packed.format_id.c_str(), packed.format_json.c_str(),
                                       subject.backend->device().kind, subject.backend->sm(),
                                       static_cast<qm_dtype>(activation)) > 0;
}

constexpr DType kActivations[] = {DType::kF32, DType::kF16, DType::kBF16};

struct Sample {
  PackedSample source;
  std::vector<DType> activations;  // those the kernel accepts
  Tensor reference;                // F32 dense values on the host
};

// Dense values in `dtype` as the plugin computes them.
std::optional<Verdict> Dequantize(Subject& subject, const PackedWeight& packed, DType dtype,
                                  const std::string& what, Tensor* out) {
  CheckedCall call(subject, CallSetup());
  qm_tensor dense =
      call.Output("the dense weight", dtype, {packed.out_features, packed.in_features});
  const qm_status code =
      Invoke(call, KernelTable(subject)->dequantize, call.InputPacked(packed), &dense);
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK) {
    return Failed(kDequantize,
                  absl::StrCat(what, ": accepted, but dequantize answers ", call.Outcome()));
  }
  absl::StatusOr<Tensor> values = call.Read(dense);
  if (!values.ok()) return Failed(kDequantize, std::string(values.status().message()));
  *out = *std::move(values);
  return std::nullopt;
}

// Every sample the kernel accepts, with its reference: that of the host where the format is built
// in, else what the kernel itself dequantizes to in f32.
std::optional<Verdict> FindSamples(Subject& subject, std::vector<Sample>* out) {
  const auto* table = KernelTable(subject);
  if (!QM_HAS(table, accepts) || !QM_HAS(table, dequantize)) {
    return Failed(kProduct, "a kernel needs at least accepts and dequantize");
  }
  absl::StatusOr<std::vector<PackedSample>> sources = MakePackedSamples(subject);
  if (!sources.ok()) return Failed("", std::string(sources.status().message()));
  for (PackedSample& source : *sources) {
    Sample sample;
    for (const DType dtype : kActivations) {
      if (Accepts(subject, source.packed, dtype)) sample.activations.push_back(dtype);
    }
    if (sample.activations.empty()) continue;
    if (FindReferenceFormat(source.packed.format_id) != nullptr) {
      absl::StatusOr<Tensor> reference = DequantizeOnHost(subject, source.packed);
      if (!reference.ok()) return Failed("", std::string(reference.status().message()));
      sample.reference = *std::move(reference);
    } else if (auto verdict = Dequantize(subject, source.packed, DType::kF32, source.name,
                                         &sample.reference)) {
      return verdict;
    }
    sample.source = std::move(source);
    out->push_back(std::move(sample));
  }
  if (!out->empty()) return std::nullopt;
  return Skipped(absl::StrCat("accepts() takes none of the ", sources->size(),
                              " weights there are here on ", subject.device,
                              ": those of the built-in formats and what this plugin quantizes"));
}

// ---- dequantize ----

// Half the distance of neighbours, relative.
double UnitRoundoff(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
}
double SmallestSubnormal(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-149 : dtype == DType::kF16 ? 0x1p-24 : 0x1p-133;
}

// The reference rounded once, or its neighbour in `dtype`.
std::optional<Verdict> CompareDense(const Sample& sample, const Tensor& dense) {
  const DType dtype = dense.dtype();
  for (int64_t i = 0; i < dense.elements(); ++i) {
    const double expected = sample.reference.as<float>()[i];
    const double seen = LoadFloat(dense, i);
    const double bound = 2.0 * UnitRoundoff(dtype) * std::fabs(expected) + SmallestSubnormal(dtype);
    if (std::fabs(seen - expected) <= bound) continue;
    const int64_t cols = dense.dim(1);
    return Failed(
        kDequantize,
        absl::StrFormat("%s as %s: w[%d, %d] is %.9g, the reference says %.9g", sample.source.name,
                        DTypeName(dtype), i / cols, i % cols, seen, expected));
  }
  return std::nullopt;
}

Verdict DequantizeEqualsReference(Subject& subject) {
  std::vector<Sample> samples;
  if (auto verdict = FindSamples(subject, &samples)) return *verdict;
  for (const Sample& sample : samples) {
    for (const DType dtype : kActivations) {
      Tensor dense;
      if (auto verdict =
              Dequantize(subject, sample.source.packed, dtype, sample.source.name, &dense)) {
        return *verdict;
      }
      if (auto verdict = CompareDense(sample, dense)) return *verdict;
    }
  }
  return Passed(absl::StrCat(samples.size(), " weights, each as F32, F16 and BF16"));
}

// ---- products ----

// Normal values, rounded to `dtype`.
Tensor RandomInput(DType dtype, int64_t rows, int64_t cols, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Tensor x = *Tensor::Host(dtype, {rows, cols});
  for (int64_t i = 0; i < x.elements(); ++i) {
    const float value = normal(random);
    if (dtype == DType::kF32) x.as<float>()[i] = value;
    if (dtype == DType::kF16) x.as<uint16_t>()[i] = F32ToF16(value);
    if (dtype == DType::kBF16) x.as<uint16_t>()[i] = F32ToBF16(value);
  }
  return x;
}

// What a product may be off, as NMSE. Weights, their scale and the output are rounded to the type
// of the activations (4 u with the zero point's); sums of K terms in f32 drift by about sqrt(K)
// roundings, of terms up to 2^bits times too large where the zero point is taken off at the end.
double NmseBound(const PackedWeight& packed, DType dtype) {
  const double bits = std::min(8.0, std::ceil(packed.BitsPerWeight()));
  const double storage = dtype == DType::kF32 ? 0.0 : 4.0 * UnitRoundoff(dtype);
  const double sums =
      0x1p-24 * std::exp2(bits) * std::sqrt(static_cast<double>(packed.in_features));
  return storage * storage + sums * sums;
}

// Error of y against x W^T (or dy W) in f64.
Distortion ProductError(const Tensor& x, const Tensor& dense, bool transposed, const Tensor& y) {
  const int64_t rows = x.dim(0), inner = x.dim(1), columns = y.dim(1);
  const float* w = dense.as<float>();
  const int64_t column_step = transposed ? 1 : inner, inner_step = transposed ? columns : 1;
  Distortion error;
  std::vector<double> row(static_cast<size_t>(inner));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < inner; ++k) row[k] = LoadFloat(x, r * inner + k);
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0.0;
      for (int64_t k = 0; k < inner; ++k) sum += row[k] * w[c * column_step + k * inner_step];
      error.Add(sum, LoadFloat(y, r * columns + c));
    }
  }
  return error;
}

// One product on the device of the subject. `y` stays empty when the kernel answers UNIMPLEMENTED.
struct Product {
  const PackedWeight* packed = nullptr;
  std::string what;
  Tensor x;
  bool transposed = false;
  bool captured = false;  // inside a CUDA graph

  int64_t inner() const { return transposed ? packed->out_features : packed->in_features; }
  int64_t columns() const { return transposed ? packed->in_features : packed->out_features; }
};

// An open call of one product, so that two can be under way at once.
class ProductCall {
 public:
  ProductCall(Subject& subject, const Product& product)
      : subject_(subject), product_(product), call_(subject, CallSetup()) {
    const auto* table = KernelTable(subject);
    packed_ = call_.InputPacked(*product.packed);
    x_ = call_.Input("x", product.x);
    y_ = call_.Output("y", product.x.dtype(), {product.x.dim(0), product.columns()});
    uint64_t bytes = 0;
    if (QM_HAS(table, workspace_bytes)) {
      bytes = table->workspace_bytes(packed_, product.x.dim(0));
    }
    workspace_ = call_.Memory("the workspace", bytes);
  }

  void Start() {
    const auto* table = KernelTable(subject_);
    code_ = Invoke(call_, product_.transposed ? table->matmul_transposed : table->matmul, packed_,
                   &x_, workspace_, &y_);
  }

  std::optional<Verdict> Finish(Tensor* y) {
    if (auto verdict = call_.Finish(code_)) return verdict;
    *y = Tensor();
    if (code_ == QM_UNIMPLEMENTED) return std::nullopt;
    if (code_ != QM_OK) {
      return Failed(kProduct, absl::StrCat(product_.what, ": ", call_.Outcome(),
                                           "; answer QM_UNIMPLEMENTED for what is not served"));
    }
    absl::StatusOr<Tensor> values = call_.Read(y_);
    if (!values.ok()) return Failed(kProduct, std::string(values.status().message()));
    *y = *std::move(values);
    return std::nullopt;
  }

 private:
  Subject& subject_;
  const Product& product_;
  CheckedCall call_;
  const qm_packed* packed_ = nullptr;
  qm_tensor x_ = {}, y_ = {};
  void* workspace_ = nullptr;
  qm_status code_ = QM_INTERNAL;
};

std::optional<Verdict> Multiply(Subject& subject, const Product& product, Tensor* y) {
  ProductCall call(subject, product);
  if (!product.captured) {
    call.Start();
    return call.Finish(y);
  }
  const absl::Status captured = RunCaptured(subject.backend->stream(), [&] { call.Start(); });
  auto verdict = call.Finish(y);
  if (verdict || captured.ok() || y->empty()) return verdict;
  return Failed(kCapture, absl::StrCat(product.what, " while the stream was captured: ",
                                       std::string(captured.message())));
}

// x as products with this weight see it: rounded where the format says so.
Tensor AsSeen(const PackedWeight& packed, const Product& product) {
  const Activations activations = ActivationsOf(packed.format_json);
  if (activations == Activations::kFloat || product.transposed) return product.x;
  Tensor rounded = *Tensor::Host(DType::kF32, product.x.shape());
  return QuantizeActivationsReference(activations, product.x, &rounded).ok() ? rounded : product.x;
}

std::optional<Verdict> CompareProduct(const Sample& sample, const Product& product, const Tensor& y,
                                      const char* rule, double* worst) {
  const Distortion error =
      ProductError(AsSeen(sample.source.packed, product), sample.reference, product.transposed, y);
  const double bound = NmseBound(sample.source.packed, product.x.dtype());
  *worst = std::max(*worst, error.nmse() / bound);
  if (error.finite && error.nmse() <= bound) return std::nullopt;
  return Failed(rule, absl::StrFormat("%s: NMSE %.3g%s; the bound for K = %d and these types is "
                                      "%.3g",
                                      product.what, error.nmse(),
                                      error.finite ? "" : " with values that are not finite",
                                      product.inner(), bound));
}

Product MakeProduct(const Subject& subject, const Sample& sample, DType dtype, int64_t rows,
                    bool transposed = false) {
  Product product;
  product.packed = &sample.source.packed;
  product.transposed = transposed;
  product.what = absl::StrFormat("%s, %d rows of %s", sample.source.name, rows, DTypeName(dtype));
  product.x = RandomInput(dtype, rows, product.inner(), subject.seed + static_cast<uint64_t>(rows));
  return product;
}

// *out stays without tensors when the kernel has nothing better than the format's own layout.
std::optional<Verdict> Prepack(Subject& subject, const Sample& sample, PackedWeight* out) {
  if (!QM_HAS(KernelTable(subject), prepack)) return std::nullopt;
  CheckedCall call(subject, CallSetup());
  qm_packed packed = {};
  const qm_status code =
      Invoke(call, KernelTable(subject)->prepack, call.InputPacked(sample.source.packed), &packed);
  if (auto verdict = call.Finish(code)) return verdict;
  if (code == QM_UNIMPLEMENTED) return std::nullopt;
  if (code != QM_OK) {
    return Failed(kPrepack, absl::StrCat(sample.source.name, ": accepted, but prepack answers ",
                                         call.Outcome()));
  }
  absl::StatusOr<PackedWeight> taken = call.TakePacked(packed);
  if (!taken.ok()) return Failed("QM-P-009", std::string(taken.status().message()));
  *out = *std::move(taken);
  if (out->format_id == sample.source.packed.format_id) return std::nullopt;
  return Failed(kPrepack, absl::StrCat("the format became ", out->format_id));
}

// All samples, activation types and numbers of rows.
enum class Mode { kPlain, kTransposed, kGraph };
Verdict TryProducts(Subject& subject, Mode mode) {
  std::vector<Sample> samples;
  if (auto verdict = FindSamples(subject, &samples)) return *verdict;
  int64_t served = 0, left = 0;
  double worst = 0.0;
  for (const Sample& sample : samples) {
    PackedWeight prepacked;  // what a host would capture
    if (mode == Mode::kGraph) {
      if (auto verdict = Prepack(subject, sample, &prepacked)) return *verdict;
    }
    for (const DType dtype : sample.activations) {
      for (const int64_t rows : kRowCounts) {
        Product product = MakeProduct(subject, sample, dtype, rows, mode == Mode::kTransposed);
        product.captured = mode == Mode::kGraph;
        if (!prepacked.tensors.empty()) product.packed = &prepacked;
        Tensor y;
        if (auto verdict = Multiply(subject, product, &y)) return *verdict;
        ++(y.empty() ? left : served);
        if (y.empty()) continue;
        if (auto verdict = CompareProduct(sample, product, y, kProduct, &worst)) return *verdict;
      }
    }
  }
  if (served == 0) return Skipped("every product was left to the host (QM_UNIMPLEMENTED)");
  return Passed(absl::StrFormat("%d products, the worst at %.2g of its bound; %d left to the host",
                                served, worst, left));
}

Verdict MatmulEqualsProduct(Subject& subject) {
  if (!QM_HAS(KernelTable(subject), matmul)) return Skipped("no matmul");
  return TryProducts(subject, Mode::kPlain);
}

Verdict TransposedEqualsProduct(Subject& subject) {
  if (!QM_HAS(KernelTable(subject), matmul_transposed)) return Skipped("no matmul_transposed");
  return TryProducts(subject, Mode::kTransposed);
}

Verdict MatmulInGraph(Subject& subject) {
  if (!subject.on_cuda()) return Skipped("on a GPU only");
  if (!QM_HAS(KernelTable(subject), matmul)) return Skipped("no matmul");
  return TryProducts(subject, Mode::kGraph);
}

// ---- prepack ----

std::optional<Verdict> ComparePrepacked(Subject& subject, const Sample& sample,
                                        const PackedWeight& prepacked) {
  const std::string what = "prepacked " + sample.source.name;
  Tensor before, after;
  if (auto verdict =
          Dequantize(subject, sample.source.packed, DType::kF32, sample.source.name, &before)) {
    return verdict;
  }
  if (auto verdict = Dequantize(subject, prepacked, DType::kF32, what, &after)) return verdict;
  if (std::memcmp(before.data(), after.data(), static_cast<size_t>(before.bytes())) != 0) {
    return Failed(kPrepack, absl::StrCat(what, ": dequantizes to other values than before"));
  }
  if (!QM_HAS(KernelTable(subject), matmul)) return std::nullopt;
  double worst = 0.0;
  for (const DType dtype : sample.activations) {
    for (const int64_t rows : kRowCounts) {
      Product product = MakeProduct(subject, sample, dtype, rows);
      product.packed = &prepacked;
      product.what = "prepacked " + product.what;
      Tensor y;
      if (auto verdict = Multiply(subject, product, &y)) return verdict;
      if (y.empty()) continue;
      if (auto verdict = CompareProduct(sample, product, y, kPrepack, &worst)) return verdict;
    }
  }
  return std::nullopt;
}

Verdict PrepackChangesNothing(Subject& subject) {
  if (!QM_HAS(KernelTable(subject), prepack)) return Skipped("no prepack");
  std::vector<Sample> samples;
  if (auto verdict = FindSamples(subject, &samples)) return *verdict;
  int64_t prepacked = 0;
  for (const Sample& sample : samples) {
    PackedWeight result;
    if (auto verdict = Prepack(subject, sample, &result)) return *verdict;
    if (result.tensors.empty()) continue;
    ++prepacked;
    if (auto verdict = ComparePrepacked(subject, sample, result)) return *verdict;
  }
  return Passed(absl::StrCat(prepacked, " of ", samples.size(), " weights have another layout"));
}

// ---- two streams ----

// Two products under way on two streams of one device: neither may see the other's memory.
std::optional<Verdict> Overlap(Subject& subject, Subject& other, const Sample& sample,
                               DType dtype) {
  const Product one = MakeProduct(subject, sample, dtype, 8);
  const Product two = MakeProduct(subject, sample, dtype, 2);
  constexpr int kRepeats = 10;
  double worst = 0.0;
  for (int i = 0; i < kRepeats; ++i) {
    ProductCall first(subject, one);
    ProductCall second(other, two);
    first.Start();
    second.Start();
    Tensor y_one, y_two;
    if (auto verdict = first.Finish(&y_one)) return verdict;
    if (auto verdict = second.Finish(&y_two)) return verdict;
    for (const auto& [product, y] : {std::pair(&one, &y_one), std::pair(&two, &y_two)}) {
      if (y->empty()) continue;
      if (auto verdict = CompareProduct(sample, *product, *y, kStream, &worst)) return verdict;
    }
  }
  return std::nullopt;
}

Verdict TwoStreams(Subject& subject) {
  if (!subject.on_cuda()) return Skipped("on a GPU only");
  if (!QM_HAS(KernelTable(subject), matmul)) return Skipped("no matmul");
  auto backend = MakeCudaBackend(subject.backend->device().index, DType::kF32, 1);
  if (!backend.ok()) return Skipped(std::string(backend.status().message()));
  Subject other = subject;
  other.backend = backend->get();
  std::vector<Sample> samples;
  if (auto verdict = FindSamples(subject, &samples)) return *verdict;
  for (const Sample& sample : samples) {
    for (const DType dtype : sample.activations) {
      if (auto verdict = Overlap(subject, other, sample, dtype)) return *verdict;
    }
  }
  return Passed(absl::StrCat(samples.size(), " weights, two products at once"));
}

Case Kernel(std::string name, std::vector<std::string> rules, std::string asserts,
            Verdict (*run)(Subject&), double limit_seconds = 60) {
  return {"kernel." + std::move(name),
          std::move(rules),
          std::move(asserts),
          Scope::kMethod,
          QM_EXT_LINEAR_KERNEL,
          run,
          limit_seconds,
          false};
}

}  // namespace

std::vector<Case> KernelCases() {
  return {
      Kernel("dequantize_equals_reference", {kDequantize},
             "Dense values are those of the format's reference, rounded once to F32, F16 and BF16.",
             DequantizeEqualsReference),
      Kernel("matmul_equals_product", {kProduct},
             "x W^T is right for 1, 2, 8, 16, 17, 32, 33 and 256 rows, or left to the host.",
             MatmulEqualsProduct),
      Kernel("matmul_transposed_equals_product", {kProduct},
             "dy W is right for the same numbers of rows, or left to the host.",
             TransposedEqualsProduct),
      Kernel("prepack_changes_nothing", {kPrepack},
             "A prepacked weight has the same dense values and gives the same products.",
             PrepackChangesNothing),
      Kernel("matmul_in_a_graph", {kCapture},
             "Products can be captured in a CUDA graph, and the graph computes them.",
             MatmulInGraph),
      Kernel("two_streams", {kStream, kProduct},
             "Two products under way on two streams do not disturb each other.", TwoStreams),
  };
}

}  // namespace quantmill::check
