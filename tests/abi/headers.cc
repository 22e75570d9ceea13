// Compiled as C++17 and C++20 with -Wpadded -Werror: the headers stand alone.
#include "quantmill/all.h"
