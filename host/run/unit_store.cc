#include "host/run/unit_store.h"

#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"
#include "core/io/safetensors_reader.h"
#include "core/io/safetensors_writer.h"
#include "host/run/fingerprint.h"

namespace quantmill {
namespace {

constexpr char kTensorFile[] = "/out.safetensors";
constexpr char kRecordFile[] = "/unit.json";

std::string TensorName(const std::string& slot, const std::string& name) {
  return slot + "/" + name;
}

std::string AdapterTensor(const std::string& slot, const std::string& name) {
  return absl::StrCat("adapter/", slot, "/", name);
}

std::string EditTensor(size_t index) { return absl::StrCat("edit/", index); }

std::string DigestOf(const Unit& unit, ThreadPool& threads) {
  Fingerprint fingerprint;
  for (const SlotRecord& record : unit.slots) {
    fingerprint.Add(record.slot);
    const auto it = unit.packed.find(record.slot);
    if (it == unit.packed.end()) continue;
    fingerprint.Add(it->second->format_id);
    fingerprint.Add(it->second->format_json);
    for (const NamedTensor& t : it->second->tensors) {
      fingerprint.Add(t.name);
      fingerprint.Add(t.tensor, threads);
    }
  }
  for (const auto& [slot, params] : unit.adapters) {
    fingerprint.Add(slot);
    for (const NamedTensor& t : params) {
      fingerprint.Add(t.name);
      fingerprint.Add(t.tensor, threads);
    }
  }
  for (const BlockEdit& edit : unit.edits) {
    fingerprint.Add(EditName(edit.kind));
    fingerprint.Add(edit.target);
    fingerprint.Add(edit.value, threads);
  }
  return fingerprint.Hex();
}

absl::StatusOr<EditKind> EditKindOf(const std::string& name) {
  for (EditKind kind : {EditKind::kScale, EditKind::kRotate, EditKind::kClip, EditKind::kReplace}) {
    if (name == EditName(kind)) return kind;
  }
  return absl::DataLossError(absl::StrCat("unknown edit '", name, "'"));
}

SlotRecord RecordFromJson(const nlohmann::json& json) {
  SlotRecord r;
  r.slot = json.at("slot");
  r.packed = json.at("packed").get<int>() != 0;
  if (json.contains("edits")) {
    r.transformed = true;
    r.edits = json["edits"].get<std::vector<std::string>>();
  }
  if (json.contains("tuned")) {
    r.tuned = true;
    r.loss_before = json["tuned"].at("loss_before");
    r.loss_after = json["tuned"].at("loss_after");
  }
  if (json.contains("trained")) {
    r.trained = true;
    r.folded = json["trained"].at("folded").get<int>() != 0;
    r.loss_before = json["trained"].at("loss_before");
    r.loss_after = json["trained"].at("loss_after");
  }
  r.method = json.at("method");
  r.version = json.at("version");
  r.plugin_sha256 = json.at("plugin_sha256");
  r.options = json.at("options");
  r.seed = json.at("seed");
  r.error = json.at("error");
  r.format_id = json.at("format_id");
  r.format_json = json.at("format_json");
  r.out_features = json.at("out_features");
  r.in_features = json.at("in_features");
  r.bits_per_weight = json.at("bits_per_weight");
  r.weight_nmse = json.at("weight_nmse");
  if (json.contains("output_nmse")) r.output_nmse = json["output_nmse"];
  r.rows = json.at("rows");
  r.seconds = json.at("seconds");
  r.scratch_peak_bytes = json.at("scratch_peak_bytes");
  return r;
}

absl::Status LoadSlot(const SafetensorsFile& file, const SlotRecord& record,
                      const nlohmann::json& names, Unit* unit) {
  auto weight = std::make_shared<PackedWeight>();
  weight->format_id = record.format_id;
  weight->format_json = record.format_json;
  weight->out_features = record.out_features;
  weight->in_features = record.in_features;
  for (const std::string name : names) {
    QM_ASSIGN_OR_RETURN(Tensor tensor, file.Get(TensorName(record.slot, name)));
    weight->tensors.push_back({name, std::move(tensor)});
  }
  unit->packed[record.slot] = std::move(weight);
  return absl::OkStatus();
}

absl::StatusOr<Unit> ParseUnit(const std::string& directory, const nlohmann::json& json) {
  Unit unit;
  unit.key = json.at("key");
  unit.stage = json.at("stage");
  unit.block = json.at("block");
  unit.seconds = json.at("seconds");
  QM_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(directory + kTensorFile));
  for (const nlohmann::json& slot : json.at("slots")) {
    unit.slots.push_back(RecordFromJson(slot));
    if (slot.contains("adapter")) {
      for (const std::string name : slot["adapter"]) {
        QM_ASSIGN_OR_RETURN(Tensor tensor, file->Get(AdapterTensor(unit.slots.back().slot, name)));
        unit.adapters[unit.slots.back().slot].push_back({name, std::move(tensor)});
      }
    }
    if (!unit.slots.back().packed) continue;
    QM_RETURN_IF_ERROR(LoadSlot(*file, unit.slots.back(), slot.at("tensors"), &unit));
  }
  for (const nlohmann::json& item : json.at("edits")) {
    BlockEdit edit;
    QM_ASSIGN_OR_RETURN(edit.kind, EditKindOf(item.at("kind")));
    edit.target = item.at("target");
    QM_ASSIGN_OR_RETURN(edit.value, file->Get(EditTensor(unit.edits.size())));
    unit.edits.push_back(std::move(edit));
  }
  unit.changed = json.at("changed").get<std::set<std::string>>();
  return unit;
}

}  // namespace

