// Group load: the file, its symbols, and what it does before anyone calls it.
#include <dlfcn.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <iterator>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "host/plugins/descriptor.h"
#include "host/supervisor/process.h"
#include "sdk/check/case.h"
#include "sdk/check/cuda_probe.h"
#include "sdk/check/elf_file.h"
#include "sdk/check/fence.h"
#include "sdk/check/syscall_watch.h"

namespace quantmill::check {
namespace {

constexpr double kScanSeconds = 0.1;
Verdict Symbols(Subject& subject) {
  const absl::StatusOr<ElfFacts> facts = ReadElf(subject.path);
  if (!facts.ok()) return Failed("QM-A-001", std::string(facts.status().message()));
  if (facts->exported == std::vector<std::string>{QM_ENTRY_SYMBOL}) return Passed();
  return Failed("QM-A-001",
                absl::StrCat("it exports [", absl::StrJoin(facts->exported, ", "), "]; export ",
                             QM_ENTRY_SYMBOL, " alone (quantmill_add_plugin sees to it)"));
}

Verdict NoDelete(Subject& subject) {
  const absl::StatusOr<ElfFacts> facts = ReadElf(subject.path);
  if (!facts.ok()) return Failed("QM-H-003", std::string(facts.status().message()));
  if (facts->no_delete) return Passed();
  return Failed("QM-H-003",
                "it can be unloaded, and a thread or a CUDA module of its own would be left "
                "without code; link it with -Wl,-z,nodelete (quantmill_add_plugin does)");
}

// Loads the file as the host does and finds the entry; a verdict when that fails.
std::optional<Verdict> Open(const std::string& path, qm_plugin_entry_v1_fn* entry) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return Failed("QM-A-001", absl::StrCat("it cannot be loaded: ", dlerror(),
                                           "; link with -Wl,-z,defs to see this when building"));
  }
  *entry = reinterpret_cast<qm_plugin_entry_v1_fn>(dlsym(handle, QM_ENTRY_SYMBOL));
  if (*entry != nullptr) return std::nullopt;
  return Failed("QM-A-001", absl::StrCat("it has no ", QM_ENTRY_SYMBOL));
}

Verdict Opens(Subject& subject) {
  qm_plugin_entry_v1_fn entry = nullptr;
  if (auto bad = Open(subject.path, &entry)) return *bad;
  const qm_plugin* plugin = entry();
  if (plugin == nullptr) return Failed("QM-P-002", "its entry function returned NULL");
  return Passed();
}

Verdict Version(Subject& subject) {
  qm_plugin_entry_v1_fn entry = nullptr;
  if (auto bad = Open(subject.path, &entry)) return Skipped(bad->text);
  const qm_plugin* plugin = entry();
  if (plugin == nullptr || plugin->struct_size < offsetof(qm_plugin, method_count)) {
    return Failed("QM-H-001", "its descriptor is too short to hold a version");
  }
  const absl::Status status =
      CheckVersion(plugin->abi_major, plugin->abi_minor, plugin->min_host_minor);
  if (!status.ok()) return Failed("QM-H-001", std::string(status.message()));
  if (plugin->min_host_minor > plugin->abi_minor) {
    return Failed("QM-H-001", absl::StrCat("min_host_minor ", plugin->min_host_minor,
                                           " is newer than the headers it was built with (",
                                           plugin->abi_minor, ")"));
  }
  return Passed(absl::StrCat("ABI ", plugin->abi_major, ".", plugin->abi_minor));
}

Verdict Descriptor(Subject& subject) {
  qm_plugin_entry_v1_fn entry = nullptr;
  if (auto bad = Open(subject.path, &entry)) return Skipped(bad->text);
  const qm_plugin* plugin = entry();
  const absl::Status status = CheckDescriptor(plugin);
  if (status.ok()) return Passed();
  const std::string text(status.message());
  // The loader's words for an option that does not fit its own line begin so.
  const bool is_option = text.find("option ") != std::string::npos;
  return Failed(is_option ? "QM-P-016" : "QM-P-002", text);
}

// ---- purity ------------------------------------------------------------------------------------

const char* doing = "while it is loaded (a static constructor)";

[[noreturn]] void ReportMisuse(const std::string& what) {
  WriteVerdictLine(
      kEventDescriptor, "failed", "QM-P-001",
      absl::StrCat(what, " ", doing, "; loading, entry and ext may only hand out constant data"));
  _exit(kExitReported);
}

