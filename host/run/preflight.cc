#include "host/run/preflight.h"

#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/calib/calibration.h"
#include "core/checkpoint/gguf_export.h"
#include "core/eval/self_text.h"
#include "core/eval/stream.h"
#include "core/formats/activations.h"
#include "core/formats/affine_int.h"
#include "core/threads/thread_pool.h"
#include "core/train/block_gradients.h"
#include "host/run/time_estimate.h"
#include "host/run/train/train_checks.h"
#include "host/run/transform_work.h"
#include "host/worker/services.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr double kUnknownBits = 8;  // assumed of methods that do not say
// What an exported directory holds besides tensor data and copied files, in bytes.
constexpr int64_t kHeaderBytes = 103;       // of a tensor in the header of its file
constexpr int64_t kRecordBytes = 470;       // of a slot in the provenance file,
constexpr int64_t kRecordOptionBytes = 40;  // and of each of its options
constexpr int64_t kTensorsPerSlot = 3;

// Of codes, scales and zero points of affine-int, without a group_index.
double AffineBits(const AffineIntParams& params, const LinearSlot& slot, DType scale_dtype) {
  const int64_t whole = params.axis == 1 ? slot.in_features : slot.out_features;
  const double group = static_cast<double>(params.group_size < 0 ? whole : params.group_size);
  const double range = 64.0 / static_cast<double>(kQ8Block);
  const double scale = 8.0 * static_cast<double>(ElementSize(scale_dtype));
  double bits = params.bits + (params.q8_scale ? 8.0 + range : scale) / group;
  if (params.zero == AffineIntParams::Zero::kFloat) {
    bits += scale / group;
  } else if (params.zero != AffineIntParams::Zero::kNone) {
    bits += 8.0 / group;
  }
  return bits;
}

// Does the method count an index of groups with this slot?
bool HasGroupIndex(const SlotPlan& plan, const LinearSlot& slot, DType scale_dtype) {
  const auto params = ParseAffineIntJson(plan.format_json);
  const double index = 32.0 / static_cast<double>(slot.out_features);
  return plan.format_id == kAffineIntId && params.ok() && plan.bits_per_weight > 0 &&
         plan.bits_per_weight - AffineBits(*params, slot, scale_dtype) > index / 2;
}

// Bits per weight in a file of this target; those of the format in memory where it has no rule of
// its own (reference of the layouts: plugin_api/FORMATS.md).
double StoredBits(const std::string& target, const SlotPlan& plan, const LinearSlot& slot,
                  DType scale_dtype) {
  const double bits = plan.bits_per_weight;
  if (plan.format_id != kAffineIntId || bits == 0) return bits;
  const auto params = ParseAffineIntJson(plan.format_json);
  if (!params.ok()) return bits;
  const bool gptq = target == "gptq" || target == "gptq_v2";
  if (target == "hqq") {  // ten 3-bit codes in a word of 32; fields beside codes and scales
    constexpr double kFieldBits = 8.0 * 80;
    return bits + (params->bits == 3 ? 0.2 : 0.0) +
           kFieldBits / static_cast<double>(slot.in_features * slot.out_features);
  }
  if (target == "gguf") {  // a zero point becomes a minimum in 16 bits
    const bool minimum = params->zero != AffineIntParams::Zero::kNone;
    return params->bits + (minimum ? 32.0 : 16.0) / static_cast<double>(params->group_size);
  }
  if (!gptq && target != "compressed-tensors") return bits;
  const double in = static_cast<double>(slot.in_features);
  const double out = static_cast<double>(slot.out_features);
  const double group = params->group_size < 0 ? in : static_cast<double>(params->group_size);
  const double scale = 8.0 * static_cast<double>(ElementSize(gptq ? DType::kF16 : scale_dtype));
  const double index = 32.0 / out;
  // GPTQ files always have packed zero points and g_idx.
  if (gptq) return params->bits + (scale + params->bits) / group + index;
  double stored = params->bits + scale / group + 128.0 / (in * out);  // weight_shape
  if (params->zero == AffineIntParams::Zero::kInt) stored += params->bits / group;
  // Whatever else the method counts is a group_index.
  if (HasGroupIndex(plan, slot, scale_dtype)) stored += index;
  return stored;
}

