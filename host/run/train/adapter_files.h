// Trained adapters in files, and adapters from files around the linears of a model.
#ifndef QUANTMILL_HOST_RUN_TRAIN_ADAPTER_FILES_H_
#define QUANTMILL_HOST_RUN_TRAIN_ADAPTER_FILES_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/checkpoint/peft_adapter.h"
#include "core/model/config.h"
#include "host/plugins/catalog.h"
#include "host/plugins/registry.h"
#include "host/run/engine.h"
#include "host/run/train/adapted_source.h"
#include "host/run/train/reparam_calls.h"

namespace quantmill {

// The adapters a run has trained, one per stage, in order.
struct StageAdapter {
  std::string stage;
  PeftAdapter adapter;
};
absl::StatusOr<std::vector<StageAdapter>> CollectAdapters(const PipelinePlan& plan, Engine& engine,
                                                          ReparamCalls& calls);

// Writes them beside a checkpoint: as `directory`/adapter, or, of several stages, as
// `directory`/adapter-STAGE.
absl::Status WriteAdaptersBeside(const std::vector<StageAdapter>& adapters,
                                 const std::string& directory);

// An adapter read from a directory, bound to the method that runs it.
class LoadedAdapter {
 public:
  // NOT_FOUND when no method knows the kind of adapter; INVALID_ARGUMENT when a module or a
  // parameter does not fit the model. `methods` and `calls` must outlive the result.
  static absl::StatusOr<std::unique_ptr<LoadedAdapter>> Open(
      const std::string& directory, const Catalog& catalog,
      const std::vector<LoadedMethod>& methods, ReparamCalls& calls, const ModelConfig& config);

  // Valid as long as this object.
  AdapterLookup Lookup();

 private:
  struct Module {
    LinearSlot slot;
    ReparamPlan plan;
    std::vector<NamedTensor> params;  // F32 on the host, in the plan's order
  };

  explicit LoadedAdapter(ReparamCalls& calls) : calls_(calls) {}
  absl::Status Add(const LinearSlot& slot, const std::string& directory,
                   const std::vector<NamedTensor>& stored);
  ReparamSubject SubjectOf(const LinearSlot& slot) const;

  ReparamCalls& calls_;
  const LoadedMethod* method_ = nullptr;
  ResolvedOptions options_;
  std::map<std::string, Module> modules_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_ADAPTER_FILES_H_
