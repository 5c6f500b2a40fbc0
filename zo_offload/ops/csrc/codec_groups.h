/* Integers, 8-bit floats and NF4 with a scale a group: 128 elements at a time. */
#pragma once

#include "codec.h"
#if defined(ZO_BUILD_AVX512) || defined(ZO_BUILD_AVX2)
#include <immintrin.h>
#endif

namespace {

/* QLoRA's appendix E (Dettmers et al. 2023), and the midpoints between its values. */
constexpr float kNf4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
constexpr float middle(int i) { return float((double(kNf4[i]) + double(kNf4[i + 1])) / 2); }
constexpr float kNf4Middles[15] = {middle(0),  middle(1),  middle(2),  middle(3),  middle(4),
                                   middle(5),  middle(6),  middle(7),  middle(8),  middle(9),
                                   middle(10), middle(11), middle(12), middle(13), middle(14)};
constexpr uint32_t kNf4Zero = 7, kNanScale = 0x7FC0;

inline float largest_code(uint32_t codec) {
  return codec == ZO_FP8_E4M3 ? 448.0f : codec == ZO_INT8 ? 127.0f : codec == ZO_INT4 ? 7.0f : 1.0f;
}

/* The largest scale whose product with a code is finite. */
inline uint32_t largest_scale(uint32_t codec) {
  return codec == ZO_FP8_E4M3 ? 0x7B12 : codec == ZO_INT8 ? 0x7C01 : codec == ZO_INT4 ? 0x7E12 : 0x7F7F;
}

/* The bfloat16 bits of a group's scale, rounded up; of a group that is not finite, NaN. */
inline uint32_t scale_of(uint32_t codec, const float *__restrict value, uint32_t group) {
  uint32_t most = 0; /* of the magnitudes' bits, whose order is that of the magnitudes */
  for (uint32_t e = 0; e < group; ++e) {
    const uint32_t size = bits_of(value[e]) & 0x7FFFFFFF;
    most = size > most ? size : most;
  }
  if (most >= 0x7F800000) return kNanScale;
  if (most == 0) return 0;
  const uint32_t up = (bits_of(float_of(most) / largest_code(codec)) + 0xFFFF) >> 16;
  const uint32_t largest = largest_scale(codec);
  return up < 1 ? 1 : up > largest ? largest : up; /* the quotient may underflow */
}

/* -- codes of x / scale: the nearest, without branches -- */

inline uint8_t integer_code(float ratio) { return uint8_t(bits_of(ratio + 12582912.0f)); }

inline uint8_t fp8_code(float ratio) {
  const uint32_t bits = bits_of(ratio), size = bits & 0x7FFFFFFF;
  const uint32_t normal = (size - (120u << 23) + 0x7FFFF + (size >> 20 & 1)) >> 20;
  const uint32_t denormal = bits_of(float_of(size) + 16384.0f) - 0x46800000;
  return uint8_t((size < 121u << 23 ? denormal : normal) | (bits >> 24 & 0x80));
}

inline uint8_t nf4_code(float ratio) {
  uint32_t code = 0;
  for (float each : kNf4Middles) code += ratio > each;
  return uint8_t(code);
}

template <class Code>
inline void codes_of(const float *__restrict value, float scale, uint32_t group, float largest,
                     Code code, uint8_t *__restrict codes) {
  for (uint32_t e = 0; e < group; ++e) {
    float ratio = value[e] / scale;
    ratio = ratio > largest ? largest : ratio; /* a huge group's scale stops short */
    codes[e] = code(ratio < -largest ? -largest : ratio);
  }
}

inline void group_codes(uint32_t codec, const float *value, uint32_t group, uint32_t scale_bits,
                        uint8_t *codes) {
  const float scale = float_of(scale_bits << 16), largest = largest_code(codec);
  if (!(scale > 0.0f))
    memset(codes, codec == ZO_NF4 ? kNf4Zero : 0, group);
  else if (codec == ZO_FP8_E4M3)
    codes_of(value, scale, group, largest, fp8_code, codes);
  else if (codec == ZO_NF4)
    codes_of(value, scale, group, largest, nf4_code, codes);
  else
    codes_of(value, scale, group, largest, integer_code, codes);
}

inline void pack_block(uint32_t codec, uint32_t group, const float *value, uint8_t *out,
                       uint8_t *scales) {
  uint8_t codes[kBlock];
  for (uint32_t e = 0; e < kBlock; e += group, scales += 2) {
    const uint16_t scale = uint16_t(scale_of(codec, value + e, group));
    memcpy(scales, &scale, 2);
    group_codes(codec, value + e, group, scale, codes + e);
  }
  if (!has_nibbles(codec)) {
    memcpy(out, codes, kBlock);
    return;
  }
  for (uint32_t i = 0; i < kBlock / 2; ++i)
    out[i] = uint8_t((codes[i] & 15) | codes[i + kBlock / 2] << 4);
}

/* -- values -- */

inline float fp8_value(uint8_t code) {
  const uint32_t size = uint32_t(code & 0x7F) << 20;
  const uint32_t normal = size + (120u << 23);
  const uint32_t denormal = bits_of(float_of(size + (121u << 23)) - float_of(121u << 23));
  const uint32_t bits = size < 1u << 23 ? denormal : normal;
  return float_of((size == 127u << 20 ? kNan : bits) | uint32_t(code & 0x80) << 24);
}

template <class Value>
inline void values_of(const uint8_t *__restrict codes, float scale, uint32_t group, Value each,
                      float *__restrict value) {
  for (uint32_t e = 0; e < group; ++e)
    value[e] = float_of(canonical(bits_of(each(codes[e]) * scale)));
}

/* A group's sixteen possible values, once, in place of a product for each element. */
inline void table_of(uint32_t codec, float scale, float *__restrict table) {
  for (int code = 0; code < 16; ++code) {
    const float plain = codec == ZO_NF4 ? kNf4[code] : float((code ^ 8) - 8);
    table[code] = float_of(canonical(bits_of(plain * scale)));
  }
}

/* 128 elements from 64 bytes: low halves by one table, high halves by the other. */
inline void look_up_halves(const float *__restrict low, const float *__restrict high,
                           const uint8_t *__restrict codes, float *__restrict value) {
#if defined(ZO_BUILD_AVX512)
  const __m512 lows = _mm512_loadu_ps(low), highs = _mm512_loadu_ps(high);
  for (uint32_t i = 0; i < 64; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i));
    const __m512i code = _mm512_cvtepu8_epi32(bytes); /* only the low four bits choose */
    _mm512_storeu_ps(value + i, _mm512_permutexvar_ps(code, lows));
    _mm512_storeu_ps(value + 64 + i, _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), highs));
  }
