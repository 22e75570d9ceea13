#include "tests/bench/cuda_timing.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <fstream>

#include "core/base/status.h"
#include "nlohmann/json.hpp"

namespace quantmill::bench {
namespace {

constexpr double kRotatedBytes = 256 << 20;
constexpr int kRepeats = 15;

absl::Status CudaOk(cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(cudaGetErrorString(error));
}

// A graph of all sets, destroyed with this object.
class Replay {
 public:
  ~Replay() {
    if (instance_ != nullptr) cudaGraphExecDestroy(instance_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
    if (begin_ != nullptr) cudaEventDestroy(begin_);
    if (end_ != nullptr) cudaEventDestroy(end_);
  }

  absl::Status Capture(cudaStream_t stream, int64_t sets,
                       const std::function<absl::Status(int64_t)>& run) {
    stream_ = stream;
    QM_RETURN_IF_ERROR(CudaOk(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal)));
    absl::Status status;
    for (int64_t set = 0; set < sets && status.ok(); ++set) status = run(set);
    const cudaError_t captured = cudaStreamEndCapture(stream, &graph_);
    QM_RETURN_IF_ERROR(status);
    QM_RETURN_IF_ERROR(CudaOk(captured));
    QM_RETURN_IF_ERROR(CudaOk(cudaGraphInstantiate(&instance_, graph_, 0)));
    QM_RETURN_IF_ERROR(CudaOk(cudaEventCreate(&begin_)));
    return CudaOk(cudaEventCreate(&end_));
  }

  absl::StatusOr<double> Milliseconds() {
    QM_RETURN_IF_ERROR(CudaOk(cudaEventRecord(begin_, stream_)));
    QM_RETURN_IF_ERROR(CudaOk(cudaGraphLaunch(instance_, stream_)));
    QM_RETURN_IF_ERROR(CudaOk(cudaEventRecord(end_, stream_)));
    QM_RETURN_IF_ERROR(CudaOk(cudaEventSynchronize(end_)));
    float elapsed = 0;
    QM_RETURN_IF_ERROR(CudaOk(cudaEventElapsedTime(&elapsed, begin_, end_)));
    return elapsed;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t instance_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace

absl::StatusOr<double> MedianSeconds(Backend& cuda, int64_t sets,
                                     const std::function<absl::Status(int64_t)>& run) {
  for (int64_t set = 0; set < sets; ++set) QM_RETURN_IF_ERROR(run(set));  // warm-up
  QM_RETURN_IF_ERROR(cuda.Synchronize());
  Replay replay;
  QM_RETURN_IF_ERROR(replay.Capture(static_cast<cudaStream_t>(cuda.stream()), sets, run));
  std::vector<double> milliseconds;
  for (int i = 0; i < kRepeats; ++i) {
    QM_ASSIGN_OR_RETURN(const double elapsed, replay.Milliseconds());
    milliseconds.push_back(elapsed);
  }
  std::nth_element(milliseconds.begin(), milliseconds.begin() + kRepeats / 2, milliseconds.end());
  return 1e-3 * milliseconds[kRepeats / 2] / static_cast<double>(sets);
}

int64_t SetsFor(double bytes) {
  return std::clamp<int64_t>(static_cast<int64_t>(kRotatedBytes / bytes) + 1, 1, 64);
}

void PrintHeading() { std::printf("%-52s %12s %10s %10s\n", "operation", "us", "GB/s", "TFLOP/s"); }

void Print(const Row& row) {
  std::printf("%-52s %12.1f %10.0f %10.1f\n", row.name.c_str(), row.microseconds,
              row.gigabytes_per_second, row.teraflops);
  std::fflush(stdout);
}

void PrintFailure(const std::string& name, const absl::Status& status) {
  std::printf("%-52s FAILED: %s\n", name.c_str(), status.ToString().c_str());
  std::fflush(stdout);
}

bool ParseOptions(int argc, char** argv, Options* options) {
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--list") {
      options->list = true;
    } else if ((word == "--json" || word == "--filter") && i + 1 < argc) {
      (word == "--json" ? options->json : options->filter) = argv[++i];
    } else {
      std::fprintf(stderr, "usage: %s [--list] [--filter TEXT] [--json FILE]\n", argv[0]);
      return false;
    }
  }
  return true;
}

bool WriteJson(const std::string& path, const std::vector<Row>& rows) {
  if (path.empty()) return true;
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const Row& row : rows) {
    json.push_back({{"name", row.name},
                    {"microseconds", row.microseconds},
                    {"gigabytes_per_second", row.gigabytes_per_second},
                    {"teraflops", row.teraflops}});
  }
  std::ofstream file(path);
  file << json.dump(1) << "\n";
  if (file.good()) return true;
  std::fprintf(stderr, "error: cannot write %s\n", path.c_str());
  return false;
}

}  // namespace quantmill::bench
