// Scale sites: places in a block where channels between a producer and its consumers may be
// rescaled, and some rotated, without changing what the block computes.
//
//   site                         producer y           consumers W                 why
//   input_layernorm              y = x^ * g           q, k, v                     linear in y
//   v_proj                       y = x Wv^T + b       o, through the heads        attention mixes
//                                                                                 values linearly
//   post_attention_layernorm     y = x^ * g           gate, up (all experts,      linear in y
//                                                     and the router)
//   up_proj (per expert)         y = x Wu^T + b       down                        silu(gate) * y
//
// The q/k norms of Qwen3 come behind q and k and are no part of any site.
#ifndef QUANTMILL_CORE_MODEL_SITES_H_
#define QUANTMILL_CORE_MODEL_SITES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "core/model/config.h"

namespace quantmill {

struct SiteConsumer {
  std::string name;  // module name
  // The site's channel that each input comes from: with grouped-query attention several inputs of o
  // share one value channel. Empty = input i is channel i.
  std::vector<int32_t> channel_map;
  int64_t in_features = 0;
  // LinearSlot::input_group; -1 for the router of a mixture of experts, which is not a slot.
  int input_group = -1;
  bool is_slot() const { return input_group >= 0; }
  int64_t ChannelOf(int64_t input) const {
    return channel_map.empty() ? input : channel_map[static_cast<size_t>(input)];
  }
};

struct ScaleSite {
  std::string id;  // the producer's module name: a producer has one site
  std::string producer;
  bool producer_is_slot = false;  // else a norm
  std::vector<SiteConsumer> consumers;
  int64_t channels = 0;
  // Channels of one head, within which they may be rotated; 0 = the site cannot be rotated.
  int64_t rotation_block = 0;
};

// The sites of decoder layer `block` in the order of execution.
std::vector<ScaleSite> BlockSites(const ModelConfig& config, int64_t block);

// The input groups (LinearSlot::input_group) of decoder layer `block` whose inputs depend on a
// tensor of it ("model.layers.3.mlp.up_proj.weight"); empty for a tensor it has not.
std::vector<int> GroupsBehind(const ModelConfig& config, int64_t block, const std::string& tensor);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_SITES_H_
