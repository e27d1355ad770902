// Prints what one core can do at most with vpdpbusd, in operations per second.

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

int main() {
  __m512i x = _mm512_set1_epi8(3), s[12] = {};
  double best = 1;
  for (int round = 0; round < 500; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 2000; ++i) {
#define JAXRMILS_SUM(j) s[j] = _mm512_dpbusd_epi32(s[j], x, x);
      JAXRMILS_SUM(0) JAXRMILS_SUM(1) JAXRMILS_SUM(2) JAXRMILS_SUM(3)
      JAXRMILS_SUM(4) JAXRMILS_SUM(5) JAXRMILS_SUM(6) JAXRMILS_SUM(7)
      JAXRMILS_SUM(8) JAXRMILS_SUM(9) JAXRMILS_SUM(10) JAXRMILS_SUM(11)
      // The sums are equal: without this the compiler keeps one.
      asm volatile(""
                   : "+v"(x), "+v"(s[0]), "+v"(s[1]), "+v"(s[2]), "+v"(s[3]), "+v"(s[4]),
                     "+v"(s[5]), "+v"(s[6]), "+v"(s[7]), "+v"(s[8]), "+v"(s[9]), "+v"(s[10]),
                     "+v"(s[11]));
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::min(best, seconds.count());
  }
  std::printf("%.4g\n", 2.0 * 64 * 12 * 2000 / best);
}
