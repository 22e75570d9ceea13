#include "host/run/time_estimate.h"

#include <algorithm>
#include <set>
#include <vector>

#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/eval/self_text.h"
#include "core/threads/thread_pool.h"

namespace quantmill {
namespace {

constexpr int kOutputGroup = 1;  // LinearSlot::input_group of o, which attention comes before
constexpr int64_t kVerifiedTokens = 32;  // host/run/verify.cc: logits, in the file and in memory
constexpr int64_t kEstimatedTokens = 16;

double WeightCount(const LinearSlot& slot) {
  return static_cast<double>(slot.out_features) * static_cast<double>(slot.in_features);
}

bool IsExpert(const LinearSlot& slot) { return slot.role.rfind("expert.", 0) == 0; }

// Of the rows of a block, those that a linear sees.
double RowShare(const ModelConfig& config, const LinearSlot& slot) {
  if (!IsExpert(slot)) return 1;
  return static_cast<double>(config.experts_per_token) / static_cast<double>(config.experts);
}

// One pass of `rows` rows in sequences of `length` through a block, up to the input of `group`
// (more than any: to the end).
RunWork BlockPass(const PipelinePlan& plan, int64_t block, int group, double rows, double length) {
  const ModelConfig& config = plan.config;
  RunWork work;
  for (const LinearSlot& slot : plan.slots) {
    if (slot.block != block || slot.input_group >= group) continue;
    const double share = RowShare(config, slot);
    work.products += 2 * rows * share * WeightCount(slot);
    work.activations += rows * share * static_cast<double>(slot.out_features + slot.in_features);
  }
  if (group < kOutputGroup) return work;
  const double seen = length / 2;  // causal
  work.attention += 4 * rows * seen * static_cast<double>(config.q_features());
  work.exponentials += rows * seen * static_cast<double>(config.heads);
  return work;
}

constexpr int kEnd = 1 << 30;

RunWork AllBlocks(const PipelinePlan& plan, double rows, double length) {
  RunWork work;
  for (int64_t block = 0; block < plan.config.layers; ++block) {
    work += BlockPass(plan, block, kEnd, rows, length);
  }
  return work;
}

double HeadFlops(const PipelinePlan& plan, double rows) {
  return 2 * rows * static_cast<double>(plan.config.hidden_size) *
         static_cast<double>(plan.config.vocab_size);
}

double AllWeights(const PipelinePlan& plan) {
  double weights = 0;
  for (const LinearSlot& slot : plan.slots) weights += WeightCount(slot);
  return weights;
}

std::vector<size_t> SlotsIn(const PipelinePlan& plan, const PreparedStage& stage, int64_t block) {
  std::vector<size_t> indices;
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    if (plan.slots[static_cast<size_t>(stage.stage->slots[i])].block == block) indices.push_back(i);
  }
  return indices;
}

// Input groups a stage measures in a block.
std::set<int> GroupsOf(const PipelinePlan& plan, const PreparedStage& stage, int64_t block) {
  std::set<int> groups;
  if (!stage.needs_statistics) return groups;
  for (const size_t i : SlotsIn(plan, stage, block)) {
    if (stage.method.plans[i].stats.empty() && !stage.fallback) continue;
    groups.insert(plan.slots[static_cast<size_t>(stage.stage->slots[i])].input_group);
  }
  return groups;
}

// Gram matrices of one input group.
double GramFlops(const PipelinePlan& plan, const PreparedStage& stage, int64_t block, int group,
                 double rows) {
  for (const size_t i : SlotsIn(plan, stage, block)) {
    const LinearSlot& slot = plan.slots[static_cast<size_t>(stage.stage->slots[i])];
    if (slot.input_group != group) continue;
    const double in = static_cast<double>(slot.in_features);
    double flops = 0;
    for (const SlotPlan::Stat& stat : stage.method.plans[i].stats) {
      const bool gram =
          stat.request.kind == StatKind::kHessian || stat.request.kind == StatKind::kCross;
      if (gram) flops += 2 * rows * RowShare(plan.config, slot) * in * in;
    }
    return flops;
  }
  return 0;
}

// Passes that measure one block's statistics.
RunWork Measuring(const PipelinePlan& plan, const StageSet& stages, int64_t block, double rows,
                  double length, int streams) {
  RunWork work;
  int last_shared = -1;
  std::set<int> measured;
  for (const PreparedStage& stage : stages.stages) {
    for (const int group : GroupsOf(plan, stage, block)) {
      if (stage.sequential) {
        work += BlockPass(plan, block, group, streams * rows, length);
      } else {
        last_shared = std::max(last_shared, group);
      }
      if (stage.sequential || measured.insert(group).second) {
        work.products += GramFlops(plan, stage, block, group, rows);
      }
    }
  }
  if (last_shared >= 0) work += BlockPass(plan, block, last_shared, streams * rows, length);
  return work;
}

// Rows on which a linear's output is compared, each way.
double JudgedRows(const SlotPlan& plan) {
  return plan.stats.empty() ? 0 : static_cast<double>(kOutputSampleRows);
}

int64_t LastMeasuredBlock(const PipelinePlan& plan, const StageSet& stages) {
  int64_t last = -1;
  for (const PreparedStage& stage : stages.stages) {
    if (!stage.needs_statistics) continue;
    for (const int slot : stage.stage->slots) {
      last = std::max<int64_t>(last, plan.slots[static_cast<size_t>(slot)].block);
    }
  }
  return last;
}

// Windows that the model writes, one token after the other.
RunWork Drawing(const PipelinePlan& plan, int64_t windows, int64_t length, DrawingDevice device) {
  const double rows = static_cast<double>(windows * length);
  RunWork work = AllBlocks(plan, rows, static_cast<double>(length));
  work.few_rows = work.products + HeadFlops(plan, rows);
  work.products = 0;
  work.exponentials += rows * static_cast<double>(plan.config.vocab_size);
  const double kept = static_cast<double>(2 * plan.config.layers * plan.config.kv_features() *
                                          ElementSize(device.activation));
  work.cached = rows * static_cast<double>(length) / 2 * kept;
  const double at_once = static_cast<double>(WindowsAtOnce(plan.config, length, device));
  work.steps = static_cast<double>(length) * std::max(1.0, static_cast<double>(windows) / at_once) *
               static_cast<double>(plan.config.layers);
  return work;
}

}  // namespace

