// rounding.c with a run() that throws, put into its noexcept slot by a cast.
#define OFFENCE THROWS
#define OFFENCE_MAY_THROW 1
#include "rounding.c"
