// What generate and chat share: the sampling options, printing tokens as they come, a model kept in
// memory.
#ifndef QUANTMILL_HOST_CLI_GENERATION_H_
#define QUANTMILL_HOST_CLI_GENERATION_H_

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/eval/generate.h"
#include "core/eval/resident_model.h"
#include "core/text/tokenizer.h"
#include "host/cli/command.h"

namespace quantmill {

// Prints tokens as they come. Characters spread over several tokens wait until they are complete.
class TokenPrinter {
 public:
  // tokenizer and out must outlive this object.
  TokenPrinter(const Tokenizer& tokenizer, std::vector<int32_t> prompt, std::ostream& out);
  void Add(int32_t token);
  // What is left, complete or not.
  void Finish() { Print(Text()); }
  const std::string& text() const { return text_; }

 private:
  std::string Text() const;
  void Print(const std::string& text);

  const Tokenizer& tokenizer_;
  std::vector<int32_t> ids_;
  std::ostream& out_;
  size_t printed_ = 0;
  std::string text_;
};

// --max-tokens, --temperature, --top-p, --seed.
std::vector<CommandOption> SamplingCommandOptions();
// Their values; usage errors for those that are not possible.
absl::StatusOr<GenerateOptions> GenerateOptionsOf(const Arguments& args);

// The end-of-text tokens of generation_config.json: chat models name their end of a turn there
// only.
absl::StatusOr<std::vector<int64_t>> MoreEndsOfText(const std::string& directory);

// With a progress line.
absl::StatusOr<ResidentModel> LoadResident(Backend& backend, WeightSource& source);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_GENERATION_H_
