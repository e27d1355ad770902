// What happens to an int32 sum before it is written: see `Epilogue` in kernels.py.
//
//   y = f(float32(sum + c[o]) * a[o] + b[o] + residual), between low and high,
//
// every operation but f rounded on its own, then y itself or the code
// clip(rint(y / s) + z, -128, 127). f is nothing, or max(x, 0) plus a polynomial in |x| on each of
// 16 intervals (see functions.py).

#pragma once

#include <cfloat>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace jaxrmils {

enum class Residual { kNone, kFloat, kCodes };

// What is written: floats, codes of any values, codes of values that are `in_range`.
enum class Result { kFloat, kCodes, kCodesInRange };

// f: coefficients of ascending powers, a row of 16 intervals each, and intervals per unit.
struct Function {
  const float* table = nullptr;  // none: f is nothing
  int64_t rows = 0;
  float per_unit = 0;

  float operator()(float x) const {
    const float t = std::fabs(x) * per_unit;
    if (!(t < kLanes)) return x < 0 ? 0 : x;
    const int interval = int(t);
    const float u = t - (float(interval) + 0.5f);
    float h = 0;
    for (int64_t j = rows; j-- > 0;) h = h * u + table[j * kLanes + interval];
    return (x < 0 ? 0 : x) + h;
  }
};

struct Epilogue {
  // Per output channel, filled up with zeros to whole vectors.
  std::vector<float> scale, offset;
  std::vector<int32_t> correction;
  Residual kind = Residual::kNone;
  const void* residual = nullptr;
  float residual_scale = 1;
  int32_t residual_zero = 0;
  Function function;  // its magnitude is never above that of what it is of
  float low = -INFINITY, high = INFINITY;
  bool codes = false;  // int8 out
  float out_scale = 1;
  int32_t out_zero = 0;
  int8_t low_code = -128, high_code = 127;
  bool in_range = false;  // whether `Divisor` may take y
  void* out = nullptr;
  int64_t channels = 0;

  void set_channels(int64_t n, const float* a, const float* b, const int32_t* c) {
    channels = n;
    const size_t padded = size_t(round_up(n, 4 * kLanes));
    scale.assign(padded, 0);
    offset.assign(padded, 0);
    correction.assign(padded, 0);
    std::memcpy(scale.data(), a, size_t(n) * sizeof(float));
    std::memcpy(offset.data(), b, size_t(n) * sizeof(float));
    std::memcpy(correction.data(), c, size_t(n) * sizeof(int32_t));
  }

  // After all else is set; `products` of codes are summed in one result.
  void close(int64_t products) {
    if (!codes) return;
    // Magnitudes in the order of their bits, which compilers find the largest of in vectors.
    int32_t bits = 0;
    const float sums = float(products) * (255 * 128);
    for (int64_t o = 0; o < channels; ++o) {
      const float sum = sums + std::fabs(float(correction[size_t(o)]));
      const float y = sum * std::fabs(scale[size_t(o)]) + std::fabs(offset[size_t(o)]);
      int32_t of_y;
      std::memcpy(&of_y, &y, sizeof(y));
      bits = of_y > bits ? of_y : bits;
    }
    float largest;
    std::memcpy(&largest, &bits, sizeof(bits));
    if (kind == Residual::kCodes) largest += 255 * residual_scale;
    in_range = kind != Residual::kFloat && largest / out_scale < 0x1p30f &&
               out_scale > 0x1p-60f && out_scale < 0x1p60f;
    // Quantization never decreases: a clamp of values is one of codes.
    low_code = quantized(low);
    high_code = quantized(high);
    // Where a quotient may not fit in int32, values beyond the outermost codes are cut off before
    // the division; they have these codes anyway.
    const float first = std::fmax(float(-128 - out_zero) * out_scale, -FLT_MAX);
    const float last = std::fmin(float(127 - out_zero) * out_scale, FLT_MAX);
    low = std::fmin(std::fmax(low, first), last);
    high = std::fmin(std::fmax(high, first), last);
  }

  int8_t quantized(float y) const {
    const float code = std::nearbyint(y / out_scale) + float(out_zero);
    return int8_t(std::fmin(std::fmax(code, -128.f), 127.f));
  }
};

