// The services plugins fetch by id (quantmill/host_ext.h): threads, linear algebra, CUDA facts, the
// block.
#ifndef QUANTMILL_HOST_WORKER_SERVICES_H_
#define QUANTMILL_HOST_WORKER_SERVICES_H_

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "core/tensor/backend.h"
#include "quantmill/all.h"

namespace quantmill {

class BlockTrials;

// What a service needs to know of the call it is used in. qm_call::host_data points at one.
struct CallContext {
  explicit CallContext(Backend& b) : backend(&b) {}
  Backend* backend;
  bool with_services = true;
  std::function<void(bool entered)> service;  // see CallSettings
  BlockTrials* block = nullptr;               // see CallSettings
  Tensor block_output;                        // of the last qm.host.block/1 forward
  qm_host_cuda cuda = {};  // filled by HostService on first use; struct_size 0 = not yet
};
inline CallContext& ContextOf(qm_call* call) { return *static_cast<CallContext*>(call->host_data); }

// Marks the time a call spends in a service, which may take long and reports no progress.
class ServiceMark {
 public:
  explicit ServiceMark(CallContext& context) : service_(context.service) {
    if (service_) service_(true);
  }
  ~ServiceMark() {
    if (service_) service_(false);
  }
  ServiceMark(const ServiceMark&) = delete;
  ServiceMark& operator=(const ServiceMark&) = delete;

 private:
  const std::function<void(bool)>& service_;
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
