#include "sdk/check/runner.h"

#include <re2/re2.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "host/plugins/inspect_child.h"
#include "host/plugins/registry.h"
#include "host/run/backend.h"
#include "host/supervisor/process.h"
#include "host/worker/formats.h"
#include "sdk/check/fence.h"

namespace quantmill::check {
namespace {

constexpr double kInspectSeconds = 20;
constexpr size_t kMostLog = 400;  // characters of a dead case's last words

// One case on one method.
struct Job {
  const Case* item = nullptr;
  std::string method;
};

// ---- running one case, in whatever process -----------------------------------------------------

// What a case needs besides itself; lives until the process ends.
struct Stage {
  std::unique_ptr<Backend> host, device;
  std::unique_ptr<PluginFormats> formats;
  Subject subject;
};

absl::Status LoadSubject(const CheckRequest& request, const Job& job, Stage* stage) {
  Subject& subject = stage->subject;
  QM_ASSIGN_OR_RETURN(std::vector<LoadedMethod> methods, LoadPlugin(request.plugin));
  subject.plugin = methods.front().plugin;
  for (const LoadedMethod& loaded : methods) {
    if (loaded.method->id == job.method) subject.method = loaded.method;
  }
  QM_ASSIGN_OR_RETURN(stage->host, MakeCpuBackend());
  QM_ASSIGN_OR_RETURN(stage->device, MakeBackend(request.device, DType::kF32));
  subject.host = stage->host.get();
  subject.backend = stage->device->device().is_cpu() ? subject.host : stage->device.get();
  subject.device = DeviceName(subject.backend->device());
  for (const std::string& other : request.other_plugins) {
    QM_ASSIGN_OR_RETURN(std::vector<LoadedMethod> more, LoadPlugin(other));
    methods.insert(methods.end(), more.begin(), more.end());
  }
  stage->formats = std::make_unique<PluginFormats>(std::move(methods), *subject.host);
  subject.formats = stage->formats.get();
  return absl::OkStatus();
}

// An error when the device asked for is not there: that says nothing about the plugin.
absl::StatusOr<Verdict> RunCase(const CheckRequest& request, const Job& job, std::string* device) {
  auto* stage = new Stage;  // a plugin's thread may outlive the case
  stage->subject.path = request.plugin;
  stage->subject.device = request.device;
  stage->subject.seed = request.seed;
  if (job.item->scope != Scope::kFile) {
    const absl::Status loaded = LoadSubject(request, job, stage);
    if (absl::IsUnavailable(loaded)) return loaded;
    if (!loaded.ok()) return Failed(job.item->rules.front(), std::string(loaded.message()));
    *device = stage->subject.device;
    if (job.item->slow && !stage->subject.on_cuda() && !request.slow) {
      return Skipped("large shapes; on the CPU with --slow only");
    }
  }
  try {
    return job.item->run(stage->subject);
  } catch (const std::exception& error) {
    return Failed("QM-P-007", absl::StrCat("the case ended in an exception: ", error.what()));
  }
}

const Case* FindCase(const std::string& name) {
  for (const Case& item : AllCases()) {
    if (item.name == name) return &item;
  }
  return nullptr;
}

// ---- one case in a child process ---------------------------------------------------------------

// A file in memory for what a child prints.
class Log {
 public:
  Log() : descriptor_(memfd_create("case", 0)) {}
  ~Log() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;
  int descriptor() const { return descriptor_; }
  // The end of the text, on one line.
  std::string Tail() const {
    std::string text(kMostLog, '\0');
    const off_t size = lseek(descriptor_, 0, SEEK_END);
    const off_t start = std::max<off_t>(0, size - static_cast<off_t>(kMostLog));
    const ssize_t n = pread(descriptor_, text.data(), text.size(), start);
    text.resize(n > 0 ? static_cast<size_t>(n) : 0);
    while (!text.empty() && text.back() == '\n') text.pop_back();
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
  }

