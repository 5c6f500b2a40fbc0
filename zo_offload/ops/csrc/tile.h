/* One tile of a job: its numbers stay in the first-level cache from load to store. */
#pragma once

#include <memory>
#include <new>

#include "codec_tile.h"
#include "philox.h"

namespace {

constexpr uint32_t kAlign = 128;  /* elements of a sign block; what segments are padded to */
constexpr uint32_t kCells = 4096; /* values of a gaussian element */
constexpr uint32_t kNoise = 0, kDither = 1, kRounding = 2; /* streams of a counter */

/* Unlike ==, tells the two zeros apart: their terms have different signs. */
inline bool same_bits(double a, double b) { return memcmp(&a, &b, sizeof a) == 0; }

/* The upper half of a gaussian's values times a coefficient; the lower is its mirror image. The
 * product is float64 and rounds once. */
struct Table {
  double factor;
  bool made = false;
  float values[kCells / 2];

  void make(double wanted, const double *cells) {
    if (made && same_bits(factor, wanted)) return;
    for (uint32_t i = 0; i < kCells / 2; ++i) values[i] = float(cells[kCells / 2 + i] * wanted);
    factor = wanted, made = true;
  }
};

/* What a draw of a fused job works with (fused_avx512.h). */
struct FusedRoom {
  alignas(64) float terms[kTile];
  alignas(64) uint32_t words[kTile / 2 + 4 * kBlocksAtOnce];
  alignas(64) uint16_t places[kTile];
};

/* What a thread works with. */
struct Room {
  FusedRoom fused[2];
  alignas(64) float value[kTile];
  alignas(64) float sum[kTile];
  alignas(64) float terms[kTile];
  alignas(64) uint16_t places[kTile];
  alignas(64) uint32_t words[kTile / 2 + 4 * kBlocksAtOnce];
  alignas(64) uint32_t extra[kTile / 2 + 4 * kBlocksAtOnce];
  alignas(64) uint32_t out[kTile];
  Table *tables = nullptr; /* one a draw of the job, in order */
};

/* Where a tile begins in its parameter. */
struct Place {
  uint64_t element;
  uint32_t parameter;
  double scale;
};

inline Stream counter_of(const zo_draw &draw, uint32_t stream, const Place &place) {
  return {draw.seed, place.parameter, draw.step, draw.probe | stream << 16};
}

/* Random words of a tile, from the block that holds its first element. */
inline void words_of(const zo_draw &draw, uint32_t stream, const Place &place, uint32_t count,
                     uint32_t elements_per_block, uint32_t *out) {
  random_words(counter_of(draw, stream, place), place.element / elements_per_block,
               (count + elements_per_block - 1) / elements_per_block, out);
}

/* Words as their sixteen-bit lanes, low half first, or as bytes. */
typedef uint16_t __attribute__((may_alias)) Half;
typedef uint8_t __attribute__((may_alias)) Byte;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the planes and lanes are little-endian");

#if defined(__SSE4_1__)
inline __m128 four_of(const float *values, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  __m128 four = _mm_load_ss(values + a);
  four = _mm_insert_ps(four, _mm_load_ss(values + b), 0x10);
  four = _mm_insert_ps(four, _mm_load_ss(values + c), 0x20);
  return _mm_insert_ps(four, _mm_load_ss(values + d), 0x30);
}
#endif

/* Gaussian terms from the low twelve bits of each lane: a place in the half table, and a sign.
 *
 * Loads one by one keep pace with the gather instructions of some processors and beat those of
 * others.
 */
inline void look_up(const float *__restrict values, const Half *__restrict lanes, uint32_t count,
                    uint16_t *__restrict places, float *__restrict terms) {
  for (uint32_t e = 0; e < count; ++e)
    places[e] = uint16_t((lanes[e] & 0x7FF) ^ (lanes[e] & 0x800 ? 0 : 0x7FF));
  for (uint32_t e = 0; e < count; e += 4) {
    uint32_t low, high;
    memcpy(&low, places + e, 4), memcpy(&high, places + e + 2, 4);
#if defined(__SSE4_1__)
    _mm_store_ps(terms + e, four_of(values, low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16));
#else
    terms[e] = values[low & 0xFFFF], terms[e + 1] = values[low >> 16];
    terms[e + 2] = values[high & 0xFFFF], terms[e + 3] = values[high >> 16];
#endif
  }
  for (uint32_t e = 0; e < count; ++e)
    terms[e] = float_of(bits_of(terms[e]) ^ uint32_t(~lanes[e] & 0x800) << 20);
}

/* A draw on a tile: `coefficient * scale * z`, element by element. */
struct Signs {
  static constexpr uint32_t kPerBlock = 128;
  uint32_t bits;
  const uint32_t *words;

