#define TARGET kAvx2
#include "units.h"
