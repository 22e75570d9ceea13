#include "core/text/bpe.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <queue>
#include <utility>

#include "core/base/status.h"
#include "core/text/unicode.h"

namespace quantmill {
namespace {

using Json = nlohmann::json;

constexpr size_t kShortPiece = 48;  // symbols up to which scanning beats a queue
constexpr size_t kCachedPieceBytes = 64;
constexpr size_t kCacheEntries = size_t{1} << 17;
constexpr uint32_t kNoRank = std::numeric_limits<uint32_t>::max();

absl::Status BadModel(absl::string_view why) {
  return absl::InvalidArgumentError(ErrorText(absl::StrCat("tokenizer.json: model ", why)));
}

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

bool FlagOr(const Json& json, const char* key, bool fallback) {
  const auto found = json.find(key);
  return found == json.end() || !found->is_boolean() ? fallback : found->get<bool>();
}

bool IsSet(const Json& json, const char* key) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null() || *found == 0) return false;
  return !found->is_string() || !found->get_ref<const std::string&>().empty();
}

}  // namespace

absl::StatusOr<BpeModel> BpeModel::FromJson(const Json& json, bool byte_level) {
  if (!json.is_object()) return BadModel("is missing");
  const auto type = json.find("type");
  if (type != json.end() && *type != "BPE") {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("tokenizer.json: model type ", type->dump(), " is not supported"),
                  "only BPE is"));
  }
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (IsSet(json, key)) {
      return absl::UnimplementedError(
          ErrorText(absl::StrCat("tokenizer.json: model.", key, " is not supported")));
    }
  }
  BpeModel model;
  model.byte_level_ = byte_level;
  model.ignore_merges_ = FlagOr(json, "ignore_merges", false);
  model.fuse_unknown_ = FlagOr(json, "fuse_unk", false);
  model.byte_fallback_ = FlagOr(json, "byte_fallback", false);
  QM_RETURN_IF_ERROR(model.ReadVocabulary(json, byte_level));
  QM_RETURN_IF_ERROR(model.ReadUnknown(json));
  QM_RETURN_IF_ERROR(model.ReadMerges(json));
  return model;
}

absl::Status BpeModel::ReadVocabulary(const Json& json, bool byte_level) {
  const auto vocabulary = json.find("vocab");
  if (vocabulary == json.end() || !vocabulary->is_object()) return BadModel("has no vocab");
  vocabulary_.reserve(vocabulary->size());
  for (const auto& [token, id] : vocabulary->items()) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
      return BadModel(absl::StrCat("vocab: token \"", token, "\" has no valid id"));
    }
    vocabulary_.emplace(token, id.get<int32_t>());
    if (!byte_level || !ignore_merges_) continue;
    if (std::optional<std::string> bytes = ByteLevelBytes(token)) {
      by_bytes_.emplace(*std::move(bytes), id.get<int32_t>());
    }
  }
  byte_ids_.fill(-1);
  for (int byte = 0; byte < 256; ++byte) {
    char fallback[8];
    std::snprintf(fallback, sizeof fallback, "<0x%02X>", static_cast<unsigned>(byte));
    const auto found = vocabulary_.find(byte_level ? ByteLevelCharacter(static_cast<uint8_t>(byte))
                                                   : std::string(fallback));
    if (found != vocabulary_.end()) byte_ids_[static_cast<size_t>(byte)] = found->second;
  }
  return absl::OkStatus();
}

absl::Status BpeModel::ReadUnknown(const Json& json) {
  if (!IsSet(json, "unk_token")) return absl::OkStatus();
  if (!json["unk_token"].is_string()) return BadModel("unk_token is not a string");
  const auto found = vocabulary_.find(json["unk_token"].get<std::string>());
  if (found == vocabulary_.end()) return BadModel("unk_token is not in the vocab");
  unknown_ = found->second;
  return absl::OkStatus();
}

absl::Status BpeModel::ReadMerges(const Json& json) {
  const auto merges = json.find("merges");
  if (merges == json.end() || !merges->is_array()) return BadModel("has no merges");
  merges_.reserve(merges->size());
  for (const Json& merge : *merges) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      QM_RETURN_IF_ERROR(AddMerge(merge[0].get<std::string>(), merge[1].get<std::string>()));
    } else if (merge.is_string()) {  // older files: "left right"
      const std::string& text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      if (space == std::string::npos)
        return BadModel(absl::StrCat("merge \"", text, "\" has no space"));
      QM_RETURN_IF_ERROR(AddMerge(text.substr(0, space), text.substr(space + 1)));
    } else {
      return BadModel("merges must be pairs of strings");
    }
  }
  return absl::OkStatus();
}

absl::Status BpeModel::AddMerge(const std::string& left, const std::string& right) {
  const auto l = vocabulary_.find(left), r = vocabulary_.find(right),
             joined = vocabulary_.find(left + right);
  if (l == vocabulary_.end() || r == vocabulary_.end() || joined == vocabulary_.end()) {
    return BadModel(absl::StrCat("merge of \"", left, "\" and \"", right,
                                 "\" has a token that is not in the vocab"));
  }
  // A repeated pair keeps its last rank, as in the reference.
  const auto rank = static_cast<uint32_t>(merge_count_++);
  merges_[PairKey(l->second, r->second)] = {rank, joined->second};
  return absl::OkStatus();
}

