// A small model on disk, quantized weights for it, and a format registry over the affine plugin.
#ifndef QUANTMILL_TESTS_CORE_CHECKPOINT_TEST_MODEL_H_
#define QUANTMILL_TESTS_CORE_CHECKPOINT_TEST_MODEL_H_

#include <map>
#include <memory>
#include <set>
#include <string>

#include "core/checkpoint/export_checkpoint.h"
#include "core/formats/affine_int.h"
#include "core/formats/packed.h"
#include "core/formats/reference.h"

namespace quantmill::testing {

// Writes a two-layer llama with random weights (BF16 or F16) and tokenizer files to `directory`.
void WriteTestModel(const std::string& directory, DType dtype = DType::kBF16);

// Packs every slot whose name does not end in one of `dense`, with parameters by slot.
class TestSource : public ExportSource {
 public:
  explicit TestSource(AffineIntParams params) : params_(params) {}

  absl::StatusOr<std::shared_ptr<const PackedWeight>> Packed(const LinearSlot& slot) override;
  absl::StatusOr<Tensor> Changed(const std::string& tensor_name) override;

  std::set<std::string> dense = {"lm_head"};
  std::map<std::string, AffineIntParams> params_of;  // overrides
  std::map<std::string, Tensor> changed;
  bool group_index = false;
  int smallest_zero = 1;
  std::string fail_on_second_use;  // a slot whose data cannot be had when it is to be written

 private:
  AffineIntParams params_;
  std::map<std::string, int> uses_;
};

// The affine plugin's format and its kernel's dequantize, without a host.
class AffineRegistry : public FormatRegistry {
 public:
  absl::StatusOr<std::shared_ptr<PackedKernel>> Kernel(const PackedWeight& weight,
                                                       Backend& backend) override;
  absl::Status Check(const PackedWeight& weight) override;
  absl::Status CanStore(std::string_view target, std::string_view format_id,
                        std::string_view format_json, int64_t out_features,
                        int64_t in_features) override;
  absl::StatusOr<Stored> ToCheckpoint(std::string_view target, std::string_view layer,
                                      const PackedWeight& weight) override;
  absl::StatusOr<PackedWeight> FromCheckpoint(std::string_view target, std::string_view layer,
                                              const Stored& stored) override;
};

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_CHECKPOINT_TEST_MODEL_H_
