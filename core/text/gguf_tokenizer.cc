#include "core/text/gguf_tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/text/unicode.h"

namespace quantmill {
namespace {

using Json = nlohmann::json;

constexpr char kMark[] = "\xE2\x96\x81";  // U+2581, SentencePiece's space

constexpr char kLlama3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr char kQwen2Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

Json Split(const char* pattern) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", pattern}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}

Json ByteLevel(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

Json Sequence(std::vector<Json> steps) {
  return {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}};
}

// The cuts of llama.cpp for files that do not say which they want.
Json DefaultCuts() {
  return Sequence(
      {Split(R"([\p{P}\$\+<=>\^~\|]+)"),
       Split(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S))"),
       Split(R"(\p{N}+)"), Split(R"([0-9][0-9][0-9])"), ByteLevel(false)});
}

// As the parser of tokenizer.json gives ids.
uint64_t Id(int64_t id) { return static_cast<uint64_t>(id); }

// What the metadata says of each token.
class Vocabulary {
 public:
  static absl::StatusOr<Vocabulary> Read(const GgufHeader& header) {
    Vocabulary vocabulary;
    const GgufValue* tokens = header.Find("tokenizer.ggml.tokens");
    const GgufValue* types = header.Find("tokenizer.ggml.token_type");
    if (tokens == nullptr || tokens->strings.empty()) {
      return absl::InvalidArgumentError("the file has no tokenizer.ggml.tokens");
    }
    vocabulary.tokens_ = &tokens->strings;
    if (types != nullptr && types->numbers.size() != tokens->strings.size()) {
      return absl::InvalidArgumentError(absl::StrCat("the file has ", tokens->strings.size(),
                                                     " tokens, but ", types->numbers.size(),
                                                     " types of them"));
    }
    if (types != nullptr) vocabulary.types_ = &types->numbers;
    return vocabulary;
  }

  int64_t size() const { return static_cast<int64_t>(tokens_->size()); }
  const std::string& Text(int64_t id) const { return (*tokens_)[static_cast<size_t>(id)]; }
  GgufTokenType Type(int64_t id) const {
    if (types_ == nullptr) return GgufTokenType::kNormal;
    return static_cast<GgufTokenType>(static_cast<int>((*types_)[static_cast<size_t>(id)]));
  }

  // Of tokens that text can become; without the special ones.
  Json ForModel() const {
    Json vocabulary = Json::object();
    for (int64_t id = 0; id < size(); ++id) {
      const GgufTokenType type = Type(id);
      if (type == GgufTokenType::kControl || type == GgufTokenType::kUnused) continue;
      vocabulary.emplace(Text(id), Id(id));  // of two alike the first counts
    }
    return vocabulary;
  }

