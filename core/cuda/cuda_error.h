// Recognising CUDA errors in a Status. Needs no CUDA header, so that any part of the program may
// ask.
#ifndef QUANTMILL_CORE_CUDA_CUDA_ERROR_H_
#define QUANTMILL_CORE_CUDA_CUDA_ERROR_H_

#include "absl/status/status.h"

namespace quantmill {

// True for errors after which CUDA answers every call of this process with the same error: illegal
// address, launch failure, misaligned address, device assertion, uncorrectable ECC and their kin.
// The only cure is a new process. The mark survives WithContext(), which keeps the code DATA_LOSS.
bool IsStickyCudaError(const absl::Status& status);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CUDA_CUDA_ERROR_H_
