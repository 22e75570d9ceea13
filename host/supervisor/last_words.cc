#include "host/supervisor/last_words.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "core/io/files.h"

namespace quantmill {

// Atomics without locks work across processes.
struct LastWords::Record {
  std::atomic<uint64_t> pulse;
  std::atomic<uint32_t> running;
  std::atomic<int32_t> services;  // entered and not left
  std::atomic<uint32_t> size;
  char text[8192];
};

absl::StatusOr<std::unique_ptr<LastWords>> LastWords::Open(const std::string& path) {
  static_assert(std::atomic<uint64_t>::is_always_lock_free);
  const int descriptor = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor < 0) return SystemError("open", path, errno);
  // Its blocks are reserved: on a full disk, a write to a hole in a mapped file is a SIGBUS.
  int error = posix_fallocate(descriptor, 0, sizeof(Record));
  void* memory = MAP_FAILED;
  if (error == 0) {
    memory = mmap(nullptr, sizeof(Record), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    error = errno;
  }
  close(descriptor);
  if (memory == MAP_FAILED) return SystemError("reserve", path, error);
  return std::unique_ptr<LastWords>(new LastWords(static_cast<Record*>(memory)));
}

LastWords::~LastWords() { munmap(record_, sizeof(Record)); }

void LastWords::Begin(const nlohmann::json& words) {
  std::string text = words.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() > sizeof(record_->text)) {
    nlohmann::json shorter = words;
    for (const char* key : {"options", "slots", "linears", "weight_dtypes", "next_roundings"}) {
      shorter.erase(key);
    }
    text = shorter.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  }
  BeginWith(text);
}

void LastWords::BeginWith(std::string_view text) {
  const size_t size = std::min(text.size(), sizeof(record_->text));
  std::memcpy(record_->text, text.data(), size);
  record_->size.store(static_cast<uint32_t>(size), std::memory_order_relaxed);
  record_->services.store(0, std::memory_order_relaxed);
  record_->running.store(1, std::memory_order_release);
  Beat();
}

void LastWords::EnterService() {
  record_->services.fetch_add(1, std::memory_order_relaxed);
  Beat();
}

void LastWords::LeaveService() {
  record_->services.fetch_sub(1, std::memory_order_relaxed);
  Beat();
}

bool LastWords::InService() const { return record_->services.load(std::memory_order_relaxed) > 0; }

void LastWords::Beat() { record_->pulse.fetch_add(1, std::memory_order_relaxed); }

void LastWords::End() {
  record_->running.store(0, std::memory_order_release);
  Beat();
}

bool LastWords::IsMarked() const { return record_->running.load(std::memory_order_relaxed) != 0; }

void LastWords::Clear() {
  record_->size.store(0, std::memory_order_relaxed);
  record_->running.store(0, std::memory_order_release);
}

std::optional<nlohmann::json> LastWords::Running() const {
  if (record_->running.load(std::memory_order_acquire) == 0) return std::nullopt;
  return Read();
}

std::optional<nlohmann::json> LastWords::Ended() const {
  if (record_->running.load(std::memory_order_acquire) != 0) return std::nullopt;
  if (record_->size.load(std::memory_order_relaxed) == 0) return std::nullopt;
  return Read();
}

std::optional<nlohmann::json> LastWords::Read() const {
  const size_t size =
      std::min<size_t>(record_->size.load(std::memory_order_relaxed), sizeof(record_->text));
  const auto words = nlohmann::json::parse(record_->text, record_->text + size, nullptr, false);
  return words.is_object() ? words : nlohmann::json::object();
}

uint64_t LastWords::Pulse() const { return record_->pulse.load(std::memory_order_relaxed); }

}  // namespace quantmill
