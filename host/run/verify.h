// Reopens a written checkpoint and checks it by the reader's rules.
#ifndef QUANTMILL_HOST_RUN_VERIFY_H_
#define QUANTMILL_HOST_RUN_VERIFY_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/tensor/backend.h"
#include "host/run/unit_source.h"
#include "host/worker/formats.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct VerifyOptions {
  std::string directory;
  // What the run has in memory: every slot's stored weight must dequantize to the same values, and
  // the logits must agree. Both or neither.
  PackedLookup expected;
  WeightSource* in_memory = nullptr;
  // Compare the files with the digests in quantmill_provenance.json; not needed right after
  // writing.
  bool check_digests = true;
  double planned_bits = 0;  // per weight; 0 = not compared
  // The original model's directory: its logits are compared, for information. May be empty.
  std::string reference;
  std::function<void(const std::string& step, int64_t done, int64_t total)> progress;
};

struct VerifyReport {
  std::vector<std::string> checks;       // what was found in order
  std::vector<std::string> warnings;     // not wrong, but worth a look
  std::vector<std::string> unquantized;  // linears that are stored dense
  int64_t packed_slots = 0;
  double bits_per_weight = 0;                 // stored for the quantized linears; 0 = none
  int64_t size_bytes = 0;                     // of the directory
  std::optional<double> reference_kl;         // mean, against the reference, nats
  std::optional<double> reference_agreement;  // of the most probable token
};
nlohmann::ordered_json ToJson(const VerifyReport& report);

// DATA_LOSS names the slot or the step at which the directory is not what it should be.
absl::StatusOr<VerifyReport> VerifyCheckpoint(const VerifyOptions& options, PluginFormats& formats,
                                              Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_VERIFY_H_
