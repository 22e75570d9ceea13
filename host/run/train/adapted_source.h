// A model with trained adapters around its linears.
#ifndef QUANTMILL_HOST_RUN_TRAIN_ADAPTED_SOURCE_H_
#define QUANTMILL_HOST_RUN_TRAIN_ADAPTED_SOURCE_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "core/model/weights.h"

namespace quantmill {

// The adapters of a slot, on the backend's device, the innermost first.
using AdapterLookup = std::function<absl::StatusOr<std::vector<std::shared_ptr<LinearAdapter>>>(
    const LinearSlot& slot, Backend& backend)>;

class AdaptedSource : public WeightSource {
 public:
  // `inner` must outlive this object.
  AdaptedSource(WeightSource& inner, AdapterLookup adapters)
      : inner_(inner), adapters_(std::move(adapters)) {}

  const ModelConfig& config() const override { return inner_.config(); }
  absl::StatusOr<BlockWeights> LoadBlock(int64_t block, Backend& backend) override;
  absl::StatusOr<Tensor> Embedding() override { return inner_.Embedding(); }
  absl::StatusOr<Tensor> FinalNorm(Backend& backend) override { return inner_.FinalNorm(backend); }
  absl::StatusOr<LinearWeight> Head(Backend& backend) override { return inner_.Head(backend); }
  void ReleaseBlock(int64_t block) override { inner_.ReleaseBlock(block); }

 private:
  WeightSource& inner_;
  AdapterLookup adapters_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_ADAPTED_SOURCE_H_
