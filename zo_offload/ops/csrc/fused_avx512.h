/* The usual job on bfloat16 in registers: one signed step, the two signs of a point, 32 elements.
 *
 * A pair of bfloat16 is one 32-bit lane: the even element moves up, the odd one is masked, and
 * nothing is widened or packed. Whatever needs care (NaN, and infinities where they are rounded by
 * chance) is done element by element.
 */
#pragma once

#include "tile.h"

namespace {

struct Fused {
  bool fits = false, moves = false;
  uint32_t points = 0;
  const zo_draw *step = nullptr, *point = nullptr;

  explicit Fused(const zo_job &job) {
    const bool planes = job.format == ZO_BF16 || job.format == ZO_BF16_SR;
    if (!planes || job.direction != ZO_RADEMACHER || job.dither || job.num_ahead) return;
    if (job.num_steps > 1 || job.num_points > 2 || job.num_steps + job.num_points == 0) return;
    if (job.num_steps == 1) {
      const zo_step &only = job.steps[0];
      if (only.decay != 1.0 || only.num_draws != 1 || only.draws[0].coefficient == 0.0) return;
      moves = true, step = only.draws;
    }
    points = job.num_points;
    if (points) point = &job.points[0].draw;
    if (points == 2) {
      const zo_draw &other = job.points[1].draw;
      if (!same_direction(*point, other) || other.coefficient != -point->coefficient) return;
    }
    fits = true;
  }
};

/* Even and odd elements of 32, each in the upper half of a lane or as fp32. */
struct Pairs {
  __m512i even, odd;
};

inline Pairs apart(__m512i pairs) {
  return {_mm512_slli_epi32(pairs, 16), _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000)))};
}

/* The upper halves of both. */
inline __m512i together(Pairs bits) {
  const __m512i high = _mm512_set1_epi32(int(0xFFFF0000));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits.even, 16), bits.odd, high, 0xF8);
}

/* plus or minus the coefficient, by the bits of a word: set means minus. */
inline Pairs signed_terms(uint32_t word, __m512i coefficient) {
  const __m512i signs = _mm512_maskz_set1_epi16(word, short(0x8000));
  const __m512i high = _mm512_set1_epi32(int(0xFFFF0000));
  return {_mm512_xor_si512(coefficient, _mm512_slli_epi32(signs, 16)),
          _mm512_ternarylogic_epi32(coefficient, signs, high, 0x78)};
}

inline __m512i plus(__m512i a, __m512i b) {
  return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}

inline __m512i minus(__m512i a, __m512i b) {
  return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}

template <int kClass>
inline bool any_of_class(Pairs bits) {
  return _kortestz_mask16_u8(_mm512_fpclass_ps_mask(_mm512_castsi512_ps(bits.even), kClass),
                             _mm512_fpclass_ps_mask(_mm512_castsi512_ps(bits.odd), kClass)) == 0;
}

inline __m512i rounded(Pairs bits, __m512i half) {
  return together({_mm512_add_epi32(bits.even, half), _mm512_add_epi32(bits.odd, half)});
}

inline bool is_finite(uint32_t bits) { return (bits & 0x7F800000) != 0x7F800000; }

inline void put(void *out, __m512i value, bool streaming) {
  if (streaming)
    _mm512_stream_si512(static_cast<__m512i *>(out), value);
  else
    _mm512_storeu_si512(out, value);
}

constexpr int kAnyNan = 0x81, kNanOrInfinity = 0x99;

/* What a tile is worked on with. */
struct Bench {
  uint16_t *wire, *rest, *out[2];
  const uint16_t *random;
  const uint32_t *step_signs, *point_signs;
  uint32_t step_bits, point_bits;
  bool streaming;
};

/* Elements e to e + 32, one by one. */
template <uint32_t kFormat, bool kMoves, uint32_t kPoints>
inline void with_care(const Bench &bench, uint32_t e) {
  for (uint32_t i = 0; i < 32; ++i) {
    uint16_t &wire = bench.wire[e + i];
    if (kMoves) {
      const float step = float_of(bench.step_bits ^ (bench.step_signs[e / 32] >> i) << 31);
      const uint32_t low = kFormat == ZO_BF16 ? uint32_t(int32_t(int16_t(bench.rest[e + i]))) : 0;
      const uint32_t master = (uint32_t(wire) << 16) + low;
      uint32_t bits = canonical(bits_of(float_of(master) - step));
      if (kFormat == ZO_BF16)
        bench.rest[e + i] = uint16_t(bits), bits += 0x8000;
      else
        bits += dither(bits, bench.random[e + i]);
      wire = uint16_t(bits >> 16);
    }
    const float seen = float_of(uint32_t(wire) << 16);
    const float term = float_of(bench.point_bits ^ (bench.point_signs[e / 32] >> i) << 31);
    if (kPoints > 0) bench.out[0][e + i] = uint16_t(nearest_bf16(bits_of(seen + term)));
    if (kPoints > 1) bench.out[1][e + i] = uint16_t(nearest_bf16(bits_of(seen - term)));
  }
}

