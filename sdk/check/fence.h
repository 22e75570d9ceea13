// Host memory that shows misuse: a block ends just before a page that cannot be touched, can be
// made read-only or untouchable as a whole, and is found again from the address of a fault.
#ifndef QUANTMILL_SDK_CHECK_FENCE_H_
#define QUANTMILL_SDK_CHECK_FENCE_H_

#include <cstdint>
#include <string>

#include "nlohmann/json.hpp"

namespace quantmill::check {

enum class FenceUse { kInput, kOutput, kScratch, kResult, kHostStruct };

// One block. Never freed: when it is closed its pages are given back and its addresses stay
// unmapped, so that a pointer kept by a plugin faults.
class Fence {
 public:
  // Null when there is no memory. The block is filled with `fill`. It starts at a multiple of
  // `alignment` (a power of two, at most a page) and ends less than `alignment` bytes before the
  // page that cannot be touched. Thread-safe.
  static Fence* New(std::string name, FenceUse use, uint64_t bytes, uint64_t alignment,
                    uint8_t fill);

  void* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  const std::string& name() const { return name_; }

  void Seal();   // read-only from now on
  void Close();  // untouchable from now on
  // "3 bytes behind the end of scratch 2 (640 bytes) were overwritten", or "". Not after Close().
  std::string Overrun() const;

 private:
  friend struct FenceTable;
  friend std::string DescribeFault(const void* address, std::string* rule);
  Fence() = default;

  std::string name_;
  FenceUse use_ = FenceUse::kScratch;
  uint8_t* data_ = nullptr;
  uint64_t bytes_ = 0;
  uint8_t* mapping_ = nullptr;  // guard page, pages of the block, guard page
  uint64_t mapping_bytes_ = 0;
  bool sealed_ = false;
  bool closed_ = false;
};

// What touching `address` broke, and the id of the rule: "it wrote to its input ...",
// "it touched ... 8 bytes behind the end of ...", "it touched ... after the call was over". Empty
// when the address is in no block's reach.
std::string DescribeFault(const void* address, std::string* rule);

// Writes one line of JSON to a descriptor, with the system call alone.
void WriteEventLine(int descriptor, const nlohmann::json& event);
void WriteVerdictLine(int descriptor, const char* state, const std::string& rule,
                      const std::string& text);

// From now on a fault in a fenced block writes a failed verdict to `descriptor` and ends the
// process with kExitReported; any other fault ends it as without this.
void ReportFaultsTo(int descriptor);
inline constexpr int kExitReported = 76;

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_FENCE_H_
