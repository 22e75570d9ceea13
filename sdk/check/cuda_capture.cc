#include "sdk/check/cuda_capture.h"

#include "absl/strings/str_cat.h"

#if defined(QM_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace quantmill::check {

#if defined(QM_WITH_CUDA)
namespace {

absl::Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(what, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error)));
}

absl::Status Launch(cudaGraph_t graph, cudaStream_t stream) {
  cudaGraphExec_t executable = nullptr;
  absl::Status status =
      ToStatus(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  if (!status.ok()) return status;
  status = ToStatus(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
  if (status.ok()) status = ToStatus(cudaStreamSynchronize(stream), "running the graph");
  cudaGraphExecDestroy(executable);
  return status;
}

}  // namespace

absl::Status RunCaptured(void* stream, const std::function<void()>& work) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  absl::Status status = ToStatus(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeGlobal),
                                 "cudaStreamBeginCapture");
  if (!status.ok()) return status;
  work();
  cudaGraph_t graph = nullptr;
  status = ToStatus(cudaStreamEndCapture(cuda_stream, &graph), "cudaStreamEndCapture");
  if (status.ok()) status = Launch(graph, cuda_stream);
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();  // what was refused during the capture is reported above
  return status;
}

#else

absl::Status RunCaptured(void*, const std::function<void()>&) {
  return absl::UnimplementedError("this build has no CUDA");
}

#endif

}  // namespace quantmill::check