RunWork& operator+=(RunWork& a, const RunWork& b) {
  a.products += b.products;
  a.few_rows += b.few_rows;
  a.attention += b.attention;
  a.cached += b.cached;
  a.method += b.method;
  a.activations += b.activations;
  a.exponentials += b.exponentials;
  a.weights += b.weights;
  a.bytes += b.bytes;
  a.text_bytes += b.text_bytes;
  a.steps += b.steps;
  return a;
}

RunWork DrawingWork(const PipelinePlan& plan, DrawingDevice device) {
  const auto& calibration = plan.pipeline.calibration;
  if (!calibration || calibration->text != "self") return {};
  return Drawing(plan, calibration->samples, calibration->sequence_length, device);
}

RunWork QuantizingWork(const PipelinePlan& plan, const StageSet& stages) {
  RunWork work;
  for (const PreparedStage& stage : stages.stages) {
    for (const auto& [block, part] : stage.parts)
      work.method += part.plan.flops + part.tuning.flops;
    for (size_t i = 0; !stage.transforms && !stage.tunes && i < stage.stage->slots.size(); ++i) {
      const LinearSlot& slot = plan.slots[static_cast<size_t>(stage.stage->slots[i])];
      const SlotPlan& slot_plan = stage.method.plans[i];
      work.method += slot_plan.flops;
      work.products += 2 * 2 * JudgedRows(slot_plan) * WeightCount(slot);
      work.weights += 3 * WeightCount(slot);  // to f32 and back, and compared
    }
  }
  const int64_t last = LastMeasuredBlock(plan, stages);
  if (last < 0 || !plan.pipeline.calibration) return work;
  const double length = static_cast<double>(plan.pipeline.calibration->sequence_length);
  const double rows = static_cast<double>(plan.pipeline.calibration->samples) * length;
  const int streams = stages.UsesOriginalStream() && stages.UsesQuantizedStream() ? 2 : 1;
  for (int64_t block = 0; block <= last; ++block) {
    work += Measuring(plan, stages, block, rows, length, streams);
    if (block < last) work += BlockPass(plan, block, kEnd, streams * rows, length);
  }
  return work;
}

