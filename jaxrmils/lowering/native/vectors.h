// What all kernels share: which instructions they use, copies of codes, scratch memory.
//
// vpdpbusd multiplies unsigned by signed bytes. Activations are signed, so kernels work on
// x + 128, which is a flipped sign bit, and subtract 128 times the sum of the weights. Sums may
// wrap on the way; that is arithmetic modulo 2^32, and the result fits.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    !defined(JAXRMILS_PORTABLE)
#define JAXRMILS_VNNI 1
#include <immintrin.h>
#endif

namespace jaxrmils {

constexpr int kLanes = 16;  // int32 in a vector: the output channels of a panel of weights

#ifdef JAXRMILS_VNNI

// Calls f(0), ..., f(n - 1) with numbers that the compiler knows, so that arrays indexed by them
// stay in registers.
template <class F, int... i>
[[gnu::always_inline]] inline void each(F f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>()), ...);
}
template <int n>
using Numbers = std::make_integer_sequence<int, n>;
#define JAXRMILS_INLINE __attribute__((always_inline))

#endif

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Copies n codes with their sign bits flipped.
inline void copy_flipped(uint8_t* to, const int8_t* from, int64_t n) {
#ifdef JAXRMILS_VNNI
  const __m512i sign = _mm512_set1_epi8(char(0x80));
  for (; n >= 64; n -= 64, to += 64, from += 64) {
    _mm512_storeu_si512(to, _mm512_xor_si512(_mm512_loadu_si512(from), sign));
  }
  if (n > 0) {
    const __mmask64 rest = ~uint64_t{0} >> (64 - n);
    _mm512_mask_storeu_epi8(
        to, rest, _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, from), sign));
  }
#else
  for (int64_t i = 0; i < n; ++i) to[i] = uint8_t(from[i]) ^ 0x80;
#endif
}

constexpr int64_t kSlack = 64;  // bytes that `copy_window` may write too many

// Copies `runs` runs of n codes, `pitch` apart, one behind the other with their sign bits flipped.
inline void copy_window(uint8_t* to, const int8_t* from, int64_t runs, int64_t pitch, int64_t n) {
#ifdef JAXRMILS_VNNI
  if (n <= 0) return;
  if (n <= 32) {
    const __m256i sign = _mm256_set1_epi8(char(0x80));
    const __mmask32 some = uint32_t(~uint64_t{0} >> (64 - n));
    for (int64_t i = 0; i < runs; ++i, to += n, from += pitch) {
      const __m256i codes = _mm256_maskz_loadu_epi8(some, from);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(codes, sign));
    }
    return;
  }
  const __m512i sign = _mm512_set1_epi8(char(0x80));
  const int64_t whole = (n - 1) / 64 * 64;
  const __mmask64 some = ~uint64_t{0} >> (64 - (n - whole));
  for (int64_t i = 0; i < runs; ++i, to += n, from += pitch) {
    for (int64_t j = 0; j < whole; j += 64) {
      _mm512_storeu_si512(to + j, _mm512_xor_si512(_mm512_loadu_si512(from + j), sign));
    }
    const __m512i codes = _mm512_maskz_loadu_epi8(some, from + whole);
    _mm512_storeu_si512(to + whole, _mm512_xor_si512(codes, sign));
  }
#else
  for (int64_t i = 0; i < runs; ++i, to += n, from += pitch) copy_flipped(to, from, n);
#endif
}

// Memory of one thread that outlives calls, so that its pages are faulted in once.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  uint8_t* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = size_t(round_up(int64_t(bytes), 4096));
      data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, size_));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace jaxrmils
