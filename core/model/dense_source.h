// Weights of an unquantized checkpoint, and the pieces a quantized one shares with it.
#ifndef QUANTMILL_CORE_MODEL_DENSE_SOURCE_H_
#define QUANTMILL_CORE_MODEL_DENSE_SOURCE_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/io/checkpoint_files.h"
#include "core/model/weights.h"

namespace quantmill {

// Checks that every tensor of RequiredTensors(config) is there with its shape and a model float
// dtype. Names for which `skip` (may be null) returns true are not asked for: those of packed
// slots. The error names the first tensor that is wrong, its file, and how many others are.
absl::Status CheckRequiredTensors(const ModelConfig& config, const Checkpoint& checkpoint,
                                  const std::function<bool(const std::string&)>& skip = nullptr);

// Makes the weight of one slot. The default is LoadDenseLinear.
using LinearLoader = std::function<absl::StatusOr<LinearWeight>(const LinearSlot&, Backend&)>;

// One named tensor on the host: a view of the mapped file. Its shape and float dtype are checked.
absl::StatusOr<Tensor> MapTensor(const Checkpoint& checkpoint, const std::string& name,
                                 const Shape& shape);
// The same on the backend's device.
absl::StatusOr<Tensor> LoadTensor(const Checkpoint& checkpoint, const std::string& name,
                                  const Shape& shape, Backend& backend);
// Weight, and bias if the slot has one.
absl::StatusOr<LinearWeight> LoadDenseLinear(const Checkpoint& checkpoint, const LinearSlot& slot,
                                             Backend& backend);
// Norms and router as stored, every slot through `load_linear` in the order of BlockSlots.
absl::StatusOr<BlockWeights> LoadBlockWeights(const ModelConfig& config,
                                              const Checkpoint& checkpoint, int64_t block,
                                              Backend& backend, const LinearLoader& load_linear);
absl::StatusOr<Tensor> MapEmbedding(const ModelConfig& config, const Checkpoint& checkpoint);
absl::StatusOr<Tensor> LoadFinalNorm(const ModelConfig& config, const Checkpoint& checkpoint,
                                     Backend& backend);
// lm_head, or with tied embeddings the embedding table (also if the file has an lm_head).
absl::StatusOr<LinearWeight> LoadDenseHead(const ModelConfig& config, const Checkpoint& checkpoint,
                                           Backend& backend);

class DenseSource : public WeightSource {
 public:
  // Reads config.json and opens the weights; every required tensor is checked now.
  static absl::StatusOr<std::unique_ptr<DenseSource>> Open(const std::string& directory);
  static absl::StatusOr<std::unique_ptr<DenseSource>> Create(
      ModelConfig config, std::shared_ptr<const Checkpoint> checkpoint);

  const ModelConfig& config() const override { return config_; }
  const Checkpoint& checkpoint() const { return *checkpoint_; }
  absl::StatusOr<BlockWeights> LoadBlock(int64_t block, Backend& backend) override;
  absl::StatusOr<Tensor> Embedding() override;
  absl::StatusOr<Tensor> FinalNorm(Backend& backend) override;
  absl::StatusOr<LinearWeight> Head(Backend& backend) override;
  void ReleaseBlock(int64_t block) override;

 private:
  DenseSource(ModelConfig config, std::shared_ptr<const Checkpoint> checkpoint)
      : config_(std::move(config)), checkpoint_(std::move(checkpoint)) {}

  ModelConfig config_;
  std::shared_ptr<const Checkpoint> checkpoint_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_DENSE_SOURCE_H_
