/* Not a plugin: calls what a plugin must not, and needs a library it should not, for the lint. */
#include <stdlib.h>
#include <zlib.h>

#include "quantmill/plugin.h"

QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) {
  setenv("QM_LINT", zlibVersion(), 1);
  exit(1);
}
