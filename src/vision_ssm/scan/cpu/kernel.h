// The scan over one block of channels, forward and backward. Compiled once per target; see vector.h.
//
// A route is walked in tiles of 16 steps: gather the tile's projections, compute the step sizes of all 16 (one load of
// a weight serves 16 tokens), run the recurrence from there. A vector holds neighboring channels.
#pragma once
#include <stdint.h>
#include <string.h>

#include "problem.h"
#include "vector.h"

namespace {

using vision_ssm::Problem;

constexpr int kTile = 16;
constexpr int kBlock = 128;  // channels of a block at most; in scratch, rows of channels lie this far apart
constexpr int kBlockUnit = 16;  // block sizes are multiples of it
constexpr int kAhead = 32;  // steps between the prefetch of a token and its use

// Channels of a route.
struct Block {
  int64_t first, count;
};

INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A thread's working memory, cut into arrays of rows: kBlock channels each, or for the last two lines kTile steps.
struct Scratch {
  float *weight, *bias, *rate, *skip, *state;  // the route's parameters (rate: see Rate) and running state
  float *x, *raw, *out;                        // a tile: inputs, step sizes before the softplus, gradients of x
  float *zeros, *unread;                       // the input of padding tokens; where outputs of no token go
  float *sums;                                 // y or grad_x of the block: (tokens, block_size)
  float *grad_y, *grad_raw, *grad_state;       // a tile's gradients; the running gradient of the state
  float *grad_weight, *grad_rate, *grad_bias, *grad_skip;
  float *saved;                                // the state at the start of every tile
  float *grad_B, *grad_C;                      // (states, kTile, kWidth): lanes not yet added up
  float *dbc, *grad_dbc;                       // a tile's projections, transposed: (rank + 2 states, kTile)
  float *rows;                                 // the same as they lie in memory

  // Cuts up `memory`; returns the number of floats, also for a null pointer.
  int64_t cut(float *memory, const Problem &p, bool backward) {
    int64_t used = 0;
    auto take = [&](int64_t rows, int64_t length) {
      float *piece = memory ? memory + used : nullptr;
      used += rows * length;
      return piece;
    };
    const int64_t features = round_up(p.rank + 2 * p.states, kTile);
    weight = take(p.rank, kBlock);
    bias = take(1, kBlock);
    rate = take(2 * p.states, kBlock);  // the high parts, then the low ones
    skip = take(1, kBlock);
    state = take(p.states, kBlock);
    x = take(kTile, kBlock);
    raw = take(kTile, kBlock);
    out = take(backward ? kTile : 0, kBlock);
    zeros = take(1, kBlock);
    unread = take(1, kBlock);
    dbc = take(features, kTile);
    rows = take(features, kTile);
    sums = take(p.tokens, p.block_size);
    if (!backward) return used;
    grad_y = take(kTile, kBlock);
    grad_raw = take(kTile, kBlock);
    grad_state = take(p.states, kBlock);
    grad_weight = take(p.rank, kBlock);
    grad_rate = take(p.states, kBlock);
    grad_bias = take(1, kBlock);
    grad_skip = take(1, kBlock);
    saved = take((p.steps + kTile - 1) / kTile * p.states, kBlock);
    grad_B = take(p.states, kTile * kWidth);
    grad_C = take(p.states, kTile * kWidth);
    grad_dbc = take(features, kTile);
    return used;
  }
};

// to[j][i] = from[i][j] for kTile x kTile values; rows lie `from_row` and `to_row` apart.
INLINE void transpose(const float *from, int64_t from_row, float *to, int64_t to_row) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_row);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      __m512d low = (__m512d)b[i + j], high = (__m512d)b[i + j + 2];
      a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
      a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
  }
  for (int j = 0; j < 4; ++j) {
    __m512 even = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88), odd = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
    __m512 even2 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
    __m512 odd2 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    _mm512_storeu_ps(to + j * to_row, _mm512_shuffle_f32x4(even, even2, 0x88));
    _mm512_storeu_ps(to + (j + 4) * to_row, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    _mm512_storeu_ps(to + (j + 8) * to_row, _mm512_shuffle_f32x4(even, even2, 0xdd));
    _mm512_storeu_ps(to + (j + 12) * to_row, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
  }
#else
  for (int j = 0; j < kTile; ++j)
    for (int i = 0; i < kTile; ++i) to[j * to_row + i] = from[i * from_row + j];
#endif
}

