#include "core/tensor/backend.h"

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {

bool Backend::PiecesFit(const Tensor& source, int64_t pieces, int64_t begin, const Tensor& target) {
  return source.rank() == 2 && target.rank() == 2 && source.dim(1) == target.dim(1) && pieces > 0 &&
         source.dim(0) % pieces == 0 && target.dim(0) % pieces == 0 && begin >= 0 &&
         begin + source.dim(0) / pieces <= target.dim(0) / pieces;
}

absl::Status Backend::AllDrawn(const Tensor& tokens) {
  for (int64_t row = 0; row < tokens.elements(); ++row) {
    if (tokens.as<const int32_t>()[row] >= 0) continue;
    return absl::FailedPreconditionError(ErrorText(
        absl::StrCat("no token can be drawn from row ", row, " of the logits"),
        "it has a value that is NaN or infinite, or no finite one",
        "check the model with `quantmill verify`; a model made for bf16 may overflow in f16"));
  }
  return absl::OkStatus();
}

}  // namespace quantmill