// Files of the model's directory that are copied: all but weights and their index.
int64_t CopiedBytes(const std::string& directory) {
  int64_t bytes = 0;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    const std::string extension = it->path().extension().string();
    const bool kept = extension == ".json" || extension == ".model" || extension == ".jinja";
    if (!kept || absl::StrContains(name, ".safetensors.") || absl::StartsWith(name, "reference")) {
      continue;
    }
    bytes += static_cast<int64_t>(it->file_size(error));
  }
  return bytes;
}

// The most this process has held so far (the program, its libraries and plugins), and what the
// first computation adds to it on any model: buffers of the linear algebra, stacks, code.
int64_t BaseBytes() {
  constexpr int64_t kComputing = int64_t{70} << 20;
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024 + kComputing;
}

int64_t Weights(const LinearSlot& slot) { return slot.out_features * slot.in_features; }

int64_t TensorBytes(const Checkpoint& checkpoint) {
  int64_t bytes = 0;
  for (const CheckpointTensor& tensor : checkpoint.tensors()) {
    bytes += static_cast<int64_t>(tensor.entry->bytes());
  }
  return bytes;
}

// Bytes of a layer's tensors, and of the largest of all layers.
int64_t LargestBlockBytes(const PipelinePlan& plan, const Checkpoint& checkpoint) {
  std::vector<int64_t> bytes(static_cast<size_t>(plan.config.layers), 0);
  for (const LinearSlot& slot : plan.slots) {
    const CheckpointTensor* tensor = checkpoint.Find(slot.name + ".weight");
    if (slot.block >= 0 && tensor != nullptr) {
      bytes[static_cast<size_t>(slot.block)] += static_cast<int64_t>(tensor->entry->bytes());
    }
  }
  return bytes.empty() ? 0 : *std::max_element(bytes.begin(), bytes.end());
}

// What trial runs keep of the windows, at most: a submodule's input and its output in f32.
int64_t TrialBytes(const PipelinePlan& plan, const PreparedStage::Part& part) {
  if (!plan.pipeline.calibration) return 0;
  int64_t values = 3 * plan.config.hidden_size;
  for (const LinearSlot& slot : part.block.slots) {
    values = std::max(values, slot.in_features + slot.out_features);
  }
  return std::min(kTrialCacheBytes, plan.pipeline.calibration->samples *
                                        plan.pipeline.calibration->sequence_length * values * 4);
}

// The most that a transform of a block needs: its weights in f32 as the method sees them, and with
// the edits tried and applied; scratch; what trial runs keep.
int64_t LargestTransformBytes(const PipelinePlan& plan, const PreparedStage& stage) {
  int64_t largest = 0;
  for (const auto& [index, part] : stage.parts) {
    int64_t bytes = static_cast<int64_t>(part.plan.scratch_bytes) + TrialBytes(plan, part);
    for (const LinearSlot& slot : part.block.slots) bytes += 12 * Weights(slot);
    largest = std::max(largest, bytes);
  }
  return largest;
}

// The most that tuning a block needs: its weights in f32 as the method sees them, as it overrides
// them and as the device multiplies them, and their gradients; scratch; what trial runs keep; and
// the backward pass of one window: the activations on tape, and as many gradients.
int64_t LargestTuningBytes(const PipelinePlan& plan, const PreparedStage& stage, DType activation) {
  if (!plan.pipeline.calibration) return 0;  // refused later, with what needs it
  const int64_t rows = plan.pipeline.calibration->sequence_length;
  const int64_t pass =
      TapeBytes(plan.config, rows, activation) + TapeBytes(plan.config, rows, DType::kF32);
  int64_t largest = 0;
  for (const auto& [index, part] : stage.parts) {
    int64_t bytes = static_cast<int64_t>(part.tuning.scratch_bytes) + TrialBytes(plan, part) + pass;
    for (const LinearSlot& slot : part.block.slots) bytes += 16 * Weights(slot);
    largest = std::max(largest, bytes);
  }
  return largest;
}

