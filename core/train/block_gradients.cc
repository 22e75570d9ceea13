#include "core/train/block_gradients.h"

#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/block_edits.h"
#include "core/model/block_parts.h"

namespace quantmill {
namespace {

absl::Status RefuseExperts(const TrainedBlock& block) {
  if (block.weights->moe.experts.empty()) return absl::OkStatus();
  return absl::UnimplementedError(
      ErrorText(absl::StrCat("no gradients of ", BlockName(block.index)),
                "it is a mixture of experts, which has no backward pass yet",
                "tune blocks with a dense MLP, or switch tuning off"));
}

absl::StatusOr<Tensor> Output(Backend& backend, const LinearWeight& weight, const Tensor& x,
                              int64_t features, LinearTape* tape) {
  QM_ASSIGN_OR_RETURN(Tensor y, backend.Allocate(x.dtype(), {x.dim(0), features}));
  QM_RETURN_IF_ERROR(ApplyLinear(backend, weight, x, &y, tape));
  return y;
}

RopeRows RopeOf(const TrainedBlock& block, int64_t length) {
  return {block.rope->cosine, block.rope->sine, 0, length, block.config->head_dim};
}

// Queries or keys: q/k norm and rotary embedding. Without a norm *raw stays empty.
absl::StatusOr<Tensor> Placed(Backend& backend, const TrainedBlock& block, const Tensor& norm,
                              Tensor projected, Tensor* raw) {
  const ModelConfig& config = *block.config;
  if (config.qk_norm) {
    *raw = projected;
    QM_ASSIGN_OR_RETURN(projected, backend.Allocate(raw->dtype(), raw->shape()));
    QM_RETURN_IF_ERROR(
        backend.RmsNorm(*raw, norm, static_cast<float>(config.rms_norm_eps), &projected));
  }
  QM_RETURN_IF_ERROR(backend.Rope(block.rope->cosine, block.rope->sine, 0,
                                  projected.dim(0) / block.batch, config.head_dim, &projected));
  return projected;
}

absl::StatusOr<Tensor> AttendOnTape(Backend& backend, const TrainedBlock& block, BlockTape* tape) {
  const ModelConfig& config = *block.config;
  const BlockWeights& w = *block.weights;
  const Tensor& x = tape->attention_in;
  QM_ASSIGN_OR_RETURN(Tensor q, Output(backend, w.q, x, config.q_features(), &tape->linears.q));
  QM_ASSIGN_OR_RETURN(Tensor k, Output(backend, w.k, x, config.kv_features(), &tape->linears.k));
  QM_ASSIGN_OR_RETURN(tape->v, Output(backend, w.v, x, config.kv_features(), &tape->linears.v));
  QM_ASSIGN_OR_RETURN(tape->q, Placed(backend, block, w.q_norm, std::move(q), &tape->q_raw));
  QM_ASSIGN_OR_RETURN(tape->k, Placed(backend, block, w.k_norm, std::move(k), &tape->k_raw));
  QM_ASSIGN_OR_RETURN(tape->mixed, backend.Allocate(x.dtype(), tape->q.shape()));
  const AttentionShape shape =
      BlockAttention(config, block.index, block.batch, x.dim(0) / block.batch, 0);
  QM_RETURN_IF_ERROR(backend.Attention(shape, tape->q, tape->k, tape->v, &tape->mixed));
  return Output(backend, w.o, tape->mixed, config.hidden_size, &tape->linears.o);
}

absl::StatusOr<Tensor> FeedOnTape(Backend& backend, const TrainedBlock& block, BlockTape* tape) {
  const BlockWeights& w = *block.weights;
  const int64_t inner = block.config->intermediate_size;
  QM_ASSIGN_OR_RETURN(tape->gate,
                      Output(backend, w.gate, tape->mlp_in, inner, &tape->linears.gate));
  QM_ASSIGN_OR_RETURN(tape->up, Output(backend, w.up, tape->mlp_in, inner, &tape->linears.up));
  QM_ASSIGN_OR_RETURN(tape->gated, backend.Allocate(tape->gate.dtype(), tape->gate.shape()));
  QM_RETURN_IF_ERROR(backend.SiluMultiply(tape->gate, tape->up, &tape->gated));
  return Output(backend, w.down, tape->gated, block.config->hidden_size, &tape->linears.down);
}

absl::Status CheckInput(const TrainedBlock& block, const Tensor& input) {
  QM_RETURN_IF_ERROR(RefuseExperts(block));
  if (input.rank() != 2 || input.dim(1) != block.config->hidden_size || block.batch < 1 ||
      input.dim(0) % block.batch != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "hidden states ", input.shape().ToString(), " do not hold ", block.batch,
        " sequences of equal length with ", block.config->hidden_size, " values per position"));
  }
  if (input.dim(0) / block.batch > block.rope->cosine.dim(0)) {
    return absl::OutOfRangeError(absl::StrCat("sequences of ", input.dim(0) / block.batch,
                                              " positions, but only ", block.rope->cosine.dim(0),
                                              " positions are prepared; use a shorter context"));
  }
  return absl::OkStatus();
}

