// Digests of tensors and of small facts, for unit keys and for noticing damaged files. Tensor data
// goes through a fast hash over fixed tiles (parallel, independent of the number of threads) whose
// results go through SHA-256: enough against accidents, not against an adversary.
#ifndef QUANTMILL_HOST_RUN_FINGERPRINT_H_
#define QUANTMILL_HOST_RUN_FINGERPRINT_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "core/io/sha256.h"
#include "core/tensor/tensor.h"
#include "core/threads/thread_pool.h"

namespace quantmill {

class Fingerprint {
 public:
  // Texts are delimited: Add("ab"), Add("c") differs from Add("a"), Add("bc").
  void Add(std::string_view text);
  // dtype, shape and bytes of a host tensor.
  void Add(const Tensor& tensor, ThreadPool& threads);
  // 64 hexadecimal digits. Call once, last.
  std::string Hex();

 private:
  Sha256 sha_;
};

// 64 bits that differ for every (run seed, stage, slot).
uint64_t SlotSeed(uint64_t run_seed, std::string_view stage, std::string_view slot);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_FINGERPRINT_H_
