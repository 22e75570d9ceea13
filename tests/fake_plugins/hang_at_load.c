/* Never finishes loading. */
#include <stddef.h>
#include <unistd.h>

#include "quantmill/plugin.h"

__attribute__((constructor)) static void Hang(void) {
  for (;;) pause();
}
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return NULL; }
