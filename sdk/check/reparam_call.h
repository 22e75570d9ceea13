// The functions of qm.reparametrize/1 as every case calls them: fenced, on a made-up layer. Tensors
// here are F32 on the host.
#ifndef QUANTMILL_SDK_CHECK_REPARAM_CALL_H_
#define QUANTMILL_SDK_CHECK_REPARAM_CALL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/formats/packed.h"
#include "core/tensor/tensor.h"
#include "sdk/check/case.h"
#include "sdk/check/quantize_call.h"
#include "sdk/check/synthetic.h"

namespace quantmill::check {

// One linear under the method: what plan() said and what init() filled in.
struct Reparametrized {
  struct Param {
    std::string name;
    Shape shape;
    bool trainable = false;
    Tensor value;
  };

  qm_reparam_phase phase = QM_PHASE_BLOCK;
  SyntheticLayer layer;
  qm_linear_info linear = {};
  std::optional<PackedWeight> base;  // what the slot is packed as; else it is dense
  qm_reparam_kind kind = 0;
  std::vector<Param> params;
  PlanAnswer stats;  // only its `stats`: what init() wants
  uint64_t saved_bytes_per_row = 0, saved_bytes_fixed = 0;

  // The weight, or rows of inputs, by kind: what forward() is a function of.
  Tensor BaseInput(int64_t rows) const;
  // Shape of forward's result for `in`.
  Shape OutputShape(const Tensor& in) const;
};

// The functions return a verdict when a rule was broken, else nullopt.

inline const qm_reparametrize* ReparamTable(const Subject& subject) {
  return subject.Ext<qm_reparametrize>(QM_EXT_REPARAMETRIZE);
}

// Plans and initialises on a layer whose shape plan() accepts; skipped when there is none, or when
// a parameter is not F32.
std::optional<Verdict> Reparametrize(Subject& subject, Reparametrized* out);
// Its first half, for the linear, options, phase and base in *model: plan() alone. *accepted says
// whether it took them; *outcome how it refused.
std::optional<Verdict> PlanReparam(Subject& subject, Reparametrized* model, bool* accepted,
                                   std::string* outcome);
// Its second half: init(), on model->layer; over a packed base without a weight.
std::optional<Verdict> InitReparam(Subject& subject, Reparametrized* model);

struct ForwardResult {
  Tensor out;
  Tensor saved;  // U8
};
// keep false: `saved` is NULL, as where no vjp follows.
std::optional<Verdict> Forward(Subject& subject, const Reparametrized& model, const Tensor& in,
                               ForwardResult* out, bool keep = true);

struct Gradients {
  Tensor d_in;
  std::vector<Tensor> d_params;  // one per parameter; zeros where it was not wanted
};
// Which gradients are asked for; the others are NULL.
struct WantedGradients {
  bool d_in = true;
  std::vector<bool> d_params;  // empty: those of the trainable parameters
};
// All gradient memory holds bytes `fill` at first: 0 for zeros.
std::optional<Verdict> Vjp(Subject& subject, const Reparametrized& model, const Tensor& in,
                           const Tensor& saved, const Tensor& d_out, uint8_t fill,
                           const WantedGradients& wanted, Gradients* out);

// The dense weight that finalize() leaves, and whether it came packed.
struct Finalized {
  Tensor weight;
  bool packed = false;
};
std::optional<Verdict> Finalize(Subject& subject, const Reparametrized& model, Finalized* out);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_REPARAM_CALL_H_