// The dense weight of a linear, dequantized to the activation dtype if it is packed.
absl::StatusOr<Tensor> DenseWeight(Backend& backend, const LinearWeight& linear) {
  if (!linear.dense.empty()) return linear.dense;
  if (linear.packed == nullptr || linear.kernel == nullptr) {
    return absl::FailedPreconditionError("a linear has neither a dense nor a packed weight");
  }
  QM_ASSIGN_OR_RETURN(Tensor dense,
                      backend.Allocate(backend.activation_dtype(),
                                       {linear.packed->out_features, linear.packed->in_features}));
  QM_RETURN_IF_ERROR(linear.kernel->Dequantize(*linear.packed, &dense));
  return dense;
}

// The backward pass of one block. The parts of a step live until the step is done: at most about
// three tensors of the MLP's width at once.
class Backward {
 public:
  Backward(TrainingOps& ops, const TrainedBlock& block, const BlockTape& tape,
           BlockWeights& gradients)
      : ops_(ops),
        backend_(ops.backend()),
        block_(block),
        weights_(*block.weights),
        tape_(tape),
        gradients_(gradients),
        eps_(static_cast<float>(block.config->rms_norm_eps)) {}

  absl::Status Run(const Tensor& d_output, Tensor* d_input) {
    const bool attention = d_input != nullptr || WantsAttention();
    const bool mlp_norm = attention || !gradients_.post_attention_norm.empty();
    QM_ASSIGN_OR_RETURN(const Tensor d_mlp_in, BackwardThroughMlp(d_output, mlp_norm));
    if (!mlp_norm) return absl::OkStatus();
    // Residual: the output's gradient is also that of the hidden states in the middle.
    QM_ASSIGN_OR_RETURN(Tensor d_middle, CopyOf(d_output));
    QM_RETURN_IF_ERROR(ops_.RmsNorm(tape_.middle, weights_.post_attention_norm, eps_, d_mlp_in,
                                    true, &d_middle, OrNull(&gradients_.post_attention_norm)));
    if (!attention) return absl::OkStatus();
    const bool input_norm = d_input != nullptr || !gradients_.input_norm.empty();
    QM_ASSIGN_OR_RETURN(const Tensor d_attention_in,
                        BackwardThroughAttention(d_middle, input_norm));
    if (!input_norm) return absl::OkStatus();
    QM_RETURN_IF_ERROR(ops_.RmsNorm(tape_.input, weights_.input_norm, eps_, d_attention_in, true,
                                    &d_middle, OrNull(&gradients_.input_norm)));
    return d_input == nullptr ? absl::OkStatus() : backend_.Copy(d_middle, d_input);
  }

 private:
  static Tensor* OrNull(Tensor* tensor) { return tensor->empty() ? nullptr : tensor; }
  // Is anything of a linear trained?
  static bool Wants(const LinearWeight& linear, const LinearWeight& gradients) {
    return !gradients.dense.empty() || !gradients.bias.empty() || !linear.adapters.empty();
  }
  bool WantsAttention() const {
    const BlockWeights &g = gradients_, &w = weights_;
    return Wants(w.q, g.q) || Wants(w.k, g.k) || Wants(w.v, g.v) || Wants(w.o, g.o) ||
           !g.input_norm.empty() || !g.q_norm.empty() || !g.k_norm.empty();
  }

