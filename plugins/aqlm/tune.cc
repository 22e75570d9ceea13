// Block tuning (V. Egiazarian et al., arXiv:2401.06118, section 3.4): codes stay, codebooks and
// scales of all linears of a block, its norms and biases move so that the output of the packed
// block comes closer to that of the dense block on the same inputs.
//
//   loss = mean over windows, rows, channels of (block(W^) - block(W))^2,  W^ = diag(s) V
//   dloss/dC_m[c] = sum over (i, j) with code c of s_i dloss/dW^[i, j]
//   dloss/ds_i    = <dloss/dW^[i], V[i]>
//
// Adam, cosine schedule, rates relative to the size of what is tuned. Gradients of the dense
// weights come from the host's vjp. What is emitted is rounded as stored, and only if the loss of
// the rounded values is lower than before.
#include "tune.h"

#include <cmath>
#include <deque>

#include "options.h"

namespace quantmill::aqlm {
namespace {

constexpr int64_t kWindowsPerStep = 4;
constexpr int64_t kPasses = 3;  // over the calibration windows
constexpr int64_t kLeastSteps = 64;
constexpr double kCodebookRate = 0.02;  // of the root mean square of all codebooks, first step
constexpr double kNormRate = 0.002;     // of the root mean square of a norm or bias
constexpr double kScaleRate = 0.002;    // of each scale
constexpr double kBeta1 = 0.9, kBeta2 = 0.95, kEpsilon = 1e-8;
// Windows on which the loss before and after is compared.
constexpr int64_t kJudgedWindows = 16;

// Adam on a vector of values in units of `unit`.
class Adam {
 public:
  explicit Adam(size_t count) : first_(count), second_(count) {}
  // values[i] -= rate * unit(i) * step; gradients are those of the values.
  template <class Unit>
  void Step(const std::vector<double>& gradient, double rate, int64_t t, Unit unit,
            std::vector<float>* values) {
    const double correct1 = 1.0 - std::pow(kBeta1, static_cast<double>(t));
    const double correct2 = 1.0 - std::pow(kBeta2, static_cast<double>(t));
    for (size_t i = 0; i < values->size(); ++i) {
      const double g = gradient[i];
      first_[i] = kBeta1 * first_[i] + (1.0 - kBeta1) * g;
      second_[i] = kBeta2 * second_[i] + (1.0 - kBeta2) * g * g;
      const double size = std::sqrt(second_[i] / correct2);
      if (!(size > 0)) continue;
      const double step = first_[i] / correct1 / (size + kEpsilon * size);
      (*values)[i] = static_cast<float>((*values)[i] - rate * unit(i) * step);
    }
  }

 private:
  std::vector<double> first_, second_;
};

// A packed linear of the block.
struct Linear {
  Options options;
  std::unique_ptr<Kernels> kernels;
  uint64_t item = 0;
  std::string weight_name;
  qm_dtype codebook_dtype = QM_F16, scale_dtype = QM_F16;
  std::vector<float> codebooks, scales;
  std::unique_ptr<Adam> codebook_steps, scale_steps;
  double unit = 0;            // root mean square of the codebooks at first
  float* dense = nullptr;     // [out, in]: the weight as decoded
  float* gradient = nullptr;  // [out, in]

  int64_t weights() const { return options.out * options.in; }
  Rows Matrix(const float* data) const { return {data, options.in}; }
};

// A norm or bias of the block.
struct Vector {
  const char* name = nullptr;
  qm_tensor shape = {};  // as handed out
  std::vector<float> values;
  std::unique_ptr<Adam> steps;
  double unit = 0;
  float *device = nullptr, *gradient = nullptr;

  int64_t count() const { return static_cast<int64_t>(values.size()); }
  qm_tensor Tensor(float* data) const {
    qm_tensor tensor = shape;
    tensor.data = data;
    tensor.flags = 0;
    return tensor;
  }
};

double RootMeanSquare(const std::vector<float>& values) {
  double squares = 0;
  for (const float value : values) squares += static_cast<double>(value) * value;
  return std::sqrt(squares / static_cast<double>(values.size()));
}

class Tuner {
 public:
  Tuner(qm_call* call, const qm_block_info& info) : call_(call), info_(info) {}

