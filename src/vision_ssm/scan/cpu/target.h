// What one target offers to scan.cpp: units of work, each of which writes memory that no other unit writes.
#pragma once
#include <stdint.h>

#include "problem.h"

namespace vision_ssm {

struct Target {
  // Floats of working memory that a thread needs for these units.
  int64_t (*forward_scratch)(const Problem &);
  int64_t (*backward_scratch)(const Problem &);
  void (*forward)(const Problem &, int64_t unit, float *scratch);
  void (*backward)(const Problem &, int64_t unit, float *scratch);
  void (*add_up)(const Problem &, int64_t unit, float *scratch);
};

extern const Target kAvx512, kAvx2, kBaseline;

// Side by side, every route has channels of its own.
static inline int64_t slices(const Problem &p) { return p.width == p.channels ? 1 : p.routes; }

static inline int64_t forward_units(const Problem &p) { return p.batch * slices(p) * p.blocks * p.parts; }

static inline int64_t backward_units(const Problem &p) { return p.groups * p.parts; }

}  // namespace vision_ssm
