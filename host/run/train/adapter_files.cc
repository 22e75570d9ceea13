#include "host/run/train/adapter_files.h"

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/model/graph.h"
#include "host/run/train/plugin_adapter.h"
#include "host/worker/method_options.h"

namespace quantmill {
namespace {

constexpr char kTarget[] = "peft";
// Of the releases whose meaning of the keys is written (Cayley-Neumann expansion of 0.18).
constexpr char kPeftVersion[] = "0.18.0";

// What the host says in adapter_config.json.
void CompleteConfig(const PipelinePlan& plan, PeftAdapter* adapter) {
  std::vector<std::string> modules;
  for (const auto& [module, params] : adapter->modules) modules.push_back(module);
  const std::filesystem::path path(plan.pipeline.model_path);
  const std::string fallback =
      path.has_filename() ? path.filename().string() : path.parent_path().filename().string();
  const auto name = plan.config.json.find("_name_or_path");
  const bool named = name != plan.config.json.end() && name->is_string();
  adapter->config["base_model_name_or_path"] = named ? name->get<std::string>() : fallback;
  adapter->config["target_modules"] = PeftTargets(plan.config, modules);
  adapter->config["peft_version"] = kPeftVersion;
  adapter->config["revision"] = nullptr;
}

}  // namespace

absl::StatusOr<std::vector<StageAdapter>> CollectAdapters(const PipelinePlan& plan, Engine& engine,
                                                          ReparamCalls& calls) {
  std::vector<StageAdapter> collected;
  std::map<const PreparedStage*, size_t> known;
  for (const LinearSlot& slot : plan.slots) {
    QM_ASSIGN_OR_RETURN(const std::vector<Engine::Adapter> adapters, engine.Adapters(slot.name));
    for (const Engine::Adapter& one : adapters) {
      const auto [found, fresh] = known.try_emplace(one.stage, collected.size());
      if (fresh) {
        StageAdapter& stage = collected.emplace_back();
        stage.stage = one.stage->stage->name;
        // The same for all layers of the stage (CheckAdapters).
        QM_ASSIGN_OR_RETURN(
            const std::string config,
            calls.ToAdapter(one.stage->method.loaded, one.stage->OptionsOf(one.index), kTarget));
        stage.adapter.config = nlohmann::json::parse(config, nullptr, false);
      }
      collected[found->second].adapter.modules[slot.name] = one.params;
    }
  }
  for (StageAdapter& stage : collected) CompleteConfig(plan, &stage.adapter);
  return collected;
}

absl::Status WriteAdaptersBeside(const std::vector<StageAdapter>& adapters,
                                 const std::string& directory) {
  for (const StageAdapter& one : adapters) {
    const std::string path = absl::StrCat(directory, "/adapter",
                                          adapters.size() > 1 ? absl::StrCat("-", one.stage) : "");
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error) return SystemError("create", path, error.value());
    QM_RETURN_IF_ERROR(WritePeftAdapter(path, one.adapter));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<LoadedAdapter>> LoadedAdapter::Open(
    const std::string& directory, const Catalog& catalog, const std::vector<LoadedMethod>& methods,
    ReparamCalls& calls, const ModelConfig& config) {
  QM_ASSIGN_OR_RETURN(const PeftAdapter files, ReadPeftAdapter(directory));
  const auto type = files.config.find("peft_type");
  if (type == files.config.end() || !type->is_string()) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat(directory, "/adapter_config.json has no 'peft_type', a text"), "",
                  "name the directory of an adapter that PEFT or quantmill wrote"));
  }
  std::unique_ptr<LoadedAdapter> loaded(new LoadedAdapter(calls));
  for (const LoadedMethod& method : methods) {
    if (method.Ext<qm_reparametrize>(QM_EXT_REPARAMETRIZE) == nullptr) continue;
    absl::StatusOr<std::optional<ResolvedOptions>> options =
        calls.FromAdapter(method, kTarget, files.config.dump());
    if (!options.ok()) return WithContext(options.status(), directory);
    if (!*options) continue;
    const MethodInfo* info = catalog.FindMethod(method.method->id);
    if (info == nullptr) continue;
    loaded->method_ = &method;
    absl::StatusOr<ResolvedOptions> resolved = OptionsFor(*info, **options);
    if (!resolved.ok()) return WithContext(resolved.status(), directory);
    loaded->options_ = *std::move(resolved);
    break;
  }
  if (loaded->method_ == nullptr) {
    return absl::NotFoundError(
        ErrorText(absl::StrCat(directory, ": no installed method runs an adapter of type ",
                               type->get<std::string>()),
                  "", "see quantmill plugins; --plugin FILE adds one"));
  }
  const std::vector<LinearSlot> slots = AllSlots(config);
  for (const auto& [module, stored] : files.modules) {
    const auto slot =
        std::find_if(slots.begin(), slots.end(),
                     [&, name = module](const LinearSlot& s) { return s.name == name; });
    if (slot == slots.end()) {
      std::vector<std::string> names;
      names.reserve(slots.size());
      for (const LinearSlot& s : slots) names.push_back(s.name);
      return absl::InvalidArgumentError(
          ErrorText(absl::StrCat(directory, ": the model has no linear '", module, "'"),
                    NearestHint(module, names), "use the adapter with the model it was made for"));
    }
    QM_RETURN_IF_ERROR(loaded->Add(*slot, directory, stored));
  }
  return loaded;
}

