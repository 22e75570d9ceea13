// The rules of growth of the plugin ABI (plugin_api/VERSIONING.md), applied to layouts as
// CurrentLayout() prints them.
#ifndef QUANTMILL_TESTS_ABI_GATE_H_
#define QUANTMILL_TESTS_ABI_GATE_H_

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace quantmill::testing {

struct FieldLayout {
  std::string name;  // "qm_call.seed"
  size_t offset = 0;
  size_t size = 0;
  std::string type;
  bool operator==(const FieldLayout&) const = default;
};

struct StructLayout {
  bool growable = false;
  size_t size = 0;
  size_t align = 0;
  std::vector<FieldLayout> fields;  // in the order of the header
};

struct Layout {
  std::map<std::string, StructLayout> structs;
  std::map<std::string, std::string> facts;  // "constant QM_OK" -> "0", "type qm_status", "id ..."
  std::vector<std::string> faults;           // lines that are not understood
};

Layout ParseLayout(const std::string& text);

// What a layout got wrong by itself: padding, a GROWABLE struct without struct_size in front or
// held by value.
std::vector<std::string> RuleFaults(const Layout& layout);

struct LayoutChange {
  std::string name;  // "qm_call.seed", "qm_call", "QM_OK"
  std::string rule;  // "QM-A-004" append to a GROWABLE struct, "QM-A-008" new name, or "break"
  std::string text;  // for people
};

// In what `next` differs from `old`. QM_ABI_MINOR may grow.
std::vector<LayoutChange> Compare(const Layout& old, const Layout& next);

// Of those, the ones with rule "break", as text.
std::vector<std::string> Breaks(const Layout& old, const Layout& next);

// Empty if the changelog says what happened between the released layout and `next`: QM_ABI_MINOR
// has grown, every change has a line "- 1.MINOR RULE `name`, `name`: why" with a minor since then,
// and no such line names anything else.
std::vector<std::string> ChangelogFaults(const Layout& released, const Layout& next,
                                         const std::string& changelog);

// Names that the text of a header declares and `layout` lacks, or holds with another kind.
std::vector<std::string> MissingFrom(const Layout& layout, const std::string& header);

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_ABI_GATE_H_