// One route of one image over one block of channels.
struct Walk {
  const Problem &p;
  const Scratch &s;
  const Block block;
  const int64_t image, taken, route, features, row;
  const int32_t *const read, *const write;
  bool one_rate;  // all states of a channel decay alike, so that one exponential serves them

  Walk(const Problem &problem, const Scratch &scratch, Block of, int64_t b, int64_t j, int64_t k)
      : p(problem), s(scratch), block(of), image(b), taken(j), route(k), features(p.rank + 2 * p.states),
        row(round_up(features, kTile)), read(p.read + k * p.steps), write(p.write + k * p.steps) {
    for (int64_t r = 0; r < p.rank; ++r)
      load_row_as<Float32>(s.weight + r * kBlock, p.dt_weight, k * p.dt_weight_route + r * p.width + block.first,
                           block.count);
    set(s.bias, p.dt_bias, k * p.dt_bias_route);
    set(s.skip, p.D, k * p.D_route);
    memset(s.rate, 0, p.states * kBlock * sizeof(float));
    const float *A = p.A + k * p.A_route + block.first * p.states;
    if (p.states == 1) load_row_as<Float32>(s.rate, A, 0, block.count);
    for (int64_t n = 0; n < p.states && p.states > 1; ++n)
      for (int64_t c = 0; c < block.count; ++c) s.rate[n * kBlock + c] = A[c * p.states + n];
    for (int64_t i = 0; i < p.states * kBlock; ++i) {
      double exact = s.rate[i] * kLog2E;
      // Finite, because the step sizes of no steps are 0, and 0 times infinity is no number.
      exact = exact < -3e38 ? -3e38 : exact;
      s.rate[i] = (float)exact;
      const double low = exact - s.rate[i];
      s.rate[p.states * kBlock + i] = low < kNear ? (low > -kNear ? (float)low : -kNear) : kNear;
    }
    one_rate = true;
    for (int64_t n = 1; n < p.states && one_rate; ++n)
      one_rate = same_rate(n);
    memset(s.state, 0, p.states * kBlock * sizeof(float));
    memset(s.rows, 0, row * kTile * sizeof(float));
    memset(s.zeros, 0, kBlock * sizeof(float));
  }

  bool same_rate(int64_t n) const {
    const float *low = s.rate + p.states * kBlock;
    return !memcmp(s.rate, s.rate + n * kBlock, kBlock * sizeof(float)) &&
           !memcmp(low, low + n * kBlock, kBlock * sizeof(float));
  }

  Rate rate(int64_t n, int64_t c) const {
    return {load(s.rate + n * kBlock + c), load(s.rate + (p.states + n) * kBlock + c)};
  }

  void set(float *to, const float *parameter, int64_t offset) const {
    memset(to, 0, kBlock * sizeof(float));
    if (parameter) load_row_as<Float32>(to, parameter, offset + block.first, block.count);
  }

  float weight() const { return p.route_weight ? p.route_weight[image * p.taken + taken] : 1.0f; }

  // First of the block's channels in x and y.
  int64_t channel() const { return (p.width == p.channels ? 0 : route * p.width) + block.first; }

  // Where a token's block of channels begins in x and y, and its projections for this route in dbc and delta.
  int64_t x_of(int64_t token) const { return (image * p.tokens + token) * p.channels + channel(); }

  int64_t dbc_of(int64_t token) const { return group_of(token, p.dbc_route) * features; }

  int64_t delta_of(int64_t token) const { return group_of(token, p.delta_route) * p.width + block.first; }

  int64_t group_of(int64_t token, int64_t own) const {
    const int64_t position = image * p.tokens + token;
    return own ? position * p.routes + route : position;
  }

