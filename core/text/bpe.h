// Byte-pair encoding (huggingface/tokenizers: tokenizers/src/models/bpe/).
#ifndef QUANTMILL_CORE_TEXT_BPE_H_
#define QUANTMILL_CORE_TEXT_BPE_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Pieces already encoded in one call. Bounded.
using BpeCache = absl::flat_hash_map<std::string, std::vector<int32_t>>;

class BpeModel {
 public:
  BpeModel() = default;
  // `json`: the "model" object of tokenizer.json. With `byte_level`, pieces are raw bytes and the
  // vocabulary is written in the byte-level alphabet; else both are UTF-8.
  static absl::StatusOr<BpeModel> FromJson(const nlohmann::json& json, bool byte_level);

  // Appends the ids of `piece`. `cache` may be null.
  void Encode(std::string_view piece, BpeCache* cache, std::vector<int32_t>* ids) const;

  // As written in the file.
  const absl::flat_hash_map<std::string, int32_t>& vocabulary() const { return vocabulary_; }

 private:
  struct Merge {
    uint32_t rank;
    int32_t id;
  };

  absl::Status ReadVocabulary(const nlohmann::json& json, bool byte_level);
  absl::Status ReadUnknown(const nlohmann::json& json);
  absl::Status ReadMerges(const nlohmann::json& json);
  absl::Status AddMerge(const std::string& left, const std::string& right);
  std::vector<int32_t> InitialSymbols(std::string_view piece) const;
  bool AppendBytes(std::string_view character, std::vector<int32_t>* ids) const;
  const Merge* Find(int32_t left, int32_t right) const;
  void MergeShort(std::vector<int32_t>* ids) const;
  void MergeLong(std::vector<int32_t>* ids) const;

  bool byte_level_ = false;
  bool ignore_merges_ = false;
  bool fuse_unknown_ = false;
  std::optional<int32_t> unknown_;
  absl::flat_hash_map<std::string, int32_t> vocabulary_;
  absl::flat_hash_map<std::string, int32_t> by_bytes_;  // byte level with ignore_merges only
  std::array<int32_t, 256> byte_ids_ = {};  // token of a byte, or of "<0xNN>"; -1 = none
  bool byte_fallback_ = false;
  size_t merge_count_ = 0;
  absl::flat_hash_map<uint64_t, Merge> merges_;  // by both ids
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_BPE_H_
