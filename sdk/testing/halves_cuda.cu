#include <cuda_runtime.h>

#include <stdexcept>

#include "halves_cuda.h"
#include "quantmill/sdk/tensor.hpp"

namespace qm_halves {
namespace {

constexpr unsigned kThreads = 256;

__global__ void ToFloatKernel(uint32_t* out) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = qm::FloatBits(qm::ToFloat(qm::F16{static_cast<uint16_t>(i)}));
}

__global__ void ToHalfKernel(const float* in, uint16_t* out, unsigned count) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) out[i] = qm::ToF16(in[i]).bits;
}

void Check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Device memory of a test; leaks nothing when a check throws.
template <class T>
struct Buffer {
  explicit Buffer(size_t count) { Check(cudaMalloc(&data, count * sizeof(T))); }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data = nullptr;
};

template <class T>
std::vector<T> Read(const Buffer<T>& buffer, size_t count) {
  std::vector<T> out(count);
  Check(cudaGetLastError());
  Check(cudaMemcpy(out.data(), buffer.data, count * sizeof(T), cudaMemcpyDeviceToHost));
  return out;
}

}  // namespace

bool HaveGpu() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

std::vector<uint32_t> FloatsOfHalves() {
  constexpr unsigned kHalves = 65536;
  const Buffer<uint32_t> out(kHalves);
  ToFloatKernel<<<kHalves / kThreads, kThreads>>>(out.data);
  return Read(out, kHalves);
}

std::vector<uint16_t> HalvesOfFloats(const std::vector<float>& floats) {
  const auto count = static_cast<unsigned>(floats.size());
  const Buffer<float> in(count);
  const Buffer<uint16_t> out(count);
  Check(cudaMemcpy(in.data, floats.data(), count * sizeof(float), cudaMemcpyHostToDevice));
  ToHalfKernel<<<(count + kThreads - 1) / kThreads, kThreads>>>(in.data, out.data, count);
  return Read(out, count);
}

}  // namespace qm_halves
