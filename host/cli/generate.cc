// quantmill generate MODEL --prompt TEXT: continues a text.
#include "core/eval/generate.h"

#include <iostream>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "host/cli/command.h"
#include "host/cli/generation.h"
#include "host/cli/model_session.h"
#include "host/cli/progress.h"

namespace quantmill {
namespace {

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

absl::StatusOr<int> RunGenerateCommand(const Arguments& args) {
  QM_ASSIGN_OR_RETURN(GenerateOptions options, GenerateOptionsOf(args));
  QM_RETURN_IF_ERROR(CheckModelDirectory(args.Text("MODEL")));
  QM_ASSIGN_OR_RETURN(options.more_eos, MoreEndsOfText(args.Text("MODEL")));
  QM_ASSIGN_OR_RETURN(const auto tokenizer, OpenTokenizer(args.Text("MODEL"), ""));
  QM_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt,
                      tokenizer->Encode(args.Text("prompt"), true));
  QM_ASSIGN_OR_RETURN(const auto session, ModelSession::Open(args));
  QM_ASSIGN_OR_RETURN(const auto source, session->OpenModelArgument(args, PackedMode::kKeepPacked));
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
  Command command = {
      .name = "generate",
      .summary = "continue a text with a model, original or quantized",
      .arguments = {{"MODEL", "a checkpoint directory, original or quantized, or a GGUF file"}},
      .options = {{.name = "prompt", .value = "TEXT", .doc = "text to continue", .required = true},
                  DeviceOption(),
                  PluginOption()},
      .examples = {"quantmill generate ./out --prompt \"Once upon a time\"",
                   "quantmill generate ./out --prompt \"Dear all,\" --temperature 0.8 --top-p "
                   "0.95 --seed 3"},
      .run = RunGenerateCommand};
  for (CommandOption& option : SamplingCommandOptions())
    command.options.push_back(std::move(option));
  for (CommandOption& option : LoadOptions()) command.options.push_back(std::move(option));
  return command;
}

}  // namespace quantmill