template <uint32_t kFormat, bool kMoves, uint32_t kPoints>
inline void fused_groups(const Bench &bench, uint32_t count) {
  const __m512i half = _mm512_set1_epi32(0x8000), low = _mm512_set1_epi32(0xFFFF);
  const __m512i step = _mm512_set1_epi32(int(bench.step_bits));
  const __m512i eps = _mm512_set1_epi32(int(bench.point_bits));
  const bool finite = is_finite(bench.step_bits) && is_finite(bench.point_bits);
  for (uint32_t e = 0; e < count; e += 32) {
    Pairs seen = apart(_mm512_loadu_si512(bench.wire + e));
    Pairs master = seen;
    if (kMoves) {
      if (kFormat == ZO_BF16) {
        const __m512i lows = _mm512_loadu_si512(bench.rest + e);
        const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(lows, 16), 16);
        master = {_mm512_add_epi32(master.even, even),
                  _mm512_add_epi32(master.odd, _mm512_srai_epi32(lows, 16))};
      }
      const Pairs terms = signed_terms(bench.step_signs[e / 32], step);
      master = {minus(master.even, terms.even), minus(master.odd, terms.odd)};
    }
    if (!finite || any_of_class<kMoves && kFormat == ZO_BF16_SR ? kNanOrInfinity : kAnyNan>(master)) {
      with_care<kFormat, kMoves, kPoints>(bench, e);
      continue;
    }
    if (kMoves) {
      if (kFormat == ZO_BF16) {
        const __m512i lows = _mm512_ternarylogic_epi32(
            low, master.even, _mm512_slli_epi32(master.odd, 16), 0xEA); /* (low & even) | odd */
        _mm512_storeu_si512(bench.rest + e, lows);
        master = {_mm512_add_epi32(master.even, half), _mm512_add_epi32(master.odd, half)};
      } else {
        const __m512i lanes = _mm512_loadu_si512(bench.random + e);
        master = {_mm512_add_epi32(master.even, _mm512_and_si512(lanes, low)),
                  _mm512_add_epi32(master.odd, _mm512_srli_epi32(lanes, 16))};
      }
      const __m512i pairs = together(master);
      _mm512_storeu_si512(bench.wire + e, pairs);
      seen = apart(pairs);
    }
    if (kPoints == 0) continue;
    const Pairs terms = signed_terms(bench.point_signs[e / 32], eps);
    const Pairs up = {plus(seen.even, terms.even), plus(seen.odd, terms.odd)};
    put(bench.out[0] + e, rounded(up, half), bench.streaming);
    if (kPoints == 1) continue;
    const Pairs down = {minus(seen.even, terms.even), minus(seen.odd, terms.odd)};
    put(bench.out[1] + e, rounded(down, half), bench.streaming);
  }
}

typedef void (*Groups)(const Bench &, uint32_t);

template <uint32_t kFormat>
inline Groups groups_of(const Fused &fused) {
  if (!fused.moves)
    return fused.points == 1 ? fused_groups<kFormat, false, 1> : fused_groups<kFormat, false, 2>;
  if (fused.points == 0) return fused_groups<kFormat, true, 0>;
  return fused.points == 1 ? fused_groups<kFormat, true, 1> : fused_groups<kFormat, true, 2>;
}

inline void fused_tile(const zo_job &job, const Fused &fused, const Place &place, uint64_t at,
                       uint32_t count, Room &room) {
  Bench bench = {};
  bench.wire = static_cast<uint16_t *>(job.wire) + at;
  bench.step_signs = room.words, bench.point_signs = room.signs;
  bench.random = reinterpret_cast<const uint16_t *>(room.extra);
  if (fused.moves) {
    if (job.format == ZO_BF16) bench.rest = static_cast<uint16_t *>(job.rest) + at;
    words_of(*fused.step, kNoise, place, count, Signs::kPerBlock, room.words);
    bench.step_bits = bits_of(float(fused.step->coefficient * place.scale));
    if (job.format == ZO_BF16_SR) {
      const zo_draw rounding = {job.steps[0].seed, 0.0, job.steps[0].step, 0};
      words_of(rounding, kRounding, place, count, 8, room.extra);
    }
  }
  bench.streaming = job.streaming;
  if (fused.points) {
    words_of(*fused.point, kNoise, place, count, Signs::kPerBlock, room.signs);
    bench.point_bits = bits_of(float(fused.point->coefficient * place.scale));
    for (uint32_t p = 0; p < fused.points; ++p) {
      bench.out[p] = static_cast<uint16_t *>(job.points[p].out) + (at - job.first);
      bench.streaming &= reinterpret_cast<uintptr_t>(bench.out[p]) % 64 == 0;
    }
  }
  const Groups groups =
      job.format == ZO_BF16 ? groups_of<ZO_BF16>(fused) : groups_of<ZO_BF16_SR>(fused);
  groups(bench, count);
}

}  // namespace
