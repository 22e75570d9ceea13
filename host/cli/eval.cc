// quantmill eval MODEL: perplexity, comparison with a reference, or logits of given ids.
#include <algorithm>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/eval/evaluate.h"
#include "core/eval/logits.h"
#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "core/text/answers.h"
#include "core/text/documents.h"
#include "host/cli/command.h"
#include "host/cli/model_session.h"
#include "host/cli/progress.h"

namespace quantmill {
namespace {

constexpr int64_t kEvalContext = 2048;

// ---- ids to logits ------------------------------------------------------------------------------

absl::StatusOr<Tensor> ReadTokenIds(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(path));
  if (file->Find("input_ids") == nullptr) {
    return absl::InvalidArgumentError(ErrorText(absl::StrCat("cannot read token ids from ", path),
                                                "it has no tensor input_ids",
                                                "store the ids as int32 [1, T] under that name"));
  }
  QM_ASSIGN_OR_RETURN(const Tensor ids, file->Get("input_ids"));
  if (ids.dtype() != DType::kI32 || ids.rank() != 2 || ids.dim(0) != 1 || ids.dim(1) < 1) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("cannot read token ids from ", path),
                  absl::StrCat("input_ids is ", std::string(DTypeName(ids.dtype())), " ",
                               ids.shape().ToString()),
                  "store the ids as int32 [1, T]"));
  }
  return ids;
}

absl::Status WriteLogits(const std::string& path, const Tensor& logits) {
  QM_ASSIGN_OR_RETURN(const auto writer,
                      SafetensorsWriter::Create(path, {{"logits", DType::kF32, logits.shape()}}));
  QM_RETURN_IF_ERROR(writer->Write("logits", logits));
  return writer->Finish();
}

absl::StatusOr<int> RunLogits(const Arguments& args) {
  const auto start = Clock::now();
  QM_ASSIGN_OR_RETURN(const Tensor ids, ReadTokenIds(args.Text("tokens")));
  QM_ASSIGN_OR_RETURN(const auto session, ModelSession::Open(args));
  QM_ASSIGN_OR_RETURN(const auto model, session->OpenModelArgument(args, PackedMode::kDequantize));
  ProgressLine progress;
  QM_ASSIGN_OR_RETURN(
      const Tensor logits,
      ComputeLogits(session->backend(), *model, ids, [&](int64_t done, int64_t total) {
        progress.Update({"logits", "block", done, total});
        return absl::OkStatus();
      }));
  QM_RETURN_IF_ERROR(WriteLogits(args.Text("logits"), logits));
  progress.Clear();
  const double seconds = SecondsSince(start);
  args.out() << "wrote logits " << logits.shape().ToString() << " to " << args.Text("logits")
             << "\n";
  nlohmann::ordered_json json;
  json["logits"] = args.Text("logits");
  json["tokens"] = logits.dim(0);
  json["vocabulary"] = logits.dim(1);
  json["seconds"] = seconds;
  QM_RETURN_IF_ERROR(args.WriteJson(json));
  return kExitDone;
}

// ---- text ---------------------------------------------------------------------------------------

absl::StatusOr<int64_t> ContextOf(const Arguments& args, const ModelConfig& config) {
  const int64_t limit = config.max_positions;
  if (!args.Has("context")) {
    return limit > 0 ? std::min(kEvalContext, limit) : kEvalContext;
  }
  const int64_t context = args.Integer("context");
  if (context < 2 || (limit > 0 && context > limit)) {
    return UsageError(absl::StrCat("--context ", context, " is not possible"),
                      absl::StrCat("this model takes 2 to ", limit, " tokens"));
  }
  return context;
}

// The windows to score; scored is empty where every token is.
absl::StatusOr<AnswerWindows> ReadWindows(const Arguments& args, const ModelConfig& config) {
  QM_ASSIGN_OR_RETURN(const int64_t context, ContextOf(args, config));
  if (args.Integer("windows") < 0) {
    return UsageError("--windows is negative", "", "give a number of windows, or 0 for all");
  }
  QM_ASSIGN_OR_RETURN(const auto tokenizer,
                      OpenTokenizer(args.Text("MODEL"), args.Text("reference")));
  if (args.Flag("answers")) {
    AnswerOptions options;
    options.length = context;
    options.count = args.Integer("windows");
    if (!config.eos_ids.empty()) options.eos = static_cast<int32_t>(config.eos_ids[0]);
    return ReadAnswers(*tokenizer, args.Text("text"), options);
  }
  TextOptions text;
  text.key = args.Text("key");
  QM_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                      TokenizeFile(*tokenizer, args.Text("text"), text));
  WindowOptions windows;
  windows.length = context;
  windows.count = args.Integer("windows");
  absl::StatusOr<Tensor> cut = CutWindows(ids, windows);
  if (!cut.ok()) return WithContext(cut.status(), args.Text("text"));
  AnswerWindows whole;
  whole.ids = *std::move(cut);
  return whole;
}

void PrintEstimate(std::ostream& out, const std::string& name, const Estimate& estimate,
                   int digits) {
  out << absl::StrFormat("%-18s %.*f", name, digits, estimate.value);
  if (estimate.standard_error) {
    out << absl::StrFormat(" +- %.*f", digits, *estimate.standard_error);
  }
  out << "\n";
}

