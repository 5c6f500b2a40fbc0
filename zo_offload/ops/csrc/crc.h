/* CRC-32C (Castagnoli; RFC 3720, B.4), by the processor's own instruction where there is one.
 *
 * The instruction takes eight bytes a cycle and answers after three: three stretches side by side
 * keep it busy. Polynomials modulo 2 are kept as the instruction keeps them, x^0 in bit 31.
 */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace {

constexpr uint32_t kCastagnoli = 0x82F63B78;

/* a * b modulo the polynomial. */
inline uint32_t crc_times(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (; a; a <<= 1) {
    product ^= b & -(a >> 31);
    b = b >> 1 ^ (kCastagnoli & -(b & 1));
  }
  return product;
}

/* x^(8 bytes): what a CRC is multiplied by when so many bytes follow. */
inline uint32_t crc_shift(uint64_t bytes) {
  uint32_t result = 0x80000000, power = 0x00800000;
  for (; bytes; bytes >>= 1, power = crc_times(power, power))
    if (bytes & 1) result = crc_times(result, power);
  return result;
}

struct CrcTable {
  uint32_t of[8][256]; /* of[k][b]: byte b with k bytes after it */

  CrcTable() {
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (kCastagnoli & -(crc & 1));
      of[0][b] = crc;
    }
    for (int k = 1; k < 8; ++k)
      for (uint32_t b = 0; b < 256; ++b) of[k][b] = of[k - 1][b] >> 8 ^ of[0][of[k - 1][b] & 255];
  }
};

inline const CrcTable &crc_table() {
  static const CrcTable table;
  return table;
}

/* One step of the state each: without instructions, in slices of eight (Kounavis, Berry 2005). */
struct CrcByTable {
  const CrcTable &table = crc_table();

  uint32_t byte(uint32_t crc, uint8_t value) const {
    return crc >> 8 ^ table.of[0][(crc ^ value) & 255];
  }
  uint32_t word(uint32_t crc, const unsigned char *at) const {
    uint32_t next = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t mixed = at[i] ^ (i < 4 ? crc >> 8 * i & 255 : 0);
      next ^= table.of[7 - i][mixed];
    }
    return next;
  }
};

#if defined(__SSE4_2__) && defined(__x86_64__)
struct CrcByInstruction {
  uint32_t byte(uint32_t crc, uint8_t value) const { return _mm_crc32_u8(crc, value); }
  uint32_t word(uint32_t crc, const unsigned char *at) const {
    uint64_t value;
    memcpy(&value, at, 8);
    return uint32_t(_mm_crc32_u64(crc, value));
  }
};
inline bool has_crc() { return true; }
#elif defined(__aarch64__)
struct CrcByInstruction {
  uint32_t byte(uint32_t crc, uint8_t value) const {
    asm(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(uint32_t(value)));
    return crc;
  }
  uint32_t word(uint32_t crc, const unsigned char *at) const {
    uint64_t value;
    memcpy(&value, at, 8);
    asm(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(value));
    return crc;
  }
};
inline bool has_crc() { return getauxval(AT_HWCAP) >> 7 & 1; } /* HWCAP_CRC32 */
#else
using CrcByInstruction = CrcByTable;
inline bool has_crc() { return false; }
#endif

template <class Step>
uint32_t crc_walk(const Step &step, uint32_t crc, const unsigned char *at, uint64_t bytes) {
  const uint64_t third = bytes / 24 * 8;
  if (third >= 1024) { /* shorter ones do not pay for the joining */
    uint32_t middle = 0, last = 0;
    for (uint64_t i = 0; i < third; i += 8) {
      crc = step.word(crc, at + i);
      middle = step.word(middle, at + third + i);
      last = step.word(last, at + 2 * third + i);
    }
    const uint32_t shift = crc_shift(third);
    crc = crc_times(shift, crc_times(shift, crc) ^ middle) ^ last;
    at += 3 * third, bytes -= 3 * third;
  }
  for (; bytes >= 8; at += 8, bytes -= 8) crc = step.word(crc, at);
  for (; bytes; ++at, --bytes) crc = step.byte(crc, *at);
  return crc;
}

}  // namespace
