// Products with packed weights on the GPU, y = x W^T in bf16, beside the dense product of the same
// shapes (Llama-3-8B). Weights come from the methods found, quantized from random values; a method
// that is not there is left out. Every product is compared with the dense product of the
// dequantized weight before it is timed. GB/s counts the packed bytes.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/tensor/backend.h"
#include "host/plugins/catalog.h"
#include "host/plugins/registry.h"
#include "host/worker/formats.h"
#include "host/worker/invoke.h"
#include "tests/bench/cuda_timing.h"

namespace quantmill::bench {
namespace {

struct Shape2 {
  const char* name;
  int64_t k, n;
};
constexpr Shape2 kShapes[] = {
    {"qkv", 4096, 6144}, {"o", 4096, 4096}, {"gate+up", 4096, 28672}, {"down", 14336, 4096}};
constexpr int64_t kRows[] = {1, 4, 16, 64, 256, 2048};

constexpr size_t kSample = 1000003;  // prime: rows differ

struct Packing {
  const char* method;
  ResolvedOptions options;  // over the method's defaults
};
const std::vector<Packing>& Packings() {
  static const auto* const packings = new std::vector<Packing>{
      {"ptq", {{"bits", "4"}, {"group_size", "128"}, {"symmetric", "true"}}},
      {"ptq", {{"bits", "4"}, {"group_size", "128"}}},
      {"ptq", {{"bits", "8"}, {"group_size", "-1"}, {"symmetric", "true"}}},
      {"ptq", {{"bits", "3"}, {"group_size", "128"}}},
      {"ptq", {{"bits", "2"}, {"group_size", "64"}}},
      {"hqq", {{"bits", "4"}, {"group_size", "64"}}},
      {"nf4", {}},
      {"nf4", {{"double_quant", "true"}}},
      {"eetq", {}},
      {"aqlm", {}},
  };
  return *packings;
}

std::string NameOf(const Packing& packing) {
  std::string name = packing.method;
  for (const auto& [option, value] : packing.options)
    absl::StrAppend(&name, " ", option, "=", value);
  return name;
}

class Bench {
 public:
  Bench(std::unique_ptr<Backend> cuda, std::unique_ptr<Backend> cpu,
        std::vector<LoadedMethod> methods)
      : cuda_(std::move(cuda)),
        cpu_(std::move(cpu)),
        methods_(methods),
        formats_(std::move(methods), *cpu_) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < kSample; ++i) sample_.push_back(normal(generator));
  }

  const LoadedMethod* Method(const std::string& id) const {
    for (const LoadedMethod& loaded : methods_) {
      if (id == loaded.method->id) return &loaded;
    }
    return nullptr;
  }

  // Normally distributed, as the values of trained weights are; large tensors repeat a sample.
  absl::StatusOr<Tensor> Random(DType dtype, int64_t rows, int64_t columns) {
    QM_ASSIGN_OR_RETURN(const Tensor host, Tensor::Host(DType::kF32, {rows, columns}));
    for (int64_t i = 0; i < host.elements(); ++i) {
      host.as<float>()[i] = sample_[static_cast<size_t>(i) % sample_.size()];
    }
    QM_ASSIGN_OR_RETURN(const Tensor device, cuda_->ToDevice(host));
    QM_ASSIGN_OR_RETURN(Tensor typed, cuda_->Allocate(dtype, {rows, columns}));
    QM_RETURN_IF_ERROR(cuda_->Copy(device, &typed));
    return typed;
  }

  absl::StatusOr<PackedWeight> Quantize(const LoadedMethod& loaded, const Packing& packing,
                                        const Tensor& weight) {
    ResolvedOptions options = packing.options;
    for (uint64_t i = 0; i < loaded.method->option_count; ++i) {
      const qm_option& option = loaded.method->options[i];
      if (option.default_value != nullptr) options.emplace(option.name, option.default_value);
    }
    CallSettings settings;
    settings.what = absl::StrCat("plugin ", loaded.method->id, ", quantize-linear.run");
    settings.options = &options;
    qm_linear_info info = {};
    info.struct_size = sizeof info;
    info.name = "weight";
    info.role = "";
    info.out_features = weight.dim(0);
    info.in_features = weight.dim(1);
    info.weight_dtype = QM_BF16;
    info.scale_dtype = QM_BF16;
    qm_stats none = {};
    none.struct_size = sizeof none;
    qm_packed packed = {};
    PluginCall call(*cuda_, settings);
    const qm_tensor view = weight.View();
    const auto* table = loaded.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
    QM_RETURN_IF_ERROR(Invoke(call, table->run, &info, &view, &none, &packed));
    return call.TakePacked(packed);
  }