#ifdef JAXRMILS_VNNI

// rint(y / s) in int32 without a division: y times the reciprocal, corrected once by what that
// leaves of y. It may differ from the rounded quotient in the last place, but
// never across one of the halves up to 255.5, whatever the significand of s
// (tests/lowering/exact_division.cc tries them all); beyond these every code is -128 or 127. For
// |y / s| < 2^30 and s between 2^-60 and 2^60, where nothing overflows or underflows that matters.
struct Divisor {
  __m512 s, inverse;
  explicit Divisor(float scale)
      : s(_mm512_set1_ps(scale)), inverse(_mm512_set1_ps(1 / scale)) {}

  template <int n>
  [[gnu::always_inline]] void steps(const __m512 (&y)[n], __m512i (&to)[n]) const {
    constexpr Numbers<n> every;
    __m512 q[n], left[n];
    each([&](auto i) JAXRMILS_INLINE { q[i] = _mm512_mul_ps(y[i], inverse); }, every);
    each([&](auto i) JAXRMILS_INLINE { left[i] = _mm512_fnmadd_ps(q[i], s, y[i]); }, every);
    each([&](auto i) JAXRMILS_INLINE { q[i] = _mm512_fmadd_ps(left[i], inverse, q[i]); }, every);
    each([&](auto i) JAXRMILS_INLINE { to[i] = _mm512_cvtps_epi32(q[i]); }, every);
  }
};

// The constants of an epilogue in vectors.
struct EpilogueVectors {
  Divisor divisor;
  __m512 low, high, residual_scale;
  __m512i out_zero, residual_zero;
  __m128i low_code, high_code;
  explicit EpilogueVectors(const Epilogue& e)
      : divisor(e.out_scale),
        low(_mm512_set1_ps(e.low)),
        high(_mm512_set1_ps(e.high)),
        residual_scale(_mm512_set1_ps(e.residual_scale)),
        out_zero(_mm512_set1_epi32(e.out_zero)),
        residual_zero(_mm512_set1_epi32(e.residual_zero)),
        low_code(_mm_set1_epi8(e.low_code)),
        high_code(_mm_set1_epi8(e.high_code)) {}
};

inline void store_codes(int8_t* to, __mmask16 some, __m128i codes) {
  if (some == 0xffff) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
  } else {
    _mm_mask_storeu_epi8(to, some, codes);
  }
}

inline void store_floats(float* to, __mmask16 some, __m512 y) {
  if (some == 0xffff) {
    _mm512_storeu_ps(to, y);
  } else {
    _mm512_mask_storeu_ps(to, some, y);
  }
}

constexpr int kTogether = 4;  // vectors that are finished step by step

// f of n vectors, which share what is read of the table.
template <int n>
[[gnu::always_inline]] inline void apply(const Function& f, __m512 (&y)[n]) {
  constexpr Numbers<n> every;
  __m512 u[n], h[n];
  __m512i interval[n];
  __mmask16 near[n];
  const __m512 per_unit = _mm512_set1_ps(f.per_unit);
  each([&](auto i) JAXRMILS_INLINE {
    u[i] = _mm512_mul_ps(_mm512_abs_ps(y[i]), per_unit);
    near[i] = _mm512_cmp_ps_mask(u[i], _mm512_set1_ps(kLanes), _CMP_LT_OQ);
    interval[i] = _mm512_cvttps_epi32(u[i]);
  }, every);
  each([&](auto i) JAXRMILS_INLINE {
    const __m512 first = _mm512_cvtepi32_ps(interval[i]);
    u[i] = _mm512_sub_ps(u[i], _mm512_add_ps(first, _mm512_set1_ps(0.5f)));
  }, every);
  const float* row = f.table + (f.rows - 1) * kLanes;
  const __m512 highest = _mm512_loadu_ps(row);
  each([&](auto i) JAXRMILS_INLINE {
    h[i] = _mm512_permutexvar_ps(interval[i], highest);
  }, every);
  for (int64_t j = f.rows - 1; j > 0; --j) {
    row -= kLanes;
    const __m512 power = _mm512_loadu_ps(row);
    each([&](auto i) JAXRMILS_INLINE {
      h[i] = _mm512_fmadd_ps(h[i], u[i], _mm512_permutexvar_ps(interval[i], power));
    }, every);
  }
  each([&](auto i) JAXRMILS_INLINE {
    const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), y[i]);
    y[i] = _mm512_mask_add_ps(positive, near[i], positive, h[i]);
  }, every);
}