  // Brings the inputs of `count` steps from `first` within reach: their projections into scratch, and in x[t] the
  // address of their channels: where they lie if those are whole vectors of float32, else converted in scratch.
  void load_tile(int64_t first, int64_t count, const float *x[kTile]) const {
    const bool in_place = p.x_type == vision_ssm::kFloat32 && block.count % kWidth == 0;
    for (int64_t t = 0; t < kTile; ++t) {
      const int64_t token = t < count ? read[first + t] : -1;
      x[t] = s.zeros;
      if (token < 0) {  // a padding token
        memset(s.rows + t * row, 0, features * sizeof(float));
        if (p.delta) memset(s.raw + t * kBlock, 0, kBlock * sizeof(float));
        continue;
      }
      if (in_place) {
        x[t] = (const float *)p.x + x_of(token);
      } else {
        load_row(s.x + t * kBlock, p.x, x_of(token), block.count, p.x_type);
        x[t] = s.x + t * kBlock;
      }
      load_row(s.rows + t * row, p.dbc, dbc_of(token), features, p.dbc_type);
      if (p.delta) load_row(s.raw + t * kBlock, p.delta, delta_of(token), block.count, p.delta_type);
    }
    for (int64_t i = 0; i < row; i += kTile) transpose(s.rows + i, row, s.dbc + i * kTile, kTile);
  }

  // Fetches what the tile of steps from `first` needs, and `sums`, to whose rows its results are added.
  void prefetch(int64_t first, const float *sums, int64_t sums_row) const {
    const int64_t x_size = p.x_type == vision_ssm::kFloat32 ? 4 : 2;
    const int64_t dbc_size = p.dbc_type == vision_ssm::kFloat32 ? 4 : 2;
    const int64_t last = first + kTile < p.steps ? first + kTile : p.steps;
    for (int64_t t = first < 0 ? 0 : first; t < last; ++t) {
      if (read[t] >= 0) {
        const char *x = (const char *)p.x + x_of(read[t]) * x_size;
        for (int64_t i = 0; i < block.count * x_size; i += 64) __builtin_prefetch(x + i);
        const char *dbc = (const char *)p.dbc + dbc_of(read[t]) * dbc_size;
        for (int64_t i = 0; i < features * dbc_size; i += 64) __builtin_prefetch(dbc + i);
      }
      if (write[t] >= 0)
        for (int64_t i = 0; i < block.count; i += 16) __builtin_prefetch(sums + write[t] * sums_row + i, 1);
    }
  }
};

// Step sizes before the softplus, for channels c of a tile.
template <int Together>
INLINE void project(const Walk &w, int64_t c, int64_t first, Vec *raw) {
  Vec sum[Together];
  for (int i = 0; i < Together; ++i) sum[i] = load(w.s.bias + c);
  for (int64_t r = 0; r < w.p.rank; ++r) {
    const Vec weight = load(w.s.weight + r * kBlock + c);
    for (int i = 0; i < Together; ++i) sum[i] += w.s.dbc[r * kTile + first + i] * weight;
  }
  for (int i = 0; i < Together; ++i) raw[first + i] = sum[i];
}

INLINE void raw_steps(const Walk &w, int64_t c, int64_t count, Vec raw[kTile]) {
  if (w.p.delta) {
    for (int t = 0; t < kTile; ++t) raw[t] = load(w.s.raw + t * kBlock + c) + load(w.s.bias + c);
  } else if (count > 4) {
    constexpr int kTogether = kWidth == 16 ? 16 : 8;  // as many sums as registers allow
    for (int t = 0; t < kTile; t += kTogether) project<kTogether>(w, c, t, raw);
  } else {
    project<4>(w, c, 0, raw);
  }
}

// Step sizes. Those after the last step are 0, which leaves the state as it is.
INLINE void step_sizes(const Walk &w, int64_t c, int64_t count, Vec delta[kTile]) {
  raw_steps(w, c, count, delta);
  if (w.p.softplus) {
    for (int t = 0; t < count; t += kGroup) {
      Group e;
      exp_minus_abs(delta + t, e);
      softplus_from(delta + t, e, delta + t);
    }
  }
  for (int64_t t = count; t < kTile; ++t) delta[t] = splat(0.0f);
}