  absl::StatusOr<PackedWeight> CopyOf(const PackedWeight& weight) {
    PackedWeight copy = weight;
    for (NamedTensor& named : copy.tensors) {
      QM_ASSIGN_OR_RETURN(Tensor tensor,
                          cuda_->Allocate(named.tensor.dtype(), named.tensor.shape()));
      QM_RETURN_IF_ERROR(cuda_->Copy(named.tensor, &tensor));
      named.tensor = std::move(tensor);
    }
    return copy;
  }

  // ||a - b|| / ||b||, both bf16 on the device.
  absl::StatusOr<double> Difference(const Tensor& a, const Tensor& b) {
    QM_ASSIGN_OR_RETURN(Tensor left, Tensor::Host(a.dtype(), a.shape()));
    QM_ASSIGN_OR_RETURN(Tensor right, Tensor::Host(b.dtype(), b.shape()));
    QM_RETURN_IF_ERROR(cuda_->Copy(a, &left));
    QM_RETURN_IF_ERROR(cuda_->Copy(b, &right));
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < left.elements(); ++i) {
      const double value = LoadFloat(right, i);
      const double error = LoadFloat(left, i) - value;
      difference += error * error;
      norm += value * value;
    }
    return std::sqrt(difference / norm);
  }

  // Both sides round x to bf16 and their results once more; the dense one also rounds the weight.
  absl::Status Check(PackedKernel& kernel, const PackedWeight& packed,
                     const PackedWeight& prepacked, const Tensor& x) {
    const int64_t m = x.dim(0), n = packed.out_features;
    QM_ASSIGN_OR_RETURN(Tensor dense, cuda_->Allocate(DType::kBF16, {n, packed.in_features}));
    QM_RETURN_IF_ERROR(kernel.Dequantize(packed, &dense));
    QM_ASSIGN_OR_RETURN(Tensor expected, cuda_->Allocate(DType::kBF16, {m, n}));
    QM_RETURN_IF_ERROR(cuda_->Linear(x, dense, Tensor(), &expected));
    QM_ASSIGN_OR_RETURN(Tensor y, cuda_->Allocate(DType::kBF16, {m, n}));
    QM_RETURN_IF_ERROR(kernel.MatMul(prepacked, x, &y));
    QM_ASSIGN_OR_RETURN(const double error, Difference(y, expected));
    if (error <= 3 * 0x1p-8) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("relative error ", error));
  }

  // Times of one packing at one shape for every number of rows.
  absl::Status Products(const Packing& packing, const Shape2& shape, std::vector<Row>* rows) {
    QM_ASSIGN_OR_RETURN(const Tensor weight, Random(DType::kF32, shape.n, shape.k));
    QM_ASSIGN_OR_RETURN(const PackedWeight packed,
                        Quantize(*Method(packing.method), packing, weight));
    QM_ASSIGN_OR_RETURN(const auto kernel, formats_.Kernel(packed, *cuda_));
    const auto bytes = static_cast<double>(packed.bytes());
    std::vector<PackedWeight> sets;
    for (int64_t i = 0; i < SetsFor(bytes); ++i) {
      QM_ASSIGN_OR_RETURN(const PackedWeight copy, CopyOf(packed));
      absl::StatusOr<PackedWeight> prepacked = kernel->Prepack(copy);
      if (!prepacked.ok() && !absl::IsUnimplemented(prepacked.status())) return prepacked.status();
      sets.push_back(prepacked.ok() ? *std::move(prepacked) : copy);
    }
    for (int64_t m : kRows) {
      const std::string name = absl::StrCat(NameOf(packing), " ", shape.name, " m=", m);
      QM_ASSIGN_OR_RETURN(const Tensor x, Random(DType::kBF16, m, shape.k));
      QM_ASSIGN_OR_RETURN(Tensor y, cuda_->Allocate(DType::kBF16, {m, shape.n}));
      const absl::Status status = Check(*kernel, packed, sets[0], x);
      if (absl::IsUnimplemented(status)) continue;  // the host dequantizes there
      if (!status.ok()) return absl::InternalError(absl::StrCat(name, ": ", status.ToString()));
      QM_ASSIGN_OR_RETURN(const double seconds,
                          MedianSeconds(*cuda_, static_cast<int64_t>(sets.size()), [&](int64_t i) {
                            return kernel->MatMul(sets[static_cast<size_t>(i)], x, &y);
                          }));
      const double operations =
          2.0 * static_cast<double>(m) * static_cast<double>(shape.n * shape.k);
      rows->push_back({name, seconds * 1e6, bytes / seconds * 1e-9, operations / seconds * 1e-12});
      Print(rows->back());
    }
    return absl::OkStatus();
  }

  absl::Status Dense(const Shape2& shape, std::vector<Row>* rows) {
    const double bytes = 2.0 * static_cast<double>(shape.n * shape.k);
    std::vector<Tensor> sets;
    for (int64_t i = 0; i < SetsFor(bytes); ++i) {
      QM_ASSIGN_OR_RETURN(sets.emplace_back(), Random(DType::kBF16, shape.n, shape.k));
    }
    for (int64_t m : kRows) {
      QM_ASSIGN_OR_RETURN(const Tensor x, Random(DType::kBF16, m, shape.k));
      QM_ASSIGN_OR_RETURN(Tensor y, cuda_->Allocate(DType::kBF16, {m, shape.n}));
      QM_ASSIGN_OR_RETURN(const double seconds,
                          MedianSeconds(*cuda_, static_cast<int64_t>(sets.size()), [&](int64_t i) {
                            return cuda_->Linear(x, sets[static_cast<size_t>(i)], Tensor(), &y);
                          }));
      const double operations =
          2.0 * static_cast<double>(m) * static_cast<double>(shape.n * shape.k);
      rows->push_back({absl::StrCat("bf16 ", shape.name, " m=", m), seconds * 1e6,
                       bytes / seconds * 1e-9, operations / seconds * 1e-12});
      Print(rows->back());
    }
    return absl::OkStatus();
  }

 private:
  std::unique_ptr<Backend> cuda_, cpu_;
  std::vector<LoadedMethod> methods_;
  PluginFormats formats_;
  std::vector<float> sample_;
};