  Json Added() const {
    Json added = Json::array();
    for (int64_t id = 0; id < size(); ++id) {
      const GgufTokenType type = Type(id);
      const bool special = type == GgufTokenType::kControl || type == GgufTokenType::kUnknown;
      if (!special && type != GgufTokenType::kUserDefined) continue;
      added.push_back({{"id", Id(id)},
                       {"content", Text(id)},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", special}});
    }
    return added;
  }

 private:
  const std::vector<std::string>* tokens_ = nullptr;
  const std::vector<double>* types_ = nullptr;
};

// ---- pairs that merge ---------------------------------------------------------------------------

absl::StatusOr<Json> ByteLevelMerges(const GgufHeader& header) {
  const GgufValue* merges = header.Find("tokenizer.ggml.merges");
  if (merges == nullptr || merges->strings.empty()) {
    return absl::InvalidArgumentError("the file has no tokenizer.ggml.merges");
  }
  Json pairs = Json::array();
  for (const std::string& merge : merges->strings) {
    const size_t space = merge.find(' ', 1);  // of llama.cpp: a token may begin with a space
    if (space == std::string::npos) {
      return absl::InvalidArgumentError("an entry of tokenizer.ggml.merges has no space");
    }
    pairs.push_back({merge.substr(0, space), merge.substr(space + 1)});
  }
  return pairs;
}

// SentencePiece joins the neighbours whose token has the highest score; as ranked pairs
// (SentencePieceExtractor in transformers): every way to cut a token in two that are tokens, by
// falling score, then by length of the parts.
absl::StatusOr<Json> ScoredMerges(const GgufHeader& header, const Vocabulary& vocabulary) {
  const GgufValue* scores = header.Find("tokenizer.ggml.scores");
  if (scores == nullptr || scores->numbers.size() != static_cast<size_t>(vocabulary.size())) {
    return absl::InvalidArgumentError("the file has no tokenizer.ggml.scores for its tokens");
  }
  absl::flat_hash_map<std::string_view, int64_t> ids;
  for (int64_t id = 0; id < vocabulary.size(); ++id) {
    const GgufTokenType type = vocabulary.Type(id);
    if (type != GgufTokenType::kNormal && type != GgufTokenType::kUserDefined) continue;
    ids.emplace(vocabulary.Text(id), id);
  }
  struct Pair {
    double score;
    size_t left_length, right_length;
    int64_t left, right;
  };
  std::vector<Pair> pairs;
  for (const auto& [text, id] : ids) {
    for (size_t cut = CharacterLength(text); cut < text.size();
         cut += CharacterLength(text.substr(cut))) {
      const auto left = ids.find(text.substr(0, cut)), right = ids.find(text.substr(cut));
      if (left == ids.end() || right == ids.end()) continue;
      pairs.push_back({scores->numbers[static_cast<size_t>(id)], cut, text.size() - cut,
                       left->second, right->second});
    }
  }
  std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
    if (a.score != b.score) return a.score > b.score;
    if (a.left_length != b.left_length) return a.left_length > b.left_length;
    if (a.right_length != b.right_length) return a.right_length > b.right_length;
    return std::pair(a.left, a.right) < std::pair(b.left, b.right);
  });
  Json merges = Json::array();
  for (const Pair& pair : pairs) {
    merges.push_back({vocabulary.Text(pair.left), vocabulary.Text(pair.right)});
  }
  return merges;
}

// ---- components ---------------------------------------------------------------------------------

// Tokens around a text.
absl::StatusOr<Json> Template(const GgufHeader& header, const Vocabulary& vocabulary,
                              bool add_bos) {
  Json single = Json::array(), special = Json::object();
  const auto add = [&](const char* key) -> absl::Status {
    const double id = header.Number(key, -1);
    if (!(id >= 0 && id < static_cast<double>(vocabulary.size()))) {
      return absl::InvalidArgumentError(
          absl::StrCat("the file asks for a token around texts, but ", key, " names none"));
    }
    const std::string& text = vocabulary.Text(static_cast<int64_t>(id));
    single.push_back({{"SpecialToken", {{"id", text}, {"type_id", 0}}}});
    special[text] = {{"id", text}, {"ids", {static_cast<uint64_t>(id)}}, {"tokens", {text}}};
    return absl::OkStatus();
  };
  if (header.Flag("tokenizer.ggml.add_bos_token", add_bos)) {
    QM_RETURN_IF_ERROR(add("tokenizer.ggml.bos_token_id"));
  }
  single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
  if (header.Flag("tokenizer.ggml.add_eos_token", false)) {
    QM_RETURN_IF_ERROR(add("tokenizer.ggml.eos_token_id"));
  }
  if (single.size() == 1) return Json(nullptr);
  return Json{{"type", "TemplateProcessing"},
              {"single", single},
              {"pair", Json::array()},
              {"special_tokens", special}};
}

const GgufPreTokenizer* FindPreTokenizer(std::string_view name) {
  for (const GgufPreTokenizer& pre : GgufPreTokenizers()) {
    if (std::find(pre.names.begin(), pre.names.end(), name) != pre.names.end()) return &pre;
  }
  return nullptr;
}

absl::StatusOr<Json> ByteLevelTokenizer(const GgufHeader& header, const Vocabulary& vocabulary) {
  const std::string name = header.Text("tokenizer.ggml.pre", "default");
  const GgufPreTokenizer* pre = FindPreTokenizer(name);
  if (pre == nullptr) {
    std::vector<std::string_view> known;
    for (const GgufPreTokenizer& other : GgufPreTokenizers()) {
      known.insert(known.end(), other.names.begin(), other.names.end());
    }
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("tokenizer.ggml.pre \"", name, "\" is not supported"),
                  absl::StrCat("supported are ",
                               absl::StrJoin(known, ", ", [](std::string* out, std::string_view n) {
                                 absl::StrAppend(out, AbslView(n));
                               }))));
  }
  Json model = {{"type", "BPE"},
                {"dropout", nullptr},
                {"unk_token", nullptr},
                {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr},
                {"fuse_unk", false},
                {"byte_fallback", false},
                {"ignore_merges", pre->ignore_merges},
                {"vocab", vocabulary.ForModel()}};
  QM_ASSIGN_OR_RETURN(model["merges"], ByteLevelMerges(header));
  Json json = {{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}};
  json["added_tokens"] = vocabulary.Added();
  json["normalizer"] = pre->nfc ? Json{{"type", "NFC"}} : Json(nullptr);
  json["pre_tokenizer"] = pre->json;
  QM_ASSIGN_OR_RETURN(json["post_processor"], Template(header, vocabulary, pre->add_bos));
  json["decoder"] = {{"type", "ByteLevel"},
                     {"add_prefix_space", true},
                     {"trim_offsets", true},
                     {"use_regex", true}};
  json["model"] = std::move(model);
  return json;
}

