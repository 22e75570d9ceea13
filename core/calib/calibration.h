// Calibration: the hidden states of all windows of the calibration text, walked through the model
// one block at a time, and the statistics measured on the way.
//
//   auto calibration = Calibration::Create(backend, config, windows, embedding, options);
//   for each block:
//     calibration->Collect(weights, original, requests, &statistics);   // as often as needed
//     ... quantize, put the results into `weights` ...
//     calibration->Advance(weights, original);
//
// True-sequential quantization calls Collect once per input group, with the slots of earlier groups
// already replaced: only the part of the block up to the last requested group is run.
//
// Two streams. The quantized stream is what the model computes with the weights handed in so far;
// the original stream, kept when options.keep_original, what the untouched model computes. They
// share memory as long as they are equal. `original` is the untouched block, or null when `weights`
// is itself the untouched block.
//
// Mixture of experts. Rows of an expert's groups are those its stream's router sends there. For
// `cross` the untouched block is run with the quantized stream's routing, so that both inputs of a
// row exist and belong to the same expert.
#ifndef QUANTMILL_CORE_CALIB_CALIBRATION_H_
#define QUANTMILL_CORE_CALIB_CALIBRATION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/calib/statistics.h"
#include "core/model/config.h"
#include "core/model/decoder.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"

namespace quantmill {

struct CalibrationOptions {
  // Keep the untouched model's hidden states too: needed for `cross` and from_original requests.
  bool keep_original = false;
  // Windows are run together up to this many rows; at least one window. Does not change statistics'
  // order of summation: they are accumulated window by window.
  int64_t batch_rows = 2048;
  // Hidden states live on the device (else in host memory, copied there and back batch by batch).
  bool hidden_on_device = true;
  // Called with the share of the running Collect or Advance that is done, in (0, 1]; a status other
  // than OK stops it and is returned. May be null.
  std::function<absl::Status(double fraction)> progress;
};

// Bytes a calibration needs, for preflight.
struct CalibrationMemory {
  int64_t hidden = 0;       // hidden states, device or host memory as the options say
  int64_t activations = 0;  // of a running block, device memory (host on the CPU)
  int64_t statistics = 0;   // of the requests of one Collect, device memory (host on the CPU)
};
CalibrationMemory EstimateCalibrationMemory(const ModelConfig& config, int64_t windows,
                                            int64_t length, DType activation_dtype,
                                            const CalibrationOptions& options, int64_t block,
                                            absl::Span<const StatRequest> requests);

class Calibration {
 public:
  // windows: I32 [windows, length] on the host, ids in [0, vocab). embedding: [vocab, hidden].
  // backend and config must outlive the result.
  static absl::StatusOr<std::unique_ptr<Calibration>> Create(Backend& backend,
                                                             const ModelConfig& config,
                                                             const Tensor& windows,
                                                             const Tensor& embedding,
                                                             const CalibrationOptions& options);
  virtual ~Calibration() = default;

  virtual int64_t windows() const = 0;
  virtual int64_t length() const = 0;
  // The block whose inputs the hidden states are now; config.layers after the last Advance.
  virtual int64_t block() const = 0;

  // Measures `requests` on the current block. Hidden states stay as they are. Every request appears
  // in *out, also those of experts without rows (zeros; `rows` with no row).
  // FAILED_PRECONDITION: a request needs the original stream, which is not kept.
  virtual absl::Status Collect(const BlockWeights& weights, const BlockWeights* original,
                               absl::Span<const StatRequest> requests, Statistics* out) = 0;

  // Replaces the hidden states by the current block's output and moves to the next block. After an
  // error the hidden states are undefined.
  virtual absl::Status Advance(const BlockWeights& weights, const BlockWeights* original) = 0;

  // Input of the current block for one window, a copy on the device: [length, hidden].
  virtual absl::StatusOr<Tensor> Input(int64_t window, bool original_stream) = 0;
  // Output of the current block for one window with these weights: [length, hidden].
  virtual absl::StatusOr<Tensor> Output(const BlockWeights& weights, int64_t window,
                                        bool original_stream) = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CALIB_CALIBRATION_H_