  qm_status Run(const qm_packed* packed, const qm_edit** edits, uint64_t* edit_count) {
    block_ = static_cast<const qm_host_block*>(call_->host_ext(call_, QM_HOST_BLOCK));
    if (block_ == nullptr || !QM_HAS(block_, vjp)) {
      return qm::Fail(call_, QM_FAILED_PRECONDITION, "tuning needs ", QM_HOST_BLOCK,
                      " with gradients, which this host does not offer; set tune: false");
    }
    for (uint64_t i = 0; i < info_.linear_count; ++i) QM_TRY(Add(packed[i], i));
    const int64_t windows = block_->sample_count(call_);
    if (linears_.empty() || windows < 1) return QM_OK;
    QM_TRY(AddVectors(packed[info_.linear_count]));
    double before = 0, after = 0;
    QM_TRY(Judge(windows, &before));
    QM_TRY(Train(windows));
    for (Linear& linear : linears_) QM_TRY(Round(linear));
    QM_TRY(Judge(windows, &after));
    qm::Log(call_, qm::Severity::kInfo, info_.name, ": error of the block ", before, " -> ", after);
    if (!(after < before)) return QM_OK;  // NaN included: what was packed stays
    for (Linear& linear : linears_) QM_TRY(EmitValues(linear));
    return EmitVectors(edits, edit_count);
  }

 private:
  Kernels& kernels() { return *linears_.front().kernels; }

  qm_status AddVectors(const qm_packed& handed_out) {
    for (uint64_t i = 0; i < handed_out.tensor_count; ++i) {
      const qm_tensor& tensor = handed_out.tensors[i].tensor;
      int64_t count = 1;
      for (int d = 0; d < tensor.rank; ++d) count *= tensor.shape[d];
      if (tensor.dtype != QM_F32 || !IsContiguous(tensor) || count < 1) continue;
      Vector& vector = vectors_.emplace_back();
      vector.name = handed_out.tensors[i].name;
      vector.shape = tensor;
      vector.values.resize(static_cast<size_t>(count));
      QM_TRY(kernels().Download(tensor.data, count * 4, vector.values.data()));
      vector.unit = RootMeanSquare(vector.values);
      vector.steps = std::make_unique<Adam>(vector.values.size());
      QM_TRY(qm::Scratch(call_, call_->device, count, vector.name, &vector.device));
      QM_TRY(qm::Scratch(call_, call_->device, count, vector.name, &vector.gradient));
      QM_TRY(kernels().Upload(vector.values.data(), count * 4, vector.device));
    }
    return QM_OK;
  }

  qm_status Step(Vector& vector, double rate, int64_t t) {
    std::vector<float> narrow(vector.values.size());
    QM_TRY(kernels().Download(vector.gradient, vector.count() * 4, narrow.data()));
    const std::vector<double> gradient(narrow.begin(), narrow.end());
    vector.steps->Step(
        gradient, kNormRate * rate, t, [&](size_t) { return vector.unit; }, &vector.values);
    return kernels().Upload(vector.values.data(), vector.count() * 4, vector.device);
  }

  qm_status EmitVectors(const qm_edit** edits, uint64_t* edit_count) {
    qm_edit* array = nullptr;
    QM_TRY(qm::Scratch(call_, kHost, static_cast<int64_t>(vectors_.size()), "edits", &array));
    for (size_t i = 0; i < vectors_.size(); ++i) {
      array[i] = {vectors_[i].name, vectors_[i].Tensor(vectors_[i].device), QM_EDIT_REPLACE, 0};
    }
    *edits = array;
    *edit_count = vectors_.size();
    return QM_OK;
  }

