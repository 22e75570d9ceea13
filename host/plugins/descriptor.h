// Reads a plugin's descriptor without trusting it.
#ifndef QUANTMILL_HOST_PLUGINS_DESCRIPTOR_H_
#define QUANTMILL_HOST_PLUGINS_DESCRIPTOR_H_

#include "absl/status/status.h"
#include "host/plugins/catalog.h"
#include "quantmill/all.h"

namespace quantmill {

// Major equal, min_host_minor not newer than this host (QM-H-001).
absl::Status CheckVersion(uint32_t abi_major, uint32_t abi_minor, uint32_t min_host_minor);

// The version first, then sizes, strings, counts, options and capability tables.
// FAILED_PRECONDITION says what is wrong, in words for the plugin's author.
absl::Status CheckDescriptor(const qm_plugin* plugin);

// A checked descriptor as data; path and sha256 stay empty.
PluginInfo DescriptorInfo(const qm_plugin& plugin);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PLUGINS_DESCRIPTOR_H_
