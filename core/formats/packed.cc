#include "core/formats/packed.h"

namespace quantmill {

const Tensor* PackedWeight::Find(std::string_view name) const {
  for (const NamedTensor& named : tensors) {
    if (named.name == name) return &named.tensor;
  }
  return nullptr;
}

int64_t PackedWeight::bytes() const {
  int64_t sum = 0;
  for (const NamedTensor& named : tensors) sum += named.tensor.bytes();
  return sum;
}

double PackedWeight::BitsPerWeight() const {
  const double weights = static_cast<double>(out_features) * static_cast<double>(in_features);
  return weights > 0 ? 8.0 * static_cast<double>(bytes()) / weights : 0.0;
}

}  // namespace quantmill
