#include "tests/abi/gate.h"

#include <algorithm>
#include <set>
#include <sstream>

#include "tests/abi/changelog.h"

namespace quantmill::testing {
namespace {

constexpr char kAppend[] = "QM-A-004";
constexpr char kNewName[] = "QM-A-008";
constexpr char kBreak[] = "break";
constexpr char kMinor[] = "constant QM_ABI_MINOR";

std::string Restored(std::istringstream& words) {
  std::string rest;
  std::getline(words >> std::ws, rest);
  return rest;
}

// "QM_OK" of "constant QM_OK".
std::string NameOf(const std::string& fact) { return fact.substr(fact.find(' ') + 1); }

int Minor(const Layout& layout) {
  const auto it = layout.facts.find(kMinor);
  return it == layout.facts.end() ? 0 : std::stoi(it->second);
}

bool Holds(const StructLayout& entry, const std::string& field) {
  return std::any_of(entry.fields.begin(), entry.fields.end(),
                     [&](const FieldLayout& other) { return other.name == field; });
}

class Comparison {
 public:
  Comparison(const Layout& old, const Layout& next) : old_(old), next_(next) {}

  std::vector<LayoutChange> Run() {
    for (const auto& [name, before] : old_.structs) {
      const auto found = next_.structs.find(name);
      if (found == next_.structs.end()) {
        Break(name, "struct " + name + " is gone");
      } else {
        CompareStruct(name, before, found->second);
      }
    }
    for (const auto& [name, now] : next_.structs) {
      if (!old_.structs.contains(name)) Add(name, kNewName, "new struct " + name);
    }
    CompareFacts();
    return std::move(changes_);
  }

 private:
  void Add(const std::string& name, const std::string& rule, const std::string& text) {
    changes_.push_back({name, rule, text});
  }
  void Break(const std::string& name, const std::string& text) { Add(name, kBreak, text); }

  void CompareStruct(const std::string& name, const StructLayout& before,
                     const StructLayout& after) {
    if (after.growable != before.growable) Break(name, name + " changed its kind");
    if (after.align != before.align) Break(name, name + " changed its alignment");
    if (before.growable ? after.size < before.size : after.size != before.size) {
      Break(name, name + " changed its size from " + std::to_string(before.size) + " to " +
                      std::to_string(after.size));
    }
    for (size_t i = 0; i < before.fields.size(); ++i) {
      const FieldLayout& field = before.fields[i];
      if (i >= after.fields.size() || !(after.fields[i] == field)) {
        Break(field.name, field.name + " is no longer number " + std::to_string(i) + " of " + name +
                              " at offset " + std::to_string(field.offset) + ", " + field.type);
      }
    }
    for (const FieldLayout& field : after.fields) {
      if (Holds(before, field.name)) continue;
      const bool at_end = before.growable && field.offset >= before.size;
      Add(field.name, at_end ? kAppend : kBreak,
          field.name + (at_end ? " appended" : " added where nothing may be added"));
    }
  }

  void CompareFacts() {
    for (const auto& [fact, value] : old_.facts) {
      const auto found = next_.facts.find(fact);
      if (found == next_.facts.end()) {
        Break(NameOf(fact), fact + " is gone");
      } else if (found->second != value && !(fact == kMinor && Minor(next_) > Minor(old_))) {
        Break(NameOf(fact), fact + " was " + value + ", is " + found->second);
      }
    }
    for (const auto& [fact, value] : next_.facts) {
      if (!old_.facts.contains(fact)) Add(NameOf(fact), kNewName, "new " + fact + " " + value);
    }
  }