// Writes n vectors of the result, a row apart, the first from element `at` on. They are finished
// step by step: one after the other, their operations would wait for each other where the
// processor can look at a few only.
template <Residual kind, Result result, bool kFunction, int n>
[[gnu::always_inline]] inline void finish_vectors(const Epilogue& e, const EpilogueVectors& k,
                                                  const __m512i (&sum)[n], __m512 scale,
                                                  __m512 offset, int64_t at, __mmask16 some) {
  constexpr Numbers<n> every;
  const int64_t pitch = e.channels;
  __m512 y[n];
  each([&](auto i) JAXRMILS_INLINE { y[i] = _mm512_cvtepi32_ps(sum[i]); }, every);
  each([&](auto i) JAXRMILS_INLINE { y[i] = _mm512_mul_ps(y[i], scale); }, every);
  each([&](auto i) JAXRMILS_INLINE { y[i] = _mm512_add_ps(y[i], offset); }, every);
  if constexpr (kind == Residual::kFloat) {
    const float* residual = static_cast<const float*>(e.residual) + at;
    each([&](auto i) JAXRMILS_INLINE {
      y[i] = _mm512_add_ps(y[i], _mm512_maskz_loadu_ps(some, residual + i * pitch));
    }, every);
  } else if constexpr (kind == Residual::kCodes) {
    const int8_t* residual = static_cast<const int8_t*>(e.residual) + at;
    each([&](auto i) JAXRMILS_INLINE {
      const __m128i bytes = _mm_maskz_loadu_epi8(some, residual + i * pitch);
      const __m512i distance = _mm512_sub_epi32(_mm512_cvtepi8_epi32(bytes), k.residual_zero);
      y[i] = _mm512_add_ps(y[i], _mm512_mul_ps(k.residual_scale, _mm512_cvtepi32_ps(distance)));
    }, every);
  }
  if constexpr (kFunction) apply(e.function, y);
  if constexpr (result != Result::kCodesInRange) {
    each([&](auto i) JAXRMILS_INLINE {
      y[i] = _mm512_min_ps(_mm512_max_ps(y[i], k.low), k.high);
    }, every);
  }
  if constexpr (result == Result::kFloat) {
    float* out = static_cast<float*>(e.out) + at;
    each([&](auto i) JAXRMILS_INLINE {
      store_floats(out + i * pitch, some, y[i]);
    }, every);
  } else {
    __m512i steps[n];
    if constexpr (result == Result::kCodesInRange) {
      k.divisor.steps(y, steps);
    } else {
      each([&](auto i) JAXRMILS_INLINE {
        steps[i] = _mm512_cvtps_epi32(_mm512_div_ps(y[i], k.divisor.s));
      }, every);
    }
    __m128i codes[n];
    each([&](auto i) JAXRMILS_INLINE {
      codes[i] = _mm512_cvtsepi32_epi8(_mm512_add_epi32(steps[i], k.out_zero));
      if constexpr (result == Result::kCodesInRange) {
        codes[i] = _mm_min_epi8(_mm_max_epi8(codes[i], k.low_code), k.high_code);
      }
    }, every);
    int8_t* out = static_cast<int8_t*>(e.out) + at;
    each([&](auto i) JAXRMILS_INLINE { store_codes(out + i * pitch, some, codes[i]); }, every);
  }
}

inline __mmask16 existing(int64_t channels) {
  return channels >= kLanes ? 0xffff : __mmask16((1u << channels) - 1);
}

