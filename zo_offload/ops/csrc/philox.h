/* Philox4x32-10, blocks in order of memory. The including file sets the instruction set.
 *
 * Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", SC11.
 *
 * A counter's four words sit in 64-bit lanes, one block a lane. A product is taken of the low
 * halves alone, so whatever a word carries above its 32 bits never needs cleaning.
 */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int kRounds = 10;
constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

/* Lane i of a vector takes block order(i), chosen so that `store` need only interleave lanes that
 * lie beside each other. */
#if defined(ZO_BUILD_AVX512)

constexpr int kLanes = 8, kBatch = 4;
typedef __m512i Vector;
inline Vector same(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
inline Vector order() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
inline Vector add(Vector a, Vector b) { return _mm512_add_epi64(a, b); }
inline Vector product(Vector a, Vector b) { return _mm512_mul_epu32(a, b); }
inline Vector mix(Vector high, Vector word, Vector key) {
  return _mm512_ternarylogic_epi64(_mm512_srli_epi64(high, 32), word, key, 0x96);
}
inline Vector pair(Vector low, Vector high) {
  return _mm512_mask_mov_epi32(low, 0xAAAA, _mm512_slli_epi64(high, 32));
}
inline void store(uint32_t *out, Vector low, Vector high) {
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low, high));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low, high));
}

#elif defined(ZO_BUILD_AVX2)

constexpr int kLanes = 4, kBatch = 2;
typedef __m256i Vector;
inline Vector same(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
inline Vector order() { return _mm256_set_epi64x(3, 1, 2, 0); }
inline Vector add(Vector a, Vector b) { return _mm256_add_epi64(a, b); }
inline Vector product(Vector a, Vector b) { return _mm256_mul_epu32(a, b); }
inline Vector mix(Vector high, Vector word, Vector key) {
  return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(high, 32), word), key);
}
inline Vector pair(Vector low, Vector high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
inline void store(uint32_t *out, Vector low, Vector high) {
  _mm256_storeu_si256(reinterpret_cast<Vector *>(out), _mm256_unpacklo_epi64(low, high));
  _mm256_storeu_si256(reinterpret_cast<Vector *>(out + 8), _mm256_unpackhi_epi64(low, high));
}

#elif defined(ZO_BUILD_NEON)

constexpr int kLanes = 2, kBatch = 4;
typedef uint64x2_t Vector;
inline Vector same(uint64_t x) { return vdupq_n_u64(x); }
inline Vector order() { return vcombine_u64(vcreate_u64(0), vcreate_u64(1)); }
inline Vector add(Vector a, Vector b) { return vaddq_u64(a, b); }
inline Vector product(Vector a, Vector b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
inline Vector mix(Vector high, Vector word, Vector key) {
  return veorq_u64(veorq_u64(vshrq_n_u64(high, 32), word), key);
}
inline Vector pair(Vector low, Vector high) { return vsliq_n_u64(low, high, 32); }
inline void store(uint32_t *out, Vector low, Vector high) {
  vst1q_u32(out, vreinterpretq_u32_u64(vzip1q_u64(low, high)));
  vst1q_u32(out + 4, vreinterpretq_u32_u64(vzip2q_u64(low, high)));
}

#else

constexpr int kLanes = 1, kBatch = 4;
typedef uint64_t Vector;
inline Vector same(uint64_t x) { return x; }
inline Vector order() { return 0; }
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector product(Vector a, Vector b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
inline Vector mix(Vector high, Vector word, Vector key) { return (high >> 32) ^ word ^ key; }
inline Vector pair(Vector low, Vector high) { return (low & 0xFFFFFFFF) | high << 32; }
inline void store(uint32_t *out, Vector low, Vector high) {
  out[0] = static_cast<uint32_t>(low), out[1] = static_cast<uint32_t>(low >> 32);
  out[2] = static_cast<uint32_t>(high), out[3] = static_cast<uint32_t>(high >> 32);
}

#endif

constexpr uint64_t kBlocksAtOnce = uint64_t{kLanes} * kBatch;

/* Everything of a counter but the block, and the key. */
struct Stream {
  uint64_t seed;
  uint32_t parameter, step, tag;
};

/* kCount vectors of consecutive blocks on their way through the rounds. */
template <int kCount>
struct Philox {
  Vector c0[kCount], c1[kCount], c2[kCount], c3[kCount];
  uint32_t k0, k1;

  Philox(const Stream &stream, uint64_t block)
      : k0(static_cast<uint32_t>(stream.seed)), k1(static_cast<uint32_t>(stream.seed >> 32)) {
    for (int i = 0; i < kCount; ++i) {
      c0[i] = add(order(), same(block + uint64_t(i) * kLanes));
      c1[i] = same(stream.parameter), c2[i] = same(stream.step), c3[i] = same(stream.tag);
    }
  }

  inline void round() {
    const Vector m0 = same(kMultiplier0), m1 = same(kMultiplier1);
    const Vector key0 = same(k0), key1 = same(k1);
    for (int i = 0; i < kCount; ++i) {
      const Vector p0 = product(c0[i], m0), p1 = product(c2[i], m1);
      c0[i] = mix(p1, c1[i], key0), c2[i] = mix(p0, c3[i], key1);
      c1[i] = p1, c3[i] = p0;
    }
    k0 += kWeyl0, k1 += kWeyl1;
  }

  inline void finish(uint32_t *out) const {
    for (int i = 0; i < kCount; ++i)
      store(out + size_t(i) * 4 * kLanes, pair(c0[i], c1[i]), pair(c2[i], c3[i]));
  }
};

template <int kCount>
inline void philox(const Stream &stream, uint64_t block, uint32_t *out) {
  Philox<kCount> all(stream, block);
  for (int round = 0; round < kRounds; ++round) all.round();
  all.finish(out);
}

/* Words of consecutive blocks; `out` has room for a multiple of kBlocksAtOnce of them. */
inline void random_words(const Stream &stream, uint64_t block, uint64_t count, uint32_t *out) {
  uint64_t done = 0;
  for (; count - done > uint64_t{kLanes} * (kBatch - 1); done += kBlocksAtOnce) {
    philox<kBatch>(stream, block + done, out + done * 4);
    if (count - done <= kBlocksAtOnce) return;
  }
  for (; done < count; done += kLanes) philox<1>(stream, block + done, out + done * 4);
}

}  // namespace
