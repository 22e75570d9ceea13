#include "host/cli/generation.h"

#include <cmath>
#include <filesystem>
#include <ostream>
#include <utility>

#include "absl/strings/match.h"
#include "core/base/status.h"
#include "core/io/json.h"
#include "host/cli/progress.h"

namespace quantmill {
namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";  // U+FFFD: bytes of a character still to come

}  // namespace

TokenPrinter::TokenPrinter(const Tokenizer& tokenizer, std::vector<int32_t> prompt,
                           std::ostream& out)
    : tokenizer_(tokenizer), ids_(std::move(prompt)), out_(out) {
  // Decoding the prompt too keeps the space before the first new word.
  printed_ = Text().size();
}

void TokenPrinter::Add(int32_t token) {
  ids_.push_back(token);
  const std::string text = Text();
  if (absl::EndsWith(text, kReplacement)) return;
  Print(text);
}

std::string TokenPrinter::Text() const {
  const absl::StatusOr<std::string> text = tokenizer_.Decode(ids_, true);
  return text.ok() ? *text : std::string();
}

void TokenPrinter::Print(const std::string& text) {
  if (text.size() <= printed_) return;
  const std::string fresh = text.substr(printed_);
  printed_ = text.size();
  text_ += fresh;
  out_ << fresh << std::flush;
}

std::vector<CommandOption> SamplingCommandOptions() {
  return {{.name = "max-tokens",
           .value = "N",
           .doc = "stop after this many tokens",
           .default_value = "128",
           .kind = CommandOption::Kind::kInteger},
          {.name = "temperature",
           .value = "T",
           .doc = "0 = always the most probable token",
           .default_value = "0",
           .kind = CommandOption::Kind::kReal},
          {.name = "top-p",
           .value = "P",
           .doc = "draw from the most probable tokens that together reach P",
           .default_value = "1",
           .kind = CommandOption::Kind::kReal},
          {.name = "seed",
           .value = "S",
           .doc = "of the random draw",
           .default_value = "0",
           .kind = CommandOption::Kind::kInteger}};
}

absl::StatusOr<GenerateOptions> GenerateOptionsOf(const Arguments& args) {
  GenerateOptions options;
  options.max_tokens = args.Integer("max-tokens");
  options.sampling.temperature = args.Real("temperature");
  options.sampling.top_p = args.Real("top-p");
  options.sampling.seed = static_cast<uint64_t>(args.Integer("seed"));
  if (options.max_tokens < 1) {
    return UsageError("--max-tokens must be at least 1");
  }
  if (!(options.sampling.temperature >= 0) || std::isinf(options.sampling.temperature)) {
    return UsageError("--temperature must be a number, 0 or more");
  }
  if (!(options.sampling.top_p > 0 && options.sampling.top_p <= 1)) {
    return UsageError("--top-p must be above 0 and at most 1");
  }
  return options;
}

// Chat models name their end-of-turn tokens in generation_config.json only.
absl::StatusOr<std::vector<int64_t>> MoreEndsOfText(const std::string& directory) {
  const std::string path = (std::filesystem::path(directory) / "generation_config.json").string();
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::vector<int64_t>();
  QM_ASSIGN_OR_RETURN(const nlohmann::json json, ReadJson(path));
  std::vector<int64_t> ids;
  if (!json.is_object() || !json.contains("eos_token_id")) return ids;
  const nlohmann::json& value = json["eos_token_id"];
  for (const nlohmann::json& id : value.is_array() ? value : nlohmann::json::array({value})) {
    if (id.is_number_integer()) ids.push_back(id.get<int64_t>());
  }
  return ids;
}

absl::StatusOr<ResidentModel> LoadResident(Backend& backend, WeightSource& source) {
  ProgressLine progress;
  auto model = ResidentModel::Load(backend, source, [&](int64_t done, int64_t total) {
    progress.Update({"load", "block", done, total});
    return absl::OkStatus();
  });
  progress.Clear();
  return model;
}

}  // namespace quantmill
