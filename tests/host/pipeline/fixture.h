// A catalog and a model made up for the tests of the checker: no plugin is loaded.
#ifndef QUANTMILL_TESTS_HOST_PIPELINE_FIXTURE_H_
#define QUANTMILL_TESTS_HOST_PIPELINE_FIXTURE_H_

#include <string>
#include <vector>

#include "core/model/config.h"
#include "host/plugins/catalog.h"
#include "quantmill/all.h"

namespace quantmill::testing {

inline MethodInfo FakeMethod(const std::string& id, std::vector<OptionInfo> options,
                             std::vector<std::string> capabilities) {
  MethodInfo method;
  method.id = id;
  method.version = "1.0.0";
  method.options = std::move(options);
  method.capabilities = std::move(capabilities);
  return method;
}

// gptq, ptq (quantize), awq (transform and quantize), awq.scale (transform), qat (train), affine
// (format only).
inline Catalog FakeCatalog() {
  const OptionInfo bits{"bits", QM_OPT_I64, false, "4", "2|3|4|8", "bits per code"};
  const OptionInfo group{"group_size", QM_OPT_I64, false, "128", "-1..", "input channels"};
  const OptionInfo symmetric{"symmetric", QM_OPT_BOOL, false, "false", "", ""};
  const OptionInfo act_order{"act_order", QM_OPT_BOOL, false, "false", "", ""};
  const OptionInfo static_groups{"static_groups", QM_OPT_BOOL, false, "false", "", ""};
  const OptionInfo damp{"damp", QM_OPT_F64, false, "0.01", "0..1", ""};
  const OptionInfo variant{"variant", QM_OPT_ENUM, false, "rtn", "rtn|mse|percentile", ""};
  const OptionInfo init{"init", QM_OPT_STR, true, "", "", "what to start from"};
  PluginInfo plugin;
  plugin.path = "/fake/libqm_all.so";
  plugin.methods = {
      FakeMethod("gptq", {bits, group, symmetric, damp, act_order, static_groups},
                 {QM_EXT_QUANTIZE_LINEAR}),
      FakeMethod("ptq", {bits, group, symmetric, variant}, {QM_EXT_QUANTIZE_LINEAR}),
      FakeMethod("awq", {bits, group}, {QM_EXT_BLOCK_TRANSFORM, QM_EXT_QUANTIZE_LINEAR}),
      FakeMethod("awq.scale", {}, {QM_EXT_BLOCK_TRANSFORM}),
      FakeMethod("qat", {init}, {QM_EXT_REPARAMETRIZE}),
      FakeMethod("affine", {}, {QM_EXT_FORMAT, QM_EXT_LINEAR_KERNEL})};
  plugin.methods.back().flags = QM_METHOD_NO_STAGE;
  plugin.methods.back().formats = {
      {"qm.fmt.affine-int/1", {"gptq", "gptq_v2", "compressed-tensors", "awq"}}};
  Catalog catalog;
  catalog.searched = {"/fake"};
  catalog.plugins.push_back(std::move(plugin));
  return catalog;
}

// Two blocks, hidden 384, MLP 1024, 6 heads and 2 key/value heads of 64.
inline ModelConfig FakeModel() {
  ModelConfig config;
  config.model_type = "llama";
  config.hidden_size = 384;
  config.intermediate_size = 1024;
  config.layers = 2;
  config.heads = 6;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.vocab_size = 8192;
  config.max_positions = 2048;
  config.sliding_window = {0, 0};
  config.moe_layer = {false, false};
  return config;
}

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_HOST_PIPELINE_FIXTURE_H_
