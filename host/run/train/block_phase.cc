#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/train/block_gradients.h"
#include "core/train/schedule.h"
#include "host/run/train/phases.h"
#include "host/run/train/train_monitor.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

// Hidden states of all windows of the phase, before the block that is worked on.
struct Streams {
  Tensor student, teacher;  // [windows * length, hidden], activation dtype
};

class BlockPhase {
 public:
  BlockPhase(const std::vector<const ReparamPlan*>& plans, TrainingRun& run)
      : plans_(plans),
        run_(run),
        options_(*run.options),
        backend_(run.ops->backend()),
        config_(*run.student->config),
        steps_(options_.BlockSteps()),
        windows_(steps_ * options_.block_batch) {}

  absl::Status Run() {
    if (steps_ == 0) return absl::OkStatus();
    if (run_.position.blocks >= config_.layers) return absl::OkStatus();
    QM_RETURN_IF_ERROR(run_.slots->Refresh());
    QM_RETURN_IF_ERROR(Embed());
    for (int64_t block = 0; block < config_.layers; ++block) {
      if (block >= run_.position.blocks) {
        QM_RETURN_IF_ERROR(Train(block));
        run_.position.blocks = block + 1;
        QM_RETURN_IF_ERROR(run_.state->Save(backend_, run_.position, run_.slots->State()));
      }
      if (block + 1 < config_.layers) QM_RETURN_IF_ERROR(Advance(block));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Embed() {
    const TrainingData::Windows windows = run_.in->data->Batch(0, windows_);
    const int64_t rows = windows_ * options_.sequence_length;
    const Shape shape = {rows, config_.hidden_size};
    QM_ASSIGN_OR_RETURN(streams_.student, backend_.Allocate(backend_.activation_dtype(), shape));
    QM_ASSIGN_OR_RETURN(streams_.teacher, backend_.Allocate(backend_.activation_dtype(), shape));
    QM_RETURN_IF_ERROR(
        backend_.Embed(run_.student->embedding, windows.ids.Reshaped({rows}), &streams_.student));
    return backend_.Copy(streams_.student, &streams_.teacher);
  }

  Tensor Batch(const Tensor& stream, int64_t step) const {
    const int64_t rows = options_.block_batch * options_.sequence_length;
    return stream.Rows(step * rows, (step + 1) * rows);
  }

  // The teacher's output of one batch.
  absl::StatusOr<Tensor> Target(int64_t block, int64_t step) {
    const Tensor input = Batch(streams_.teacher, step);
    QM_ASSIGN_OR_RETURN(Tensor hidden, backend_.Allocate(input.dtype(), input.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(input, &hidden));
    BlockRun run;
    run.batch = options_.block_batch;
    QM_RETURN_IF_ERROR(RunBlock(backend_, config_, run_.teacher->blocks[static_cast<size_t>(block)],
                                block, run_.teacher->rope, run, &hidden));
    return hidden;
  }

  // Mean square of a tensor's elements.
  absl::StatusOr<double> MeanSquare(const Tensor& tensor) {
    QM_ASSIGN_OR_RETURN(Tensor f32, backend_.Allocate(DType::kF32, tensor.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(tensor, &f32));
    QM_ASSIGN_OR_RETURN(const double sum, run_.ops->SumOfSquares({&f32, 1}));
    return sum / static_cast<double>(tensor.elements());
  }

  absl::Status Train(int64_t block) {
    AdamW optimizer(*run_.ops, OptimizerOptions(options_));
    QM_RETURN_IF_ERROR(
        run_.slots->Register(plans_, block, options_.parameter_rate, QM_PHASE_BLOCK, &optimizer));
    if (optimizer.gradients().empty()) return absl::OkStatus();  // nothing of it is trained
    std::vector<NamedTensor> wanted;
    for (const NamedTensor& gradient : run_.slots->WantedGradients()) wanted.push_back(gradient);
    const size_t index = static_cast<size_t>(block);
    QM_ASSIGN_OR_RETURN(BlockWeights gradients,
                        PlaceGradients(config_, block, run_.student->blocks[index], wanted));
    TrainPosition watch;
    const Clock::time_point start = Clock::now();
    for (int64_t step = 0; step < steps_; ++step) {
      QM_RETURN_IF_ERROR(run_.slots->Refresh());
      QM_ASSIGN_OR_RETURN(const double loss, AddGradients(block, step, &gradients));
      QM_RETURN_IF_ERROR(run_.slots->PullBack());
      const WarmupCosine schedule = {
          options_.block_rate, steps_,
          options_.Steps() > 0 ? options_.warmup * steps_ / options_.Steps() : 0,
          options_.rate_floor};
      QM_ASSIGN_OR_RETURN(const OptimizerStep taken, optimizer.Step(schedule.Rate(step + 1)));
      watch.step = step + 1;
      QM_RETURN_IF_ERROR(WatchLoss(loss, taken.skipped, steps_, &watch));
      QM_RETURN_IF_ERROR(Log(block, step + 1, schedule.Rate(step + 1), loss));
      const double speed =
          SecondsSince(start) > 0
              ? static_cast<double>(step + 1) *
                    static_cast<double>(options_.block_batch * options_.sequence_length) /
                    SecondsSince(start)
              : 0;
      run_.Progress(absl::StrFormat("block %d/%d, loss %.4f, %.0f tokens/s", block + 1,
                                    config_.layers, loss, speed),
                    step + 1, steps_);
    }
    return run_.slots->Refresh();
  }

  absl::StatusOr<double> AddGradients(int64_t block, int64_t step, BlockWeights* gradients) {
    const size_t index = static_cast<size_t>(block);
    const TrainedBlock trained = {&config_, block, &run_.student->blocks[index],
                                  &run_.student->rope, options_.block_batch};
    QM_ASSIGN_OR_RETURN(const Tensor target, Target(block, step));
    BlockTape tape;
    QM_ASSIGN_OR_RETURN(const Tensor output,
                        RunBlockOnTape(backend_, trained, Batch(streams_.student, step), &tape));
    QM_ASSIGN_OR_RETURN(const double energy, MeanSquare(target));
    const double weight = 1 / (std::max(energy, 1e-30) * static_cast<double>(target.elements()));
    QM_ASSIGN_OR_RETURN(Tensor d_output, backend_.Allocate(DType::kF32, output.shape()));
    QM_ASSIGN_OR_RETURN(
        const double sum,
        run_.ops->SquaredError(output, target, static_cast<float>(2 * weight), &d_output));
    QM_RETURN_IF_ERROR(
        BackwardThroughBlock(*run_.ops, trained, tape, d_output, gradients, nullptr));
    return sum * weight;
  }

  absl::Status Log(int64_t block, int64_t step, double rate, double loss) {
    const nlohmann::ordered_json line = {
        {"phase", "blocks"}, {"block", block}, {"step", step}, {"lr", rate}, {"loss", loss}};
    return run_.log->Add(line.dump());
  }

  // Both streams to the inputs of the next block.
  absl::Status Advance(int64_t block) {
    const size_t index = static_cast<size_t>(block);
    BlockRun run;
    run.batch = options_.block_batch;
    for (int64_t step = 0; step < steps_; ++step) {
      Tensor student = Batch(streams_.student, step), teacher = Batch(streams_.teacher, step);
      QM_RETURN_IF_ERROR(RunBlock(backend_, config_, run_.student->blocks[index], block,
                                  run_.student->rope, run, &student));
      QM_RETURN_IF_ERROR(RunBlock(backend_, config_, run_.teacher->blocks[index], block,
                                  run_.teacher->rope, run, &teacher));
    }
    return absl::OkStatus();
  }

  const std::vector<const ReparamPlan*>& plans_;
  TrainingRun& run_;
  const TrainOptions& options_;
  Backend& backend_;
  const ModelConfig& config_;
  const int64_t steps_, windows_;
  Streams streams_;
};

}  // namespace

absl::Status TrainBlocks(const std::vector<const ReparamPlan*>& plans, TrainingRun* run) {
  return BlockPhase(plans, *run).Run();
}

}  // namespace quantmill