 private:
  int descriptor_;
};

std::optional<State> StateFromName(const std::string& name) {
  for (const State state : {State::kPassed, State::kSkipped, State::kWarning, State::kFailed}) {
    if (name == StateName(state)) return state;
  }
  return std::nullopt;
}

// The rule that a death breaks, when nothing better is known.
std::string RuleOfDeath(const WorkerEnd& end, const Case& item) {
  if (end.signal == SIGABRT || end.signal == 0) return "QM-P-007";  // terminate, abort, exit
  return item.scope == Scope::kFile ? "QM-P-001" : "QM-P-014";
}

Verdict VerdictOfDeath(const WorkerEnd& end, const Case& item, double limit, const Log& log) {
  if (end.interrupted) {
    return {State::kTimedOut, item.scope == Scope::kFile ? "QM-P-001" : "QM-P-008",
            absl::StrCat("it had not come back after ", limit, " s")};
  }
  if (end.signal == SIGSYS) {  // a watched call made with signals blocked (syscall_watch.h)
    return Failed("QM-P-001",
                  "it starts a thread while it is loaded or scanned; loading, entry and ext may "
                  "only hand out constant data");
  }
  std::string text = end.signal == 0
                         ? absl::StrCat("the process ", end.How(0),
                                        " in the middle of the case: something called exit()")
                         : absl::StrCat("the process ", end.How(0));
  const std::string tail = log.Tail();
  if (!tail.empty()) absl::StrAppend(&text, "; it had printed: ", tail);
  return {State::kCrashed, RuleOfDeath(end, item), text};
}

absl::StatusOr<Verdict> RunInChild(const CheckRequest& request, const Job& job,
                                   std::string* device) {
  const double limit = request.limit_seconds > 0 ? request.limit_seconds : job.item->limit_seconds;
  const Log log;
  WorkerOptions options;
  options.program = request.program.empty() ? QuantmillProgram() : request.program;
  options.arguments = {"check-case"};
  options.request =
      nlohmann::json{{"plugin", request.plugin}, {"other_plugins", request.other_plugins},
                     {"device", request.device}, {"seed", request.seed},
                     {"slow", request.slow},     {"case", job.item->name},
                     {"method", job.method},     {"log", log.descriptor()}}
          .dump();
  const auto start = Clock::now();
  options.interrupted = [start, limit] { return SecondsSince(start) > limit; };
  std::optional<Verdict> verdict;
  std::string error;
  QM_ASSIGN_OR_RETURN(const WorkerEnd end, RunWorker(options, [&](const nlohmann::json& event) {
                        if (event.contains("error")) error = event["error"].get<std::string>();
                        if (event.contains("device")) *device = event["device"].get<std::string>();
                        const std::optional<State> state = StateFromName(event.value("state", ""));
                        if (!state) return;
                        verdict = Verdict{*state, event.value("rule", ""), event.value("text", "")};
                      }));
  if (!error.empty()) return absl::UnavailableError(error);
  if (verdict && (end.exit_code == 0 || end.exit_code == kExitReported) && end.signal == 0) {
    return *verdict;
  }
  return VerdictOfDeath(end, *job.item, limit, log);
}

// ---- all cases ---------------------------------------------------------------------------------

std::vector<Job> JobsOf(const PluginInfo& info, const RE2& only) {
  std::vector<Job> jobs;
  for (const Case& item : AllCases()) {
    if (!RE2::PartialMatch(item.name, only)) continue;
    if (item.scope != Scope::kFile && !info.rejected.empty()) continue;
    if (item.scope != Scope::kMethod) {
      jobs.push_back({&item, ""});
      continue;
    }
    for (const MethodInfo& method : info.methods) {
      if (item.capability.empty() || method.Has(item.capability))
        jobs.push_back({&item, method.id});
    }
  }
  return jobs;
}

// The first plugin's description; rejected where there is none.
absl::StatusOr<PluginInfo> Inspect(const CheckRequest& request) {
  QM_ASSIGN_OR_RETURN(const InspectResult result,
                      InspectInChild(request.program.empty() ? QuantmillProgram() : request.program,
                                     request.plugin, kInspectSeconds));
  return result.info;
}

}  // namespace

int CheckReport::Count(State state) const {
  return static_cast<int>(std::count_if(
      results.begin(), results.end(), [state](const auto& r) { return r.verdict.state == state; }));
}

bool CheckReport::ok() const {
  return rejected.empty() &&
         Count(State::kFailed) + Count(State::kCrashed) + Count(State::kTimedOut) == 0;
}

absl::StatusOr<CheckReport> CheckPlugin(const CheckRequest& given,
                                        const std::function<void(const CaseResult&)>& sink) {
  CheckRequest request = given;
  std::error_code error;
  request.plugin = std::filesystem::canonical(given.plugin, error).string();
  if (error) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("cannot open plugin ", given.plugin), error.message()));
  }
  if (!std::filesystem::is_regular_file(request.plugin, error)) {
    return absl::InvalidArgumentError(ErrorText(absl::StrCat("cannot open plugin ", given.plugin),
                                                "it is no file", "name a .so file"));
  }
  const RE2 only(request.only, RE2::Quiet);
  if (!only.ok()) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("cannot read the pattern '", request.only, "'"), only.error()));
  }
  if (std::none_of(AllCases().begin(), AllCases().end(),
                   [&only](const Case& item) { return RE2::PartialMatch(item.name, only); })) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("no case matches '", request.only, "'"), "",
                  "quantmill check --list shows their names"));
  }
  QM_ASSIGN_OR_RETURN(const PluginInfo info, Inspect(request));
  CheckReport report;
  report.rejected = info.rejected;
  for (const Job& job : JobsOf(info, only)) {
    const auto start = Clock::now();
    Verdict verdict;
    if (request.in_process) {
      QM_ASSIGN_OR_RETURN(verdict, RunCase(request, job, &report.device));
    } else {
      QM_ASSIGN_OR_RETURN(verdict, RunInChild(request, job, &report.device));
    }
    report.results.push_back({job.item->name, job.method, job.item->rules, job.item->asserts,
                              std::move(verdict), SecondsSince(start)});
    if (sink) sink(report.results.back());
  }
  return report;
}

void RunCaseProcess(const nlohmann::json& json, int descriptor) {
  CheckRequest request;
  request.plugin = json.value("plugin", "");
  request.other_plugins = json.value("other_plugins", std::vector<std::string>());
  request.device = json.value("device", "cpu");
  request.seed = json.value("seed", uint64_t{1});
  request.slow = json.value("slow", false);
  const Job job = {FindCase(json.value("case", "")), json.value("method", "")};
  if (job.item == nullptr) _exit(2);
  if (const int log = json.value("log", -1); log >= 0) {
    dup2(log, STDOUT_FILENO);
    dup2(log, STDERR_FILENO);
  }
  ReportFaultsTo(descriptor);
  std::string device;
  const absl::StatusOr<Verdict> verdict = RunCase(request, job, &device);
  if (!verdict.ok()) {
    WriteEventLine(descriptor, {{"error", std::string(verdict.status().message())}});
    _exit(0);
  }
  if (!device.empty()) WriteEventLine(descriptor, {{"device", device}});
  WriteVerdictLine(descriptor, std::string(StateName(verdict->state)).c_str(), verdict->rule,
                   verdict->text);
  _exit(0);  // what the plugin left behind is not worth a destructor
}

}  // namespace quantmill::check