int CountThreads() {
  std::error_code error;
  return static_cast<int>(
      std::distance(std::filesystem::directory_iterator("/proc/self/task", error),
                    std::filesystem::directory_iterator()));
}

void CallAllScanFunctions(const qm_plugin* plugin) {
  for (uint32_t i = 0; i < plugin->method_count; ++i) {
    const qm_method* method = plugin->methods[i];
    for (const char* id : kExtIds) method->ext(method, id);
    method->ext(method, "org.example.unknown/1");
    const auto* kernel =
        static_cast<const qm_linear_kernel*>(method->ext(method, QM_EXT_LINEAR_KERNEL));
    if (QM_HAS(kernel, accepts)) {
      kernel->accepts("org.example.fmt.unknown/1", "{}", QM_CUDA, 90, QM_BF16);
    }
  }
}

Verdict Pure(Subject& subject) {
  const bool watched = StartWatch(ReportMisuse);
  const int threads = CountThreads();
  SetWatchPhase(WatchPhase::kLoading);
  qm_plugin_entry_v1_fn entry = nullptr;
  const auto bad = Open(subject.path, &entry);
  doing = "in its entry function or in ext()";
  SetWatchPhase(WatchPhase::kScanning);
  const qm_plugin* plugin = bad ? nullptr : entry();
  const bool usable = plugin != nullptr && CheckDescriptor(plugin).ok();
  if (usable) CallAllScanFunctions(plugin);
  SetWatchPhase(WatchPhase::kOff);
  if (bad) return Skipped(bad->text);
  if (!usable) return Skipped("its descriptor cannot be walked (load.descriptor)");
  if (CountThreads() != threads) return Failed("QM-P-001", "it started a thread");
  if (CudaStarted()) {
    return Failed("QM-P-001", "it started CUDA; a plugin must also load where there is no GPU");
  }
  if (watched) return Passed();
  return Passed("threads and CUDA only: the kernel does not let this process watch system calls");
}

Verdict ScanTime(Subject& subject) {
  const auto start = std::chrono::steady_clock::now();
  qm_plugin_entry_v1_fn entry = nullptr;
  if (auto bad = Open(subject.path, &entry)) return Skipped(bad->text);
  const qm_plugin* plugin = entry();
  if (plugin == nullptr || !CheckDescriptor(plugin).ok()) {
    return Skipped("its descriptor cannot be walked (load.descriptor)");
  }
  CallAllScanFunctions(plugin);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::string text = absl::StrCat(static_cast<int>(seconds * 1e3 + 0.5), " ms");
  if (seconds <= kScanSeconds) return Passed(text);
  return Warning("QM-P-001",
                 absl::StrCat("loading and describing it took ", text, ", more than ",
                              static_cast<int>(kScanSeconds * 1e3),
                              " ms; move work from static constructors into the calls"));
}

}  // namespace

std::vector<Case> LoadCases() {
  return {
      {"load.symbols",
       {"QM-A-001"},
       "The file exports qm_plugin_entry_v1 and nothing else.",
       Scope::kFile,
       "",
       Symbols},
      {"load.opens",
       {"QM-A-001", "QM-P-002"},
       "The file loads with RTLD_NOW and RTLD_LOCAL and its entry returns a descriptor.",
       Scope::kFile,
       "",
       Opens},
      {"load.version",
       {"QM-H-001"},
       "It was built for an ABI this host speaks.",
       Scope::kFile,
       "",
       Version},
      {"load.descriptor",
       {"QM-P-002", "QM-P-016"},
       "Strings, counts, options and tables of the descriptor are sound.",
       Scope::kFile,
       "",
       Descriptor},
      {"load.pure",
       {"QM-P-001"},
       "Loading it, its entry and ext() use no CUDA, start no thread and do no input or output.",
       Scope::kFile,
       "",
       Pure},
      {"load.scan_time",
       {"QM-P-001"},
       "Loading and describing it takes less than 100 ms.",
       Scope::kFile,
       "",
       ScanTime},
      {"load.nodelete", {"QM-H-003"}, "It is linked with -z nodelete.", Scope::kFile, "", NoDelete},
  };
}

}  // namespace quantmill::check
