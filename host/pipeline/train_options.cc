#include "host/pipeline/train_options.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"

namespace quantmill {
namespace {

constexpr int64_t kMost = int64_t{1} << 50;

class Reader {
 public:
  Reader(const nlohmann::json& section, std::vector<std::string>* errors)
      : section_(section), errors_(*errors) {}

  bool Has(const char* key) const { return section_.is_object() && section_.contains(key); }

  void Text(const char* key, std::string* out) {
    if (!Has(key)) return;
    if (section_[key].is_string()) {
      *out = section_[key].get<std::string>();
    } else {
      Wrong(key, "a text");
    }
  }
  void Count(const char* key, int64_t least, int64_t* out) {
    if (!Has(key)) return;
    const nlohmann::json& value = section_[key];
    // 1e6 is a count, too.
    const double number = value.is_number() ? value.get<double>() : -1;
    if (number >= static_cast<double>(least) && number <= static_cast<double>(kMost) &&
        number == std::floor(number)) {
      *out = static_cast<int64_t>(number);
    } else {
      Wrong(key, absl::StrCat("a whole number, ", least, " or more"));
    }
  }
  void Real(const char* key, double least, double most, double* out) {
    if (!Has(key)) return;
    const nlohmann::json& value = section_[key];
    const double number = value.is_number() ? value.get<double>() : std::nan("");
    if (number >= least && number <= most) {
      *out = number;
    } else {
      Wrong(key, std::isinf(most) ? absl::StrCat("a number, ", least, " or more")
                                  : absl::StrCat("a number from ", least, " to ", most));
    }
  }
  void Flag(const char* key, bool* out) {
    if (!Has(key)) return;
    if (section_[key].is_boolean()) {
      *out = section_[key].get<bool>();
    } else {
      Wrong(key, "true or false");
    }
  }
  void Wrong(const char* key, const std::string& expected) {
    const std::string value = Has(key) ? section_[key].dump() : "missing";
    errors_.push_back(absl::StrCat("'train.", key, "' is ", value, "; it must be ", expected));
  }
  void Add(std::string error) { errors_.push_back(std::move(error)); }

 private:
  const nlohmann::json& section_;
  std::vector<std::string>& errors_;
};

// steps or tokens, and what one of the two gives in whole steps.
void ReadLength(Reader& reader, TrainOptions* options) {
  int64_t steps = 0;
  reader.Count("steps", 0, &steps);
  reader.Count("tokens", 0, &options->tokens);
  if (reader.Has("steps") == reader.Has("tokens")) {
    reader.Add(reader.Has("steps") ? "'train' has both 'steps' and 'tokens'; keep one"
                                   : "'train' does not say how long; add tokens: N (or steps: N)");
    return;
  }
  if (reader.Has("tokens")) {
    const int64_t step = options->StepTokens();
    steps = (options->tokens + step - 1) / step;
  }
  if (steps > kMost / options->StepTokens()) {
    reader.Wrong(reader.Has("steps") ? "steps" : "tokens", "smaller");
    return;
  }
  options->tokens = steps * options->StepTokens();
}

// A share of all steps if below 1, else steps.
void ReadWarmup(Reader& reader, TrainOptions* options) {
  double warmup = 0.03;
  reader.Real("warmup", 0, 1e9, &warmup);
  const double steps = static_cast<double>(options->Steps());
  options->warmup = static_cast<int64_t>(std::llround(warmup < 1 ? warmup * steps : warmup));
  if (options->warmup > options->Steps()) {
    reader.Add(absl::StrCat("'train.warmup' is ", options->warmup, " steps; the training has only ",
                            options->Steps()));
  }
}

}  // namespace

TrainOptions ReadTrainOptions(const nlohmann::json& section, std::vector<std::string>* errors) {
  TrainOptions options;
  Reader reader(section, errors);
  constexpr double kUnbounded = std::numeric_limits<double>::infinity();
  if (!reader.Has("data")) {
    reader.Add("training needs text; add train: {data: FILE, tokens: N}");
    return options;
  }
  reader.Text("data", &options.data);
  reader.Text("key", &options.key);
  reader.Count("batch", 1, &options.batch);
  reader.Count("micro_batch", 0, &options.micro_batch);
  reader.Count("sequence_length", 2, &options.sequence_length);
  if (options.batch > kMost / options.sequence_length) {
    reader.Wrong("batch", "smaller");
    return options;
  }
  if (options.batch % options.MicroBatch() != 0) {
    reader.Add(absl::StrCat("'train.micro_batch' is ", options.micro_batch,
                            "; it must divide batch, which is ", options.batch));
  }
  ReadLength(reader, &options);
  ReadWarmup(reader, &options);
  reader.Real("lr", 0, 1, &options.rate);
  reader.Real("lr_scale", 0, kUnbounded, &options.parameter_rate);
  reader.Real("lr_floor", 0, 1, &options.rate_floor);
  reader.Real("weight_decay", 0, kUnbounded, &options.decay);
  reader.Real("clip_norm", 0, kUnbounded, &options.clip_norm);
  reader.Real("beta1", 0, 0.9999, &options.beta1);
  reader.Real("average", 0, 1, &options.average);
  std::string loss = "distill";
  reader.Text("loss", &loss);
  if (loss != "distill" && loss != "lm") reader.Wrong("loss", "distill or lm");
  options.distill = loss != "lm";
  reader.Count("sampled_tokens", 0, &options.sampled_tokens);
  if (options.sampled_tokens > 0 && !options.distill) {
    reader.Add(
        "'train.sampled_tokens' needs loss: distill; next tokens that the model wrote itself teach "
        "it nothing");
  }
  reader.Flag("norms", &options.norms);
  reader.Flag("embeddings", &options.embeddings);
  reader.Flag("checkpointing", &options.checkpointing);
  options.block_tokens = options.tokens / 8;
  reader.Count("block_tokens", 0, &options.block_tokens);
  reader.Count("block_batch", 1, &options.block_batch);
  options.block_rate = options.rate;
  reader.Real("block_lr", 0, 1, &options.block_rate);
  reader.Real("save_seconds", 0, kUnbounded, &options.save_seconds);
  return options;
}

}  // namespace quantmill