  Signs(double factor, Table *, const double *, const uint32_t *words, uint32_t, Room &)
      : bits(bits_of(float(factor))), words(words) {}

  template <class Each>
  inline void over(uint32_t count, Each each) const {
    for (uint32_t w = 0; w < count / 32; ++w) {
      const uint32_t word = words[w];
      for (uint32_t i = 0; i < 32; ++i)
        each(w * 32 + i, float_of(bits ^ (word >> i) << 31));
    }
  }
};

struct Cells {
  static constexpr uint32_t kPerBlock = 8;
  const float *terms;

  Cells(double factor, Table *table, const double *cells, const uint32_t *words, uint32_t count,
        Room &room)
      : terms(room.terms) {
    table->make(factor, cells);
    look_up(table->values, reinterpret_cast<const Half *>(words), count, room.places, room.terms);
  }

  template <class Each>
  inline void over(uint32_t count, Each each) const {
    for (uint32_t e = 0; e < count; ++e) each(e, terms[e]);
  }
};

/* -- masters -- */

inline void load_master(uint32_t format, const void *wire, const void *rest, uint64_t at,
                        uint32_t count, float *__restrict value) {
  const uint16_t *high = static_cast<const uint16_t *>(wire) + at;
  switch (format) {
    case ZO_FP32:
      memcpy(value, static_cast<const float *>(wire) + at, count * 4);
      break;
    case ZO_FP16:
      memcpy(value, static_cast<const float *>(rest) + at, count * 4);
      break;
    case ZO_BF16: {
      const int16_t *low = static_cast<const int16_t *>(rest) + at;
      for (uint32_t e = 0; e < count; ++e)
        value[e] = float_of((uint32_t(high[e]) << 16) + uint32_t(int32_t(low[e])));
      break;
    }
    case ZO_BF16_8: {
      const int8_t *low = static_cast<const int8_t *>(rest) + at;
      for (uint32_t e = 0; e < count; ++e)
        value[e] = float_of((uint32_t(high[e]) << 16) + (uint32_t(int32_t(low[e])) << 8));
      break;
    }
    case ZO_BF16_SR:
      for (uint32_t e = 0; e < count; ++e) value[e] = float_of(uint32_t(high[e]) << 16);
      break;
  }
}

inline void store_master(uint32_t format, const float *__restrict value, void *wire, void *rest,
                         uint64_t at, uint32_t count) {
  uint16_t *high = static_cast<uint16_t *>(wire) + at;
  switch (format) {
    case ZO_FP32:
      memcpy(static_cast<float *>(wire) + at, value, count * 4);
      break;
    case ZO_FP16:
      if (rest) memcpy(static_cast<float *>(rest) + at, value, count * 4);
      for (uint32_t e = 0; e < count; ++e) high[e] = float_to_half(bits_of(value[e]));
      break;
    case ZO_BF16: {
      int16_t *low = static_cast<int16_t *>(rest) + at;
      for (uint32_t e = 0; e < count; ++e) {
        const uint32_t bits = bits_of(value[e]);
        high[e] = uint16_t((bits + 0x8000) >> 16), low[e] = int16_t(bits);
      }
      break;
    }
    case ZO_BF16_8: {
      int8_t *low = static_cast<int8_t *>(rest) + at;
      for (uint32_t e = 0; e < count; ++e) {
        const uint32_t bits = bits_of(value[e]);
        high[e] = uint16_t((bits + 0x8000) >> 16), low[e] = int8_t(bits >> 8);
      }
      break;
    }
    case ZO_BF16_SR:
      for (uint32_t e = 0; e < count; ++e) high[e] = uint16_t(bits_of(value[e]) >> 16);
      break;
  }
}

/* Any values as the nearest that a master of the format holds, ties away from zero. */
inline void hold(uint32_t format, const float *__restrict from, uint32_t count,
                 float *__restrict value) {
  const uint32_t half = format == ZO_BF16_8 ? 0x80 : format == ZO_BF16_SR ? 0x8000 : 0;
  const uint32_t kept = half ? ~(2 * half - 1) : ~0u;
  for (uint32_t e = 0; e < count; ++e)
    value[e] = float_of((canonical(bits_of(from[e])) + half) & kept);
}

/* Stochastic rounding to the master's grid, from the step's own noise. */
inline void round_master(uint32_t format, const zo_step &step, const Place &place, uint32_t count,
                         Room &room) {
  const zo_draw draw = {step.seed, 0.0, step.step, 0};
  float *__restrict value = room.value;
  if (format == ZO_BF16_SR) {
    words_of(draw, kRounding, place, count, 8, room.extra);
    const Half *__restrict random = reinterpret_cast<const Half *>(room.extra);
    for (uint32_t e = 0; e < count; ++e) {
      const uint32_t bits = bits_of(value[e]);
      value[e] = float_of((bits + dither(bits, random[e])) & 0xFFFF0000);
    }
  } else if (format == ZO_BF16_8) {
    words_of(draw, kRounding, place, count, 16, room.extra);
    const Byte *__restrict random = reinterpret_cast<const Byte *>(room.extra);
    for (uint32_t e = 0; e < count; ++e) {
      const uint32_t bits = bits_of(value[e]);
      value[e] = float_of((bits + dither(bits, random[e])) & 0xFFFFFF00);
    }
  }
}

/* -- steps and points -- */

template <class Z>
inline void take_steps(const zo_job &job, const zo_step *steps, uint32_t num_steps, bool of_master,
                       const Place &place, uint32_t count, Room &room, Table *tables) {
  float *__restrict value = room.value, *__restrict sum = room.sum;
  for (uint32_t s = 0; s < num_steps; ++s) {
    const zo_step &step = steps[s];
    bool moved = false;
    if (step.decay != 1.0) {
      for (uint32_t e = 0; e < count; ++e)
        value[e] = float_of(canonical(bits_of(float(double(value[e]) * step.decay))));
      moved = true;
    }
    uint32_t terms = 0;
    for (uint32_t d = 0; d < step.num_draws; ++d) terms += step.draws[d].coefficient != 0.0;
    uint32_t added = 0;
    for (uint32_t d = 0; d < step.num_draws; ++d, ++tables) {
      const zo_draw &draw = step.draws[d];
      if (draw.coefficient == 0.0) continue;
      words_of(draw, kNoise, place, count, Z::kPerBlock, room.words);
      const Z z(draw.coefficient * place.scale, tables, job.cells, room.words, count, room);
      ++added;
      if (terms == 1) /* no sum to make */
        z.over(count, [=](uint32_t e, float term) {
          value[e] = float_of(canonical(bits_of(value[e] - term)));
        });
      else if (added == 1)
        z.over(count, [=](uint32_t e, float term) { sum[e] = term; });
      else if (added < terms)
        z.over(count, [=](uint32_t e, float term) { sum[e] += term; });
      else
        z.over(count, [=](uint32_t e, float term) {
          value[e] = float_of(canonical(bits_of(value[e] - (sum[e] + term))));
        });
    }
    if (of_master && (moved || terms)) round_master(job.format, step, place, count, room);
  }
}

/* Copies around the caches, where the machine can and the address allows. */
inline void stream(void *out, const void *from, size_t bytes) {
#if defined(ZO_BUILD_AVX512) || defined(ZO_BUILD_AVX2)
  if ((reinterpret_cast<uintptr_t>(out) | bytes) % 32 == 0) {
    const __m256i *source = static_cast<const __m256i *>(from);
    __m256i *target = static_cast<__m256i *>(out);
    for (size_t i = 0; i < bytes / 32; ++i)
      _mm256_stream_si256(target + i, _mm256_loadu_si256(source + i));
    return;
  }
#endif
  memcpy(out, from, bytes);
}

/* Terms may be those of the opposite coefficient: then they are taken away, which is the same. */
template <class Z, bool kOpposite>
inline void add_terms(const zo_job &job, const zo_draw &draw, const Place &place, uint32_t count,
                      const Z &z, void *out, Room &room) {
  const float *__restrict value = room.value;
  const auto moved = [=](uint32_t e, float term) {
    return bits_of(kOpposite ? value[e] - term : value[e] + term);
  };
  float *__restrict full = static_cast<float *>(out);
  uint16_t *__restrict halves = static_cast<uint16_t *>(out);
  if (job.format == ZO_FP32) {
    z.over(count, [=](uint32_t e, float term) { full[e] = float_of(canonical(moved(e, term))); });
  } else if (job.format == ZO_FP16) {
    z.over(count, [=](uint32_t e, float term) { halves[e] = float_to_half(moved(e, term)); });
  } else if (job.dither) {
    words_of(draw, kDither, place, count, 8, room.extra);
    const Half *__restrict random = reinterpret_cast<const Half *>(room.extra);
    z.over(count, [=](uint32_t e, float term) {
      const uint32_t bits = canonical(moved(e, term));
      halves[e] = uint16_t((bits + dither(bits, random[e])) >> 16);
    });
  } else {
    z.over(count,
           [=](uint32_t e, float term) { halves[e] = uint16_t(nearest_bf16(moved(e, term))); });
  }
}

inline bool same_direction(const zo_draw &a, const zo_draw &b) {
  return a.seed == b.seed && a.step == b.step && a.probe == b.probe;
}

/* Perturbed copies, one after another; the two signs of a direction share its terms. */
template <class Z>
inline void write_points(const zo_job &job, const Place &place, uint64_t done, uint32_t count,
                         Room &room, Table *tables) {
  const uint32_t size = job.format == ZO_FP32 ? 4 : 2;
  for (uint32_t p = 0; p < job.num_points;) {
    const zo_draw &draw = job.points[p].draw;
    words_of(draw, kNoise, place, count, Z::kPerBlock, room.words);
    const Z z(draw.coefficient * place.scale, tables + p, job.cells, room.words, count, room);
    uint32_t last = p;
    do {
      const zo_point &point = job.points[last];
      char *target = static_cast<char *>(point.out) + done * size;
      void *out = job.streaming ? static_cast<void *>(room.out) : target;
      if (same_bits(point.draw.coefficient, draw.coefficient))
        add_terms<Z, false>(job, draw, place, count, z, out, room);
      else
        add_terms<Z, true>(job, draw, place, count, z, out, room);
      if (job.streaming) stream(target, out, size_t(count) * size);
    } while (++last < job.num_points && same_direction(draw, job.points[last].draw) &&
             (same_bits(job.points[last].draw.coefficient, draw.coefficient) ||
              same_bits(job.points[last].draw.coefficient, -draw.coefficient)));
    p = last;
  }
}

template <class Z>
inline bool walk_tile(const zo_job &job, const Place &place, uint64_t at, uint32_t count,
                      uint32_t draws_of_steps, uint32_t draws_ahead, Room &room) {
  if (job.num_steps) {
    load_master(job.format, job.wire, job.rest, at, count, room.value);
    take_steps<Z>(job, job.steps, job.num_steps, true, place, count, room, room.tables);
    store_master(job.format, room.value, job.wire, job.rest, at, count);
  }
  if (!job.num_points) return true;
  if (job.codec == ZO_IDENTITY)
    decode_wire(job.format, job.wire, at, count, room.value);
  else if (!unpack_tile(packed_of(job), at, count, room.value))
    return false;
  Table *tables = room.tables + draws_of_steps;
  take_steps<Z>(job, job.ahead, job.num_ahead, false, place, count, room, tables);
  write_points<Z>(job, place, at - job.first, count, room, tables + draws_ahead);
  return true;
}

}  // namespace
