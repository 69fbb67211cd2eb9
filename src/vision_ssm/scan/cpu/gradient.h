// The backward pass of the scan over one block of channels: tile by tile from the end, each from the state at its start.
#pragma once
#include "kernel.h"

namespace {

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

// backward_tile where forward_divided applies. With g the divided state and k its gradient after a step, what flows
// through the step is k g from the state before: in front of the tile's last step that product itself, in front of an
// earlier one what flows through the next, plus what the step puts out, less what it takes in.
template <int States, bool Inclusive, int Vectors>
INLINE Vec backward_divided(const Walk &w, int64_t c, const float *const *x, const float *saved) {
  constexpr int kTogether = (kWidth == 16 ? 8 : 4) / Vectors;
  const Scratch &s = w.s;
  const int64_t states = States ? States : w.p.states, head = w.head_of(c) * kTile;
  const float *delta = s.head_delta + head, *slope = s.head_slope + head;
  const float *through = s.head_through + head, *inverse = s.head_inverse + head;
  Vec driven[kTile][Vectors], given[kTile][Vectors], y[kTile][Vectors], flow[Vectors] = {};
  for (int t = 0; t < kTile; ++t)
    for (int v = 0; v < Vectors; ++v) {
      driven[t][v] = delta[t] * inverse[t] * load(x[t] + c + v * kWidth);
      given[t][v] = w.weight() * through[t] * load(s.grad_y + t * kBlock + c + v * kWidth);
    }
  for (int t = 0; t < kTile; t += kTogether) {
    Vec sum[kTogether][Vectors] = {};
    for (int64_t n = 0; n < states; ++n) {
      const float *B = s.dbc + (w.p.rank + n) * kTile + t, *C = B + states * kTile;
      float *grad_C = s.grad_C + (n * kTile + t) * kWidth;
      Vec g[Vectors];
      for (int v = 0; v < Vectors; ++v) g[v] = load((t ? s.state : saved) + n * kBlock + c + v * kWidth);
      for (int i = 0; i < kTogether; ++i) {
        Vec of_C = c ? load(grad_C + i * kWidth) : splat(0.0f);
        for (int v = 0; v < Vectors; ++v) {
          const Vec before = g[v];
          g[v] += driven[t + i][v] * B[i];
          const Vec seen = Inclusive ? g[v] : before;
          sum[i][v] += seen * C[i];
          of_C += given[t + i][v] * seen;
        }
        store(grad_C + i * kWidth, of_C);
      }
      for (int v = 0; v < Vectors; ++v) store(s.state + n * kBlock + c + v * kWidth, g[v]);
    }
    for (int i = 0; i < kTogether; ++i)
      for (int v = 0; v < Vectors; ++v) y[t + i][v] = sum[i][v];
  }
  for (int64_t n = 0; n < states; ++n)
    for (int v = 0; v < Vectors; ++v) {
      float *carry = s.grad_state + n * kBlock + c + v * kWidth;
      const Vec k = through[kTile - 1] * load(carry);
      flow[v] += k * load(s.state + n * kBlock + c + v * kWidth);
      store(carry, k);
    }
  Vec product = {};
  for (int t = kTile - kTogether; t >= 0; t -= kTogether) {
    Vec of_driven[kTogether][Vectors] = {};
    for (int64_t n = 0; n < states; ++n) {
      const float *B = s.dbc + (w.p.rank + n) * kTile + t, *C = B + states * kTile;
      float *grad_B = s.grad_B + (n * kTile + t) * kWidth, *carry = s.grad_state + n * kBlock + c;
      Vec k[Vectors];
      for (int v = 0; v < Vectors; ++v) k[v] = load(carry + v * kWidth);
      for (int i = kTogether - 1; i >= 0; --i) {
        Vec of_B = c ? load(grad_B + i * kWidth) : splat(0.0f);
        for (int v = 0; v < Vectors; ++v) {
          const Vec after = k[v];
          k[v] += given[t + i][v] * C[i];
          const Vec g = Inclusive ? k[v] : after;
          of_driven[i][v] += g * B[i];
          of_B += g * driven[t + i][v];
        }
        store(grad_B + i * kWidth, of_B);
      }
      for (int v = 0; v < Vectors; ++v) store(carry + v * kWidth, k[v]);
    }
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = c + v * kWidth;
      const Vec rate = load(s.rate + at), skip = load(s.skip + at);
      Vec grad_rate = load(s.grad_rate + at), grad_bias = load(s.grad_bias + at), grad_skip = load(s.grad_skip + at);
      for (int i = kTogether - 1; i >= 0; --i) {
        const int j = t + i;
        const Vec input = load(x[j] + at), grad_y = load(s.grad_y + j * kBlock + at), g = w.weight() * grad_y;
        if (w.p.route_weight) product += grad_y * (through[j] * y[j][v] + skip * input);
        flow[v] += given[j][v] * y[j][v] - of_driven[i][v] * driven[j][v];
        const Vec of_drive = inverse[j] * of_driven[i][v];
        const Vec grad_raw = ((float)(1 / kLog2E) * rate * flow[v] + of_drive * input) * slope[j];
        store(s.grad_raw + j * kBlock + at, grad_raw);
        store(s.out + j * kBlock + at, of_drive * delta[j] + skip * g);
        grad_rate += flow[v] * delta[j];
        grad_bias += grad_raw;
        grad_skip += g * input;
      }
      store(s.grad_rate + at, grad_rate);
      store(s.grad_bias + at, grad_bias);
      store(s.grad_skip + at, grad_skip);
    }
  }
  return product;
}

