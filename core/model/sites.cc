#include "core/model/sites.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/model/graph.h"

namespace quantmill {
namespace {

SiteConsumer ConsumerOf(const LinearSlot& slot) {
  return {slot.name, {}, slot.in_features, slot.input_group};
}

// Input i of o belongs to query head i / head_dim, which attends with key/value head
// (i / head_dim) / (heads / kv_heads).
std::vector<int32_t> ValueChannels(const ModelConfig& config) {
  if (config.heads == config.kv_heads) return {};
  const int64_t shared = config.heads / config.kv_heads;
  std::vector<int32_t> map(static_cast<size_t>(config.q_features()));
  for (int64_t i = 0; i < config.q_features(); ++i) {
    const int64_t head = i / config.head_dim / shared;
    map[static_cast<size_t>(i)] =
        static_cast<int32_t>(head * config.head_dim + i % config.head_dim);
  }
  return map;
}

ScaleSite NormSite(const ModelConfig& config, const std::string& norm) {
  ScaleSite site;
  site.id = site.producer = norm;
  site.channels = config.hidden_size;
  return site;
}

ScaleSite LinearSite(const LinearSlot& producer, const LinearSlot& consumer) {
  ScaleSite site;
  site.id = site.producer = producer.name;
  site.producer_is_slot = true;
  site.channels = producer.out_features;
  site.consumers.push_back(ConsumerOf(consumer));
  return site;
}

}  // namespace

std::vector<ScaleSite> BlockSites(const ModelConfig& config, int64_t block) {
  const std::string name = BlockName(block);
  ScaleSite attention = NormSite(config, name + ".input_layernorm");
  ScaleSite mlp = NormSite(config, name + ".post_attention_layernorm");
  std::vector<ScaleSite> linear_sites;
  const std::vector<LinearSlot> slots = BlockSlots(config, block);
  for (size_t i = 0; i < slots.size(); ++i) {
    const LinearSlot& slot = slots[i];
    if (slot.input_group == 0) attention.consumers.push_back(ConsumerOf(slot));
    if (slot.input_group >= 2 && slot.input_group % 2 == 0) {
      mlp.consumers.push_back(ConsumerOf(slot));
    }
    // v and o, up and down follow each other in BlockSlots.
    if (slot.role == "attn.v" || slot.role == "mlp.up" || slot.role == "expert.up") {
      linear_sites.push_back(LinearSite(slot, slots[i + 1]));
    }
  }
  if (config.moe_layer[static_cast<size_t>(block)]) {
    mlp.consumers.push_back({RouterName(config, block), {}, config.hidden_size, -1});
  }
  ScaleSite& values = linear_sites.front();
  values.consumers[0].channel_map = ValueChannels(config);
  values.rotation_block = config.head_dim;

  std::vector<ScaleSite> sites;
  sites.push_back(std::move(attention));
  sites.push_back(std::move(values));
  sites.push_back(std::move(mlp));
  for (size_t i = 1; i < linear_sites.size(); ++i) sites.push_back(std::move(linear_sites[i]));
  return sites;
}

std::vector<int> GroupsBehind(const ModelConfig& config, int64_t block, const std::string& tensor) {
  const std::vector<LinearSlot> slots = BlockSlots(config, block);
  const int last = slots.back().input_group;
  auto from = [last](int first) {
    std::vector<int> groups;
    for (int group = first; group <= last; ++group) groups.push_back(group);
    return groups;
  };
  const std::string name = BlockName(block);
  if (tensor == name + ".input_layernorm.weight") return from(0);
  if (tensor == name + ".self_attn.q_norm.weight" || tensor == name + ".self_attn.k_norm.weight") {
    return from(1);
  }
  if (tensor == name + ".post_attention_layernorm.weight" ||
      tensor == RouterName(config, block) + ".weight") {
    return from(2);
  }
  const std::string module = tensor.substr(0, tensor.rfind('.'));
  for (const LinearSlot& slot : slots) {
    if (slot.name != module) continue;
    if (slot.input_group < 2) return from(slot.input_group + 1);
    // Gate and up feed the down of their own MLP only.
    return slot.input_group % 2 == 0 ? std::vector<int>{slot.input_group + 1} : std::vector<int>{};
  }
  return {};
}

}  // namespace quantmill
