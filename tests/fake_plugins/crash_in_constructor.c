/* Dies while it is loaded. */
#include <signal.h>
#include <stddef.h>

#include "quantmill/plugin.h"

__attribute__((constructor)) static void Crash(void) { raise(SIGSEGV); }
QM_EXPORT const qm_plugin* qm_plugin_entry_v1(void);
const qm_plugin* qm_plugin_entry_v1(void) { return NULL; }