// Advances the state of channels c over `count` steps with inputs x; adds their outputs to `sums` if asked for.
template <int States, bool Inclusive, bool Output>
INLINE void forward_tile(const Walk &w, int64_t c, int64_t count, const float *const *x, float *const *sums) {
  const Scratch &s = w.s;
  const int64_t states = States ? States : w.p.states;
  Vec delta[kTile];
  step_sizes(w, c, count, delta);
  for (int t = 0; t < count; t += kGroup) {
    Group driven, y, decay, near;
    EACH {
      near[i] = near_of(delta[t + i]);
      const Vec input = load(x[t + i] + c);
      driven[i] = delta[t + i] * input;
      y[i] = load(s.skip + c) * input;
    }
    for (int64_t n = 0; n < states; ++n) {
      const float *B = s.dbc + (w.p.rank + n) * kTile + t, *C = B + states * kTile;
      Vec h = load(s.state + n * kBlock + c);
      if (n == 0 || !w.one_rate) exp_of(delta + t, near, w.rate(n, c), decay);
      EACH {
        const Vec decayed = decay[i] * h;
        h = decay[i] * h + driven[i] * B[i];
        if (Output) y[i] += (Inclusive ? h : decayed) * C[i];
      }
      store(s.state + n * kBlock + c, h);
    }
    if (Output) {
      if (w.p.route_weight) EACH y[i] = rounded(w.weight() * y[i]);
      EACH store(sums[t + i] + c, load(sums[t + i] + c) + y[i]);
    }
  }
}

template <int States, bool Inclusive>
void forward_route(const Walk &w, float *sums, int64_t sums_row) {
  const Problem &p = w.p;
  for (int64_t first = 0; first < p.steps; first += kTile) {
    const int64_t count = p.steps - first < kTile ? p.steps - first : kTile;
    w.prefetch(first + kAhead, sums, sums_row);
    const float *x[kTile];
    float *to[kTile];
    w.load_tile(first, count, x);
    for (int64_t t = 0; t < kTile; ++t)
      to[t] = t < count && w.write[first + t] >= 0 ? sums + w.write[first + t] * sums_row : w.s.unread;
    for (int64_t c = 0; c < w.block.count; c += kWidth) forward_tile<States, Inclusive, true>(w, c, count, x, to);
  }
  float *state = p.state + ((w.image * p.taken + w.taken) * p.width + w.block.first) * p.states;
  if (p.states == 1) return store_row_as<Float32>(state, 0, w.s.state, w.block.count);
  for (int64_t c = 0; c < w.block.count; ++c)
    for (int64_t n = 0; n < p.states; ++n) state[c * p.states + n] = w.s.state[n * kBlock + c];
}

// to[t] = the sum over the lanes of v[t]
INLINE void sums_of(const Vec v[kTile], float to[kTile]) {
#if defined(__AVX512F__)
  // Transpose and add: every round halves the number of vectors.
  __m512 a[8], b[4], d[2];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]),
                         _mm512_unpackhi_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d low = (__m512d)a[2 * i], high = (__m512d)a[2 * i + 1];
    b[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(low, high), (__m512)_mm512_unpackhi_pd(low, high));
  }
  for (int i = 0; i < 2; ++i)
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  _mm512_storeu_ps(to, _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd)));
#else
  for (int t = 0; t < kTile; ++t) to[t] = sum_of(v[t]);
#endif
}

