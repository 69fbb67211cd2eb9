// One call of the operator, as Python hands it over. `library.py` declares the same fields in the same order.
#pragma once
#include <stdint.h>

namespace vision_ssm {

enum Type : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Problem {
  // Sizes. `taken` routes of the pool of `routes` are walked per image.
  int64_t batch, tokens, channels, routes, taken, steps, width, states, rates, rank;  // rates: per channel, `states` or 1
  int64_t head;  // neighboring channels with one step size; 1, a multiple of 16, or `width`
  int64_t softplus, inclusive;
  // Dtypes of the tensors that may be of half precision.
  int64_t x_type, dbc_type, delta_type, y_type, grad_y_type;
  // Elements from one route to the next in arguments that have such an axis; 0: one for all routes.
  int64_t dbc_route, delta_route, A_route, dt_weight_route, dt_bias_route, D_route;
  // Arguments, all dense; null where not given. Parameters are float32.
  const void *x, *dbc, *delta;
  const float *A, *dt_weight, *dt_bias, *D, *route_weight;
  const int32_t *read, *write;
  const int64_t *route_index;
  // Outputs of the forward pass: y (batch, tokens, channels) dense, state (batch, taken, width, states).
  void *y;
  float *state;
  // The channels of a route are cut into `blocks` of `block_size`, a multiple of 16. `parts` is 1, or `taken`: then every
  // route of an image is a unit of its own and writes its output into its slice of partial (taken, batch, tokens,
  // channels), and the slices are added up afterwards.
  int64_t blocks, block_size, parts;
  float *partial;
  // The backward pass: gradients in, gradients out, the latter zero beforehand except grad_x. Each of `groups` of images
  // has its slice of the parameters' gradients. With `parts` > 1 every block of a group is a unit of its own and has its
  // slice of dbc's gradient.
  const void *grad_y;
  const float *grad_state;
  void *grad_x;              // (batch, tokens, channels) dense, of x_type
  float *grad_dbc;           // (parts, batch, tokens, routes or 1, rank + 2 states)
  float *grad_delta;         // (batch, tokens, routes or 1, width), or of heads (parts, batch, tokens, routes or 1, heads)
  float *grad_parameters;    // (groups, routes, rank + rates + 2, width): dt_weight, A, dt_bias, D
  float *grad_route_weight;  // (blocks, batch, taken)
  int64_t groups;
  int64_t threads;
};

}  // namespace vision_ssm