absl::StatusOr<Json> SentencePieceTokenizer(const GgufHeader& header,
                                            const Vocabulary& vocabulary) {
  const double unknown = header.Number("tokenizer.ggml.unknown_token_id", 0);
  if (!(unknown >= 0 && unknown < static_cast<double>(vocabulary.size()))) {
    return absl::InvalidArgumentError("tokenizer.ggml.unknown_token_id names no token");
  }
  const std::string& unknown_text = vocabulary.Text(static_cast<int64_t>(unknown));
  Json vocab = vocabulary.ForModel();
  vocab.emplace(unknown_text, static_cast<uint64_t>(unknown));
  Json model = {{"type", "BPE"},
                {"dropout", nullptr},
                {"unk_token", unknown_text},
                {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr},
                {"fuse_unk", true},
                {"byte_fallback", true},
                {"ignore_merges", false},
                {"vocab", std::move(vocab)}};
  QM_ASSIGN_OR_RETURN(model["merges"], ScoredMerges(header, vocabulary));
  const bool prefix = header.Flag("tokenizer.ggml.add_space_prefix", true);
  const Json replace = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kMark}};
  Json decoders = {{{"type", "Replace"}, {"pattern", {{"String", kMark}}}, {"content", " "}},
                   {{"type", "ByteFallback"}},
                   {{"type", "Fuse"}}};
  if (prefix) {
    decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }
  Json json = {{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}};
  json["added_tokens"] = vocabulary.Added();
  json["normalizer"] =
      prefix ? Json{{"type", "Sequence"},
                    {"normalizers", {{{"type", "Prepend"}, {"prepend", kMark}}, replace}}}
             : replace;
  json["pre_tokenizer"] = nullptr;
  QM_ASSIGN_OR_RETURN(json["post_processor"], Template(header, vocabulary, /*add_bos=*/true));
  json["decoder"] = {{"type", "Sequence"}, {"decoders", std::move(decoders)}};
  json["model"] = std::move(model);
  return json;
}

}  // namespace

const std::vector<GgufPreTokenizer>& GgufPreTokenizers() {
  static const auto* const kinds = new std::vector<GgufPreTokenizer>{
      {{"llama-bpe", "llama3", "llama-v3"},
       Sequence({Split(kLlama3Pattern), ByteLevel(false)}),
       false,
       /*ignore_merges=*/true,
       /*add_bos=*/true},
      {{"dbrx", "smaug-bpe"}, Sequence({Split(kLlama3Pattern), ByteLevel(false)})},
      {{"qwen2", "deepseek-r1-qwen"},
       Sequence({Split(kQwen2Pattern), ByteLevel(false)}),
       /*nfc=*/true},
      {{"smollm", "starcoder", "refact", "command-r", "codeshell"},
       Sequence({{{"type", "Digits"}, {"individual_digits", true}}, ByteLevel(true)})},
      {{"gpt-2", "phi-2", "mpt", "olmo", "jais"}, ByteLevel(true)},
      {{"default"}, DefaultCuts()},
  };
  return *kinds;
}

absl::StatusOr<Json> TokenizerFromGguf(const GgufHeader& header) {
  const std::string model = header.Text("tokenizer.ggml.model");
  if (model != "gpt2" && model != "llama") {
    return absl::UnimplementedError(
        ErrorText(model.empty() || model == "none" || model == "no_vocab"
                      ? std::string("the file holds no tokenizer")
                      : absl::StrCat("tokenizer.ggml.model \"", model, "\" is not supported"),
                  "supported are gpt2 (byte-level BPE) and llama (SentencePiece)"));
  }
  QM_ASSIGN_OR_RETURN(const Vocabulary vocabulary, Vocabulary::Read(header));
  return model == "gpt2" ? ByteLevelTokenizer(header, vocabulary)
                         : SentencePieceTokenizer(header, vocabulary);
}

nlohmann::ordered_json TokenizerConfigFromGguf(const GgufHeader& header) {
  nlohmann::ordered_json json = {{"tokenizer_class", "PreTrainedTokenizerFast"}};
  const GgufValue* tokens = header.Find("tokenizer.ggml.tokens");
  for (const auto& [key, name] : {std::pair("tokenizer.ggml.bos_token_id", "bos_token"),
                                  std::pair("tokenizer.ggml.eos_token_id", "eos_token"),
                                  std::pair("tokenizer.ggml.unknown_token_id", "unk_token"),
                                  std::pair("tokenizer.ggml.padding_token_id", "pad_token")}) {
    const double id = header.Number(key, -1);
    if (tokens == nullptr || !(id >= 0 && id < static_cast<double>(tokens->strings.size())))
      continue;
    json[name] = tokens->strings[static_cast<size_t>(id)];
  }
  const std::string chat = header.Text("tokenizer.chat_template");
  if (!chat.empty()) json["chat_template"] = chat;
  return json;
}

}  // namespace quantmill