  qm_status Add(const qm_packed& packed, uint64_t item) {
    if (packed.format_id == nullptr || std::strcmp(packed.format_id, kFormatName) != 0) {
      return QM_OK;
    }
    Weight w;
    QM_TRY(ReadWeight(call_, packed, &w));
    Linear& linear = linears_.emplace_back();
    linear.item = item;
    linear.weight_name = qm::StrCat(info_.linears[item]->name, ".weight");
    linear.codebook_dtype = w.codebook_dtype;
    linear.scale_dtype = w.scale_dtype;
    Options& o = linear.options;
    o.params = w.params;
    o.out = w.out;
    o.in = w.in;
    QM_TRY(MakeKernels(call_, o, &linear.kernels));
    Arrays& a = linear.kernels->arrays;
    const qm_device device = call_->device;
    QM_TRY(qm::Scratch(call_, device, w.params.values(), "codebooks", &a.codebooks));
    QM_TRY(qm::Scratch(call_, device, w.out, "scales", &a.scales));
    QM_TRY(
        qm::Scratch(call_, device, w.out * w.groups() * w.params.codebooks, "indices", &a.indices));
    QM_TRY(qm::Scratch(call_, device, linear.weights(), "a weight", &linear.dense));
    QM_TRY(qm::Scratch(call_, device, linear.weights(), "a gradient", &linear.gradient));
    QM_TRY(linear.kernels->LoadCodes(w.codes));
    QM_TRY(Download(linear, w.codebooks, w.codebook_dtype, w.params.values(), &linear.codebooks));
    QM_TRY(Download(linear, w.scales, w.scale_dtype, w.out, &linear.scales));
    linear.unit = RootMeanSquare(linear.codebooks);
    linear.codebook_steps = std::make_unique<Adam>(linear.codebooks.size());
    linear.scale_steps = std::make_unique<Adam>(linear.scales.size());
    return Decode(linear);
  }

  qm_status Download(Linear& linear, const void* from, qm_dtype dtype, int64_t count,
                     std::vector<float>* out) {
    const int64_t bytes = count * qm::ElementSize(dtype);
    std::vector<uint8_t> raw(static_cast<size_t>(bytes));
    QM_TRY(linear.kernels->Download(from, bytes, raw.data()));
    out->resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) (*out)[i] = LoadValue(raw.data(), dtype, i);
    return QM_OK;
  }

  qm_status Decode(Linear& linear) {
    Kernels& k = *linear.kernels;
    QM_TRY(
        k.Upload(linear.codebooks.data(), linear.options.params.values() * 4, k.arrays.codebooks));
    QM_TRY(k.Upload(linear.scales.data(), linear.options.out * 4, k.arrays.scales));
    return k.Decode(k.arrays.codebooks, k.arrays.scales, {}, linear.options.out, linear.dense);
  }

  std::vector<qm_override> Overrides() {
    std::vector<qm_override> overrides;
    for (Linear& linear : linears_) {
      overrides.push_back({linear.weight_name.c_str(),
                           qm::MakeMatrix(linear.dense, linear.options.out, linear.options.in,
                                          linear.options.in, call_->device)});
    }
    for (Vector& vector : vectors_) {
      overrides.push_back({vector.name, vector.Tensor(vector.device)});
    }
    return overrides;
  }

  // The difference of one window's outputs, times `factor`, in difference_; its squares are added
  // to *sum and their number to *count.
  qm_status Compare(int64_t window, const std::vector<qm_override>& overrides, float factor,
                    double* sum, int64_t* count) {
    Kernels& k = kernels();
    qm_tensor out = {};
    QM_TRY(block_->forward(call_, window, nullptr, 0, &out));
    const int64_t elements = out.shape[0] * out.shape[1];
    if (elements > capacity_) {
      QM_TRY(qm::Scratch(call_, call_->device, elements, "an output", &target_));
      QM_TRY(qm::Scratch(call_, call_->device, elements, "a difference", &difference_));
      capacity_ = elements;
    }
    // The output is the host's until the next run.
    QM_TRY(k.Copy(out.data, elements * qm::ElementSize(out.dtype), target_));
    QM_TRY(block_->forward(call_, window, overrides.data(), overrides.size(), &out));
    double squares = 0;
    QM_TRY(k.Difference(out.data, target_, out.dtype, elements, factor, difference_, &squares));
    *sum += squares;
    *count += elements;
    shape_ = out;
    return QM_OK;
  }

