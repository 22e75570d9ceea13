#include <cstdio>
#include <utility>

#include "absl/strings/str_format.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/model/block_parts.h"
#include "core/train/schedule.h"
#include "host/run/train/phases.h"
#include "host/run/train/train_monitor.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

// Final hidden states of the teacher, normalised: the logits of some rows are one product away.
absl::StatusOr<Tensor> TeacherStates(Backend& backend, const TrainedModel& teacher,
                                     const Tensor& ids) {
  const ModelConfig& config = *teacher.config;
  QM_ASSIGN_OR_RETURN(Tensor hidden, backend.Allocate(backend.activation_dtype(),
                                                      {ids.elements(), config.hidden_size}));
  QM_RETURN_IF_ERROR(backend.Embed(teacher.embedding, ids.Reshaped({ids.elements()}), &hidden));
  BlockRun run;
  run.batch = ids.dim(0);
  for (int64_t block = 0; block < config.layers; ++block) {
    QM_RETURN_IF_ERROR(RunBlock(backend, config, teacher.blocks[static_cast<size_t>(block)], block,
                                teacher.rope, run, &hidden));
  }
  return Normalized(backend, config, teacher.final_norm, hidden);
}

class EndToEnd {
 public:
  EndToEnd(const std::vector<const ReparamPlan*>& plans, TrainingRun& run)
      : plans_(plans),
        run_(run),
        options_(*run.options),
        backend_(run.ops->backend()),
        optimizer_(*run.ops, WithMeans(options_)) {}

  absl::Status Run() {
    QM_RETURN_IF_ERROR(run_.slots->Register(plans_, -1, options_.parameter_rate,
                                            QM_PHASE_END_TO_END, &optimizer_));
    if (run_.position.step > 0) {
      QM_RETURN_IF_ERROR(run_.state->Load(backend_, Tensors()));
      QM_RETURN_IF_ERROR(optimizer_.Restore(run_.position.optimizer_steps));
    }
    QM_ASSIGN_OR_RETURN(gradients_,
                        PlaceModelGradients(*run_.student, run_.slots->WantedGradients()));
    const int64_t steps = options_.Steps();
    Clock::time_point saved = Clock::now();
    start_ = saved;
    first_step_ = run_.position.step;
    while (run_.position.step < steps) {
      QM_RETURN_IF_ERROR(Step());
      if (SecondsSince(saved) < options_.save_seconds && run_.position.step < steps) continue;
      QM_RETURN_IF_ERROR(run_.state->Save(backend_, run_.position, Tensors()));
      saved = Clock::now();
    }
    QM_RETURN_IF_ERROR(optimizer_.StoreAverages());
    return run_.slots->Refresh();
  }

 private:
  static AdamWOptions WithMeans(const TrainOptions& train) {
    AdamWOptions adamw = OptimizerOptions(train);
    adamw.average_steps = train.AverageSteps();
    return adamw;
  }

  std::vector<NamedTensor> Tensors() const {
    std::vector<NamedTensor> tensors = run_.slots->State();
    const std::vector<NamedTensor> more = optimizer_.State();
    tensors.insert(tensors.end(), more.begin(), more.end());
    return tensors;
  }

  absl::Status Step() {
    const int64_t step = run_.position.step;  // finished so far
    QM_RETURN_IF_ERROR(run_.slots->Refresh());
    const int64_t micro = options_.MicroBatch(), parts = options_.batch / micro;
    BatchLoss loss;
    for (int64_t part = 0; part < parts; ++part) {
      QM_ASSIGN_OR_RETURN(const BatchLoss one,
                          AddBatch(step * options_.batch + part * micro, micro));
      loss.lm += one.lm / static_cast<double>(parts);
      loss.kl += one.kl / static_cast<double>(parts);
    }
    QM_RETURN_IF_ERROR(run_.slots->PullBack());
    const WarmupCosine schedule = {options_.rate, options_.Steps(), options_.warmup,
                                   options_.rate_floor};
    const double rate = schedule.Rate(step + 1);
    QM_ASSIGN_OR_RETURN(const OptimizerStep taken, optimizer_.Step(rate, parts));
    run_.position.step = step + 1;
    run_.position.optimizer_steps = optimizer_.steps();
    const double value = options_.distill ? loss.kl : loss.lm;
    QM_RETURN_IF_ERROR(WatchLoss(value, taken.skipped, options_.Steps(), &run_.position));
    nlohmann::ordered_json line = {{"phase", "end_to_end"},
                                   {"step", step + 1},
                                   {"tokens", (step + 1) * options_.StepTokens()},
                                   {"lr", rate},
                                   {"loss", value},
                                   {"lm", loss.lm}};
    if (options_.distill) line["kl"] = loss.kl;
    line["gradient_norm"] = taken.gradient_norm;
    if (taken.skipped) line["skipped"] = 1;
    QM_RETURN_IF_ERROR(run_.log->Add(line.dump()));
    Report(value, rate);
    return absl::OkStatus();
  }

  absl::StatusOr<BatchLoss> AddBatch(int64_t first, int64_t count) {
    const TrainingData::Windows windows = run_.in->data->Batch(first, count);
    TrainingBatch batch;
    batch.ids = windows.ids;
    batch.targets = windows.targets;
    batch.checkpoint = options_.checkpointing;
    TokenLoss weights = {1, 0};
    Tensor states;
    if (options_.distill) {
      weights = {0, 1};
      QM_ASSIGN_OR_RETURN(states, TeacherStates(backend_, *run_.teacher, windows.ids));
      batch.teacher = [&](int64_t begin, int64_t end) -> absl::StatusOr<Tensor> {
        QM_ASSIGN_OR_RETURN(
            Tensor logits,
            backend_.Allocate(DType::kF32, {end - begin, run_.teacher->config->vocab_size}));
        QM_RETURN_IF_ERROR(
            ApplyLinear(backend_, run_.teacher->head, states.Rows(begin, end), &logits));
        return logits;
      };
    }
    return AddModelGradients(*run_.ops, *run_.student, batch, weights, 1, &gradients_);
  }

  void Report(double loss, double rate) {
    const int64_t done = run_.position.step - first_step_;
    const double seconds = SecondsSince(start_);
    const double speed =
        seconds > 0 ? static_cast<double>(done * options_.StepTokens()) / seconds : 0;
    run_.Progress(absl::StrFormat("loss %.4f, lr %.2e, %.0f tokens/s", loss, rate, speed),
                  run_.position.step, options_.Steps());
  }

  const std::vector<const ReparamPlan*>& plans_;
  TrainingRun& run_;
  const TrainOptions& options_;
  Backend& backend_;
  AdamW optimizer_;
  ModelGradients gradients_;
  Clock::time_point start_;
  int64_t first_step_ = 0;
};

}  // namespace

absl::Status TrainEndToEnd(const std::vector<const ReparamPlan*>& plans, TrainingRun* run) {
  return EndToEnd(plans, *run).Run();
}

}  // namespace quantmill
