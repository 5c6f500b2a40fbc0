/* The usual job on bfloat16 in registers: one step, the two signs of a point, 32 elements at a time.
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
    if (!planes || job.dither || job.num_ahead || job.codec != ZO_IDENTITY) return;
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
      if (!same_direction(*point, other) || !same_bits(other.coefficient, -point->coefficient)) return;
    }
    fits = true;
  }
};

inline bool is_finite(uint32_t bits) { return (bits & 0x7F800000) != 0x7F800000; }

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

/* The terms of a draw on a tile: plus or minus the coefficient by the bits of a word, set means
 * minus. */
struct FusedSigns {
  uint32_t bits = 0;
  const uint32_t *words = nullptr;

  FusedSigns() = default;
  FusedSigns(const zo_job &, const zo_draw &draw, const Place &place, uint32_t count, Table *,
             FusedRoom &room)
      : bits(bits_of(float(draw.coefficient * place.scale))), words(room.words) {
    words_of(draw, kNoise, place, count, Signs::kPerBlock, room.words);
  }

  Pairs pairs(uint32_t e) const {
    const __m512i minus = _mm512_set1_epi16(short(0x8000));
    const __m512i signs = _mm512_maskz_mov_epi16(words[e / 32], minus);
    const __m512i coefficient = _mm512_set1_epi32(int(bits));
    const __m512i high = _mm512_set1_epi32(int(0xFFFF0000));
    return {_mm512_xor_si512(coefficient, _mm512_slli_epi32(signs, 16)),
            _mm512_ternarylogic_epi32(coefficient, signs, high, 0x78)};
  }

  uint32_t one(uint32_t e) const { return bits ^ (words[e / 32] >> e % 32) << 31; }
  bool finite() const { return is_finite(bits); }
};

/* Magnitudes looked up one by one, of every 32 elements the even ones first; bit 11 of a lane says
 * plus.
 *
 * Looking up keeps the load ports busy, Philox the vector ports: a round of the next 128 elements'
 * stands between every few elements that are looked up, and so both go on at once.
 */
struct FusedCells {
  static constexpr uint32_t kChunk = 128, kWords = kChunk / 2, kVectors = kChunk / 8 / kLanes;
  const float *terms = nullptr;
  const uint32_t *words = nullptr;
  bool are_finite = false;

  FusedCells() = default;
  FusedCells(const zo_job &job, const zo_draw &draw, const Place &place, uint32_t count,
             Table *table, FusedRoom &room)
      : terms(room.terms), words(room.words) {
    table->make(draw.coefficient * place.scale, job.cells);
    are_finite = is_finite(bits_of(table->values[kCells / 2 - 1]));
    const Stream counter = counter_of(draw, kNoise, place);
    uint64_t block = place.element / Cells::kPerBlock;
    philox<kVectors>(counter, block, room.words);
    for (uint32_t e = 0; e < count; e += kChunk) {
      find_places(room.words + e / 2, room.places);
      if (e + kChunk == count) {
        look_up<0, kChunk / 8>(table->values, room.places, room.terms + e);
        break;
      }
      block += kChunk / Cells::kPerBlock;
      Philox<kVectors> next(counter, block);
      with_rounds<0>(next, table->values, room.places, room.terms + e);
      next.finish(room.words + e / 2 + kWords);
    }
  }

  static void find_places(const uint32_t *words, uint16_t *places) {
    const __m512i low = _mm512_set1_epi16(0x7FF), sign = _mm512_set1_epi16(0x800);
    for (uint32_t e = 0; e < kChunk; e += 32) {
      const __m512i lanes = _mm512_loadu_si512(words + e / 2);
      const __mmask32 below = _mm512_testn_epi16_mask(lanes, sign);
      const __m512i upper = _mm512_and_si512(lanes, low);
      _mm512_store_si512(places + e, _mm512_xor_si512(upper, _mm512_maskz_mov_epi16(below, low)));
    }
  }

