// Capturing what a plugin does on a CUDA stream.
#ifndef QUANTMILL_SDK_CHECK_CUDA_CAPTURE_H_
#define QUANTMILL_SDK_CHECK_CUDA_CAPTURE_H_

#include <functional>

#include "absl/status/status.h"

namespace quantmill::check {

// Runs `work` while `stream` (a cudaStream_t) is captured, launches the graph and waits for it.
// FAILED_PRECONDITION says what CUDA refused: work that allocates, waits, or goes to another stream
// cannot be captured. UNIMPLEMENTED without CUDA in this build.
absl::Status RunCaptured(void* stream, const std::function<void()>& work);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_CUDA_CAPTURE_H_
