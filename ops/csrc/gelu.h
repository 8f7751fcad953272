// The GELU and its slope, in vectors of attention_strips.h.
#pragma once

#include "attention_strips.h"
#include "product.h"

namespace phx {
namespace {

struct Curved {
  Vec value, slope;
};

// Hendrycks & Gimpel 2016, to about 1e-6: x F(x), where F is the normal distribution, and F(x) + x f(x); or by
// its tanh, where F is the logistic function of a cubic.
template <Gelu kKind>
PHX_INLINE Curved gelu(Vec x) {
  const Vec one = splat(1.0f), square = x * x;
  if (kKind == Gelu::kTanh) {
    const Vec twice = splat(1.5957691216057308f);  // 2 sqrt(2 / pi)
    const Vec u = twice * x * (one + splat(0.044715f) * square);
    const Vec low = u > Vec{} ? -u : u, power = exponential(low);  // e^-|u|
    const Vec share = one / (one + power), f = u > Vec{} ? share : power * share;
    const Vec slope = f + x * (f * (one - f)) * twice * (one + splat(3 * 0.044715f) * square);
    // Where the cubic is beyond all bounds its product with 0 would be no number.
    return {x * f, square > splat(400.0f) ? (x > Vec{} ? one : Vec{}) : slope};
  }
  const Vec size = x > Vec{} ? x : -x;
  const Vec power = exponential(splat(-0.5f) * square);  // e^(-x^2 / 2)
  // Abramowitz & Stegun 1964, 7.1.26: 1 - erf(size / sqrt 2).
  const Vec t = one / (one + splat(0.23164190f) * size);
  Vec p = splat(1.061405429f);
  p = p * t + splat(-1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t + splat(-0.284496736f);
  p = p * t + splat(0.254829592f);
  const Vec above = splat(0.5f) * p * t * power, f = x > Vec{} ? one - above : above;
  return {x * f, f + x * power * splat(0.3989422804014327f)};
}

}  // namespace
}  // namespace phx
