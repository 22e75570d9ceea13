/* Compiled as C11 and C17 with -Wpadded -Werror: the headers stand alone. */
#include "quantmill/all.h"

typedef int quantmill_headers_compile_as_c;