  const Layout& old_;
  const Layout& next_;
  std::vector<LayoutChange> changes_;
};

// "qm_tensor" of "qm_tensor" and "qm_tensor[4]": a struct held by value; else "".
std::string HeldByValue(const std::string& type) {
  if (type.rfind("qm_", 0) != 0) return "";
  const size_t end = type.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_");
  return end == std::string::npos || type[end] == '[' ? type.substr(0, end) : "";
}

}  // namespace

Layout ParseLayout(const std::string& text) {
  Layout layout;
  std::istringstream lines(text);
  std::string line;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    std::string kind, name, word;
    words >> kind;
    if (kind == "FROZEN" || kind == "GROWABLE") {
      words >> name;
      StructLayout& entry = layout.structs[name];
      entry.growable = kind == "GROWABLE";
      words >> word >> entry.size >> word >> entry.align;
    } else if (kind == "constant" || kind == "type" || kind == "id") {
      words >> name;
      layout.facts[kind + " " + name] = Restored(words);
    } else if (line.rfind("  qm_", 0) == 0) {
      FieldLayout field{kind, 0, 0, ""};
      words >> word >> field.offset >> word >> field.size >> word;
      field.type = Restored(words);
      layout.structs[kind.substr(0, kind.find('.'))].fields.push_back(field);
    } else {
      layout.faults.push_back("not understood: " + line);
      continue;
    }
    if (!words) layout.faults.push_back("incomplete: " + line);
  }
  return layout;
}

std::vector<std::string> RuleFaults(const Layout& layout) {
  std::vector<std::string> faults = layout.faults;
  for (const auto& [name, entry] : layout.structs) {
    size_t end = 0;
    for (const FieldLayout& field : entry.fields) {
      if (field.offset != end) faults.push_back(field.name + ": padding or a field before it");
      end = field.offset + field.size;
      const auto inner = layout.structs.find(HeldByValue(field.type));
      if (inner != layout.structs.end() && inner->second.growable) {
        faults.push_back(field.name + " holds a GROWABLE struct by value (QM-A-003)");
      }
    }
    if (end != entry.size) faults.push_back(name + ": padding or a field at its end");
    if (entry.growable && (entry.fields.empty() || entry.fields[0].name != name + ".struct_size" ||
                           entry.fields[0].type != "uint64_t")) {
      faults.push_back(name + " does not start with uint64_t struct_size (QM-A-003)");
    }
  }
  return faults;
}

std::vector<LayoutChange> Compare(const Layout& old, const Layout& next) {
  return Comparison(old, next).Run();
}

std::vector<std::string> Breaks(const Layout& old, const Layout& next) {
  std::vector<std::string> breaks;
  for (const LayoutChange& change : Compare(old, next)) {
    if (change.rule == kBreak) breaks.push_back(change.text);
  }
  return breaks;
}

std::vector<std::string> ChangelogFaults(const Layout& released, const Layout& next,
                                         const std::string& changelog) {
  std::vector<std::string> faults;
  const std::vector<LayoutChange> changes = Compare(released, next);
  const int oldest = Minor(released) + 1, newest = Minor(next);
  if (!changes.empty() && newest < oldest) {
    faults.push_back("something changed since QM_ABI_MINOR " + std::to_string(newest) +
                     " was released; set it to " + std::to_string(oldest));
  }
  std::set<std::string> said;  // "QM-A-004 qm_call.seed"
  for (const ChangelogLine& line : ParseChangelog(changelog)) {
    if (!line.fault.empty()) faults.push_back("CHANGELOG.md: " + line.fault);
    if (line.minor < oldest) continue;
    if (line.minor > newest) {
      faults.push_back("CHANGELOG.md has a line for minor " + std::to_string(line.minor) +
                       ", but QM_ABI_MINOR is " + std::to_string(newest));
    }
    for (const std::string& name : line.names) said.insert(line.rule + " " + name);
  }
  for (const LayoutChange& change : changes) {
    if (said.erase(change.rule + " " + change.name) == 0) {
      faults.push_back(change.text + ": CHANGELOG.md lacks a line \"- 1." + std::to_string(newest) +
                       " " + change.rule + " `" + change.name + "`: why\"");
    }
  }
  for (const std::string& extra : said) {
    faults.push_back("CHANGELOG.md names '" + extra + "', but no such change was made");
  }
  return faults;
}

}  // namespace quantmill::testing
