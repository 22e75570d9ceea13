// Compiled by nvcc: the headers stand alone there too.
#include "quantmill/all.h"