ReparamSubject LoadedAdapter::SubjectOf(const LinearSlot& slot) const {
  ReparamSubject subject;
  subject.method = method_;
  subject.stage = "adapter";
  subject.slot = &slot;
  subject.options = &options_;
  return subject;
}

absl::Status LoadedAdapter::Add(const LinearSlot& slot, const std::string& directory,
                                const std::vector<NamedTensor>& stored) {
  Module& module = modules_[slot.name];
  module.slot = slot;
  QM_ASSIGN_OR_RETURN(const std::optional<ReparamPlan> plan, calls_.Plan(SubjectOf(module.slot)));
  if (!plan || plan->kind == QM_REPARAM_WEIGHT || plan->params.size() != stored.size()) {
    return absl::InvalidArgumentError(ErrorText(
        absl::StrCat(directory, ": ", slot.name, " has ", stored.size(), " parameters"),
        absl::StrCat("method ", method_->method->id, " has ", plan ? plan->params.size() : 0,
                     " with the options in adapter_config.json"),
        "is adapter_config.json that of these tensors?"));
  }
  module.plan = *plan;
  for (const ReparamPlan::Param& param : plan->params) {
    const auto found = std::find_if(stored.begin(), stored.end(), [&](const NamedTensor& named) {
      return named.name == param.name;
    });
    if (found == stored.end() || !(found->tensor.shape() == param.shape) ||
        !IsModelFloat(found->tensor.dtype())) {
      return absl::InvalidArgumentError(ErrorText(
          absl::StrCat(directory, ": ", slot.name, " has no parameter '", param.name, "' ",
                       param.shape.ToString()),
          found == stored.end() ? ""
                                : absl::StrCat("the file has ", found->tensor.shape().ToString()),
          "use the adapter with the model it was made for"));
    }
    module.params.push_back({param.name, found->tensor});
  }
  return absl::OkStatus();
}

AdapterLookup LoadedAdapter::Lookup() {
  return [this](const LinearSlot& slot,
                Backend& backend) -> absl::StatusOr<std::vector<std::shared_ptr<LinearAdapter>>> {
    std::vector<std::shared_ptr<LinearAdapter>> adapters;
    const auto found = modules_.find(slot.name);
    if (found == modules_.end()) return adapters;
    const Module& module = found->second;
    std::vector<NamedTensor> params;
    for (const NamedTensor& stored : module.params) {
      QM_ASSIGN_OR_RETURN(Tensor f32, backend.Allocate(DType::kF32, stored.tensor.shape()));
      QM_RETURN_IF_ERROR(backend.Copy(stored.tensor, &f32));
      params.push_back({stored.name, std::move(f32)});
    }
    adapters.push_back(std::make_shared<PluginAdapter>(calls_, SubjectOf(module.slot), module.plan,
                                                       std::move(params)));
    return adapters;
  };
}

}  // namespace quantmill