  absl::StatusOr<Tensor> Gradient(const Shape& shape) {
    return backend_.Allocate(DType::kF32, shape);
  }
  absl::StatusOr<Tensor> CopyOf(const Tensor& tensor) {
    QM_ASSIGN_OR_RETURN(Tensor copy, Gradient(tensor.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(tensor, &copy));
    return copy;
  }

  // What a linear leaves behind for the gradient of its output: gradients of its parameters and of
  // its adapters', and, unless d_x is null, that of its input (on top of what is there if `add`).
  absl::Status Through(const LinearWeight& linear, const LinearTape& tape, const Tensor& d_y,
                       LinearWeight* gradients, bool add, Tensor* d_x) {
    // Both products read it: rounded once.
    QM_ASSIGN_OR_RETURN(const Tensor factor, ops_.AsFactor(d_y));
    if (!gradients->dense.empty()) {
      QM_RETURN_IF_ERROR(ops_.WeightGradient(factor, tape.weight_in, &gradients->dense));
    }
    if (!gradients->bias.empty()) QM_RETURN_IF_ERROR(ops_.BiasGradient(d_y, &gradients->bias));
    if (linear.adapters.empty()) {
      return d_x == nullptr ? absl::OkStatus() : ThroughWeight(linear, factor, add, d_x);
    }
    QM_ASSIGN_OR_RETURN(Tensor d_in, Gradient(tape.weight_in.shape()));
    QM_RETURN_IF_ERROR(ThroughWeight(linear, factor, false, &d_in));
    for (size_t i = 0; i < linear.adapters.size(); ++i) {
      const LinearTape::Step& step = tape.steps[linear.adapters.size() - 1 - i];
      LinearAdapter& adapter = *linear.adapters[i];
      if (adapter.kind() == LinearAdapter::Kind::kDelta) {
        QM_RETURN_IF_ERROR(adapter.Backward(step.in, step.saved, d_y, &d_in));
        continue;
      }
      QM_ASSIGN_OR_RETURN(Tensor d_outer, Gradient(d_in.shape()));
      QM_RETURN_IF_ERROR(backend_.Zero(&d_outer));
      QM_RETURN_IF_ERROR(adapter.Backward(step.in, step.saved, d_in, &d_outer));
      d_in = std::move(d_outer);
    }
    if (d_x == nullptr) return absl::OkStatus();
    return add ? ops_.Add(d_in, d_x) : backend_.Copy(d_in, d_x);
  }

  absl::Status ThroughWeight(const LinearWeight& linear, const Tensor& d_y, bool add, Tensor* d_x) {
    QM_ASSIGN_OR_RETURN(const Tensor weight, DenseWeight(backend_, linear));
    return ops_.InputGradient(d_y, weight, add, d_x);
  }

  // The gradient of mlp_in; empty unless wanted.
  absl::StatusOr<Tensor> BackwardThroughMlp(const Tensor& d_output, bool wanted) {
    BlockWeights& g = gradients_;
    const BlockWeights& w = weights_;
    const auto& tape = tape_.linears;
    const bool inner = wanted || Wants(w.gate, g.gate) || Wants(w.up, g.up);
    if (!inner) {
      QM_RETURN_IF_ERROR(Through(w.down, tape.down, d_output, &g.down, false, nullptr));
      return Tensor();
    }
    QM_ASSIGN_OR_RETURN(Tensor d_gate, Gradient(tape_.gate.shape()));
    QM_ASSIGN_OR_RETURN(Tensor d_up, Gradient(tape_.up.shape()));
    QM_RETURN_IF_ERROR(Through(w.down, tape.down, d_output, &g.down, false, &d_up));
    QM_RETURN_IF_ERROR(ops_.SiluMultiply(tape_.gate, tape_.up, d_up, &d_gate, &d_up));
    Tensor d_x;
    if (wanted) {
      QM_ASSIGN_OR_RETURN(d_x, Gradient(tape_.mlp_in.shape()));
    }
    Tensor* d_input = wanted ? &d_x : nullptr;
    QM_RETURN_IF_ERROR(Through(w.gate, tape.gate, d_gate, &g.gate, false, d_input));
    QM_RETURN_IF_ERROR(Through(w.up, tape.up, d_up, &g.up, true, d_input));
    return d_x;
  }

  // From the gradient of what attention reads to that of the projection's output, in place.
  absl::Status Unplace(const Tensor& raw, const Tensor& norm, Tensor* norm_gradient, Tensor* d) {
    QM_RETURN_IF_ERROR(ops_.Rope(RopeOf(block_, d->dim(0) / block_.batch), d));
    if (raw.empty()) return absl::OkStatus();
    return ops_.RmsNorm(raw, norm, eps_, *d, false, d, OrNull(norm_gradient));
  }

  // The gradient of attention_in; empty unless wanted.
  absl::StatusOr<Tensor> BackwardThroughAttention(const Tensor& d_middle, bool wanted) {
    BlockWeights& g = gradients_;
    const BlockWeights& w = weights_;
    const auto& tape = tape_.linears;
    QM_ASSIGN_OR_RETURN(Tensor d_mixed, Gradient(tape_.mixed.shape()));
    QM_RETURN_IF_ERROR(Through(w.o, tape.o, d_middle, &g.o, false, &d_mixed));
    QM_ASSIGN_OR_RETURN(Tensor d_q, Gradient(tape_.q.shape()));
    QM_ASSIGN_OR_RETURN(Tensor d_k, Gradient(tape_.k.shape()));
    QM_ASSIGN_OR_RETURN(Tensor d_v, Gradient(tape_.v.shape()));
    const AttentionShape shape = BlockAttention(*block_.config, block_.index, block_.batch,
                                                tape_.q.dim(0) / block_.batch, 0);
    QM_RETURN_IF_ERROR(ops_.Attention(shape, tape_.q, tape_.k, tape_.v, d_mixed, &d_q, &d_k, &d_v));
    QM_RETURN_IF_ERROR(Unplace(tape_.q_raw, w.q_norm, &g.q_norm, &d_q));
    QM_RETURN_IF_ERROR(Unplace(tape_.k_raw, w.k_norm, &g.k_norm, &d_k));
    Tensor d_x;
    if (wanted) {
      QM_ASSIGN_OR_RETURN(d_x, Gradient(tape_.attention_in.shape()));
    }
    Tensor* d_input = wanted ? &d_x : nullptr;
    QM_RETURN_IF_ERROR(Through(w.q, tape.q, d_q, &g.q, false, d_input));
    QM_RETURN_IF_ERROR(Through(w.k, tape.k, d_k, &g.k, true, d_input));
    QM_RETURN_IF_ERROR(Through(w.v, tape.v, d_v, &g.v, true, d_input));
    return d_x;
  }

  TrainingOps& ops_;
  Backend& backend_;
  const TrainedBlock& block_;
  const BlockWeights& weights_;
  const BlockTape& tape_;
  BlockWeights& gradients_;
  const float eps_;
};

}  // namespace