#elif defined(ZO_BUILD_AVX2)
  const auto chosen = [](const float *table, __m256i code) {
    const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), code);
    const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), code);
    return _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  };
  for (uint32_t i = 0; i < 64; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + i));
    const __m256i code = _mm256_cvtepu8_epi32(bytes);
    _mm256_storeu_ps(value + i, chosen(low, code));
    _mm256_storeu_ps(value + 64 + i, chosen(high, _mm256_srli_epi32(code, 4)));
  }
#else
  for (uint32_t i = 0; i < 64; ++i)
    value[i] = low[codes[i] & 15], value[64 + i] = high[codes[i] >> 4];
#endif
}

/* Of the group that holds an element. */
inline float scale_at(const Packed &packed, uint64_t at) {
  if (packed.scales) return packed.scales[(at - packed.first) / packed.group];
  const uint8_t *scales = packed.bytes + scales_at(packed.codec, packed.elements);
  return float_of(uint32_t(load16(scales + at / packed.group * 2)) << 16);
}

inline void unpack_groups(const Packed &packed, uint64_t at, uint32_t count, float *value) {
  const uint32_t group = packed.group;
  if (has_nibbles(packed.codec)) {
    alignas(64) float low[16], high[16];
    const uint8_t *codes = packed.bytes + at / 2;
    for (uint32_t e = 0; e < count; e += kBlock, codes += 64) {
      table_of(packed.codec, scale_at(packed, at + e), low);
      table_of(packed.codec, scale_at(packed, at + e + 64), high);
      look_up_halves(low, high, codes, value + e);
    }
    return;
  }
  for (uint32_t e = 0; e < count; e += group) {
    const float scale = scale_at(packed, at + e);
    const uint8_t *codes = packed.bytes + at + e;
    if (packed.codec == ZO_INT8)
      values_of(codes, scale, group, [](uint8_t code) { return float(int8_t(code)); }, value + e);
    else
      values_of(codes, scale, group, fp8_value, value + e);
  }
}

}  // namespace