nlohmann::ordered_json ToJson(const SlotRecord& r) {
  nlohmann::ordered_json json = {{"slot", r.slot},
                                 {"packed", r.packed ? 1 : 0},
                                 {"method", r.method},
                                 {"version", r.version},
                                 {"plugin_sha256", r.plugin_sha256},
                                 {"options", r.options},
                                 {"seed", r.seed},
                                 {"error", r.error},
                                 {"format_id", r.format_id},
                                 {"format_json", r.format_json},
                                 {"out_features", r.out_features},
                                 {"in_features", r.in_features},
                                 {"bits_per_weight", r.bits_per_weight},
                                 {"weight_nmse", r.weight_nmse}};
  if (r.transformed) json["edits"] = r.edits;
  if (r.tuned) json["tuned"] = {{"loss_before", r.loss_before}, {"loss_after", r.loss_after}};
  if (r.trained) {
    json["trained"] = {
        {"folded", r.folded ? 1 : 0}, {"loss_before", r.loss_before}, {"loss_after", r.loss_after}};
  }
  if (r.output_nmse >= 0) json["output_nmse"] = r.output_nmse;
  json["rows"] = r.rows;
  json["seconds"] = r.seconds;
  json["scratch_peak_bytes"] = r.scratch_peak_bytes;
  return json;
}

absl::Status UnitStore::Save(Unit* unit, ThreadPool& threads) const {
  const std::string directory = Directory(unit->key);
  std::error_code error;
  std::filesystem::remove_all(directory, error);  // of a run that ended between its two files
  std::filesystem::create_directories(directory, error);
  if (error) return SystemError("create", directory, error.value());

  std::vector<TensorDeclaration> declarations;
  nlohmann::ordered_json slots = nlohmann::ordered_json::array();
  for (const SlotRecord& record : unit->slots) {
    nlohmann::ordered_json json = ToJson(record);
    json["tensors"] = nlohmann::ordered_json::array();
    if (const auto it = unit->packed.find(record.slot); it != unit->packed.end()) {
      for (const NamedTensor& t : it->second->tensors) {
        json["tensors"].push_back(t.name);
        declarations.push_back(
            {TensorName(record.slot, t.name), t.tensor.dtype(), t.tensor.shape()});
      }
    }
    if (const auto it = unit->adapters.find(record.slot); it != unit->adapters.end()) {
      json["adapter"] = nlohmann::ordered_json::array();
      for (const NamedTensor& t : it->second) {
        json["adapter"].push_back(t.name);
        declarations.push_back(
            {AdapterTensor(record.slot, t.name), t.tensor.dtype(), t.tensor.shape()});
      }
    }
    slots.push_back(std::move(json));
  }
  nlohmann::ordered_json edits = nlohmann::ordered_json::array();
  for (const BlockEdit& edit : unit->edits) {
    declarations.push_back({EditTensor(edits.size()), edit.value.dtype(), edit.value.shape()});
    edits.push_back({{"kind", std::string(EditName(edit.kind))}, {"target", edit.target}});
  }
  QM_ASSIGN_OR_RETURN(auto writer,
                      SafetensorsWriter::Create(directory + kTensorFile, declarations));
  for (const auto& [slot, weight] : unit->packed) {
    for (const NamedTensor& t : weight->tensors) {
      QM_RETURN_IF_ERROR(writer->Write(TensorName(slot, t.name), t.tensor));
    }
  }
  for (const auto& [slot, params] : unit->adapters) {
    for (const NamedTensor& t : params) {
      QM_RETURN_IF_ERROR(writer->Write(AdapterTensor(slot, t.name), t.tensor));
    }
  }
  for (size_t i = 0; i < unit->edits.size(); ++i) {
    QM_RETURN_IF_ERROR(writer->Write(EditTensor(i), unit->edits[i].value));
  }
  QM_RETURN_IF_ERROR(writer->Finish());
  unit->digest = DigestOf(*unit, threads);
  const nlohmann::ordered_json record = {{"key", unit->key},       {"stage", unit->stage},
                                         {"block", unit->block},   {"seconds", unit->seconds},
                                         {"digest", unit->digest}, {"slots", slots},
                                         {"edits", edits},         {"changed", unit->changed}};
  return WriteFile(directory + kRecordFile, record.dump(1) + "\n");
}

absl::StatusOr<Unit> UnitStore::Load(const std::string& key, const std::string& digest,
                                     ThreadPool& threads) const {
  const std::string directory = Directory(key);
  QM_ASSIGN_OR_RETURN(const nlohmann::json json, ReadJson(directory + kRecordFile));
  absl::StatusOr<Unit> unit = absl::InternalError("");
  try {
    unit = ParseUnit(directory, json);
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(absl::StrCat(directory, kRecordFile, ": ", error.what()));
  }
  QM_RETURN_IF_ERROR(unit.status());
  unit->digest = DigestOf(*unit, threads);
  if (unit->key != key || unit->digest != digest) {
    return absl::DataLossError(ErrorText(absl::StrCat(directory, " is damaged"),
                                         "its content is not what the journal says"));
  }
  return unit;
}

}  // namespace quantmill
