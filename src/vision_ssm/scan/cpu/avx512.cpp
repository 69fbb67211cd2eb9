#define TARGET kAvx512
#include "units.h"