// Flops of adapters per row: each parameter of a rotation is used in two products at most, each of
// two operations, forward, forward again, and back to the input and to the parameters.
double AdapterFlops(const PreparedStage& stage) {
  constexpr double kPerParameter = 2 * 2 * 4;
  double flops = 0;
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    const ReparamPlan* plan = stage.AnyPlan(i);
    if (plan == nullptr || plan->kind == QM_REPARAM_WEIGHT) continue;
    for (const ReparamPlan::Param& param : plan->params) {
      flops += kPerParameter * static_cast<double>(param.shape.elements());
    }
  }
  return flops;
}

RunWork TrainingWork(const PipelinePlan& plan, const StageSet& stages, DrawingDevice device) {
  RunWork work;
  for (const PreparedStage& stage : stages.stages) {
    if (!stage.trains) continue;
    const TrainOptions& train = *stage.stage->train;
    const double length = static_cast<double>(train.sequence_length);
    const double teacher = train.distill ? 1 : 0;
    if (train.sampled_tokens > 0) {
      work += Drawing(plan, train.SampledWindows(), train.sequence_length, device);
    }
    // A backward pass is worth two forward passes.
    if (stage.HasPhase(QM_PHASE_END_TO_END)) {
      const double rows = static_cast<double>(train.tokens);
      work += AllBlocks(plan, (3 + teacher + (train.checkpointing ? 1 : 0)) * rows, length);
      work.products += HeadFlops(plan, (3 + teacher) * rows);
      work.method += AdapterFlops(stage) * rows;
      work.exponentials += 2 * rows * static_cast<double>(plan.config.vocab_size);
      work.weights += 8 * static_cast<double>(train.Steps()) * AllWeights(plan);
    }
    // Both models' outputs, the way back, and both models' inputs of the next block.
    if (stage.HasPhase(QM_PHASE_BLOCK)) {
      work += AllBlocks(plan, 6 * static_cast<double>(train.block_tokens), length);
      work.weights += 8 * static_cast<double>(train.BlockSteps()) * AllWeights(plan);
    }
  }
  return work;
}

RunWork OutputWork(const PipelinePlan& plan, const RunExtent& extent) {
  RunWork work = AllBlocks(plan, 2 * kVerifiedTokens, kVerifiedTokens);
  work.products += HeadFlops(plan, 2 * kVerifiedTokens);
  RunWork generated = AllBlocks(plan, kEstimatedTokens, kEstimatedTokens);
  work.weights += generated.products / 2 + HeadFlops(plan, kEstimatedTokens) / 2;
  work.steps = static_cast<double>(kEstimatedTokens * plan.config.layers);
  double packed = 0;
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    if (plan.packed_by[i] >= 0) packed += WeightCount(plan.slots[i]);
  }
  work.weights += 5 * packed;  // into the file's layout, out of it, dequantized twice, compared
  work.bytes = static_cast<double>(extent.original_bytes) +
               3.0 * static_cast<double>(extent.work_bytes) +
               2.0 * static_cast<double>(extent.output_bytes);
  return work;
}

