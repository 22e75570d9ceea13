// The `train` section of a stage, checked, with its defaults.
#ifndef QUANTMILL_HOST_PIPELINE_TRAIN_OPTIONS_H_
#define QUANTMILL_HOST_PIPELINE_TRAIN_OPTIONS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace quantmill {

struct TrainOptions {
  std::string data;            // absolute path: .txt, .jsonl[.gz], .json (alpaca)
  std::string key = "text";    // JSONL field
  int64_t tokens = 0;          // to train on end to end; a whole number of steps
  int64_t sampled_tokens = 0;  // of text that the original model adds to `data`
  int64_t batch = 32;          // sequences of a step
  int64_t micro_batch = 0;     // of them at once; 0 = all
  int64_t sequence_length = 1024;
  double rate = 1e-4;         // lr: peak learning rate
  double parameter_rate = 1;  // lr_scale: factor on it for the method's own parameters
  bool distill = true;        // loss: distill = KL to the original model, else next token
  int64_t warmup = 0;         // steps
  double rate_floor = 0.05;   // lr_floor: last rate over the peak
  double decay = 0;           // weight_decay
  double clip_norm = 1;
  double beta1 = 0.9;
  double average = 0.08;      // share of the steps whose mean the end-to-end training ends with
  bool norms = true;          // train the norms of the blocks, too, where weights are trained
  bool embeddings = true;     // and, end to end, embedding, last norm and head
  bool checkpointing = true;  // run blocks again on the way back instead of keeping activations
  int64_t block_tokens = 0;   // of the phase `blocks`, per block
  double block_rate = 1e-4;   // block_lr
  int64_t block_batch = 4;    // sequences of its steps
  double save_seconds = 60;   // time between saved states

  int64_t StepTokens() const { return batch * sequence_length; }
  int64_t Steps() const { return tokens / StepTokens(); }
  int64_t MicroBatch() const { return micro_batch > 0 ? micro_batch : batch; }
  int64_t SampledWindows() const {
    return (sampled_tokens + sequence_length - 1) / sequence_length;
  }
  // Tokens of `data` that a window the model continues begins with.
  int64_t GivenTokens() const { return sequence_length < 16 ? 1 : sequence_length / 8; }
  double AverageSteps() const { return average * static_cast<double>(Steps()); }
  int64_t BlockSteps() const { return block_tokens / (block_batch * sequence_length); }
};

// From the section as JSON. What is wrong goes to `errors`, one text each.
TrainOptions ReadTrainOptions(const nlohmann::json& section, std::vector<std::string>* errors);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_TRAIN_OPTIONS_H_
