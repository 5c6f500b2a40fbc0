/* lossless12: bfloat16 as signs and mantissas, four-bit exponent codes, and escapes. */
#pragma once

#include "codec.h"

namespace {

/* How many elements have each exponent. */
inline void count_exponents(const uint16_t *wire, uint64_t count, uint64_t *histogram) {
  uint32_t counts[4][256] = {}; /* neighbours do not wait for each other */
  for (uint64_t e = 0; e < count; e += 4)
    for (int i = 0; i < 4; ++i) ++counts[i][wire[e + i] >> 7 & 255];
  for (int i = 0; i < 256; ++i)
    histogram[i] += uint64_t(counts[0][i]) + counts[1][i] + counts[2][i] + counts[3][i];
}

inline uint32_t exponent_code(uint16_t bits, uint32_t top) {
  const uint32_t below = top - (uint32_t(bits) >> 7 & 255);
  return below < kEscape ? below : kEscape;
}

/* Planes and codes of a stretch that begins with a tile; for each tile, how many escapes. */
inline void pack_twelve(const uint16_t *__restrict wire, uint64_t count, uint32_t top,
                        uint8_t *__restrict planes, uint8_t *__restrict codes,
                        uint8_t *__restrict counts) {
  for (uint64_t e = 0; e < count; ++e) planes[e] = uint8_t((wire[e] >> 8 & 128) | (wire[e] & 127));
  for (uint64_t e = 0; e < count; e += kTwelveTile, counts += 4) {
    const uint64_t end = count - e < kTwelveTile ? count - e : kTwelveTile;
    uint32_t escapes = 0;
    for (uint64_t b = e; b < e + end; b += kBlock)
      for (uint32_t i = 0; i < kBlock / 2; ++i) {
        const uint32_t low = exponent_code(wire[b + i], top);
        const uint32_t high = exponent_code(wire[b + i + kBlock / 2], top);
        codes[b / 2 + i] = uint8_t(low | high << 4);
        escapes += (low == kEscape) + (high == kEscape);
      }
    memcpy(counts, &escapes, 4);
  }
}

/* The exponents of a tile that have no code, in order. */
inline void pack_escapes(const uint16_t *wire, uint64_t count, uint32_t top, uint8_t *out) {
  for (uint64_t e = 0; e < count; ++e)
    if (exponent_code(wire[e], top) == kEscape) *out++ = uint8_t(wire[e] >> 7);
}

inline uint32_t count_escapes(const uint8_t *__restrict codes, uint64_t bytes) {
  uint32_t escapes = 0;
  for (uint64_t b = 0; b < bytes; b += 64) {
    uint8_t found = 0; /* at most 128 */
    for (uint32_t i = 0; i < 64; ++i)
      found = uint8_t(found + (codes[b + i] >= 0xF0) + ((codes[b + i] & 15) == 15));
    escapes += found;
  }
  return escapes;
}

/* Elements of whole blocks as if there were no escapes. */
inline void spread_blocks(const uint8_t *__restrict planes, const uint8_t *__restrict codes,
                          uint32_t top, uint32_t count, float *__restrict value) {
  const auto bits = [=](uint8_t plane, uint32_t code) {
    return uint32_t(plane & 128) << 24 | ((top - code) & 255) << 23 | uint32_t(plane & 127) << 16;
  };
  for (uint32_t e = 0; e < count; e += kBlock, planes += kBlock, codes += kBlock / 2, value += kBlock)
    for (uint32_t i = 0; i < kBlock / 2; ++i) {
      value[i] = float_of(bits(planes[i], codes[i] & 15));
      value[i + kBlock / 2] = float_of(bits(planes[i + kBlock / 2], codes[i] >> 4));
    }
}

/* Puts a tile's escaped exponents where they belong; `value` is of elements from `at` to `to`. */
inline void mend_escapes(const uint8_t *codes, const uint8_t *escapes, uint64_t begin, uint64_t end,
                         uint64_t at, uint64_t to, float *value) {
  for (uint64_t e = begin; e < end; ++e) {
    const uint64_t i = e % kBlock;
    const uint8_t both = codes[e / kBlock * (kBlock / 2) + i % (kBlock / 2)];
    if ((i < kBlock / 2 ? both & 15 : both >> 4) != int(kEscape)) continue;
    if (e >= at && e < to) {
      const uint32_t rest = bits_of(value[e - at]) & 0x807FFFFF;
      value[e - at] = float_of(rest | uint32_t(*escapes) << 23);
    }
    ++escapes;
  }
}

/* False where a tile's escapes do not match the table; `packed` can be read. */
inline bool unpack_twelve(const Packed &packed, uint64_t at, uint32_t count, float *value) {
  TwelveHeader head;
  memcpy(&head, packed.bytes, kHeader);
  if (head.mode == kRaw) {
    const uint8_t *halves = packed.bytes + kHeader + 2 * at;
    for (uint32_t e = 0; e < count; ++e) value[e] = float_of(uint32_t(load16(halves + 2 * e)) << 16);
    return true;
  }
  const Sections place(packed.elements, head.escapes);
  const uint8_t *codes = packed.bytes + place.codes, *planes = packed.bytes + place.planes;
  for (const uint64_t stop = at + count; at < stop;) {
    const uint64_t tile = at / kTwelveTile, begin = tile * kTwelveTile;
    const uint64_t end = begin + kTwelveTile < packed.elements ? begin + kTwelveTile : packed.elements;
    const uint8_t *entry = packed.bytes + kHeader + 4 * tile;
    const uint64_t before = load32(entry), after = load32(entry + 4);
    const uint32_t escapes = count_escapes(codes + begin / 2, (end - begin) / 2);
    if (before > after || after > head.escapes || after - before != escapes) return false;
    if ((tile == 0 && before) || (tile + 1 == place.tiles && after != head.escapes)) return false;
    const uint64_t to = end < stop ? end : stop;
    spread_blocks(planes + at, codes + at / 2, head.top, uint32_t(to - at), value);
    if (escapes)
      mend_escapes(codes, packed.bytes + place.escapes + before, begin, end, at, to, value);
    value += to - at, at = to;
  }
  return true;
}

}  // namespace