// The most that slots sharing one call need: weights and dequantized copies in f32, and scratch.
int64_t LargestCallBytes(const PipelinePlan& plan, const StageSet& stages, DrawingDevice device,
                         int64_t model_bytes) {
  int64_t largest = 0;
  for (const PreparedStage& stage : stages.stages) {
    if (stage.trains) {
      largest = std::max(largest, TrainingBytes(plan, stage, device, model_bytes));
      continue;
    }
    if (stage.transforms || stage.tunes) {
      largest = std::max(largest, stage.tunes ? LargestTuningBytes(plan, stage, device.activation)
                                              : LargestTransformBytes(plan, stage));
      continue;
    }
    std::map<std::pair<int, int>, int64_t> groups;
    for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
      const LinearSlot& slot = plan.slots[static_cast<size_t>(stage.stage->slots[i])];
      const int64_t bytes =
          Weights(slot) * 4 * 2 + static_cast<int64_t>(stage.method.plans[i].scratch_bytes);
      largest = std::max(largest, groups[{slot.block, slot.input_group}] += bytes);
    }
  }
  return largest;
}

CalibrationMemory LargestCalibration(const PipelinePlan& plan, const StageSet& stages,
                                     Backend& backend) {
  CalibrationMemory largest;
  if (!stages.NeedsStatistics() || !plan.pipeline.calibration) return largest;
  CalibrationOptions options;
  options.keep_original = stages.UsesOriginalStream() && stages.UsesQuantizedStream();
  for (int64_t block = 0; block < plan.config.layers; ++block) {
    std::set<StatRequest> requests;
    for (const PreparedStage& stage : stages.stages) {
      std::vector<size_t> slots;
      for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
        if (plan.slots[static_cast<size_t>(stage.stage->slots[i])].block == block) {
          slots.push_back(i);
        }
      }
      const std::vector<StatRequest> more = stage.Requests(slots);
      requests.insert(more.begin(), more.end());
    }
    const std::vector<StatRequest> list(requests.begin(), requests.end());
    const CalibrationMemory memory = EstimateCalibrationMemory(
        plan.config, plan.pipeline.calibration->samples, plan.pipeline.calibration->sequence_length,
        backend.activation_dtype(), options, block, list);
    largest.hidden = std::max(largest.hidden, memory.hidden);
    largest.activations = std::max(largest.activations, memory.activations);
    largest.statistics = std::max(largest.statistics, memory.statistics);
  }
  return largest;
}

int64_t FileBytes(const std::string& path) {
  std::error_code error;
  const auto bytes = fs::file_size(path, error);
  return error ? 0 : static_cast<int64_t>(bytes);
}

std::string Size(int64_t bytes) {
  constexpr int64_t kSmall = 100'000'000;
  return bytes < kSmall ? absl::StrFormat("%.2f MB", static_cast<double>(bytes) / 1e6)
                        : absl::StrFormat("%.2f GB", static_cast<double>(bytes) / 1e9);
}

// The closest directory above `path` that exists.
fs::path ExistingAncestor(fs::path path) {
  std::error_code error;
  path = fs::absolute(path, error);
  while (!path.empty() && !fs::exists(path, error) && path != path.parent_path()) {
    path = path.parent_path();
  }
  return path;
}

int64_t FreeDisk(const std::string& path) {
  std::error_code error;
  const fs::space_info space = fs::space(ExistingAncestor(path), error);
  return error ? 0 : static_cast<int64_t>(space.available);
}

int64_t CgroupAvailable() {
  std::ifstream limit_file("/sys/fs/cgroup/memory.max"), used_file("/sys/fs/cgroup/memory.current");
  int64_t limit = 0, used = 0;
  if (!(limit_file >> limit) || !(used_file >> used)) return 0;
  return std::max<int64_t>(limit - used, 1);
}

int64_t MemAvailable() {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  int64_t kilobytes = 0;
  while (file >> name >> kilobytes) {
    std::getline(file, unit);
    if (name == "MemAvailable:") return kilobytes * 1024;
  }
  return 0;
}

// Where the estimate of a slot in a stage is: a stage that transforms and quantizes has one for
// both.
using EstimateIndex = std::map<std::pair<int, int>, size_t>;

SlotEstimate& EstimateOf(int stage, int slot, EstimateIndex* index, PlanReport* report) {
  const auto [found, fresh] = index->try_emplace({stage, slot}, report->slots.size());
  if (fresh) {
    report->slots.emplace_back();
    report->slots.back().stage = stage;
    report->slots.back().slot = slot;
  }
  return report->slots[found->second];
}

