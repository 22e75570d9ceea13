// quantmill chat MODEL: reads lines, answers each, and remembers what was said.
#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/text/chat_template.h"
#include "host/cli/command.h"
#include "host/cli/generation.h"
#include "host/cli/model_session.h"

namespace quantmill {
namespace {

constexpr int64_t kChatContext = 4096;

// A conversation: what the model has seen of it is in the session.
class Conversation {
 public:
  Conversation(const ResidentModel& model, const Tokenizer& tokenizer, ChatTemplate chat,
               GenerateOptions options, int64_t capacity)
      : model_(model),
        tokenizer_(tokenizer),
        chat_(std::move(chat)),
        options_(std::move(options)),
        capacity_(capacity),
        seed_(options_.sampling.seed) {
    const std::optional<int32_t> end = tokenizer_.TokenId(chat_.end_of_reply);
    if (!chat_.end_of_reply.empty() && end) options_.more_eos.push_back(*end);
  }

  // Answers one line; the answer is printed as it comes. INVALID_ARGUMENT when the line alone is
  // longer than the context. `forgot`: the conversation so far had to be dropped to make room.
  absl::StatusOr<std::string> Answer(const std::string& line, std::ostream& out, bool* forgot) {
    *forgot = false;
    QM_ASSIGN_OR_RETURN(std::vector<int32_t> prompt, Prompt(line));
    if (session_ && session_->length() + Length(prompt) >= capacity_) {
      *forgot = true;
      Forget();
      QM_ASSIGN_OR_RETURN(prompt, Prompt(line));
    }
    if (Length(prompt) >= capacity_) {
      return absl::InvalidArgumentError(ErrorText(
          absl::StrCat("the line has ", Length(prompt), " tokens"),
          absl::StrCat("the context is ", capacity_, " with the answer"), "shorten the line"));
    }
    if (!session_) {
      QM_ASSIGN_OR_RETURN(session_, DecodeSession::Create(model_, capacity_));
    }
    TokenPrinter printer(tokenizer_, prompt, out);
    GenerateOptions options = options_;
    options.sampling.seed = seed_++;  // each answer draws anew
    options.on_token = [&](int32_t token) {
      printer.Add(token);
      return false;
    };
    QM_ASSIGN_OR_RETURN(const GenerateResult result, Continue(model_, *session_, prompt, options));
    printer.Finish();
    tokens_ += static_cast<int64_t>(result.tokens.size());
    seconds_ += result.generation_seconds;
    // The last token of an answer that was cut off has not been run.
    pending_.clear();
    if (!result.reached_end && !result.tokens.empty()) pending_ = {result.tokens.back()};
    return printer.text();
  }

  void Forget() {
    session_.reset();
    pending_.clear();
  }

  int64_t tokens() const { return tokens_; }
  double tokens_per_second() const {
    return seconds_ > 0 ? static_cast<double>(tokens_) / seconds_ : 0;
  }

 private:
  static int64_t Length(const std::vector<int32_t>& ids) {
    return static_cast<int64_t>(ids.size());
  }

  // What the model has not seen yet: the end of its last answer, and the line.
  absl::StatusOr<std::vector<int32_t>> Prompt(const std::string& line) const {
    const bool first = !session_;
    const bool plain = chat_.name == "plain";
    const std::string after = first ? "" : plain ? "\n" : chat_.after_reply;
    const std::string text = absl::StrCat(after, chat_.before_user, line, chat_.before_reply);
    std::vector<int32_t> ids = pending_;
    QM_ASSIGN_OR_RETURN(const std::vector<int32_t> added, tokenizer_.Encode(text, first));
    ids.insert(ids.end(), added.begin(), added.end());
    return ids;
  }

