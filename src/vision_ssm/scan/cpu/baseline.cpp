#define TARGET kBaseline
#include "units.h"
