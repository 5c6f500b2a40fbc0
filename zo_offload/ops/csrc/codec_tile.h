/* Any codec, a few elements at a time: what one instruction set does of packing and unpacking. */
#pragma once

#include "codec_groups.h"
#include "codec_lossless.h"

namespace {

/* fp32 values of `count` elements, both multiples of 128; false where the bytes are damaged. */
inline bool unpack_tile(const Packed &packed, uint64_t at, uint32_t count, float *value) {
  if (packed.codec == ZO_LOSSLESS12) return unpack_twelve(packed, at, count, value);
  if (has_groups(packed.codec)) {
    unpack_groups(packed, at, count, value);
    return true;
  }
  const uint32_t format = packed.codec == ZO_WIRE_BF16   ? uint32_t(ZO_BF16)
                          : packed.codec == ZO_WIRE_FP16 ? uint32_t(ZO_FP16)
                                                         : packed.format;
  decode_wire(format, packed.bytes, at, count, value);
  if (format == ZO_FP16)
    for (uint32_t e = 0; e < count; ++e) value[e] = float_of(canonical(bits_of(value[e])));
  return true;
}

inline void narrow(uint32_t format, const float *__restrict value, uint32_t count, void *out) {
  uint16_t *__restrict halves = static_cast<uint16_t *>(out);
  if (format == ZO_FP16)
    for (uint32_t e = 0; e < count; ++e) halves[e] = float_to_half(bits_of(value[e]));
  else
    for (uint32_t e = 0; e < count; ++e) halves[e] = uint16_t(nearest_bf16(bits_of(value[e])));
}

inline Packed packed_of(const zo_job &job) {
  return {static_cast<const uint8_t *>(job.wire), job.wire_bytes,
          job.segments[job.num_segments - 1].stop, job.codec, job.group, job.format, nullptr, 0};
}

inline Packed packed_of(const zo_pack &pack) {
  return {static_cast<const uint8_t *>(pack.packed), pack.packed_bytes, pack.elements, pack.codec,
          pack.group, pack.format, pack.scales, pack.first};
}

/* Elements start to stop of a span, decoded to the pack's `out`. */
inline bool unpack_part(const zo_pack &pack, uint64_t start, uint64_t stop) {
  const Packed packed = packed_of(pack);
  alignas(64) float room[kTile];
  for (uint64_t at = start; at < stop; at += kTile) {
    const uint32_t count = uint32_t(stop - at < kTile ? stop - at : kTile);
    const uint64_t done = at - pack.first;
    const bool wide = pack.out_format == ZO_FP32;
    if (!unpack_tile(packed, at, count, wide ? static_cast<float *>(pack.out) + done : room))
      return false;
    if (!wide) narrow(pack.out_format, room, count, static_cast<uint16_t *>(pack.out) + done);
  }
  return true;
}

/* Elements start to stop of a wire, encoded; not lossless12. */
inline void pack_part(const zo_pack &pack, uint64_t start, uint64_t stop) {
  uint8_t *out = static_cast<uint8_t *>(pack.packed);
  if (pack.codec == ZO_IDENTITY) {
    const uint64_t size = pack.format == ZO_FP32 ? 4 : 2;
    memcpy(out + start * size, static_cast<const uint8_t *>(pack.wire) + start * size,
           (stop - start) * size);
    return;
  }
  alignas(64) float value[kTile];
  for (uint64_t at = start; at < stop; at += kTile) {
    const uint32_t count = uint32_t(stop - at < kTile ? stop - at : kTile);
    decode_wire(pack.format, pack.wire, at, count, value);
    if (!has_groups(pack.codec)) {
      narrow(pack.codec == ZO_WIRE_FP16 ? ZO_FP16 : ZO_BF16, value, count, out + 2 * at);
      continue;
    }
    uint8_t *scales = out + scales_at(pack.codec, pack.elements) + at / pack.group * 2;
    for (uint32_t e = 0; e < count; e += kBlock)
      pack_block(pack.codec, pack.group, value + e,
                 out + (has_nibbles(pack.codec) ? (at + e) / 2 : at + e),
                 scales + e / pack.group * 2);
  }
}

}  // namespace
