/* Packing a whole span on several threads. */
#pragma once

#include "codec_lossless.h"
#include "codec_tile.h"
#include "parallel.h"

namespace {

static_assert(kPart % kTwelveTile == 0, "a part holds whole tiles");

inline bool is_sound(const zo_pack &pack) {
  if (!is_codec(pack.codec, pack.group) || pack.format > ZO_FP16 || pack.out_format > ZO_FP16)
    return false;
  if (pack.codec == ZO_LOSSLESS12 && pack.format != ZO_BF16) return false;
  if (pack.scales && !has_groups(pack.codec)) return false;
  if (pack.elements % kBlock || pack.first % kBlock || pack.count % kBlock) return false;
  return pack.first <= pack.elements && pack.count <= pack.elements - pack.first;
}

/* Calls part(start, stop) for the parts of `count` elements. */
template <class Part>
void in_parts(uint64_t count, uint32_t num_threads, Part part) {
  in_parallel((count + kPart - 1) / kPart, num_threads, [&](uint64_t i) {
    const uint64_t start = i * kPart, stop = start + kPart < count ? start + kPart : count;
    part(start, stop);
  });
}

uint64_t encode_fixed(const zo_pack &pack, const zo_parts &parts) {
  const uint64_t used = capacity_of(pack.codec, pack.group, pack.format, pack.elements);
  if (has_groups(pack.codec)) { /* what pads the scales */
    const uint64_t end = scales_at(pack.codec, pack.elements) + pack.elements / pack.group * 2;
    memset(static_cast<uint8_t *>(pack.packed) + end, 0, used - end);
  }
  in_parts(pack.elements, pack.num_threads,
           [&](uint64_t start, uint64_t stop) { parts.pack(pack, start, stop); });
  return used;
}

/* The largest of the 15 neighbouring exponents that most elements have; of several such windows,
 * the one of the smallest. */
uint32_t top_of(const uint64_t *histogram, uint64_t *held) {
  uint32_t best = 0;
  *held = 0;
  for (uint32_t top = kEscape - 1; top < 256; ++top) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < kEscape; ++i) sum += histogram[top - i];
    if (best == 0 || sum > *held) best = top, *held = sum;
  }
  return best;
}

uint64_t encode_raw(const zo_pack &pack) {
  const TwelveHeader head = make_header(kRaw, 0, pack.elements, 0, kHeader + 2 * pack.elements);
  memcpy(pack.packed, &head, kHeader);
  in_parts(pack.elements, pack.num_threads, [&](uint64_t start, uint64_t stop) {
    memcpy(static_cast<uint8_t *>(pack.packed) + kHeader + 2 * start,
           static_cast<const uint8_t *>(pack.wire) + 2 * start, 2 * (stop - start));
  });
  return head.bytes;
}

/* From each tile's number of escapes to where they begin. */
void make_table(uint8_t *table, uint64_t tiles) {
  uint32_t before = 0;
  for (uint64_t t = 0; t <= tiles; ++t) {
    const uint32_t count = t < tiles ? load32(table + 4 * t) : 0;
    memcpy(table + 4 * t, &before, 4);
    before += count;
  }
}

uint64_t encode_twelve(const zo_pack &pack, const zo_parts &parts) {
  const uint16_t *wire = static_cast<const uint16_t *>(pack.wire);
  uint8_t *out = static_cast<uint8_t *>(pack.packed);
  std::atomic<uint64_t> counts[256] = {};
  in_parts(pack.elements, pack.num_threads, [&](uint64_t start, uint64_t stop) {
    uint64_t mine[256] = {};
    parts.count_exponents(wire + start, stop - start, mine);
    for (int i = 0; i < 256; ++i) counts[i] += mine[i];
  });
  const std::vector<uint64_t> histogram(counts, counts + 256);
  uint64_t held;
  const uint32_t top = top_of(histogram.data(), &held);
  const uint64_t escapes = pack.elements - held;
  const Sections place(pack.elements, escapes);
  if (place.end >= kHeader + 2 * pack.elements || escapes >> 32) return encode_raw(pack);
  const TwelveHeader head = make_header(kTwelve, top, pack.elements, escapes, place.end);
  memcpy(out, &head, kHeader);
  memset(out + kHeader, 0, place.planes - kHeader);
  memset(out + place.escapes, 0, place.end - place.escapes);
  uint8_t *table = out + kHeader;
  in_parts(pack.elements, pack.num_threads, [&](uint64_t start, uint64_t stop) {
    parts.pack_twelve(wire + start, stop - start, top, out + place.planes + start,
                      out + place.codes + start / 2, table + start / kTwelveTile * 4);
  });
  make_table(table, place.tiles);
  in_parts(pack.elements, pack.num_threads, [&](uint64_t start, uint64_t stop) {
    for (uint64_t at = start; at < stop; at += kTwelveTile) {
      const uint8_t *entry = table + at / kTwelveTile * 4;
      const uint64_t end = stop < at + kTwelveTile ? stop : at + kTwelveTile;
      if (load32(entry) != load32(entry + 4))
        pack_escapes(wire + at, end - at, top, out + place.escapes + load32(entry));
    }
  });
  return place.end;
}

}  // namespace
