#include "host/run/train/train_state.h"

#include <filesystem>
#include <fstream>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

constexpr char kPosition[] = "position";
constexpr int64_t kNumbers = 8;

constexpr char kRemedy[] = "remove the file to train from the start";

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> OpenState(const std::string& path) {
  absl::StatusOr<std::shared_ptr<const SafetensorsFile>> file = SafetensorsFile::Open(path);
  if (file.ok()) return file;
  return absl::DataLossError(
      ErrorText(absl::StrCat("the saved state of a training is damaged: ", path),
                std::string(file.status().message()), kRemedy));
}

}  // namespace

bool TrainState::Exists() const {
  std::error_code error;
  return std::filesystem::exists(path_, error);
}

absl::Status TrainState::Save(Backend& backend, const TrainPosition& position,
                              const std::vector<NamedTensor>& tensors) const {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), error);
  std::vector<TensorDeclaration> declarations = {{kPosition, DType::kF64, {kNumbers}}};
  for (const NamedTensor& named : tensors) {
    declarations.push_back({named.name, named.tensor.dtype(), named.tensor.shape()});
  }
  QM_ASSIGN_OR_RETURN(auto writer, SafetensorsWriter::Create(path_, declarations));
  QM_ASSIGN_OR_RETURN(Tensor numbers, Tensor::Host(DType::kF64, {kNumbers}));
  const double values[kNumbers] = {static_cast<double>(position.blocks),
                                   static_cast<double>(position.step),
                                   static_cast<double>(position.optimizer_steps),
                                   static_cast<double>(position.skipped_in_row),
                                   static_cast<double>(position.losses),
                                   position.first_loss,
                                   position.recent_loss,
                                   position.lowest_loss};
  std::copy(values, values + kNumbers, numbers.as<double>());
  QM_RETURN_IF_ERROR(writer->Write(kPosition, numbers));
  for (const NamedTensor& named : tensors) {
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(named.tensor.dtype(), named.tensor.shape()));
    QM_RETURN_IF_ERROR(backend.Copy(named.tensor, &host));
    QM_RETURN_IF_ERROR(writer->Write(named.name, host));
  }
  return writer->Finish();
}

absl::StatusOr<TrainPosition> TrainState::Position() const {
  QM_ASSIGN_OR_RETURN(const auto file, OpenState(path_));
  const absl::StatusOr<Tensor> numbers = file->Get(kPosition);
  if (!numbers.ok() || numbers->dtype() != DType::kF64 || numbers->elements() != kNumbers) {
    return absl::DataLossError(
        ErrorText(absl::StrCat(path_, " is no saved state of a training"), "", kRemedy));
  }
  const double* values = numbers->as<const double>();
  TrainPosition position;
  position.blocks = static_cast<int64_t>(values[0]);
  position.step = static_cast<int64_t>(values[1]);
  position.optimizer_steps = static_cast<int64_t>(values[2]);
  position.skipped_in_row = static_cast<int64_t>(values[3]);
  position.losses = static_cast<int64_t>(values[4]);
  position.first_loss = values[5];
  position.recent_loss = values[6];
  position.lowest_loss = values[7];
  return position;
}

absl::Status TrainState::Load(Backend& backend, const std::vector<NamedTensor>& tensors) const {
  QM_ASSIGN_OR_RETURN(const auto file, OpenState(path_));
  for (const NamedTensor& named : tensors) {
    absl::StatusOr<Tensor> stored = file->Get(named.name);
    if (!stored.ok() || stored->dtype() != named.tensor.dtype() ||
        !(stored->shape() == named.tensor.shape())) {
      return absl::DataLossError(
          ErrorText(absl::StrCat(path_, " does not hold ", named.name, " as this training has it"),
                    "", kRemedy));
    }
    Tensor target = named.tensor;
    QM_RETURN_IF_ERROR(backend.Copy(*stored, &target));
  }
  return backend.Synchronize();  // the copies read the mapped file
}

absl::Status TrainState::Remove() const { return RemoveFile(path_); }

absl::StatusOr<LossLog> LossLog::Open(const std::string& path, const TrainPosition& position) {
  std::string kept;
  {
    std::ifstream file(path);
    std::string line;
    while (std::getline(file, line)) {
      const auto json = nlohmann::json::parse(line, nullptr, false);
      if (!json.is_object()) break;
      const bool block = json.value("phase", "") == "blocks";
      const int64_t at = json.value(block ? "block" : "step", int64_t{0});
      if (block ? at < position.blocks : at <= position.step) absl::StrAppend(&kept, line, "\n");
    }
  }
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  QM_RETURN_IF_ERROR(WriteFile(path, kept));
  return LossLog(path);
}

absl::Status LossLog::Add(const std::string& line) {
  std::ofstream file(path_, std::ios::app);
  file << line << "\n";
  if (file.flush()) return absl::OkStatus();
  return absl::UnavailableError(
      ErrorText(absl::StrCat("cannot write ", path_), "", "is the disk full?"));
}

}  // namespace quantmill
