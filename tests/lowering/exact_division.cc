// Whether `Divisor` rounds like a division, for every significand of s and every half up to 255.5.
//
//   exact_division STRIDE    looks at every STRIDE-th significand
//
// Tries floats from four units in the last place below half * s to four above. Prints how many
// quotients were compared and how many of their integers differ.

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "epilogue.h"

int main([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
#ifndef JAXRMILS_VNNI
  std::puts("no AVX-512 VNNI");
  return 0;
#else
  using namespace jaxrmils;
  const uint32_t stride = argc > 1 ? uint32_t(std::atoi(argv[1])) : 1;
  const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t compared = 0, different = 0;
  for (uint32_t significand = 0; significand < 1u << 23; significand += stride) {
    const uint32_t bits = 0x3f800000u | significand;
    float s;
    std::memcpy(&s, &bits, sizeof(s));
    const Divisor divisor(s);
    for (int half = 0; half < 256; half += kLanes) {
      const __m512 halves = _mm512_add_ps(lanes, _mm512_set1_ps(float(half) + 0.5f));
      const __m512i middle = _mm512_castps_si512(_mm512_mul_ps(halves, divisor.s));
      for (int unit = -4; unit <= 4; ++unit) {
        const __m512i moved = _mm512_add_epi32(middle, _mm512_set1_epi32(unit));
        const __m512 y[1] = {_mm512_castsi512_ps(moved)};
        __m512i steps[1];
        divisor.steps(y, steps);
        const __m512i expected = _mm512_cvtps_epi32(_mm512_div_ps(y[0], divisor.s));
        different += __builtin_popcount(_mm512_cmpneq_epi32_mask(steps[0], expected));
        compared += kLanes;
      }
    }
  }
  std::printf("%lld compared, %lld different\n", (long long)compared, (long long)different);
  return different != 0;
#endif
}