RunWork EvaluationWork(const PipelinePlan& plan, int64_t windows) {
  RunWork work;
  if (!plan.pipeline.evaluate || windows == 0) return work;
  const double length = static_cast<double>(plan.pipeline.evaluate->context);
  const double rows = static_cast<double>(windows) * length;
  const double models = plan.pipeline.evaluate->reference ? 2 : 1;
  work = AllBlocks(plan, models * rows, length);
  work.products += models * HeadFlops(plan, rows);
  const double vocabulary = static_cast<double>(plan.config.vocab_size);
  // Each model's logits are normalized; KL goes over both once more.
  work.exponentials += rows * vocabulary * (models > 1 ? 4 : 1);
  work.weights += AllWeights(plan);
  return work;
}

RunWork TotalWork(const PipelinePlan& plan, const StageSet& stages, const RunExtent& extent) {
  RunWork work;
  if (stages.NeedsStatistics()) work += DrawingWork(plan, extent.device);
  work += QuantizingWork(plan, stages);
  work += TrainingWork(plan, stages, extent.device);
  work += OutputWork(plan, extent);
  work += EvaluationWork(plan, extent.evaluation_windows);
  work.text_bytes = static_cast<double>(extent.text_bytes);
  return work;
}

absl::StatusOr<double> MeasureProductRate(Backend& backend) {
  const int64_t size = backend.device().is_cuda() ? 4096 : 384;
  constexpr int kRepeats = 3;
  const DType dtype = backend.activation_dtype();
  QM_ASSIGN_OR_RETURN(Tensor x, backend.Allocate(dtype, {size, size}));
  QM_ASSIGN_OR_RETURN(Tensor weight, backend.Allocate(dtype, {size, size}));
  QM_ASSIGN_OR_RETURN(Tensor out, backend.Allocate(dtype, {size, size}));
  QM_RETURN_IF_ERROR(backend.Zero(&x));
  QM_RETURN_IF_ERROR(backend.Zero(&weight));
  double fastest = 0;
  for (int i = 0; i <= kRepeats; ++i) {  // the first one warms up
    const auto start = Clock::now();
    QM_RETURN_IF_ERROR(backend.Linear(x, weight, Tensor(), &out));
    QM_RETURN_IF_ERROR(backend.Synchronize());
    const double seconds = SecondsSince(start);
    if (i == 1 || (i > 1 && seconds < fastest)) fastest = seconds;
  }
  const double side = static_cast<double>(size);
  return 2 * side * side * side / std::max(fastest, 1e-9);
}

double SecondsFor(const RunWork& work, double product_rate, bool on_gpu, int threads) {
  // Shares of the product rate, and costs of a value on one core in seconds, measured with runs of
  // the recipes and of a model of 19 M parameters on two cores with AVX-512, and on an H200.
  constexpr double kProductShare = 0.75, kFewRowsShare = 0.25, kMethodShare = 0.1;
  constexpr double kAttentionShare = 0.3, kExponential = 1.5e-9, kActivation = 1e-9;
  constexpr double kWeight = 2e-9, kTextByte = 1e-7, kDiskBytes = 5e8;
  // On a GPU two processes open the device, and a step is some launches per block.
  const double start = on_gpu ? 3.2 : 0.2, step = on_gpu ? 1e-4 : 5e-5;
  // A GPU goes over values as fast as its memory lets it. It reads the keys and values of few rows
  // for longer than it computes with them; a CPU does not.
  const double values = on_gpu ? 1e-3 : 1.0 / threads;
  const double cached_byte = on_gpu ? 1e-12 : 0;
  return start + work.products / (kProductShare * product_rate) +
         work.few_rows / (kFewRowsShare * product_rate) +
         work.attention / (kAttentionShare * product_rate) + work.cached * cached_byte +
         work.method / (kMethodShare * product_rate) +
         (work.exponentials * kExponential + work.activations * kActivation) * values +
         work.weights * kWeight / threads + work.text_bytes * kTextByte + work.steps * step +
         work.bytes / kDiskBytes;
}

}  // namespace quantmill
