/* Wire elements in fp32; where a packed span's sections lie (docs/codecs.md), and what is refused before one is read. */
#pragma once

#include "kernels.h"
#include "numbers.h"

namespace {

constexpr uint32_t kTile = 1024;     /* elements that are worked on at a time */
constexpr uint64_t kBlock = 128;     /* elements; four-bit codes: 64 low halves, then 64 high ones */
constexpr uint64_t kTwelveTile = 1024; /* elements that share an entry of the table of escapes */
constexpr uint64_t kHeader = 64;     /* bytes of lossless12's header */
constexpr uint32_t kEscape = 15;     /* the exponent code that says: look elsewhere */

/* What the forward sees of wire elements. */
inline void decode_wire(uint32_t format, const void *wire, uint64_t at, uint32_t count,
                        float *__restrict value) {
  const uint16_t *halves = static_cast<const uint16_t *>(wire) + at;
  if (format == ZO_FP32)
    memcpy(value, static_cast<const float *>(wire) + at, count * 4);
  else if (format == ZO_FP16)
    for (uint32_t e = 0; e < count; ++e) value[e] = half_to_float(halves[e]);
  else
    for (uint32_t e = 0; e < count; ++e) value[e] = float_of(uint32_t(halves[e]) << 16);
}

inline uint64_t padded(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

inline uint16_t load16(const uint8_t *from) {
  uint16_t value;
  memcpy(&value, from, 2);
  return value;
}

inline uint32_t load32(const uint8_t *from) {
  uint32_t value;
  memcpy(&value, from, 4);
  return value;
}

inline bool has_groups(uint32_t codec) { return codec >= ZO_FP8_E4M3 && codec <= ZO_NF4; }
inline bool has_nibbles(uint32_t codec) { return codec == ZO_INT4 || codec == ZO_NF4; }

inline bool is_codec(uint32_t codec, uint32_t group) {
  if (has_groups(codec)) return group == 64 || group == 128;
  return codec <= ZO_NF4 && group == 0;
}

inline uint64_t scales_at(uint32_t codec, uint64_t elements) {
  return has_nibbles(codec) ? elements / 2 : elements;
}

/* Bytes of a packed span; of lossless12, the most that it takes. */
inline uint64_t capacity_of(uint32_t codec, uint32_t group, uint32_t format, uint64_t elements) {
  if (codec == ZO_IDENTITY) return elements * (format == ZO_FP32 ? 4 : 2);
  if (codec == ZO_LOSSLESS12) return kHeader + 2 * elements;
  if (has_groups(codec)) return scales_at(codec, elements) + padded(elements / group * 2);
  return 2 * elements;
}

/* Of a packed (not raw) lossless12 span. */
struct Sections {
  uint64_t tiles, planes, codes, escapes, end;

  Sections(uint64_t elements, uint64_t num_escapes)
      : tiles((elements + kTwelveTile - 1) / kTwelveTile),
        planes(kHeader + padded(4 * (tiles + 1))),
        codes(planes + elements),
        escapes(codes + elements / 2),
        end(padded(escapes + num_escapes)) {}
};

/* Little-endian, as it lies in memory. */
struct TwelveHeader {
  char magic[4];
  uint8_t version, mode, top, zero;
  uint64_t elements, escapes, bytes;
  uint8_t padding[32];
};
static_assert(sizeof(TwelveHeader) == kHeader, "a header is 64 bytes");
constexpr uint8_t kRaw = 0, kTwelve = 1;

inline TwelveHeader make_header(uint8_t mode, uint32_t top, uint64_t elements, uint64_t escapes,
                                uint64_t bytes) {
  return {{'Z', 'L', '1', '2'}, 1, mode, uint8_t(top), 0, elements, escapes, bytes, {}};
}

/* Whether a header may be believed: everything that is read later lies inside `bytes`. */
inline bool is_sound(const TwelveHeader &head, uint64_t elements, uint64_t bytes) {
  if (memcmp(head.magic, "ZL12", 4) || head.version != 1 || head.mode > kTwelve) return false;
  if (head.elements != elements || head.escapes > elements || head.bytes > bytes) return false;
  if (head.mode == kRaw) return !head.escapes && head.bytes == kHeader + 2 * elements;
  return head.top >= kEscape - 1 && head.bytes == Sections(elements, head.escapes).end;
}

/* A packed span, as decoding sees it. */
struct Packed {
  const uint8_t *bytes;
  uint64_t num_bytes, elements;
  uint32_t codec, group, format;
  const float *scales; /* in place of those that are packed, of the groups from element `first` on */
  uint64_t first;
};

/* Once a call, before any part of it. */
inline bool can_be_read(const Packed &packed) {
  const uint64_t least = packed.codec == ZO_LOSSLESS12
                             ? kHeader
                             : capacity_of(packed.codec, packed.group, packed.format, packed.elements);
  if (packed.elements > uint64_t{1} << 48 || packed.num_bytes < least) return false;
  if (packed.codec != ZO_LOSSLESS12) return true;
  TwelveHeader head;
  memcpy(&head, packed.bytes, kHeader);
  return is_sound(head, packed.elements, packed.num_bytes);
}

}  // namespace
