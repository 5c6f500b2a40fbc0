/* CRC32C (Castagnoli, reflected 0x82F63B78) of every page of a buffer.
 *
 * x86 and ARM have an instruction for eight bytes of it, which takes three cycles and may begin every
 * cycle: three pages are worked on at once. Elsewhere a table serves.
 */
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

namespace {

constexpr uint64_t kPage = 4096;

struct Table {
  uint32_t of[256];
  Table() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
      of[byte] = crc;
    }
  }
};

uint32_t by_table(const uint8_t *page) {
  static const Table table;
  uint32_t crc = ~0u;
  for (uint64_t i = 0; i < kPage; ++i) crc = crc >> 8 ^ table.of[(crc ^ page[i]) & 0xFF];
  return ~crc;
}

#if defined(__x86_64__)
#define ZO_CRC_TARGET __attribute__((target("sse4.2")))
bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }
ZO_CRC_TARGET inline uint32_t next(uint32_t crc, uint64_t word) {
  return uint32_t(_mm_crc32_u64(crc, word));
}
#elif defined(__aarch64__) && defined(__linux__)
#define ZO_CRC_TARGET __attribute__((target("+crc")))
bool has_instruction() { return getauxval(AT_HWCAP) & (1 << 7); } /* HWCAP_CRC32 */
ZO_CRC_TARGET inline uint32_t next(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
#endif

#if defined(ZO_CRC_TARGET)
ZO_CRC_TARGET void by_instruction(const uint8_t *data, uint64_t pages, uint32_t *out) {
  const auto word = [&](uint64_t page, uint64_t at) {
    uint64_t found;
    memcpy(&found, data + page * kPage + at, 8);
    return found;
  };
  uint64_t page = 0;
  for (; page + 3 <= pages; page += 3) {
    uint32_t a = ~0u, b = ~0u, c = ~0u;
    for (uint64_t at = 0; at < kPage; at += 8) {
      a = next(a, word(page, at));
      b = next(b, word(page + 1, at));
      c = next(c, word(page + 2, at));
    }
    out[page] = ~a, out[page + 1] = ~b, out[page + 2] = ~c;
  }
  for (; page < pages; ++page) {
    uint32_t crc = ~0u;
    for (uint64_t at = 0; at < kPage; at += 8) crc = next(crc, word(page, at));
    out[page] = ~crc;
  }
}
#endif

}  // namespace

extern "C" ZO_API void zo_page_crcs(const void *data, uint64_t pages, uint32_t *out) {
  const uint8_t *bytes = static_cast<const uint8_t *>(data);
#if defined(ZO_CRC_TARGET)
  if (has_instruction()) return by_instruction(bytes, pages, out);
#endif
  for (uint64_t page = 0; page < pages; ++page) out[page] = by_table(bytes + page * kPage);
}