  // Mean squared difference over windows spread evenly.
  qm_status Judge(int64_t windows, double* loss) {
    const int64_t judged = std::min(windows, kJudgedWindows);
    const std::vector<qm_override> overrides = Overrides();
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < judged; ++i) {
      QM_TRY(qm::Progress(call_, -1));
      QM_TRY(Compare(i * windows / judged, overrides, 1.0f, &sum, &count));
    }
    *loss = sum / static_cast<double>(count);
    return QM_OK;
  }

  qm_status Train(int64_t windows) {
    const int64_t per_step = std::min(kWindowsPerStep, windows);
    const int64_t steps = std::max(kLeastSteps, kPasses * windows / per_step);
    for (int64_t t = 0; t < steps; ++t) {
      const double done = static_cast<double>(t) / static_cast<double>(steps);
      QM_TRY(qm::Progress(call_, done));
      for (Linear& linear : linears_)
        QM_TRY(linear.kernels->Clear(linear.gradient, linear.weights() * 4));
      for (Vector& vector : vectors_) {
        QM_TRY(kernels().Clear(vector.gradient, vector.count() * 4));
      }
      const std::vector<qm_override> overrides = Overrides();
      for (int64_t i = 0; i < per_step; ++i) {
        QM_TRY(AddGradients((t * per_step + i) % windows, overrides));
      }
      const double warm = std::min(1.0, static_cast<double>(t + 1) / 8.0);
      const double rate = warm * 0.5 * (1.0 + std::cos(3.14159265358979 * done));
      for (Linear& linear : linears_) QM_TRY(Step(linear, rate, t + 1));
      for (Vector& vector : vectors_) QM_TRY(Step(vector, rate, t + 1));
    }
    return QM_OK;
  }

  qm_status AddGradients(int64_t window, const std::vector<qm_override>& overrides) {
    double sum = 0;
    int64_t count = 0;
    // Adam is blind to the factor; this one keeps gradients away from the ends of f16.
    QM_TRY(Compare(window, overrides, 1.0f, &sum, &count));
    const qm_tensor d_out = qm::MakeMatrix(difference_, shape_.shape[0], shape_.shape[1],
                                           shape_.shape[1], call_->device);
    std::vector<qm_named_tensor> gradients;
    for (Linear& linear : linears_) {
      gradients.push_back({linear.weight_name.c_str(),
                           qm::MakeMatrix(linear.gradient, linear.options.out, linear.options.in,
                                          linear.options.in, call_->device)});
    }
    for (Vector& vector : vectors_) {
      gradients.push_back({vector.name, vector.Tensor(vector.gradient)});
    }
    QM_TRY(qm::Progress(call_, -1));
    return block_->vjp(call_, window, overrides.data(), overrides.size(), &d_out, gradients.data(),
                       gradients.size());
  }

  qm_status Step(Linear& linear, double rate, int64_t t) {
    Kernels& k = *linear.kernels;
    const Options& o = linear.options;
    std::vector<double> codebook_gradient, scale_gradient;
    QM_TRY(k.Scatter(linear.Matrix(linear.gradient), o.out, k.arrays.scales, 1, 0,
                     o.params.codebooks, &codebook_gradient));
    QM_TRY(k.RowDots(linear.Matrix(linear.gradient), linear.Matrix(linear.dense), o.out,
                     &scale_gradient));
    for (int64_t r = 0; r < o.out; ++r) {
      // Of the logarithm of the scale; Adam's step is that of the scale relative to itself.
      if (!std::isfinite(scale_gradient[r])) scale_gradient[r] = 0;
    }
    linear.codebook_steps->Step(
        codebook_gradient, kCodebookRate * rate, t, [&](size_t) { return linear.unit; },
        &linear.codebooks);
    const std::vector<float> scales = linear.scales;
    linear.scale_steps->Step(
        scale_gradient, kScaleRate * rate, t,
        [&](size_t i) { return static_cast<double>(scales[i]); }, &linear.scales);
    return Decode(linear);
  }