absl::StatusOr<std::vector<LoadedMethod>> AllMethods() {
  QM_ASSIGN_OR_RETURN(const Catalog catalog, DiscoverPlugins({}));
  return LoadMethods(catalog, {});
}

int Main(int argc, char** argv) {
  Options options;
  if (!ParseOptions(argc, argv, &options)) return 2;
  auto cuda = MakeCudaBackend(0, DType::kBF16, 0);
  if (!cuda.ok()) {
    std::printf("skipped: %s\n", std::string(cuda.status().message()).c_str());
    return 0;
  }
  auto methods = AllMethods();
  if (!methods.ok()) {
    std::fprintf(stderr, "error: %s\n", methods.status().ToString().c_str());
    return 1;
  }
  Bench rig(*std::move(cuda), MakeCpuBackend(0).value(), *std::move(methods));
  std::vector<Row> rows;
  bool failed = false;
  const auto run = [&](const std::string& name, const auto& body) {
    if (name.find(options.filter) == std::string::npos) return;
    if (options.list) {
      std::printf("%s\n", name.c_str());
    } else if (const absl::Status status = body(); !status.ok()) {
      PrintFailure(name, status);
      failed = true;
    }
  };
  PrintHeading();
  for (const Shape2& shape : kShapes) {
    run(absl::StrCat("bf16 ", shape.name), [&] { return rig.Dense(shape, &rows); });
    for (const Packing& packing : Packings()) {
      if (rig.Method(packing.method) == nullptr) continue;
      run(absl::StrCat(NameOf(packing), " ", shape.name),
          [&] { return rig.Products(packing, shape, &rows); });
    }
  }
  if (!options.list && !WriteJson(options.json, rows)) return 1;
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) { return quantmill::bench::Main(argc, argv); }
