// quantmill generate MODEL --prompt TEXT: continues a text.
#include "core/eval/generate.h"

#include <cmath>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "core/io/json.h"
#include "host/cli/command.h"
#include "host/cli/model_session.h"
#include "host/cli/progress.h"

namespace quantmill {
namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";  // U+FFFD: bytes of a character still to come

// Prints tokens as they come. Characters spread over several tokens wait until they are complete.
class TokenPrinter {
 public:
  TokenPrinter(const Tokenizer& tokenizer, std::vector<int32_t> prompt, std::ostream& out)
      : tokenizer_(tokenizer), ids_(std::move(prompt)), out_(out) {
    // Decoding the prompt too keeps the space before the first new word.
    printed_ = Text().size();
  }

  void Add(int32_t token) {
    ids_.push_back(token);
    const std::string text = Text();
    if (absl::EndsWith(text, kReplacement)) return;
    Print(text);
  }
  // What is left, complete or not.
  void Finish() { Print(Text()); }
  const std::string& text() const { return text_; }

 private:
  std::string Text() const {
    const absl::StatusOr<std::string> text = tokenizer_.Decode(ids_, true);
    return text.ok() ? *text : std::string();
  }
  void Print(const std::string& text) {
    if (text.size() <= printed_) return;
    const std::string fresh = text.substr(printed_);
    printed_ = text.size();
    text_ += fresh;
    out_ << fresh << std::flush;
  }

  const Tokenizer& tokenizer_;
  std::vector<int32_t> ids_;
  std::ostream& out_;
  size_t printed_ = 0;
  std::string text_;
};

absl::StatusOr<GenerateOptions> OptionsOf(const Arguments& args) {
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

nlohmann::ordered_json ResultJson(const GenerateResult& result, size_t prompt_tokens,
                                  const std::string& text) {
  nlohmann::ordered_json json;
  json["text"] = text;
  json["prompt_tokens"] = prompt_tokens;
  json["tokens"] = result.tokens.size();
  json["ids"] = result.tokens;
  json["ended"] = result.reached_end ? 1 : 0;
  json["seconds"] = result.prompt_seconds + result.generation_seconds;
  json["prompt_tokens_per_second"] = result.prompt_tokens_per_second;
  json["tokens_per_second"] = result.tokens_per_second;
  return json;
}

// Before anything is loaded or printed.
absl::Status CheckPrompt(const std::vector<int32_t>& prompt, const ModelConfig& config) {
  if (prompt.empty()) {
    return UsageError("--prompt is empty", "this model has no token that begins a text",
                      "give a text to continue");
  }
  const int64_t tokens = static_cast<int64_t>(prompt.size());
  if (config.max_positions <= 0 || tokens < config.max_positions) return absl::OkStatus();
  return UsageError(
      absl::StrCat("--prompt has ", tokens, " tokens"),
      absl::StrCat("the model was made for ", config.max_positions, " with what it generates"),
      "shorten the prompt");
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

absl::StatusOr<int> Run(const Arguments& args) {
  QM_ASSIGN_OR_RETURN(GenerateOptions options, OptionsOf(args));
  QM_RETURN_IF_ERROR(CheckModelDirectory(args.Text("MODEL")));
  QM_ASSIGN_OR_RETURN(options.more_eos, MoreEndsOfText(args.Text("MODEL")));
  QM_ASSIGN_OR_RETURN(const auto tokenizer, OpenTokenizer(args.Text("MODEL"), ""));
  QM_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt,
                      tokenizer->Encode(args.Text("prompt"), true));
  QM_ASSIGN_OR_RETURN(const auto session, ModelSession::Open(args));
  QM_ASSIGN_OR_RETURN(const auto source,
                      session->OpenCheckpoint(args.Text("MODEL"), PackedMode::kKeepPacked));
  QM_RETURN_IF_ERROR(CheckPrompt(prompt, source->config()));
  QM_ASSIGN_OR_RETURN(const ResidentModel model, LoadResident(session->backend(), *source));
  TokenPrinter printer(*tokenizer, prompt, args.out());
  args.out() << args.Text("prompt") << std::flush;
  options.on_token = [&](int32_t token) {
    printer.Add(token);
    return false;
  };
  QM_ASSIGN_OR_RETURN(const GenerateResult result, Generate(model, prompt, options));
  printer.Finish();
  args.out() << "\n" << std::flush;
  // Not on stdout: that is the text, which may go to a file.
  std::cerr << absl::StrFormat(
      "\n%d + %d tokens on %s, prompt %.0f tokens/s, generation %.1f tokens/s\n", prompt.size(),
      result.tokens.size(), BackendName(session->backend()), result.prompt_tokens_per_second,
      result.tokens_per_second);
  QM_RETURN_IF_ERROR(args.WriteJson(ResultJson(result, prompt.size(), printer.text())));
  return kExitDone;
}

}  // namespace

Command MakeGenerateCommand() {
  return {
      .name = "generate",
      .summary = "continue a text with a model, original or quantized",
      .arguments = {{"MODEL", "a checkpoint directory, original or quantized, or a GGUF file"}},
      .options = {{.name = "prompt", .value = "TEXT", .doc = "text to continue", .required = true},
                  {.name = "max-tokens",
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
                   .kind = CommandOption::Kind::kInteger},
                  DeviceOption(),
                  PluginOption()},
      .examples = {"quantmill generate ./out --prompt \"Once upon a time\"",
                   "quantmill generate ./out --prompt \"Dear all,\" --temperature 0.8 --top-p "
                   "0.95 --seed 3"},
      .run = Run};
}

}  // namespace quantmill
