#include "sdk/check/fence.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <vector>

#include "absl/strings/str_cat.h"

namespace quantmill::check {

// All blocks ever made; the fault handler reads it without a lock.
struct FenceTable {
  static constexpr size_t kMost = 1 << 16;
  std::mutex mutex;
  std::atomic<Fence*> fences[kMost] = {};
  std::atomic<size_t> count{0};

  void Add(Fence* fence) {
    const std::lock_guard<std::mutex> lock(mutex);
    const size_t at = count.load();
    if (at == kMost) return;
    fences[at].store(fence);
    count.store(at + 1);
  }
};

namespace {

constexpr uint8_t kFenceCanary = 0xA5;

FenceTable& Table() {
  static auto* const table = new FenceTable;
  return *table;
}

uint64_t PageBytes() {
  static const uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

uint64_t RoundUp(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

uint64_t CountOther(const uint8_t* begin, const uint8_t* end) {
  uint64_t other = 0;
  for (; begin < end; ++begin) other += *begin != kFenceCanary;
  return other;
}

}  // namespace

Fence* Fence::New(std::string name, FenceUse use, uint64_t bytes, uint64_t alignment,
                  uint8_t fill) {
  const uint64_t page = PageBytes();
  if (bytes > (uint64_t{1} << 46)) return nullptr;
  const uint64_t room = RoundUp(bytes == 0 ? 1 : bytes, alignment);
  const uint64_t pages = RoundUp(room, page);
  void* mapping = mmap(nullptr, pages + 2 * page, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  auto* fence = new Fence;
  fence->name_ = std::move(name);
  fence->use_ = use;
  fence->bytes_ = bytes;
  fence->mapping_ = static_cast<uint8_t*>(mapping);
  fence->mapping_bytes_ = pages + 2 * page;
  fence->data_ = fence->mapping_ + page + pages - room;
  if (mprotect(fence->mapping_ + page, pages, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping, fence->mapping_bytes_);
    delete fence;
    return nullptr;
  }
  memset(fence->mapping_ + page, kFenceCanary, pages);
  memset(fence->data_, fill, bytes);
  Table().Add(fence);
  return fence;
}

void Fence::Seal() {
  const uint64_t page = PageBytes();
  sealed_ = mprotect(mapping_ + page, mapping_bytes_ - 2 * page, PROT_READ) == 0;
}

void Fence::Close() {
  if (closed_) return;
  closed_ = true;
  mmap(mapping_, mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
       -1, 0);
}

std::string Fence::Overrun() const {
  const uint64_t page = PageBytes();
  const uint8_t* end = mapping_ + mapping_bytes_ - page;
  const uint64_t behind = CountOther(data_ + bytes_, end);
  const uint64_t before = CountOther(mapping_ + page, data_);
  if (behind + before == 0) return "";
  return absl::StrCat(behind + before, behind + before == 1 ? " byte " : " bytes ",
                      behind > 0 ? "behind the end of " : "before the start of ", name_, " (",
                      bytes_, behind + before == 1 ? " bytes) was" : " bytes) were",
                      " overwritten");
}

std::string DescribeFault(const void* address, std::string* rule) {
  const auto* at = static_cast<const uint8_t*>(address);
  const FenceTable& table = Table();
  // The newest first: the kernel may have given old addresses out again to its guard pages.
  for (size_t i = table.count.load(); i-- > 0;) {
    const Fence& fence = *table.fences[i].load();
    if (at < fence.mapping_ || at >= fence.mapping_ + fence.mapping_bytes_) continue;
    const std::string block = absl::StrCat(fence.name_, " (", fence.bytes_, " bytes)");
    if (fence.closed_) {
      *rule = "QM-P-003";
      return absl::StrCat("it touched ", block, " after the call it belonged to was over");
    }
    if (at >= fence.data_ + fence.bytes_) {
      *rule = fence.use_ == FenceUse::kHostStruct ? "QM-A-005" : "QM-P-014";
      return absl::StrCat("it touched memory ", at - (fence.data_ + fence.bytes_),
                          " bytes behind the end of ", block);
    }
    if (at < fence.data_) {
      *rule = "QM-P-014";
      return absl::StrCat("it touched memory ", fence.data_ - at, " bytes before the start of ",
                          block);
    }
    *rule = "QM-P-004";
    return absl::StrCat("it wrote to ", block, " at byte ", at - fence.data_,
                        "; what the host hands over to be read is read-only");
  }
  return "";
}

void WriteEventLine(int descriptor, const nlohmann::json& event) {
  const std::string line =
      event.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  for (size_t written = 0; written < line.size();) {
    const ssize_t n = write(descriptor, line.data() + written, line.size() - written);
    if (n <= 0) return;
    written += static_cast<size_t>(n);
  }
}

void WriteVerdictLine(int descriptor, const char* state, const std::string& rule,
                      const std::string& text) {
  WriteEventLine(descriptor, {{"state", state}, {"rule", rule}, {"text", text}});
}

namespace {

int report_descriptor = -1;

// The process ends here whatever happens, so that text may be composed: at worst the handler faults
// itself, and the default action follows.
void OnFault(int number, siginfo_t* info, void*) {
  signal(number, SIG_DFL);
  std::string rule;
  const std::string text = DescribeFault(info->si_addr, &rule);
  if (text.empty()) {
    raise(number);  // delivered when this handler returns
    return;
  }
  WriteVerdictLine(report_descriptor, "failed", rule, text);
  _exit(kExitReported);
}

}  // namespace

void ReportFaultsTo(int descriptor) {
  report_descriptor = descriptor;
  // A fault may come from a plugin that has used up its stack.
  static std::vector<char> stack(size_t{1} << 16);
  const stack_t alternative = {stack.data(), 0, stack.size()};
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

}  // namespace quantmill::check