// Adds to the gradients of channels c of a tile, going backwards through it. Returns this part of <grad_y, y>.
template <int States, bool Inclusive>
INLINE Vec backward_tile(const Walk &w, int64_t c, int64_t count, const float *const *x, const float *saved) {
  const Problem &p = w.p;
  const Scratch &s = w.s;
  const int64_t states = States ? States : p.states;
  Vec slope[kTile], delta[kTile], decay[kTile], of_delta[kTile], of_driven[kTile];
  const int64_t head = w.heads ? w.head_of(c) * kTile : 0;
  if (!w.heads) raw_steps(w, c, kTile, delta);
  for (int t = 0; t < kTile; t += kGroup) {
    if (w.heads) {
      EACH delta[t + i] = splat(s.head_delta[head + t + i]);
      EACH slope[t + i] = splat(s.head_slope[head + t + i]);
    } else if (p.softplus) {
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
    float *of_rate = s.grad_rate + (p.rates == 1 ? 0 : n) * kBlock + c;
    Vec carry = load(s.grad_state + n * kBlock + c), grad_rate = load(of_rate);
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
    store(of_rate, grad_rate);
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
    for (int64_t c = 0; c < w.block.count;) c += forward_tile<States, Inclusive, false>(w, c, kTile, x, nullptr);
  }
  memset(s.grad_state, 0, states * kBlock * sizeof(float));
  if (p.grad_state) {
    const float *given = p.grad_state + ((w.image * p.taken + w.taken) * p.width + w.block.first) * states;
    for (int64_t c = 0; c < w.block.count; ++c)
      for (int64_t n = 0; n < states; ++n) s.grad_state[n * kBlock + c] = given[c * states + n];
  }
  memset(s.grad_weight, 0, p.rank * kBlock * sizeof(float));
  memset(s.grad_rate, 0, p.rates * kBlock * sizeof(float));
  memset(s.grad_bias, 0, kBlock * sizeof(float));
  memset(s.grad_skip, 0, kBlock * sizeof(float));
  Vec sum = {};
  float *grad_dbc = p.grad_dbc + part * p.batch * p.tokens * (p.dbc_route ? p.routes : 1) * w.features;
  float *grad_delta = p.grad_delta;
  if (w.heads) grad_delta += part * p.batch * p.tokens * (p.delta_route ? p.routes : 1) * (p.width / p.head);
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
    for (int64_t c = 0, vectors; c < w.block.count; c += vectors * kWidth) {
      vectors = w.divisible(c);
      sum += vectors == 2   ? backward_divided<States, Inclusive, 2>(w, c, x, saved)
             : vectors == 1 ? backward_divided<States, Inclusive, 1>(w, c, x, saved)
                            : backward_tile<States, Inclusive>(w, c, count, x, saved);
      vectors = vectors ? vectors : 1;
    }
    backward_projection(w);
    float of_head[kHeads][kTile];
    for (int64_t h = 0, c = 0; h < w.heads; ++h) {
      Vec sum[kTile] = {};
      for (; c < w.block.count && w.head_of(c) == h; c += kWidth)
        for (int t = 0; t < kTile; ++t) sum[t] += load(s.grad_raw + t * kBlock + c);
      sums_of(sum, of_head[h]);
    }
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
      if (w.heads)
        for (int64_t h = 0; h < w.heads; ++h) grad_delta[w.delta_of(token) + h] += of_head[h][t];
      else if (p.delta)
        add_row(p.grad_delta + w.delta_of(token), s.grad_raw + t * kBlock, w.block.count);
    }
    memset(s.rows, 0, kTile * w.row * sizeof(float));
  }
  // Rows of the route's slot: rank of dt_weight, rates of A, dt_bias, D.
  float *to = p.grad_parameters + (group * p.routes + w.route) * (p.rank + p.rates + 2) * p.width + w.block.first;
  auto add = [&](const float *from, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i, to += p.width) add_row(to, from + i * kBlock, w.block.count);
  };
  add(s.grad_weight, p.rank);
  add(s.grad_rate, p.rates);
  add(s.grad_bias, 1);
  add(s.grad_skip, 1);
  *product = sum_of(sum);
}

}  // namespace
