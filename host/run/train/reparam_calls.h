// Calls of qm.reparametrize/1: training parameters on or around a linear. Everything around a call
// is done here: views, options, seed, last words, checks of what comes back.
#ifndef QUANTMILL_HOST_RUN_TRAIN_REPARAM_CALLS_H_
#define QUANTMILL_HOST_RUN_TRAIN_REPARAM_CALLS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/formats/packed.h"
#include "core/model/graph.h"
#include "core/tensor/backend.h"
#include "host/plugins/registry.h"
#include "host/supervisor/last_words.h"
#include "host/supervisor/process.h"
#include "host/worker/call.h"
#include "host/worker/plugin_log.h"

namespace quantmill {

// What plan() said about one linear in one phase.
struct ReparamPlan {
  struct Param {
    std::string name;
    Shape shape;
    double rate = 1;  // factor on the learning rate of parameters
    bool trainable = false;
    bool decays = false;
  };
  qm_reparam_kind kind = 0;
  std::vector<Param> params;
  uint64_t saved_bytes_per_row = 0, saved_bytes_fixed = 0;
  uint64_t scratch_bytes = 0;
  double weight_rate = 0;  // WEIGHT: factor on the learning rate of weights; 0: W is not trained
  std::string format_id;   // WEIGHT: what finalize gives; empty: a dense weight
  std::string format_json;
  double bits_per_weight = 0;
  bool fold = false;  // INPUT, DELTA: finalize makes the slot dense

  uint64_t SavedBytes(int64_t rows) const {
    return saved_bytes_fixed + saved_bytes_per_row * static_cast<uint64_t>(rows);
  }
};

// One linear under a method. What the pointers name must outlive it.
struct ReparamSubject {
  const LoadedMethod* method = nullptr;
  std::string stage;
  std::string key;  // of the training, for remembering a crash; empty: it is not remembered
  const LinearSlot* slot = nullptr;
  const ResolvedOptions* options = nullptr;
  DType weight_dtype = DType::kF32;  // as stored
  DType scale_dtype = DType::kF16;
  std::shared_ptr<const PackedWeight> base;  // on the device; for Plan only its format is looked at
  uint64_t seed = 0;
  qm_reparam_phase phase = QM_PHASE_END_TO_END;
  // Where the inputs of a call that fails are written, to be made again from there
  // (reparam_bundle.h); empty: nowhere. save_first: before every call, because one of them ended
  // with the process.
  std::string bundle;
  bool save_first = false;
};
struct ReparamInputs;

class ReparamCalls {
 public:
  // `words` may be null. Both must outlive this object.
  ReparamCalls(Backend& backend, LastWords* words, EventSink sink);

  Backend& backend() const { return backend_; }

  // nullopt: the method leaves the linear alone, or has no such phase.
  absl::StatusOr<std::optional<ReparamPlan>> Plan(const ReparamSubject& subject);

  struct Start {
    std::vector<NamedTensor> params;  // F32 on the device, in the plan's order
    Tensor weight;                    // F32 on the device: the W to start from; empty: as given
  };
  // weight: F32 [out, in] on the device, or empty for INPUT and DELTA over a packed base.
  absl::StatusOr<Start> Init(const ReparamSubject& subject, const ReparamPlan& plan,
                             const Tensor& weight);

  // saved: null when no Vjp follows. Work is queued on the backend's stream.
  absl::Status Forward(const ReparamSubject& subject, const Tensor& in,
                       absl::Span<const NamedTensor> params, Tensor* saved, Tensor* out);
  // d_in (null: not wanted) and d_params (empty tensors: not trained) are added to.
  absl::Status Vjp(const ReparamSubject& subject, const Tensor& in,
                   absl::Span<const NamedTensor> params, const Tensor& saved, const Tensor& d_out,
                   Tensor* d_in, absl::Span<const NamedTensor> d_params);

  // One of the two, on the host.
  struct Folded {
    std::optional<PackedWeight> packed;
    Tensor dense;  // F32
  };
  absl::StatusOr<Folded> Finalize(const ReparamSubject& subject, const ReparamPlan& plan,
                                  const Tensor& weight, absl::Span<const NamedTensor> params);

  // The method's part of an adapter's config for `target`, a JSON object as text; UNIMPLEMENTED
  // when it writes none.
  absl::StatusOr<std::string> ToAdapter(const LoadedMethod& method, const ResolvedOptions& options,
                                        const std::string& target);
  // Options that run an adapter with this config; nullopt: it is of another kind.
  absl::StatusOr<std::optional<ResolvedOptions>> FromAdapter(const LoadedMethod& method,
                                                             const std::string& target,
                                                             const std::string& config_json);

 private:
  class Call;

  Backend& backend_;
  LastWords* words_;
  EventSink sink_;
  int failure_bundles_ = 0;
  PluginLog log_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_REPARAM_CALLS_H_
