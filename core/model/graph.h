// Names and shapes: which tensors a decoder has, which of them are slots (linears a method may
// pack), and which slots share an input.
#ifndef QUANTMILL_CORE_MODEL_GRAPH_H_
#define QUANTMILL_CORE_MODEL_GRAPH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "core/model/config.h"
#include "core/tensor/tensor.h"

namespace quantmill {

// One linear of the model.
struct LinearSlot {
  std::string name;  // module name: "model.layers.3.mlp.down_proj"; the weight is name + ".weight"
  std::string role;  // see qm_linear_info in quantmill/quantize_linear.h
  int64_t out_features = 0;
  int64_t in_features = 0;
  bool has_bias = false;
  // Equal for slots of one block fed by the same activation; increases in the order of execution:
  // 0 = q/k/v, 1 = o, 2 = gate/up, 3 = down; experts e: 2 + 2e = gate/up, 3 + 2e = down.
  int input_group = 0;
  int block = -1;  // decoder layer; -1 for embedding and head
};

// Linears of decoder layer `block` in the order of execution: q, k, v, o, then gate, up, down, per
// expert for a mixture of experts. The router is not a slot.
std::vector<LinearSlot> BlockSlots(const ModelConfig& config, int64_t block);
// Slots of all blocks in order.
std::vector<LinearSlot> AllSlots(const ModelConfig& config);
// The head as a slot ("lm_head"), also when it is tied.
LinearSlot HeadSlot(const ModelConfig& config);

// Name, and shape, of every tensor a checkpoint of this architecture must have (unpacked form).
// With tied embeddings lm_head.weight is not required.
struct TensorSpec {
  std::string name;
  Shape shape;
};
std::vector<TensorSpec> RequiredTensors(const ModelConfig& config);

// "model.layers.3"
std::string BlockName(int64_t block);
// Full name of the router's module of a mixture-of-experts block.
std::string RouterName(const ModelConfig& config, int64_t block);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_GRAPH_H_