bool BpeModel::AppendBytes(std::string_view character, std::vector<int32_t>* ids) const {
  for (const char byte : character) {
    if (byte_ids_[static_cast<uint8_t>(byte)] < 0) return false;
  }
  for (const char byte : character) ids->push_back(byte_ids_[static_cast<uint8_t>(byte)]);
  return true;
}

std::vector<int32_t> BpeModel::InitialSymbols(std::string_view piece) const {
  std::vector<int32_t> ids;
  ids.reserve(piece.size());
  bool after_unknown = false;
  while (!piece.empty()) {
    const size_t length = byte_level_ ? 1 : std::max<size_t>(1, CharacterLength(piece));
    const std::string_view character = piece.substr(0, length);
    piece.remove_prefix(length);
    const auto found = byte_level_ ? vocabulary_.end() : vocabulary_.find(AbslView(character));
    const bool known = byte_level_ || byte_fallback_;
    if (found != vocabulary_.end()) {
      ids.push_back(found->second);
      after_unknown = false;
    } else if (known && AppendBytes(character, &ids)) {
      after_unknown = false;
    } else if (unknown_.has_value()) {  // without one, the reference drops the character too
      if (!after_unknown || !fuse_unknown_) ids.push_back(*unknown_);
      after_unknown = true;
    }
  }
  return ids;
}

const BpeModel::Merge* BpeModel::Find(int32_t left, int32_t right) const {
  const auto found = merges_.find(PairKey(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

// Lowest rank first, leftmost on ties; every step scans the ranks of all neighbours.
void BpeModel::MergeShort(std::vector<int32_t>* ids) const {
  std::array<Merge, kShortPiece> next;  // next[i]: merge of symbols i and i + 1
  size_t count = ids->size();
  const auto look = [&](size_t i) {
    const Merge* merge = i + 1 < count ? Find((*ids)[i], (*ids)[i + 1]) : nullptr;
    next[i] = merge == nullptr ? Merge{kNoRank, -1} : *merge;
  };
  for (size_t i = 0; i < count; ++i) look(i);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (next[i].rank < next[best].rank) best = i;
    }
    if (next[best].rank == kNoRank) break;
    (*ids)[best] = next[best].id;
    ids->erase(ids->begin() + static_cast<std::ptrdiff_t>(best) + 1);
    --count;
    for (size_t i = best + 1; i < count; ++i) next[i] = next[i + 1];
    look(best);
    if (best > 0) look(best - 1);
  }
}

// The same order from a queue over a linked list: O(n log n). An entry whose symbols have changed
// since it was pushed is skipped.
void BpeModel::MergeLong(std::vector<int32_t>* ids) const {
  struct Entry {
    uint32_t rank;
    uint32_t position;
    int32_t left, right, merged;
    bool operator<(const Entry& other) const {  // std::priority_queue serves the largest
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  constexpr uint32_t kEnd = std::numeric_limits<uint32_t>::max();
  const auto count = static_cast<uint32_t>(ids->size());
  std::vector<uint32_t> next(count), previous(count);
  std::vector<Entry> initial;
  const auto entry_at = [&](uint32_t i, uint32_t j, std::vector<Entry>* out) {
    if (const Merge* merge = Find((*ids)[i], (*ids)[j])) {
      out->push_back({merge->rank, i, (*ids)[i], (*ids)[j], merge->id});
    }
  };
  for (uint32_t i = 0; i < count; ++i) {
    next[i] = i + 1 < count ? i + 1 : kEnd;
    previous[i] = i > 0 ? i - 1 : kEnd;
    if (i + 1 < count) entry_at(i, i + 1, &initial);
  }
  std::priority_queue<Entry> queue(std::less<Entry>(), std::move(initial));
  std::vector<Entry> fresh;
  while (!queue.empty()) {
    const Entry top = queue.top();
    queue.pop();
    const uint32_t right = (*ids)[top.position] == top.left ? next[top.position] : kEnd;
    if (right == kEnd || (*ids)[right] != top.right) continue;
    (*ids)[top.position] = top.merged;
    (*ids)[right] = -1;
    next[top.position] = next[right];
    if (next[right] != kEnd) previous[next[right]] = top.position;
    fresh.clear();
    if (next[top.position] != kEnd) entry_at(top.position, next[top.position], &fresh);
    if (previous[top.position] != kEnd) entry_at(previous[top.position], top.position, &fresh);
    for (const Entry& entry : fresh) queue.push(entry);
  }
  ids->erase(std::remove(ids->begin(), ids->end(), -1), ids->end());
}

void BpeModel::Encode(std::string_view piece, BpeCache* cache, std::vector<int32_t>* ids) const {
  if (piece.empty()) return;
  const bool cached = cache != nullptr && piece.size() <= kCachedPieceBytes;
  if (cached) {
    const auto found = cache->find(AbslView(piece));
    if (found != cache->end()) {
      ids->insert(ids->end(), found->second.begin(), found->second.end());
      return;
    }
  }
  std::vector<int32_t> symbols;
  const auto& whole = byte_level_ ? by_bytes_ : vocabulary_;
  const auto direct = ignore_merges_ ? whole.find(AbslView(piece)) : whole.end();
  if (direct != whole.end()) {
    symbols.push_back(direct->second);
  } else {
    symbols = InitialSymbols(piece);
    symbols.size() <= kShortPiece ? MergeShort(&symbols) : MergeLong(&symbols);
  }
  ids->insert(ids->end(), symbols.begin(), symbols.end());
  if (cached && cache->size() < kCacheEntries) cache->emplace(piece, std::move(symbols));
}

}  // namespace quantmill
