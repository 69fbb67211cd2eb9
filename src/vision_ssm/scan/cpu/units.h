// Units of work from the scan of one block; included by one file per target, which names it in TARGET.
#pragma once
#include "gradient.h"
#include "target.h"

namespace {

using vision_ssm::slices;

inline Block block_of(const Problem &p, int64_t index) {
  int64_t first = index * p.block_size, rest = p.width - first;
  return {first, rest < p.block_size ? rest : p.block_size};
}

// Float32 sums over routes, in memory of the thread's own: in the result itself, hardware that prefetches beyond a row
// takes cache lines away from the thread that writes the neighboring block.
struct Sums {
  const Problem &p;
  float *const rows;
  const int64_t count, row;

  Sums(const Problem &problem, const Scratch &s, Block block)
      : p(problem), rows(s.sums), count(block.count), row(round_up(block.count, kBlockUnit)) {
    memset(rows, 0, p.tokens * row * sizeof(float));
  }

  // Rounds the sums to channels from `channel` of an image of `to`, (batch, tokens, channels).
  void store_to(void *to, int64_t type, int64_t image, int64_t channel) const {
    for (int64_t t = 0; t < p.tokens; ++t)
      store_row(to, (image * p.tokens + t) * p.channels + channel, rows + t * row, count, type);
  }
};

void forward_one(const Walk &w, float *out, int64_t out_row) {
  if (w.p.states == 1)
    w.p.inclusive ? forward_route<1, true>(w, out, out_row) : forward_route<1, false>(w, out, out_row);
  else
    w.p.inclusive ? forward_route<0, true>(w, out, out_row) : forward_route<0, false>(w, out, out_row);
}

void forward_unit(const Problem &p, int64_t unit, float *memory) {
  Scratch s;
  s.cut(memory, p, false);
  Block block = block_of(p, unit % p.blocks);
  unit /= p.blocks;
  int64_t part = unit % p.parts;
  unit /= p.parts;
  int64_t slice = unit % slices(p), image = unit / slices(p);
  int64_t channel = slice * p.width + block.first;
  int64_t first = 0, last = p.taken;
  if (slices(p) > 1) first = slice, last = slice + 1;
  if (p.parts > 1) first = part, last = part + 1;
  Sums sums(p, s, block);
  for (int64_t j = first; j < last; ++j)
    forward_one(Walk(p, s, block, image, j, p.route_index ? p.route_index[image * p.taken + j] : j), sums.rows,
                sums.row);
  if (p.parts > 1)
    sums.store_to(p.partial + part * p.batch * p.tokens * p.channels, vision_ssm::kFloat32, image, channel);
  else
    sums.store_to(p.y, p.y_type, image, channel);
}

// y = the sum of the routes' partial outputs, one unit per image, in the order of the routes.
void add_up_unit(const Problem &p, int64_t image, float *) {
  alignas(64) float sum[64];
  const int64_t size = p.tokens * p.channels, all = p.batch * size;
  for (int64_t i = 0; i < size; i += 64) {
    int64_t count = size - i < 64 ? size - i : 64;
    memset(sum, 0, sizeof sum);
    for (int64_t part = 0; part < p.parts; ++part)
      for (int64_t c = 0; c < count; ++c) sum[c] += p.partial[part * all + image * size + i + c];
    store_row(p.y, image * size + i, sum, count, p.y_type);
  }
}

void backward_one(const Walk &w, const Sums &sums, int64_t part, int64_t group, float *product) {
  if (w.p.states == 1)
    w.p.inclusive ? backward_route<1, true>(w, sums.rows, sums.row, part, group, product)
                  : backward_route<1, false>(w, sums.rows, sums.row, part, group, product);
  else
    w.p.inclusive ? backward_route<0, true>(w, sums.rows, sums.row, part, group, product)
                  : backward_route<0, false>(w, sums.rows, sums.row, part, group, product);
}

void backward_unit(const Problem &p, int64_t unit, float *memory) {
  Scratch s;
  s.cut(memory, p, true);
  int64_t part = unit % p.parts, group = unit / p.parts;
  int64_t all = slices(p) * p.blocks;
  for (int64_t image = p.batch * group / p.groups; image < p.batch * (group + 1) / p.groups; ++image) {
    for (int64_t index = p.parts > 1 ? part : 0; index < (p.parts > 1 ? part + 1 : all); ++index) {
      Block block = block_of(p, index % p.blocks);
      int64_t slice = index / p.blocks;
      Sums sums(p, s, block);
      bool own = slices(p) > 1;
      for (int64_t j = own ? slice : 0; j < (own ? slice + 1 : p.taken); ++j) {
        float product;
        int64_t route = p.route_index ? p.route_index[image * p.taken + j] : j;
        backward_one(Walk(p, s, block, image, j, route), sums, part, group, &product);
        if (p.grad_route_weight) p.grad_route_weight[(index * p.batch + image) * p.taken + j] = product;
      }
      sums.store_to(p.grad_x, p.x_type, image, slice * p.width + block.first);
    }
  }
}

int64_t forward_scratch(const Problem &p) { return Scratch().cut(nullptr, p, false); }

int64_t backward_scratch(const Problem &p) { return Scratch().cut(nullptr, p, true); }

}  // namespace

extern const vision_ssm::Target vision_ssm::TARGET = {forward_scratch, backward_scratch, forward_unit, backward_unit,
                                                      add_up_unit};