  qm_status Round(Linear& linear) {
    for (float& value : linear.codebooks) value = RoundToDType(value, linear.codebook_dtype);
    for (float& value : linear.scales) value = RoundToDType(value, linear.scale_dtype);
    return Decode(linear);
  }

  qm_status EmitValues(Linear& linear) {
    const Params& p = linear.options.params;
    const int64_t shape[3] = {p.codebooks, p.length(), p.group_size};
    qm_tensor codebooks = {}, scales = {};
    QM_TRY(call_->emit(call_, linear.item, "codebooks", call_->device, linear.codebook_dtype, 3,
                       shape, &codebooks));
    QM_TRY(call_->emit(call_, linear.item, "scales", call_->device, linear.scale_dtype, 1,
                       &linear.options.out, &scales));
    QM_TRY(Store(linear, linear.codebooks, codebooks));
    return Store(linear, linear.scales, scales);
  }

  qm_status Store(Linear& linear, const std::vector<float>& values, const qm_tensor& out) {
    const int64_t size = qm::ElementSize(out.dtype), n = static_cast<int64_t>(values.size());
    std::vector<uint8_t> raw(static_cast<size_t>(size * n));
    for (int64_t i = 0; i < n; ++i) StoreValue(raw.data(), out.dtype, i, values[i]);
    return linear.kernels->Upload(raw.data(), size * n, out.data);
  }

  qm_call* call_;
  const qm_block_info& info_;
  const qm_host_block* block_ = nullptr;
  std::deque<Linear> linears_;  // kernels point at their options
  std::deque<Vector> vectors_;
  float *target_ = nullptr, *difference_ = nullptr;
  int64_t capacity_ = 0;
  qm_tensor shape_ = {};
};

// Rows of a window are not known before the run; this many at most.
constexpr int64_t kMaxWindowRows = 8192;

}  // namespace

qm_status BlockTuner::Plan(qm_call* call, const qm_block_info& info, qm_quant_plan* out) {
  if (!qm::OptionBool(call, "tune")) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "tune is false: codebooks stay as they were fitted");
  }
  // Scratch is handed out in steps of 256 bytes; norms, biases and edits are small.
  uint64_t bytes = uint64_t{64} * 256;
  int64_t widest = 0;
  double flops = 0;
  for (uint64_t i = 0; i < info.linear_count; ++i) {
    Options o;
    QM_TRY(ReadOptions(call, *info.linears[i], &o));
    const int64_t weights = o.out * o.in;
    widest = std::max({widest, o.out, o.in});  // no less than the width of the block
    bytes += static_cast<uint64_t>(8 * weights + 4 * (o.params.values() + o.out) +
                                   2 * weights / o.params.group_size * o.params.codebooks) +
             uint64_t{8} * 256;
    if (call->device.kind == QM_CPU) bytes += CpuKernelBytes(o);
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) bytes += CudaKernelBytes(o);
#endif
    // Forward twice and back once over windows of perhaps 128 x 2048 rows.
    flops += 10.0 * static_cast<double>(kPasses) * 262144.0 * static_cast<double>(weights);
  }
  constexpr int64_t kVectors = 16;
  out->scratch_bytes = bytes + static_cast<uint64_t>(8 * (kMaxWindowRows + kVectors) * widest);
  out->scratch_bytes_shared = 0;
  out->flops = flops;
  return QM_OK;
}

qm_status BlockTuner::Run(qm_call* call, const qm_block_info& info, const qm_packed* packed,
                          const qm_edit** edits, uint64_t* edit_count) {
  *edits = nullptr;
  *edit_count = 0;
  return Tuner(call, info).Run(packed, edits, edit_count);
}

}  // namespace quantmill::aqlm
