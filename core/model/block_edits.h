// Edits of a block's dense tensors: rescaling and rotating at scale sites (sites.h), which preserve
// what the block computes, and clipping and replacing, which do not. Everything is computed on the
// host in f32, so that all devices give the same bytes.
#ifndef QUANTMILL_CORE_MODEL_BLOCK_EDITS_H_
#define QUANTMILL_CORE_MODEL_BLOCK_EDITS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/model/config.h"
#include "core/model/sites.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"

namespace quantmill {

// Values as in quantmill/block_transform.h.
enum class EditKind { kScale = 1, kRotate = 2, kClip = 3, kReplace = 4 };

// "scale", "rotate", "clip", "replace".
std::string_view EditName(EditKind kind);

struct BlockEdit {
  EditKind kind = EditKind::kScale;
  // Scale, rotate: a site's id. Clip: a linear's module name. Replace: a tensor's full name.
  std::string target;
  // F32 on the host. Scale: [channels] s: the producer is divided by it, the consumers multiplied.
  // Rotate: [channels, channels] orthogonal Q, zero between heads: the producer's output y (a row)
  // becomes y Q. Clip: [out, groups], the largest |w| of each group of in / groups inputs. Replace:
  // the new content.
  Tensor value;
  bool preserves() const { return kind == EditKind::kScale || kind == EditKind::kRotate; }
};

// A block's dense tensors by full name ("model.layers.3.self_attn.q_proj.weight").
class BlockTensors {
 public:
  BlockTensors(const ModelConfig& config, int64_t block, BlockWeights* weights);
  // Null for a name the block has not, and for a weight that is packed.
  Tensor* Find(const std::string& name) const;
  const std::map<std::string, Tensor*>& all() const { return tensors_; }

 private:
  std::map<std::string, Tensor*> tensors_;
};

class BlockEditor {
 public:
  // `stored`: the block as in the checkpoint; its dtypes are those edited tensors end in. All but
  // `stored` must outlive this object.
  BlockEditor(const ModelConfig& config, int64_t block, const BlockWeights& stored,
              Backend& backend);

  const std::vector<ScaleSite>& sites() const { return sites_; }
  // Null if the block has no site of this id.
  const ScaleSite* FindSite(std::string_view id) const;

  // INVALID_ARGUMENT: unknown target, wrong shape or dtype, a value that is not finite, a scale of
  // 0, a negative clip, a rotation that is not orthogonal or mixes heads, a site that cannot be
  // rotated.
  absl::Status Check(const BlockEdit& edit) const;

  // Applies a checked edit. Edited tensors of `weights` become F32 on the backend's device (whole,
  // so that a later rounding sees the exact product); their names go to `changed`.
  //
  // Returns the edit as applied. A norm is rounded to its stored dtype at once and the consumers
  // get the exact ratio of old and new norm in place of `s`: so the stored norm is the one the
  // consumers were made for. FAILED_PRECONDITION when a scaled norm leaves the range of its dtype.
  absl::StatusOr<BlockEdit> Apply(const BlockEdit& edit, BlockWeights* weights,
                                  std::set<std::string>* changed) const;

  // Rounds the named tensors of `weights` to their stored dtypes.
  absl::Status Round(const std::set<std::string>& names, BlockWeights* weights) const;

 private:
  absl::Status CheckScale(const BlockEdit& edit) const;
  absl::Status CheckRotation(const BlockEdit& edit) const;
  absl::Status CheckClip(const BlockEdit& edit) const;
  absl::Status CheckReplacement(const BlockEdit& edit) const;
  using HostEdit = std::function<void(Tensor* f32)>;
  absl::Status Edit(const BlockTensors& tensors, const std::string& name, const HostEdit& edit,
                    std::set<std::string>* changed) const;
  absl::Status DivideProducer(const ScaleSite& site, const Tensor& scale,
                              const BlockTensors& tensors, std::set<std::string>* changed) const;
  absl::StatusOr<Tensor> DivideNorm(const ScaleSite& site, const Tensor& scale,
                                    const BlockTensors& tensors,
                                    std::set<std::string>* changed) const;
  absl::StatusOr<Tensor> Scale(const ScaleSite& site, const Tensor& scale,
                               const BlockTensors& tensors, std::set<std::string>* changed) const;
  void RotateRows(const ScaleSite& site, const Tensor& rotation, Tensor* rows) const;
  void RotateColumns(const ScaleSite& site, const SiteConsumer& consumer, const Tensor& rotation,
                     Tensor* weight) const;
  absl::Status Rotate(const ScaleSite& site, const Tensor& rotation, const BlockTensors& tensors,
                      std::set<std::string>* changed) const;
  absl::StatusOr<Tensor> ToHost(const Tensor& tensor) const;

  const ModelConfig& config_;
  int64_t block_;
  Backend& backend_;
  std::vector<ScaleSite> sites_;
  struct Stored {
    DType dtype;
    Shape shape;
  };
  std::map<std::string, Stored> stored_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_BLOCK_EDITS_H_