void AddStatistics(const SlotPlan& plan, SlotEstimate* estimate) {
  std::vector<std::string>& ids = estimate->statistics;
  for (const SlotPlan::Stat& stat : plan.stats) {
    const std::string id(StatId(stat.request.kind));
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
}

void AddTransform(const PreparedStage& stage, EstimateIndex* index, PlanReport* report) {
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    AddStatistics(stage.method.plans[i],
                  &EstimateOf(stage.index, stage.stage->slots[i], index, report));
  }
  for (const auto& [block, part] : stage.parts) {
    // Its edits are scales of channels, seldom more.
    for (const ScaleSite& site : part.block.sites) report->work_bytes += 4 * site.channels;
  }
}

absl::Status CanBeDense(const std::string& format_json) {
  if (ActivationsOf(format_json) == Activations::kFloat) return absl::OkStatus();
  return absl::FailedPreconditionError(
      ErrorText("a dense file cannot say that activations are quantized", "",
                "export as compressed-tensors or quantmill"));
}

// Its unit holds the block's packed weights once more.
void AddTuning(const PipelinePlan& plan, const PreparedStage& stage, EstimateIndex* index,
               PlanReport* report) {
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    const int slot = stage.stage->slots[i];
    const auto part = stage.parts.find(plan.slots[static_cast<size_t>(slot)].block);
    if (part == stage.parts.end()) continue;
    SlotEstimate& estimate = EstimateOf(stage.index, slot, index, report);
    estimate.scratch_bytes =
        std::max(estimate.scratch_bytes, static_cast<int64_t>(part->second.tuning.scratch_bytes));
    const double bits = estimate.bits_per_weight > 0 ? estimate.bits_per_weight : kUnknownBits;
    report->work_bytes += static_cast<int64_t>(
        bits * static_cast<double>(Weights(plan.slots[static_cast<size_t>(slot)])) / 8);
  }
}

// Raises the peaks to a phase's: `working` bytes where the backend computes, and a block's weights,
// `block` bytes, on their way there.
void SetPeaks(int64_t working, int64_t block, const Backend& backend, PlanReport* report) {
  // Of matrix products, there from the start (core/cuda/matrix_product.h).
  constexpr int64_t kDeviceBase = int64_t{32} << 20;
  const bool on_gpu = backend.device().is_cuda();
  report->peak_host_bytes =
      std::max(report->peak_host_bytes, BaseBytes() + (on_gpu ? block : working));
  if (on_gpu) {
    report->peak_device_bytes = std::max(report->peak_device_bytes, kDeviceBase + working);
  }
}

}  // namespace