template <Residual kind, Result result, bool kFunction>
void finish_rows(const Epilogue& e, const int32_t* sums, int64_t pitch, int64_t rows,
                 int64_t row, int64_t channel, int64_t count) {
  const EpilogueVectors k(e);
  for (int64_t o = channel; o < channel + count; o += kLanes, sums += kLanes) {
    const __mmask16 some = existing(channel + count - o);
    const __m512 scale = _mm512_loadu_ps(&e.scale[size_t(o)]);
    const __m512 offset = _mm512_loadu_ps(&e.offset[size_t(o)]);
    const int64_t first = row * e.channels + o;
    const auto group = [&](auto n, int64_t i) JAXRMILS_INLINE {
      __m512i sum[n];
      each([&](auto r) JAXRMILS_INLINE {
        sum[r] = _mm512_loadu_si512(sums + (i + r) * pitch);
      }, Numbers<n>());
      finish_vectors<kind, result, kFunction>(e, k, sum, scale, offset, first + i * e.channels,
                                              some);
    };
    int64_t i = 0;
    for (; i + kTogether <= rows; i += kTogether) {
      group(std::integral_constant<int, kTogether>(), i);
    }
    for (; i < rows; ++i) group(std::integral_constant<int, 1>(), i);
  }
}

#else

template <Residual kind, Result result, bool kFunction>
void finish_rows(const Epilogue& e, const int32_t* sums, int64_t pitch, int64_t rows,
                 int64_t row, int64_t channel, int64_t count) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      const size_t o = size_t(channel + j);
      const int64_t at = (row + i) * e.channels + channel + j;
      const float scaled = float(sums[i * pitch + j]) * e.scale[o];
      float y = scaled + e.offset[o];
      if (kind == Residual::kFloat) {
        y = y + static_cast<const float*>(e.residual)[at];
      } else if (kind == Residual::kCodes) {
        const int32_t steps = static_cast<const int8_t*>(e.residual)[at] - e.residual_zero;
        const float r = e.residual_scale * float(steps);
        y = y + r;
      }
      if (kFunction) y = e.function(y);
      y = std::fmin(std::fmax(y, e.low), e.high);
      if (result != Result::kFloat) {
        static_cast<int8_t*>(e.out)[at] = e.quantized(y);
      } else {
        static_cast<float*>(e.out)[at] = y;
      }
    }
  }
}

#endif

// Finishes `rows` output rows (pixels) from `row` on, and `count` channels of each from
// `channel` on. Row i's sums, which hold the correction, start at sums + i * pitch.
inline void finish(const Epilogue& e, const int32_t* sums, int64_t pitch, int64_t rows,
                   int64_t row, int64_t channel, int64_t count) {
  using Finish = void (*)(const Epilogue&, const int32_t*, int64_t, int64_t, int64_t, int64_t,
                          int64_t);
  using K = Residual;
  using R = Result;
  static constexpr Finish choices[2][3][3] = {
      {{finish_rows<K::kNone, R::kFloat, false>, finish_rows<K::kNone, R::kCodes, false>,
        finish_rows<K::kNone, R::kCodesInRange, false>},
       {finish_rows<K::kFloat, R::kFloat, false>, finish_rows<K::kFloat, R::kCodes, false>,
        finish_rows<K::kFloat, R::kCodesInRange, false>},
       {finish_rows<K::kCodes, R::kFloat, false>, finish_rows<K::kCodes, R::kCodes, false>,
        finish_rows<K::kCodes, R::kCodesInRange, false>}},
      {{finish_rows<K::kNone, R::kFloat, true>, finish_rows<K::kNone, R::kCodes, true>,
        finish_rows<K::kNone, R::kCodesInRange, true>},
       {finish_rows<K::kFloat, R::kFloat, true>, finish_rows<K::kFloat, R::kCodes, true>,
        finish_rows<K::kFloat, R::kCodesInRange, true>},
       {finish_rows<K::kCodes, R::kFloat, true>, finish_rows<K::kCodes, R::kCodes, true>,
        finish_rows<K::kCodes, R::kCodesInRange, true>}}};
  const R result = !e.codes ? R::kFloat : e.in_range ? R::kCodesInRange : R::kCodes;
  const bool function = e.function.table != nullptr;
  choices[function][int(e.kind)][int(result)](e, sums, pitch, rows, row, channel, count);
}

}  // namespace jaxrmils
