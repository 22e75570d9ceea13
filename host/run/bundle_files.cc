#include "host/run/bundle_files.h"

#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/safetensors_writer.h"

namespace quantmill {

absl::Status WriteBundleTensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                                Backend& backend) {
  std::vector<TensorDeclaration> declarations;
  declarations.reserve(tensors.size());
  for (const NamedTensor& t : tensors) {
    declarations.push_back({t.name, t.tensor.dtype(), t.tensor.shape()});
  }
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsWriter> writer,
                      SafetensorsWriter::Create(path, declarations));
  for (const NamedTensor& t : tensors) {
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(t.tensor.dtype(), t.tensor.shape()));
    QM_RETURN_IF_ERROR(backend.Copy(t.tensor, &host));
    QM_RETURN_IF_ERROR(writer->Write(t.name, host));
  }
  return writer->Finish();
}

std::string FieldReader::Text(const char* key) {
  const auto it = json_.find(key);
  if (it != json_.end() && it->is_string()) return it->get<std::string>();
  Fail(key);
  return "";
}

int64_t FieldReader::Integer(const char* key) {
  const auto it = json_.find(key);
  if (it != json_.end() && it->is_number_integer()) return it->get<int64_t>();
  Fail(key);
  return 0;
}

uint64_t FieldReader::Unsigned(const char* key) {
  const auto it = json_.find(key);
  if (it != json_.end() && it->is_number_unsigned()) return it->get<uint64_t>();
  Fail(key);
  return 0;
}

DType FieldReader::Type(const char* key) {
  const std::optional<DType> dtype = DTypeFromName(Text(key));
  if (!dtype) Fail(key);
  return dtype.value_or(DType::kF32);
}

ResolvedOptions FieldReader::Options(const char* key) {
  ResolvedOptions options;
  const auto it = json_.find(key);
  if (it == json_.end() || !it->is_object()) {
    Fail(key);
    return options;
  }
  for (const auto& [name, value] : it->items()) {
    if (!value.is_string()) Fail(key);
    if (value.is_string()) options[name] = value.get<std::string>();
  }
  return options;
}

std::vector<std::string> FieldReader::Texts(const char* key) {
  std::vector<std::string> texts;
  const auto it = json_.find(key);
  bool good = it != json_.end() && it->is_array();
  for (size_t i = 0; good && i < it->size(); ++i) {
    good = (*it)[i].is_string();
    if (good) texts.push_back((*it)[i].get<std::string>());
  }
  if (!good) Fail(key);
  return texts;
}

std::vector<std::vector<int64_t>> FieldReader::Table(const char* key, size_t width) {
  std::vector<std::vector<int64_t>> rows;
  const auto it = json_.find(key);
  bool good = it != json_.end() && it->is_array();
  for (size_t i = 0; good && i < it->size(); ++i) {
    const nlohmann::json& row = (*it)[i];
    good = row.is_array() && row.size() == width;
    std::vector<int64_t>& values = rows.emplace_back();
    for (size_t j = 0; good && j < width; ++j) {
      good = row[j].is_number_integer();
      if (good) values.push_back(row[j].get<int64_t>());
    }
  }
  if (!good) Fail(key);
  return rows;
}

std::vector<DType> FieldReader::Types(const char* key) {
  std::vector<DType> types;
  for (const std::string& name : Texts(key)) {
    const std::optional<DType> dtype = DTypeFromName(name);
    if (!dtype) Fail(key);
    types.push_back(dtype.value_or(DType::kF32));
  }
  return types;
}

void FieldReader::Fail(const char* key) {
  if (!status_.ok()) return;
  status_ = absl::DataLossError(
      ErrorText(absl::StrCat("cannot use the call in ", path_),
                absl::StrCat("'", key, "' is missing or of another type than a run writes")));
}

}  // namespace quantmill