absl::StatusOr<PlanReport> EstimateRun(const PipelinePlan& plan, const StageSet& stages,
                                       const Checkpoint& checkpoint, Backend& backend) {
  PlanReport report;
  report.device = DeviceName(backend.device());
  EstimateIndex estimates;
  const std::string& target = plan.pipeline.export_format;
  double stored_bits = 0;
  int64_t slot_bytes = 0;
  int64_t other_bytes = CopiedBytes(plan.pipeline.model_path) +
                        static_cast<int64_t>(checkpoint.tensors().size()) * kHeaderBytes;
  for (const PreparedStage& stage : stages.stages) {
    if (stage.transforms) {
      AddTransform(stage, &estimates, &report);
      continue;
    }
    if (stage.tunes) {
      AddTuning(plan, stage, &estimates, &report);
      continue;
    }
    if (stage.trains) {  // the text it draws
      const TrainOptions& train = *stage.stage->train;
      report.work_bytes += 4 * train.SampledWindows() * train.sequence_length;
    }
    for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
      const int index = stage.stage->slots[i];
      const LinearSlot& slot = plan.slots[static_cast<size_t>(index)];
      const SlotPlan& slot_plan = stage.method.plans[i];
      if (stage.trains && slot_plan.format_id.empty()) {
        const int64_t bytes = AdapterBytes(stage, i);
        report.work_bytes += bytes;
        report.output_bytes += bytes;
        continue;
      }
      SlotEstimate& estimate = EstimateOf(stage.index, index, &estimates, &report);
      estimate.format_id = slot_plan.format_id;
      estimate.bits_per_weight = slot_plan.bits_per_weight;
      AddStatistics(slot_plan, &estimate);
      estimate.scratch_bytes =
          std::max(estimate.scratch_bytes, static_cast<int64_t>(slot_plan.scratch_bytes));
      estimate.flops += slot_plan.flops;
      const double bits = estimate.bits_per_weight > 0 ? estimate.bits_per_weight : kUnknownBits;
      report.work_bytes += static_cast<int64_t>(bits * static_cast<double>(Weights(slot)) / 8);
      if (plan.packed_by[static_cast<size_t>(index)] == stage.index) {
        report.parameters += Weights(slot);
        const double stored = StoredBits(target, slot_plan, slot, stages.scale_dtype);
        stored_bits += (stored > 0 ? stored : bits) * static_cast<double>(Weights(slot));
        other_bytes += kRecordBytes +
                       kRecordOptionBytes * static_cast<int64_t>(stage.OptionsOf(i).size()) +
                       (target == "dense" ? 0 : (kTensorsPerSlot - 1) * kHeaderBytes);
        const CheckpointTensor* tensor = checkpoint.Find(slot.name + ".weight");
        if (tensor != nullptr) slot_bytes += static_cast<int64_t>(tensor->entry->bytes());
      }
    }
  }
  if (report.parameters > 0) {
    report.bits_per_weight = stored_bits / static_cast<double>(report.parameters);
  }
  report.output_bytes += TensorBytes(checkpoint) + other_bytes;
  if (target != "dense") {
    report.output_bytes += static_cast<int64_t>(stored_bits / 8) - slot_bytes;
  }

  const CalibrationMemory calibration = LargestCalibration(plan, stages, backend);
  const int64_t block = LargestBlockBytes(plan, checkpoint);
  int64_t working =
      block + LargestCallBytes(plan, stages, DrawingDevice::Of(backend), TensorBytes(checkpoint)) +
      calibration.activations + calibration.statistics;
  if (stages.NeedsStatistics()) {  // the block with dequantized weights
    working += block * ElementSize(backend.activation_dtype()) / 2;
  }
  if (stages.NeedsStatistics() && plan.pipeline.calibration &&
      plan.pipeline.calibration->text == "self") {
    const CalibrationSection& text = *plan.pipeline.calibration;
    working = std::max(working, TensorBytes(checkpoint) + DrawingBytes(plan.config, text.samples,
                                                                       text.sequence_length,
                                                                       DrawingDevice::Of(backend)));
  }
  SetPeaks(working + calibration.hidden, block, backend, &report);
  return report;
}

void AddEvaluation(const PipelinePlan& plan, const Checkpoint& checkpoint, int64_t windows,
                   Backend& backend, PlanReport* report) {
  const Pipeline::Evaluate& evaluate = *plan.pipeline.evaluate;
  const int64_t models = evaluate.reference ? 2 : 1, vocab = plan.config.vocab_size;
  CalibrationOptions options;  // without requests, what passing windows through blocks takes
  options.keep_original = evaluate.reference;
  const CalibrationMemory windows_memory = EstimateCalibrationMemory(
      plan.config, windows, evaluate.context, backend.activation_dtype(), options, 0, {});
  const int64_t tile = std::min(evaluate.context, OutputHead::TileRows(vocab)) * vocab * 4;
  const int64_t head = vocab * plan.config.hidden_size * ElementSize(plan.config.dtype);
  const int64_t block = LargestBlockBytes(plan, checkpoint);
  const int64_t working =
      windows_memory.hidden + std::max(block + windows_memory.activations, models * (tile + head));
  SetPeaks(working, block, backend, report);
}

absl::Status EstimateTime(const PipelinePlan& plan, const StageSet& stages,
                          const Checkpoint& checkpoint, int64_t evaluation_windows,
                          Backend& backend, PlanReport* report) {
  const Pipeline& pipeline = plan.pipeline;
  RunExtent extent;
  extent.evaluation_windows = evaluation_windows;
  extent.original_bytes = TensorBytes(checkpoint);
  extent.work_bytes = report->work_bytes;
  extent.output_bytes = report->output_bytes;
  extent.device = DrawingDevice::Of(backend);
  if (pipeline.evaluate) extent.text_bytes += FileBytes(pipeline.evaluate->text);
  if (stages.NeedsStatistics() && pipeline.calibration->text != "self") {
    extent.text_bytes += FileBytes(pipeline.calibration->text);
  }
  for (const PreparedStage& stage : stages.stages) {
    if (stage.trains) extent.text_bytes += FileBytes(stage.stage->train->data);
  }
  QM_ASSIGN_OR_RETURN(const double rate, MeasureProductRate(backend));
  report->seconds = SecondsFor(TotalWork(plan, stages, extent), rate, backend.device().is_cuda(),
                               backend.threads().size());
  return absl::OkStatus();
}