  const ResidentModel& model_;
  const Tokenizer& tokenizer_;
  const ChatTemplate chat_;
  GenerateOptions options_;
  const int64_t capacity_;
  uint64_t seed_;
  std::optional<DecodeSession> session_;
  std::vector<int32_t> pending_;
  int64_t tokens_ = 0;
  double seconds_ = 0;
};

absl::StatusOr<int64_t> CapacityOf(const Arguments& args, const ModelConfig& config) {
  const int64_t limit = config.max_positions;
  if (!args.Has("context")) return limit > 0 ? std::min(kChatContext, limit) : kChatContext;
  const int64_t context = args.Integer("context");
  if (context >= 2 && (limit <= 0 || context <= limit)) return context;
  return UsageError(absl::StrCat("--context ", context, " is not possible"),
                    limit > 0 ? absl::StrCat("this model takes 2 to ", limit, " tokens")
                              : "a context has at least 2 tokens");
}

// What was said, for the result.
struct Record {
  std::vector<std::string> lines, replies;
  std::optional<absl::Status> failed;
};

// A line the model cannot take ends in a message, not in the end of the conversation.
absl::Status Talk(const Arguments& args, Conversation& conversation, Record* record) {
  const bool interactive = isatty(STDIN_FILENO) != 0 && !args.WantsJson();
  std::string line;
  while (true) {
    if (interactive) args.out() << "> " << std::flush;
    if (!std::getline(std::cin, line)) break;
    line = std::string(absl::StripAsciiWhitespace(line));
    if (line.empty()) continue;
    if (line == "/quit") break;
    if (line == "/new") {
      conversation.Forget();
      continue;
    }
    bool forgot = false;
    const absl::StatusOr<std::string> reply = conversation.Answer(line, args.out(), &forgot);
    if (forgot) std::cerr << "the context is full; what was said before is forgotten\n";
    if (absl::IsInvalidArgument(reply.status())) {
      PrintError(reply.status());
      record->failed = reply.status();
      continue;
    }
    QM_RETURN_IF_ERROR(reply.status());
    args.out() << "\n" << std::flush;
    record->lines.push_back(line);
    record->replies.push_back(*reply);
  }
  if (interactive) args.out() << "\n" << std::flush;
  return absl::OkStatus();
}

absl::StatusOr<int> RunChatCommand(const Arguments& args) {
  QM_ASSIGN_OR_RETURN(GenerateOptions options, GenerateOptionsOf(args));
  const std::string directory = args.Text("MODEL");
  QM_RETURN_IF_ERROR(CheckModelDirectory(directory));
  QM_ASSIGN_OR_RETURN(options.more_eos, MoreEndsOfText(directory));
  QM_ASSIGN_OR_RETURN(const auto tokenizer, OpenTokenizer(directory, ""));
  QM_ASSIGN_OR_RETURN(const ChatTemplate chat, ReadChatTemplate(directory));
  QM_ASSIGN_OR_RETURN(const auto session, ModelSession::Open(args));
  QM_ASSIGN_OR_RETURN(const auto source, session->OpenModelArgument(args, PackedMode::kKeepPacked));
  QM_ASSIGN_OR_RETURN(const int64_t capacity, CapacityOf(args, source->config()));
  QM_ASSIGN_OR_RETURN(const ResidentModel model, LoadResident(session->backend(), *source));
  Conversation conversation(model, *tokenizer, chat, options, capacity);
  Record record;
  QM_RETURN_IF_ERROR(Talk(args, conversation, &record));
  std::cerr << absl::StrFormat("\n%d %s, %d tokens on %s, %.1f tokens/s\n", record.replies.size(),
                               record.replies.size() == 1 ? "answer" : "answers",
                               conversation.tokens(), BackendName(session->backend()),
                               conversation.tokens_per_second());
  nlohmann::ordered_json json;
  json["template"] = chat.name;
  json["turns"] = record.replies.size();
  json["lines"] = record.lines;
  json["replies"] = record.replies;
  json["tokens"] = conversation.tokens();
  json["tokens_per_second"] = conversation.tokens_per_second();
  QM_RETURN_IF_ERROR(args.WriteJson(json));
  return record.failed ? kExitFailed : kExitDone;
}

}  // namespace

Command MakeChatCommand() {
  Command command = {
      .name = "chat",
      .summary = "talk with a model, original or quantized",
      .arguments = {{"MODEL", "a checkpoint directory, original or quantized"}},
      .options = {{.name = "context",
                   .value = "N",
                   .doc = "tokens of the conversation that are kept (default 4096, or what the "
                          "model takes)",
                   .kind = CommandOption::Kind::kInteger},
                  DeviceOption(),
                  PluginOption()},
      .examples = {"quantmill chat ./out", "# quantized while it is loaded, nothing written",
                   "quantmill chat ./Llama-3.1-8B-Instruct --load METHOD",
                   "# questions from a file, one a line",
                   "quantmill chat ./out --temperature 0.7 --json answers.json < questions.txt"},
      .notes =
          "Each line of the input is answered. /new forgets what was said, /quit or the end of "
          "the\n"
          "input ends. Lines are put into the model's chat template where that is one of ChatML,\n"
          "Llama 3, [INST] and <|user|>; else the model continues the text of the conversation.\n"
          "When the context is full, the conversation starts anew with the last line.",
      .run = RunChatCommand};
  for (CommandOption& option : SamplingCommandOptions())
    command.options.push_back(std::move(option));
  for (CommandOption& option : LoadOptions()) command.options.push_back(std::move(option));
  return command;
}

}  // namespace quantmill
