/* Number formats, in integers: no conversion instruction that may flush a denormal or fuse.
 *
 * Written without branches, so that a compiler turns loops over them into vectors.
 */
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

constexpr uint32_t kNan = 0x7FC00000;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* Every NaN as one. */
inline uint32_t canonical(uint32_t bits) {
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? kNan : bits;
}

inline uint32_t nearest_bf16(uint32_t bits) { return (canonical(bits) + 0x8000) >> 16; }

/* What stochastic rounding may add: nothing to infinities and NaN. */
inline uint32_t dither(uint32_t bits, uint32_t random) {
  return (bits & 0x7F800000) == 0x7F800000 ? 0 : random;
}

inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7FFF) << 13, exponent = magnitude & 0x0F800000;
  const uint32_t special = exponent == 0x0F800000 ? 112u << 23 : 0;
  const uint32_t normal = magnitude + (112u << 23) + special;
  const uint32_t denormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  return float_of((exponent == 0 ? denormal : normal) | uint32_t(half & 0x8000) << 16);
}

/* Nearest, ties to even. */
inline uint16_t float_to_half(uint32_t bits) {
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
  uint32_t half = magnitude < 0x38800000 ? denormal : normal;
  half = magnitude >= 0x47800000 ? 0x7C00 : half;
  return uint16_t(magnitude > 0x7F800000 ? 0x7E00 : half | sign);
}

}  // namespace
