// The scan over one block of channels, forward; gradient.h has the backward pass. Compiled once per target; see vector.h.
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
constexpr int kHeads = kBlock / kBlockUnit;  // of a block at most
constexpr float kDivisible = 12;  // binary logarithms of decays that states are divided by lie below it
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
  // Of heads of a tile, see head_steps: step sizes, their slopes, the state's decay from the start of the tile to a step
  // and its inverse, in rows of kTile steps; and the largest magnitude of that decay's binary logarithm.
  float *head_delta, *head_slope, *head_through, *head_inverse, *head_range;

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
    const int64_t heads = p.head > 1 ? kHeads : 0;
    head_delta = take(heads, kTile);
    head_slope = take(heads, kTile);
    head_through = take(heads, kTile);
    head_inverse = take(heads, kTile);
    head_range = take(heads ? 1 : 0, kTile);
    sums = take(p.tokens, p.block_size);
    if (!backward) return used;
    grad_y = take(kTile, kBlock);
    grad_raw = take(kTile, kBlock);
    grad_state = take(p.states, kBlock);
    grad_weight = take(p.rank, kBlock);
    grad_rate = take(p.rates, kBlock);
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
  const int64_t heads;  // that the block has channels of; 0 if every channel has its own step size
  const int32_t *const read, *const write;
  bool one_rate;  // all states of a channel decay alike, so that one exponential serves them
  bool shared;    // and so do all channels of a head

  Walk(const Problem &problem, const Scratch &scratch, Block of, int64_t b, int64_t j, int64_t k)
      : p(problem), s(scratch), block(of), image(b), taken(j), route(k), features(p.rank + 2 * p.states),
        row(round_up(features, kTile)), heads(problem.head > 1 ? head_of(of.count - 1) + 1 : 0),
        read(p.read + k * p.steps), write(p.write + k * p.steps) {
    for (int64_t r = 0; r < p.rank; ++r)
      load_row_as<Float32>(s.weight + r * kBlock, p.dt_weight, k * p.dt_weight_route + r * p.width + block.first,
                           block.count);
    if (heads) {
      memset(s.bias, 0, kBlock * sizeof(float));
      if (p.dt_bias) load_row_as<Float32>(s.bias, p.dt_bias, k * p.dt_bias_route + block.first / p.head, heads);
    } else {
      set(s.bias, p.dt_bias, k * p.dt_bias_route);
    }
    set(s.skip, p.D, k * p.D_route);
    memset(s.rate, 0, p.states * kBlock * sizeof(float));
    const float *A = p.A + k * p.A_route + block.first * p.rates;
    for (int64_t n = 0; n < p.states; ++n)
      for (int64_t c = 0; c < block.count; ++c) s.rate[n * kBlock + c] = A[c * p.rates + n % p.rates];
    for (int64_t i = 0; i < p.states * kBlock; ++i) {
      double exact = s.rate[i] * kLog2E;
      // Finite, because the step sizes of no steps are 0, and 0 times infinity is no number.
      exact = exact < -3e38 ? -3e38 : exact;
      s.rate[i] = (float)exact;
      const double low = exact - s.rate[i];
      s.rate[p.states * kBlock + i] = low < kNear ? (low > -kNear ? (float)low : -kNear) : kNear;
    }
    one_rate = true;
    for (int64_t n = 1; n < p.states && p.rates > 1 && one_rate; ++n)
      one_rate = same_rate(n);
    shared = heads && p.rates == 1;
    // Of the whole route, as its blocks depend on the number of threads.
    const float *rates = p.A + k * p.A_route;
    for (int64_t first = 0; first < p.width && shared; first += p.head)
      for (int64_t c = 1; c < p.head; ++c) shared &= rates[first + c] == rates[first];
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

  int64_t delta_of(int64_t token) const { return (group_of(token, p.delta_route) * p.width + block.first) / p.head; }

  // Which of the block's heads a channel of it belongs to.
  int64_t head_of(int64_t c) const { return (block.first % p.head + c) / p.head; }

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
      if (p.delta)
        load_row(s.raw + t * kBlock, p.delta, delta_of(token), heads ? heads : block.count, p.delta_type);
    }
    for (int64_t i = 0; i < row; i += kTile) transpose(s.rows + i, row, s.dbc + i * kTile, kTile);
    if (heads) head_steps(count);
  }

  // Computes what all channels of a head have in common, for the steps of a tile side by side.
  void head_steps(int64_t count) const {
    for (int64_t h = 0; h < heads; ++h)
      for (int t = 0; t < kTile; ++t) s.head_delta[h * kTile + t] = s.raw[t * kBlock + h] + s.bias[h];
    for (int64_t first = 0; first < heads * kTile; first += kGroup * kWidth) {
      Group delta, slope;
      EACH delta[i] = load(s.head_delta + first + i * kWidth);
      EACH slope[i] = splat(1.0f);
      if (p.softplus) {
        Group e;
        exp_minus_abs(delta, e);
        sigmoid_from(delta, e, slope);
        softplus_from(delta, e, delta);
      }
      EACH store(s.head_delta + first + i * kWidth, delta[i]);
      EACH store(s.head_slope + first + i * kWidth, slope[i]);
    }
    for (int64_t h = 0; h < heads; ++h) {
      float *delta = s.head_delta + h * kTile;
      double sum = 0, low = 0, high = 0;
      for (int64_t t = count; t < kTile; ++t) delta[t] = s.head_slope[h * kTile + t] = 0;
      for (int t = 0; t < kTile; ++t) {
        sum += delta[t];
        low = sum < low ? sum : low;
        high = sum > high ? sum : high;
        const float rounded = (float)sum;
        s.head_through[h * kTile + t] = rounded;
        s.head_inverse[h * kTile + t] = (float)(sum - rounded);
      }
      const float rate = s.rate[channel_of(h)];
      s.head_range[h] = (float)((high > -low ? high : -low) * (rate < 0 ? -rate : rate) + 0 * sum);  // keeps NaN
    }
    for (int64_t first = 0; first < heads * kTile && shared; first += kGroup * kWidth) {
      // Of sums in two parts: products of what is nearly 1 would be biased, and rounding a large sum shows in the ratio
      // of two decays.
      Group near, through;
      Rate rates[kGroup];
      EACH {
        const int64_t channel = channel_of((first + i * kWidth) / kTile);
        rates[i] = {splat(s.rate[channel]), splat(s.rate[p.states * kBlock + channel])};
        through[i] = load(s.head_through + first + i * kWidth);
        near[i] = near_of(through[i]);
      }
      exp_of(through, near, rates, through);
      EACH through[i] += through[i] * ((float)(1 / kLog2E) * rates[i].high * load(s.head_inverse + first + i * kWidth));
      EACH store(s.head_through + first + i * kWidth, through[i]);
      EACH store(s.head_inverse + first + i * kWidth, 1.0f / through[i]);
    }
  }

  // The first channel of one of the block's heads.
  int64_t channel_of(int64_t head) const {
    return head > 0 && head < heads ? head * p.head - block.first % p.head : 0;
  }

  // How many vectors of channels from c can keep their states divided by their decay since the start of the tile.
  int64_t divisible(int64_t c) const {
    const int64_t head = shared ? head_of(c) : 0;
    if (!shared || !(s.head_range[head] < kDivisible)) return 0;
    return c + kWidth < block.count && head_of(c + kWidth) == head ? 2 : 1;
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
  if (w.heads) {
    for (int t = 0; t < kTile; ++t) delta[t] = splat(w.s.head_delta[w.head_of(c) * kTile + t]);
    return;
  }
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

// forward_tile where all channels of a head decay alike, for `Vectors` vectors of them: states divided by that decay
// take two operations a step.
template <int States, bool Inclusive, bool Output, int Vectors>
INLINE void forward_divided(const Walk &w, int64_t c, const float *const *x, float *const *sums) {
  constexpr int kTogether = (kWidth == 16 ? 8 : 4) / Vectors;  // as many sums as registers allow
  const Scratch &s = w.s;
  const int64_t states = States ? States : w.p.states, head = w.head_of(c) * kTile;
  const float *delta = s.head_delta + head, *through = s.head_through + head, *inverse = s.head_inverse + head;
  for (int t = 0; t < kTile; t += kTogether) {
    Vec driven[kTogether][Vectors], y[kTogether][Vectors];
    for (int i = 0; i < kTogether; ++i)
      for (int v = 0; v < Vectors; ++v) {
        driven[i][v] = delta[t + i] * inverse[t + i] * load(x[t + i] + c + v * kWidth);
        y[i][v] = splat(0.0f);
      }
    const float after = t + kTogether < kTile ? 1.0f : through[kTile - 1];
    for (int64_t n = 0; n < states; ++n) {
      const float *B = s.dbc + (w.p.rank + n) * kTile + t, *C = B + states * kTile;
      float *state = s.state + n * kBlock + c;
      Vec g[Vectors];
      for (int v = 0; v < Vectors; ++v) g[v] = load(state + v * kWidth);
      for (int i = 0; i < kTogether; ++i)
        for (int v = 0; v < Vectors; ++v) {
          const Vec before = g[v];
          g[v] += driven[i][v] * B[i];
          if (Output) y[i][v] += (Inclusive ? g[v] : before) * C[i];
        }
      for (int v = 0; v < Vectors; ++v) store(state + v * kWidth, after * g[v]);
    }
    for (int i = 0; i < kTogether && Output; ++i)
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = c + v * kWidth;
        Vec out = through[t + i] * y[i][v] + load(s.skip + at) * load(x[t + i] + at);
        if (w.p.route_weight) out = rounded(w.weight() * out);
        store(sums[t + i] + at, load(sums[t + i] + at) + out);
      }
  }
}

// Advances the state of channels c over `count` steps with inputs x; adds their outputs to `sums` if asked for. Returns
// the number of channels.
template <int States, bool Inclusive, bool Output>
INLINE int64_t forward_tile(const Walk &w, int64_t c, int64_t count, const float *const *x, float *const *sums) {
  const Scratch &s = w.s;
  const int64_t states = States ? States : w.p.states;
  if (const int64_t vectors = w.divisible(c)) {
    vectors == 2 ? forward_divided<States, Inclusive, Output, 2>(w, c, x, sums)
                 : forward_divided<States, Inclusive, Output, 1>(w, c, x, sums);
    return vectors * kWidth;
  }
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
  return kWidth;
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
    for (int64_t c = 0; c < w.block.count;) c += forward_tile<States, Inclusive, true>(w, c, count, x, to);
  }
  float *state = p.state + ((w.image * p.taken + w.taken) * p.width + w.block.first) * p.states;
  if (p.states == 1) return store_row_as<Float32>(state, 0, w.s.state, w.block.count);
  for (int64_t c = 0; c < w.block.count; ++c)
    for (int64_t n = 0; n < p.states; ++n) state[c * p.states + n] = w.s.state[n * kBlock + c];
}

}  // namespace