// Adds to the gradients of channels c of a tile, going backwards through it. Returns this part of <grad_y, y>.
template <int States, bool Inclusive>
INLINE Vec backward_tile(const Walk &w, int64_t c, int64_t count, const float *const *x, const float *saved) {
  const Problem &p = w.p;
  const Scratch &s = w.s;
  const int64_t states = States ? States : p.states;
  Vec slope[kTile], delta[kTile], decay[kTile], of_delta[kTile], of_driven[kTile];
  raw_steps(w, c, kTile, delta);
  for (int t = 0; t < kTile; t += kGroup) {
    if (p.softplus) {
      Group e;
      exp_minus_abs(delta + t, e);
      sigmoid_from(delta + t, e, slope + t);
      softplus_from(delta + t, e, delta + t);
    } else {
      EACH slope[t + i] = splat(1.0f);
    }
  }
  for (int64_t t = count; t < kTile; ++t) delta[t] = slope[t] = splat(0.0f);  // see step_sizes
  Vec near[kTile];
  for (int t = 0; t < kTile; ++t) near[t] = near_of(delta[t]);
  const Vec weight = splat(w.weight()), skip = load(s.skip + c);
  Vec product = {};
  for (int64_t n = 0; n < states; ++n) {
    const Rate rate = w.rate(n, c);
    const float *B = s.dbc + (p.rank + n) * kTile, *C = B + states * kTile;
    float *grad_B = s.grad_B + n * kTile * kWidth, *grad_C = s.grad_C + n * kTile * kWidth;
    Vec h = load(saved + n * kBlock + c), decayed[kTile];
    for (int t = 0; t < kTile; t += kGroup) {
      if (n == 0 || !w.one_rate) exp_of(delta + t, near + t, rate, decay + t);
      EACH {
        decayed[t + i] = decay[t + i] * h;
        h = decay[t + i] * h + delta[t + i] * load(x[t + i] + c) * B[t + i];
      }
    }
    Vec carry = load(s.grad_state + n * kBlock + c), grad_rate = load(s.grad_rate + n * kBlock + c);
    for (int t = kTile - 1; t >= 0; --t) {
      const Vec driven = delta[t] * load(x[t] + c), given = load(s.grad_y + t * kBlock + c);
      const Vec seen = Inclusive ? decayed[t] + driven * B[t] : decayed[t];
      if (p.route_weight) product += given * (seen * C[t]);
      const Vec g = given * weight;
      const Vec of_decayed = carry + C[t] * g;
      const Vec of_drive = Inclusive ? of_decayed : carry;
      const Vec of_exponent = of_decayed * decayed[t];
      store(grad_C + t * kWidth, (c ? load(grad_C + t * kWidth) : splat(0.0f)) + g * seen);
      store(grad_B + t * kWidth, (c ? load(grad_B + t * kWidth) : splat(0.0f)) + of_drive * driven);
      of_delta[t] = (n ? of_delta[t] : splat(0.0f)) + of_exponent * rate.high;
      of_driven[t] = (n ? of_driven[t] : splat(0.0f)) + of_drive * B[t];
      grad_rate += of_exponent * delta[t];
      carry = decay[t] * of_decayed;
    }
    store(s.grad_state + n * kBlock + c, carry);
    store(s.grad_rate + n * kBlock + c, grad_rate);
  }
  Vec grad_bias = load(s.grad_bias + c), grad_skip = load(s.grad_skip + c);
  for (int t = 0; t < kTile; ++t) {
    const Vec input = load(x[t] + c), given = load(s.grad_y + t * kBlock + c), g = given * weight;
    if (p.route_weight) product += given * (skip * input);
    const Vec grad_raw = ((float)(1 / kLog2E) * of_delta[t] + of_driven[t] * input) * slope[t];
    store(s.grad_raw + t * kBlock + c, grad_raw);
    store(s.out + t * kBlock + c, of_driven[t] * delta[t] + skip * g);
    grad_bias += grad_raw;
    grad_skip += g * input;
  }
  store(s.grad_bias + c, grad_bias);
  store(s.grad_skip + c, grad_skip);
  return product;
}

// The two matrix products behind the step sizes, for one tile.
INLINE void backward_projection(const Walk &w) {
  const Scratch &s = w.s;
  const int64_t rank = w.p.rank, count = w.block.count;
  for (int64_t r = 0; r < rank; ++r) {
    Vec sum[kTile];
    for (int t = 0; t < kTile; ++t) sum[t] = splat(0.0f);
    for (int64_t c = 0; c < count; c += kWidth) {
      const Vec weight = load(s.weight + r * kBlock + c);
      for (int t = 0; t < kTile; ++t) sum[t] += load(s.grad_raw + t * kBlock + c) * weight;
    }
    sums_of(sum, s.grad_dbc + r * kTile);
  }
  constexpr int kTogether = 8;
  for (int64_t c = 0; c < count; c += kWidth) {
    int64_t r = 0;
    for (; r + kTogether <= rank; r += kTogether) {
      Vec sum[kTogether];
      for (int i = 0; i < kTogether; ++i) sum[i] = load(s.grad_weight + (r + i) * kBlock + c);
      for (int t = 0; t < kTile; ++t) {
        const Vec grad_raw = load(s.grad_raw + t * kBlock + c);
        for (int i = 0; i < kTogether; ++i) sum[i] += s.dbc[(r + i) * kTile + t] * grad_raw;
      }
      for (int i = 0; i < kTogether; ++i) store(s.grad_weight + (r + i) * kBlock + c, sum[i]);
    }
    for (; r < rank; ++r) {
      Vec even = load(s.grad_weight + r * kBlock + c), odd = {};
      for (int t = 0; t < kTile; t += 2) {
        even += s.dbc[r * kTile + t] * load(s.grad_raw + t * kBlock + c);
        odd += s.dbc[r * kTile + t + 1] * load(s.grad_raw + (t + 1) * kBlock + c);
      }
      store(s.grad_weight + r * kBlock + c, even + odd);
    }
  }
}