MachineState ReadMachineState(const Pipeline& pipeline, Backend& backend) {
  MachineState machine;
  machine.host_bytes = MemAvailable();
  if (const int64_t cgroup = CgroupAvailable(); cgroup > 0) {
    machine.host_bytes = std::min(machine.host_bytes, cgroup);
  }
  if (backend.device().is_cuda()) machine.device_bytes = CudaFreeBytes(backend.device().index);
  machine.work_disk_bytes = FreeDisk(pipeline.work_dir);
  machine.output_disk_bytes = FreeDisk(pipeline.export_path);
  struct stat work = {}, output = {};
  machine.one_disk = stat(ExistingAncestor(pipeline.work_dir).c_str(), &work) == 0 &&
                     stat(ExistingAncestor(pipeline.export_path).c_str(), &output) == 0 &&
                     work.st_dev == output.st_dev;
  return machine;
}

absl::Status CheckMachine(const PipelinePlan& plan, const PlanReport& report,
                          const MachineState& machine) {
  std::vector<std::string> reasons;
  auto check = [&reasons](const char* what, int64_t wanted, int64_t there, const char* remedy) {
    if (there <= 0 || wanted <= there) return;
    reasons.push_back(ErrorText(
        absl::StrCat(what, ": about ", Size(wanted), " needed, ", Size(there), " available"), "",
        remedy));
  };
  const Pipeline& pipeline = plan.pipeline;
  auto limit = [](int64_t configured, int64_t available) {
    return configured > 0 && (available <= 0 || configured < available) ? configured : available;
  };
  check("host memory", report.peak_host_bytes,
        limit(pipeline.host_memory_limit, machine.host_bytes),
        "use fewer calibration samples, or a machine with more memory");
  check("device memory", report.peak_device_bytes,
        limit(pipeline.device_memory_limit, machine.device_bytes),
        "use another device, or --device cpu");
  if (machine.one_disk) {
    check("disk space for work_dir and output", report.work_bytes + report.output_bytes,
          machine.output_disk_bytes, "free some, or put work_dir on another disk");
  } else {
    check("disk space for work_dir", report.work_bytes, machine.work_disk_bytes,
          "free some, or choose another run.work_dir");
    check("disk space for the output", report.output_bytes, machine.output_disk_bytes,
          "free some, or choose another export.path");
  }
  if (reasons.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrJoin(reasons, "\n"));
}

absl::Status CheckCanStore(const PipelinePlan& plan, const StageSet& stages,
                           PluginFormats& formats) {
  const std::string& target = plan.pipeline.export_format;
  for (const PreparedStage& stage : stages.stages) {
    QM_RETURN_IF_ERROR(CheckAdapters(target, stage));
  }
  if (target == "quantmill") return absl::OkStatus();
  if (target == kGgufTarget) {
    QM_RETURN_IF_ERROR(CheckGgufExport(plan.pipeline.model_path, plan.config));
  }
  for (const PreparedStage& stage : stages.stages) {
    if (stage.transforms || stage.tunes) continue;
    for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
      const size_t index = static_cast<size_t>(stage.stage->slots[i]);
      if (plan.packed_by[index] != stage.index) continue;
      const LinearSlot& slot = plan.slots[index];
      const SlotPlan& slot_plan = stage.method.plans[i];
      if (slot_plan.format_json.empty()) continue;
      absl::Status status =
          target == "dense" ? CanBeDense(slot_plan.format_json)
                            : formats.CanStore(target, slot_plan.format_id, slot_plan.format_json,
                                               slot.out_features, slot.in_features);
      if (status.ok() && target == kGgufTarget &&
          HasGroupIndex(slot_plan, slot, stages.scale_dtype)) {
        status = absl::FailedPreconditionError(
            ErrorText("gguf files hold groups in the order of the input channels only", "",
                      "use static_groups: true, or act_order: false"));
      }
      if (!status.ok()) {
        return WithContext(
            status, absl::StrCat(stage.stage->location.ToString(), ": stage '", stage.stage->name,
                                 "', ", slot.name, " as ", target));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace quantmill