  /* Eights kFirst to kLast of a chunk: four even elements, four odd ones. */
  template <uint32_t kFirst, uint32_t kLast>
  static inline void look_up(const float *__restrict values, const uint16_t *__restrict places,
                             float *__restrict terms) {
    if constexpr (kFirst < kLast) {
      constexpr uint32_t e = kFirst * 8;
      uint32_t pair[4];
      memcpy(pair, places + e, sizeof pair);
      float *to = terms + e / 32 * 32 + e % 32 / 2;
      _mm_store_ps(to, four_of(values, uint16_t(pair[0]), uint16_t(pair[1]), uint16_t(pair[2]),
                               uint16_t(pair[3])));
      _mm_store_ps(to + 16,
                   four_of(values, pair[0] >> 16, pair[1] >> 16, pair[2] >> 16, pair[3] >> 16));
      look_up<kFirst + 1, kLast>(values, places, terms);
    }
  }

  template <uint32_t kRound>
  static inline void with_rounds(Philox<kVectors> &next, const float *values,
                                 const uint16_t *places, float *terms) {
    constexpr uint32_t kEights = kChunk / 8;
    if constexpr (kRound < kRounds) {
      next.round();
      look_up<kEights * kRound / kRounds, kEights *(kRound + 1) / kRounds>(values, places, terms);
      with_rounds<kRound + 1>(next, values, places, terms);
    }
  }

  Pairs pairs(uint32_t e) const {
    const __m512i lanes = _mm512_loadu_si512(words + e / 2);
    const __m512i sign = _mm512_set1_epi32(int(0x80000000));
    const __m512i even = _mm512_castps_si512(_mm512_load_ps(terms + e));
    const __m512i odd = _mm512_castps_si512(_mm512_load_ps(terms + e + 16));
    /* term ^ (~lanes & sign) */
    return {_mm512_ternarylogic_epi32(even, _mm512_slli_epi32(lanes, 20), sign, 0xD2),
            _mm512_ternarylogic_epi32(odd, _mm512_slli_epi32(lanes, 4), sign, 0xD2)};
  }

  uint32_t one(uint32_t e) const {
    const uint32_t lane = words[e / 2] >> e % 2 * 16;
    return bits_of(terms[e / 32 * 32 + e % 2 * 16 + e % 32 / 2]) ^ (~lane & 0x800) << 20;
  }
  bool finite() const { return are_finite; }
};

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

template <bool kStreaming>
inline void put(void *out, __m512i value) {
  if (kStreaming)
    _mm512_stream_si512(static_cast<__m512i *>(out), value);
  else
    _mm512_storeu_si512(out, value);
}

constexpr int kAnyNan = 0x81, kNanOrInfinity = 0x99;

/* What a tile is worked on with. */
struct Bench {
  uint16_t *wire, *rest, *out[2];
  const uint16_t *random;
};

/* Elements e to e + 32, one by one. */
template <class Z, uint32_t kFormat, bool kMoves, uint32_t kPoints>
void with_care(const Bench bench, const Z step, const Z point, uint32_t e) {
  for (uint32_t i = e; i < e + 32; ++i) {
    uint16_t &wire = bench.wire[i];
    if (kMoves) {
      const uint32_t low = kFormat == ZO_BF16 ? uint32_t(int32_t(int16_t(bench.rest[i]))) : 0;
      const uint32_t master = (uint32_t(wire) << 16) + low;
      uint32_t bits = canonical(bits_of(float_of(master) - float_of(step.one(i))));
      if (kFormat == ZO_BF16)
        bench.rest[i] = uint16_t(bits), bits += 0x8000;
      else
        bits += dither(bits, bench.random[i]);
      wire = uint16_t(bits >> 16);
    }
    const float seen = float_of(uint32_t(wire) << 16);
    const float term = kPoints ? float_of(point.one(i)) : 0.0f;
    if (kPoints > 0) bench.out[0][i] = uint16_t(nearest_bf16(bits_of(seen + term)));
    if (kPoints > 1) bench.out[1][i] = uint16_t(nearest_bf16(bits_of(seen - term)));
  }
}

