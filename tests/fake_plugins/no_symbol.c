/* A shared object that is no plugin. */
#include "quantmill/plugin.h"

QM_EXPORT int qm_plugin_entry_v0(void);
int qm_plugin_entry_v0(void) { return 0; }
