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

// What is written: floats, codes of any values, codes of values that are `in_int32`.
enum class Result { kFloat, kCodes, kCodesInInt32 };

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
  bool in_int32 = false;  // whether y / out_scale is sure to be
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
    in_int32 = kind != Residual::kFloat && largest / out_scale < 0x1p30f;
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

// The constants of an epilogue in vectors.
struct EpilogueVectors {
  __m512 low, high, out_scale, residual_scale;
  __m512i out_zero, residual_zero;
  __m128i low_code, high_code;
  explicit EpilogueVectors(const Epilogue& e)
      : low(_mm512_set1_ps(e.low)),
        high(_mm512_set1_ps(e.high)),
        out_scale(_mm512_set1_ps(e.out_scale)),
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

inline __m512 apply(const Function& f, __m512 x) {
  const __m512 t = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(f.per_unit));
  const __mmask16 near = _mm512_cmp_ps_mask(t, _mm512_set1_ps(kLanes), _CMP_LT_OQ);
  const __m512i interval = _mm512_cvttps_epi32(t);
  const __m512 middle = _mm512_add_ps(_mm512_cvtepi32_ps(interval), _mm512_set1_ps(0.5f));
  const __m512 u = _mm512_sub_ps(t, middle);
  const float* row = f.table + (f.rows - 1) * kLanes;
  __m512 h = _mm512_permutexvar_ps(interval, _mm512_loadu_ps(row));
  for (int64_t j = f.rows - 1; j > 0; --j) {
    row -= kLanes;
    h = _mm512_fmadd_ps(h, u, _mm512_permutexvar_ps(interval, _mm512_loadu_ps(row)));
  }
  const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), x);
  return _mm512_mask_add_ps(positive, near, positive, h);
}

// Writes a vector of the result, whose first element is number `at`.
template <Residual kind, Result result, bool kFunction>
inline void finish_vector(const Epilogue& e, const EpilogueVectors& k, __m512i sum, __m512 scale,
                          __m512 offset, int64_t at, __mmask16 some) {
  __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale), offset);
  if constexpr (kind == Residual::kFloat) {
    const float* residual = static_cast<const float*>(e.residual) + at;
    y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, residual));
  } else if constexpr (kind == Residual::kCodes) {
    const int8_t* residual = static_cast<const int8_t*>(e.residual) + at;
    const __m512i code = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, residual));
    const __m512 steps = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, k.residual_zero));
    y = _mm512_add_ps(y, _mm512_mul_ps(k.residual_scale, steps));
  }
  if constexpr (kFunction) y = apply(e.function, y);
  if constexpr (result != Result::kCodesInInt32) {
    y = _mm512_min_ps(_mm512_max_ps(y, k.low), k.high);
  }
  if constexpr (result == Result::kFloat) {
    _mm512_mask_storeu_ps(static_cast<float*>(e.out) + at, some, y);
  } else {
    const __m512i steps = _mm512_cvtps_epi32(_mm512_div_ps(y, k.out_scale));
    __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_add_epi32(steps, k.out_zero));
    if constexpr (result == Result::kCodesInInt32) {
      bytes = _mm_min_epi8(_mm_max_epi8(bytes, k.low_code), k.high_code);
    }
    store_codes(static_cast<int8_t*>(e.out) + at, some, bytes);
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
    int64_t at = row * e.channels + o;
    for (int64_t i = 0; i < rows; ++i, at += e.channels) {
      const __m512i sum = _mm512_loadu_si512(sums + i * pitch);
      finish_vector<kind, result, kFunction>(e, k, sum, scale, offset, at, some);
    }
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
        finish_rows<K::kNone, R::kCodesInInt32, false>},
       {finish_rows<K::kFloat, R::kFloat, false>, finish_rows<K::kFloat, R::kCodes, false>,
        finish_rows<K::kFloat, R::kCodesInInt32, false>},
       {finish_rows<K::kCodes, R::kFloat, false>, finish_rows<K::kCodes, R::kCodes, false>,
        finish_rows<K::kCodes, R::kCodesInInt32, false>}},
      {{finish_rows<K::kNone, R::kFloat, true>, finish_rows<K::kNone, R::kCodes, true>,
        finish_rows<K::kNone, R::kCodesInInt32, true>},
       {finish_rows<K::kFloat, R::kFloat, true>, finish_rows<K::kFloat, R::kCodes, true>,
        finish_rows<K::kFloat, R::kCodesInInt32, true>},
       {finish_rows<K::kCodes, R::kFloat, true>, finish_rows<K::kCodes, R::kCodes, true>,
        finish_rows<K::kCodes, R::kCodesInInt32, true>}}};
  const R result = !e.codes ? R::kFloat : e.in_int32 ? R::kCodesInInt32 : R::kCodes;
  const bool function = e.function.table != nullptr;
  choices[function][int(e.kind)][int(result)](e, sums, pitch, rows, row, channel, count);
}

}  // namespace jaxrmils
