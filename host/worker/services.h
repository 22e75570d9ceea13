// The services plugins fetch by id (quantmill/host_ext.h): threads, linear algebra, CUDA facts.
#ifndef QUANTMILL_HOST_WORKER_SERVICES_H_
#define QUANTMILL_HOST_WORKER_SERVICES_H_

#include <cstdint>
#include <functional>
#include <string_view>

#include "core/tensor/backend.h"
#include "quantmill/all.h"

namespace quantmill {

// What a service needs to know of the call it is used in. qm_call::host_data points at one.
struct CallContext {
  explicit CallContext(Backend& b) : backend(&b) {}
  Backend* backend;
  bool with_services = true;
  std::function<void(bool entered)> service;  // see CallSettings
  qm_host_cuda cuda = {};  // filled by HostService on first use; struct_size 0 = not yet
};

// The table for `id`, valid while the call is open, or null: unknown id, or a service this device
// does not have (qm.host.cuda/1 on the CPU).
const void* HostService(CallContext& context, std::string_view id);

// Versions of the CUDA libraries this binary runs with; false without CUDA.
bool CudaVersions(qm_host_cuda* out);
// Free memory of GPU `index`; 0 when it is not known.
int64_t CudaFreeBytes(int index);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_SERVICES_H_