void PrintResult(const EvalResult& result, const std::string& device, std::ostream& out) {
  PrintEstimate(out, "perplexity", result.perplexity, 4);
  PrintEstimate(out, "nll", result.nll, 5);
  if (result.comparison) {
    PrintEstimate(out, "KL mean", result.comparison->kl_mean, 5);
    out << absl::StrFormat("%-18s %.5f\n", "KL median", result.comparison->kl_median)
        << absl::StrFormat("%-18s %.5f\n", "KL 99 %", result.comparison->kl_p99);
    PrintEstimate(out, "top-1 agreement", result.comparison->top1_agreement, 4);
    PrintEstimate(out, "perplexity ratio", result.comparison->ppl_ratio, 5);
  }
  out << absl::StrFormat("%d %s of %d tokens, %d scored, %.1f s on %s (%.0f tokens/s)\n",
                         result.windows, result.windows == 1 ? "window" : "windows", result.context,
                         result.tokens, result.seconds, device, result.tokens_per_second);
  if (result.nll.standard_error) out << "+- is one standard error over windows\n";
}

EvalOptions WithProgress(ProgressLine* progress) {
  EvalOptions options;
  options.progress = [progress](std::string_view stage, int64_t done, int64_t total) {
    const bool scoring = stage == "score";  // the last part: its end is the end of all
    progress->Update({scoring ? "eval" : absl::StrCat("eval: ", std::string(stage)),
                      scoring ? "window" : "block", done, total});
    return absl::OkStatus();
  };
  return options;
}

absl::StatusOr<int> RunText(const Arguments& args) {
  QM_ASSIGN_OR_RETURN(const auto session, ModelSession::Open(args));
  QM_ASSIGN_OR_RETURN(const auto model, session->OpenModelArgument(args, PackedMode::kDequantize));
  std::unique_ptr<CheckpointSource> reference;
  if (args.Has("reference")) {
    QM_ASSIGN_OR_RETURN(reference,
                        session->OpenCheckpoint(args.Text("reference"), PackedMode::kDequantize));
  }
  QM_ASSIGN_OR_RETURN(const AnswerWindows windows, ReadWindows(args, model->config()));
  ProgressLine progress;
  EvalOptions options = WithProgress(&progress);
  const bool answers = args.Flag("answers");
  if (answers) options.scored = &windows.scored;
  QM_ASSIGN_OR_RETURN(const EvalResult result,
                      Evaluate(session->backend(), *model, reference.get(), windows.ids, options));
  progress.Clear();
  PrintResult(result, BackendName(session->backend()), args.out());
  nlohmann::ordered_json json = ToJson(result);
  if (answers) {
    args.out() << "the answers of " << result.windows << " records, " << windows.cut << " cut at "
               << result.context << " tokens, " << windows.left_out << " left out\n";
    json["answers_cut"] = windows.cut;
    json["answers_left_out"] = windows.left_out;
  }
  QM_RETURN_IF_ERROR(args.WriteJson(json));
  return kExitDone;
}

absl::StatusOr<int> RunEvalCommand(const Arguments& args) {
  if (args.Has("tokens") != args.Has("logits")) {
    return UsageError("--tokens and --logits belong together",
                      "one names the ids to run, the other the file for the result",
                      "give both or neither");
  }
  if (args.Has("tokens") == args.Has("text")) {
    return UsageError("eval needs either a text or token ids", "",
                      "give --text FILE, or --tokens IDS.safetensors --logits OUT.safetensors");
  }
  if (args.Flag("answers") && !args.Has("text")) {
    return UsageError("--answers needs a text", "it says which tokens of one are scored",
                      "give --text RECORDS.json");
  }
  return args.Has("tokens") ? RunLogits(args) : RunText(args);
}

}  // namespace

Command MakeEvalCommand() {
  Command command = {
      .name = "eval",
      .summary = "measure a model: perplexity, KL divergence from the original, agreement",
      .arguments = {{"MODEL", "a checkpoint directory, original or quantized, or a GGUF file"}},
      .options = {{.name = "text",
                   .value = "FILE",
                   .doc = "text to score: .txt, .jsonl, .jsonl.gz or alpaca .json"},
                  {.name = "reference",
                   .value = "MODEL",
                   .doc = "compare with this model, usually the original"},
                  {.name = "context",
                   .value = "N",
                   .doc = "tokens per window (default 2048, or what the model takes)",
                   .kind = CommandOption::Kind::kInteger},
                  {.name = "windows",
                   .value = "N",
                   .doc = "windows from the start of the text; 0 = all",
                   .default_value = "0",
                   .kind = CommandOption::Kind::kInteger},
                  {.name = "answers",
                   .doc = "of an alpaca .json: every record a window, only its answer is scored"},
                  {.name = "key",
                   .value = "NAME",
                   .doc = "field of a JSON Lines file that holds the text",
                   .default_value = "text"},
                  {.name = "tokens",
                   .value = "IDS.safetensors",
                   .doc = "run these ids (input_ids, int32 [1, T]) instead of a text"},
                  {.name = "logits",
                   .value = "OUT.safetensors",
                   .doc = "write their logits here (logits, float32 [T, vocabulary])"},
                  DeviceOption(),
                  PluginOption()},
      .examples = {"quantmill eval ./out --text valid.txt --reference ./Llama-3.1-8B",
                   "quantmill eval ./out --text valid.txt --context 1024 --windows 100 --json -",
                   "# quantized while it is loaded, nothing written",
                   "quantmill eval ./Llama-3.1-8B --load METHOD --text valid.txt",
                   "# for comparison with another engine",
                   "quantmill eval ./out --tokens ids.safetensors --logits logits.safetensors"},
      .notes =
          "Either --text, or --tokens with --logits. Windows are scored one by one without a "
          "token\n"
          "before them. KL is that of reference || model per position, in nats.",
      .run = RunEvalCommand};
  for (CommandOption& option : LoadOptions()) command.options.push_back(std::move(option));
  return command;
}

}  // namespace quantmill