int64_t TapeBytes(const ModelConfig& config, int64_t rows, DType activation) {
  const int64_t projected = config.q_features() + config.kv_features();
  const int64_t features = 4 * config.hidden_size + 2 * config.q_features() +
                           2 * config.kv_features() + (config.qk_norm ? projected : 0) +
                           3 * config.intermediate_size;
  return rows * features * ElementSize(activation);
}

absl::StatusOr<Tensor> RunBlockOnTape(Backend& backend, const TrainedBlock& block,
                                      const Tensor& input, BlockTape* tape) {
  QM_RETURN_IF_ERROR(CheckInput(block, input));
  const ModelConfig& config = *block.config;
  *tape = {};
  tape->input = input;
  QM_ASSIGN_OR_RETURN(tape->attention_in,
                      Normalized(backend, config, block.weights->input_norm, input));
  QM_ASSIGN_OR_RETURN(const Tensor attended, AttendOnTape(backend, block, tape));
  QM_ASSIGN_OR_RETURN(tape->middle, backend.Allocate(input.dtype(), input.shape()));
  QM_RETURN_IF_ERROR(backend.Copy(input, &tape->middle));
  QM_RETURN_IF_ERROR(backend.Add(attended, &tape->middle));
  QM_ASSIGN_OR_RETURN(
      tape->mlp_in, Normalized(backend, config, block.weights->post_attention_norm, tape->middle));
  QM_ASSIGN_OR_RETURN(Tensor output, FeedOnTape(backend, block, tape));
  QM_RETURN_IF_ERROR(backend.Add(tape->middle, &output));
  return output;
}

absl::StatusOr<BlockWeights> PlaceGradients(const ModelConfig& config, int64_t index,
                                            const BlockWeights& weights,
                                            absl::Span<const NamedTensor> wanted) {
  BlockWeights gradients = weights;
  const BlockTensors places(config, index, &gradients);
  std::set<std::string> named;
  for (const NamedTensor& gradient : wanted) {
    Tensor* place = places.Find(gradient.name);
    if (place == nullptr) {
      return absl::NotFoundError(
          absl::StrCat("no tensor '", gradient.name, "' in ", BlockName(index)));
    }
    if (gradient.tensor.dtype() != DType::kF32 || gradient.tensor.read_only() ||
        !(gradient.tensor.shape() == place->shape())) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the gradient of ", gradient.name, " is ", AbslView(DTypeName(gradient.tensor.dtype())),
          " ", gradient.tensor.shape().ToString(), ", expected writable F32 ",
          place->shape().ToString()));
    }
    if (!named.insert(gradient.name).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("the gradient of ", gradient.name, " is asked for twice"));
    }
    *place = gradient.tensor;
  }
  for (const auto& [name, place] : places.all()) {
    if (!named.contains(name)) *place = Tensor();
  }
  return gradients;
}

absl::Status BackwardThroughBlock(TrainingOps& ops, const TrainedBlock& block,
                                  const BlockTape& tape, const Tensor& d_output,
                                  BlockWeights* gradients, Tensor* d_input) {
  QM_RETURN_IF_ERROR(RefuseExperts(block));
  if (d_output.dtype() != DType::kF32 || !(d_output.shape() == tape.input.shape()) ||
      !(d_output.device() == ops.backend().device())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the output's gradient is ", AbslView(DTypeName(d_output.dtype())), " ",
        d_output.shape().ToString(), " on ", DeviceName(d_output.device()), ", expected F32 ",
        tape.input.shape().ToString(), " on ", DeviceName(ops.backend().device())));
  }
  return Backward(ops, block, tape, *gradients).Run(d_output, d_input);
}

}  // namespace quantmill
