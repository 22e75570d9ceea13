// A small decoder block for cases of block transforms: two norms, causal attention with grouped
// queries, a gated MLP, all computed slowly in f64 from F32 weights. Some input channels of both
// halves are outliers, as in language models.
#ifndef QUANTMILL_SDK_CHECK_SYNTHETIC_BLOCK_H_
#define QUANTMILL_SDK_CHECK_SYNTHETIC_BLOCK_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "core/tensor/tensor.h"
#include "quantmill/all.h"
#include "sdk/check/plain_rounding.h"
#include "sdk/check/synthetic.h"

namespace quantmill::check {

// F32 host tensors by full name: "model.layers.0.mlp.up_proj.weight" [out, in],
// "model.layers.0.input_layernorm.weight" [hidden].
using BlockTensors = std::map<std::string, Tensor>;

// What the parts of a block gave for one window, [rows, width] in f64, by name: each linear's
// output under its full name, the halves as "self_attn" and "mlp", the whole as "".
using BlockOutputs = std::map<std::string, std::vector<double>>;

class SyntheticBlock {
 public:
  static constexpr int64_t kHidden = 32, kHeads = 4, kKvHeads = 2, kHeadDim = 8, kInner = 64;
  static constexpr int64_t kWindows = 6, kRows = 16;  // rows of a window

  struct Linear {
    std::string name;
    std::string role;
    int64_t out = 0, in = 0;
    int32_t input_group = 0;
    std::string weight() const { return name + ".weight"; }
  };
  struct Consumer {
    std::string name;
    std::vector<int32_t> channel_map;  // empty = identity
    int64_t in = 0;
  };
  struct Site {
    std::string producer;  // also its id
    std::vector<Consumer> consumers;
    int64_t channels = 0;
    int64_t rotation_block = 0;  // 0 = not rotatable
  };

  explicit SyntheticBlock(uint64_t seed);

  const std::string& name() const { return name_; }
  const std::vector<Linear>& linears() const { return linears_; }
  const std::vector<Site>& sites() const { return sites_; }
  const BlockTensors& tensors() const { return tensors_; }  // of the untouched block
  // How the linears are rounded next.
  const PlainRule& NextRounding() const { return rounding_; }

  BlockOutputs Run(const BlockTensors& tensors, int64_t window) const;
  // The gradient of <d_out, Run(tensors, window)[""]> with respect to every tensor, by its name, in
  // f64; d_out: [rows, hidden]. synthetic_block_vjp.cc.
  BlockOutputs Gradients(const BlockTensors& tensors, int64_t window,
                         const std::vector<double>& d_out) const;
  // Mean squared difference to the untouched block over windows [first, first + count), of the
  // part named as in BlockOutputs. NaN for a part there is not.
  double Loss(const BlockTensors& tensors, const std::string& part, int64_t first,
              int64_t count) const;
  // A linear with the rows that reach it in the untouched block.
  SyntheticLayer LayerOf(const Linear& linear) const;
  // All linears rounded plainly by NextRounding().
  BlockTensors Rounded(const BlockTensors& tensors) const;

  // Applies an edit as block_transform.h says; `value` is its value on the host. INVALID_ARGUMENT:
  // unknown kind or target, wrong shape, or values that cannot be meant (not finite, a scale of 0,
  // a negative bound, a rotation that is not orthogonal or mixes heads).
  absl::Status Apply(const qm_edit& edit, const Tensor& value, BlockTensors* tensors) const;

 private:
  void AddLinear(const std::string& part, const std::string& role, int64_t out, int64_t in,
                 int32_t input_group, uint64_t seed);
  void AddNorm(const std::string& part, uint64_t seed);
  void AddSites();
  const Site* FindSite(const std::string& id) const;
  bool IsLinear(const std::string& name) const;
  absl::Status Scale(const Site& site, const Tensor& value, BlockTensors* tensors) const;
  absl::Status Rotate(const Site& site, const Tensor& value, BlockTensors* tensors) const;
  absl::Status Clip(const std::string& linear, const Tensor& value, BlockTensors* tensors) const;
  // The rows that enter every linear, by its name.
  BlockOutputs Inputs(const BlockTensors& tensors, int64_t window, BlockOutputs* outputs) const;

  std::string name_ = "model.layers.0";
  PlainRule rounding_{4, 32, false};
  std::vector<Linear> linears_;
  std::vector<Site> sites_;
  BlockTensors tensors_;
  Tensor windows_;  // [windows * rows, hidden]
};

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_SYNTHETIC_BLOCK_H_