/* Everything by value: what is stored cannot change what the loop stands on. */
template <class Z, uint32_t kFormat, bool kMoves, uint32_t kPoints, bool kStreaming>
inline void fused_groups(const Bench bench, const Z step, const Z point, uint32_t count) {
  const __m512i half = _mm512_set1_epi32(0x8000), low = _mm512_set1_epi32(0xFFFF);
  const bool finite = (!kMoves || step.finite()) && (!kPoints || point.finite());
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
      const Pairs terms = step.pairs(e);
      master = {minus(master.even, terms.even), minus(master.odd, terms.odd)};
    }
    if (!finite || any_of_class<kMoves && kFormat == ZO_BF16_SR ? kNanOrInfinity : kAnyNan>(master)) {
      with_care<Z, kFormat, kMoves, kPoints>(bench, step, point, e);
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
    const Pairs terms = point.pairs(e);
    const Pairs up = {plus(seen.even, terms.even), plus(seen.odd, terms.odd)};
    put<kStreaming>(bench.out[0] + e, rounded(up, half));
    if (kPoints == 1) continue;
    const Pairs down = {minus(seen.even, terms.even), minus(seen.odd, terms.odd)};
    put<kStreaming>(bench.out[1] + e, rounded(down, half));
  }
}

template <class Z, uint32_t kFormat, bool kStreaming>
inline void any_groups(const Fused &fused, const Bench &bench, const Z &step, const Z &point,
                       uint32_t count) {
  if (!fused.moves && fused.points == 1)
    fused_groups<Z, kFormat, false, 1, kStreaming>(bench, step, point, count);
  else if (!fused.moves)
    fused_groups<Z, kFormat, false, 2, kStreaming>(bench, step, point, count);
  else if (fused.points == 0)
    fused_groups<Z, kFormat, true, 0, kStreaming>(bench, step, point, count);
  else if (fused.points == 1)
    fused_groups<Z, kFormat, true, 1, kStreaming>(bench, step, point, count);
  else
    fused_groups<Z, kFormat, true, 2, kStreaming>(bench, step, point, count);
}

template <class Z>
inline void fused_tile(const zo_job &job, const Fused &fused, const Place &place, uint64_t at,
                       uint32_t count, Room &room) {
  Bench bench = {};
  bench.wire = static_cast<uint16_t *>(job.wire) + at;
  bench.random = reinterpret_cast<const uint16_t *>(room.extra);
  Z step, point;
  if (fused.moves) {
    if (job.format == ZO_BF16) bench.rest = static_cast<uint16_t *>(job.rest) + at;
    step = Z(job, *fused.step, place, count, room.tables, room.fused[0]);
    if (job.format == ZO_BF16_SR) {
      const zo_draw rounding = {job.steps[0].seed, 0.0, job.steps[0].step, 0};
      words_of(rounding, kRounding, place, count, 8, room.extra);
    }
  }
  bool streaming = job.streaming;
  if (fused.points) {
    point = Z(job, *fused.point, place, count, room.tables + fused.moves, room.fused[1]);
    for (uint32_t p = 0; p < fused.points; ++p) {
      bench.out[p] = static_cast<uint16_t *>(job.points[p].out) + (at - job.first);
      streaming = streaming && reinterpret_cast<uintptr_t>(bench.out[p]) % 64 == 0;
    }
  }
  const auto groups =
      job.format == ZO_BF16
          ? (streaming ? any_groups<Z, ZO_BF16, true> : any_groups<Z, ZO_BF16, false>)
          : (streaming ? any_groups<Z, ZO_BF16_SR, true> : any_groups<Z, ZO_BF16_SR, false>);
  groups(fused, bench, step, point, count);
}

}  // namespace