template <int States, bool Inclusive>
void backward_route(const Walk &w, float *grad_x, int64_t grad_x_row, int64_t part, int64_t group, float *product) {
  const Problem &p = w.p;
  const Scratch &s = w.s;
  const int64_t states = p.states, tiles = (p.steps + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    memcpy(s.saved + tile * states * kBlock, s.state, states * kBlock * sizeof(float));
    if (tile + 1 == tiles) break;
    w.prefetch(tile * kTile + kAhead, grad_x, grad_x_row);
    const float *x[kTile];
    w.load_tile(tile * kTile, kTile, x);
    for (int64_t c = 0; c < w.block.count; c += kWidth)
      forward_tile<States, Inclusive, false>(w, c, kTile, x, nullptr);
  }
  memset(s.grad_state, 0, states * kBlock * sizeof(float));
  if (p.grad_state) {
    const float *given = p.grad_state + ((w.image * p.taken + w.taken) * p.width + w.block.first) * states;
    for (int64_t c = 0; c < w.block.count; ++c)
      for (int64_t n = 0; n < states; ++n) s.grad_state[n * kBlock + c] = given[c * states + n];
  }
  memset(s.grad_weight, 0, p.rank * kBlock * sizeof(float));
  memset(s.grad_rate, 0, states * kBlock * sizeof(float));
  memset(s.grad_bias, 0, kBlock * sizeof(float));
  memset(s.grad_skip, 0, kBlock * sizeof(float));
  Vec sum = {};
  float *grad_dbc = p.grad_dbc + part * p.batch * p.tokens * (p.dbc_route ? p.routes : 1) * w.features;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t first = tile * kTile, count = p.steps - first < kTile ? p.steps - first : kTile;
    w.prefetch(first - kAhead, grad_x, grad_x_row);
    const float *x[kTile];
    w.load_tile(first, count, x);
    for (int64_t t = 0; t < kTile; ++t) {
      const int64_t token = t < count ? w.write[first + t] : -1;
      if (token < 0)
        memset(s.grad_y + t * kBlock, 0, kBlock * sizeof(float));
      else
        load_row(s.grad_y + t * kBlock, p.grad_y, w.x_of(token), w.block.count, p.grad_y_type);
    }
    const float *saved = s.saved + tile * states * kBlock;
    for (int64_t c = 0; c < w.block.count; c += kWidth)
      sum += backward_tile<States, Inclusive>(w, c, count, x, saved);
    backward_projection(w);
    for (int64_t n = 0; n < 2 * states; ++n) {
      const float *lanes = n < states ? s.grad_B + n * kTile * kWidth : s.grad_C + (n - states) * kTile * kWidth;
      Vec v[kTile];
      for (int t = 0; t < kTile; ++t) v[t] = load(lanes + t * kWidth);
      sums_of(v, s.grad_dbc + (p.rank + n) * kTile);
    }
    for (int64_t i = 0; i < w.row; i += kTile) transpose(s.grad_dbc + i * kTile, kTile, s.rows + i, w.row);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t token = w.read[first + t];
      if (token < 0) continue;
      add_row(grad_x + token * grad_x_row, s.out + t * kBlock, w.block.count);
      add_row(grad_dbc + w.dbc_of(token), s.rows + t * w.row, w.features);
      if (p.delta) add_row(p.grad_delta + w.delta_of(token), s.grad_raw + t * kBlock, w.block.count);
    }
    memset(s.rows, 0, kTile * w.row * sizeof(float));
  }
  // Rows of the route's slot: rank of dt_weight, states of A, dt_bias, D.
  float *to = p.grad_parameters + (group * p.routes + w.route) * (p.rank + states + 2) * p.width + w.block.first;
  auto add = [&](const float *from, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i, to += p.width) add_row(to, from + i * kBlock, w.block.count);
  };
  add(s.grad_weight, p.rank);
  add(s.grad_rate, states);
  add(s.grad_bias, 1);
  add(s.grad_skip, 1);
  *product = sum_of(sum);
}

}  // namespace
