// What happens to an int32 sum before it is written: see `Epilogue` in kernels.py.
//
//   y = float32(sum + c[o]) * a[o] + b[o] + residual, between low and high,
//
// every operation rounded on its own, then y itself or the code clip(rint(y / s) + z, -128, 127).

#pragma once

#include <cfloat>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace jaxrmils {

enum class Residual { kNone, kFloat, kCodes };

struct Epilogue {
  // Per output channel, filled up with zeros to whole vectors.
  std::vector<float> scale, offset;
  std::vector<int32_t> correction;
  Residual kind = Residual::kNone;
  const void* residual = nullptr;
  float residual_scale = 1;
  int32_t residual_zero = 0;
  float low = -INFINITY, high = INFINITY;
  bool codes = false;  // int8 out
  float out_scale = 1;
  int32_t out_zero = 0;
  void* out = nullptr;
  int64_t channels = 0;

  // `sums` are those of the weights, of which x + 128 has counted 128 too many.
  void set_channels(int64_t n, const float* a, const float* b, const int32_t* c,
                    const int32_t* sums) {
    channels = n;
    const size_t padded = size_t(round_up(n, 4 * kLanes));
    scale.assign(padded, 0);
    offset.assign(padded, 0);
    correction.assign(padded, 0);
    std::memcpy(scale.data(), a, size_t(n) * sizeof(float));
    std::memcpy(offset.data(), b, size_t(n) * sizeof(float));
    for (int64_t o = 0; o < n; ++o) {
      correction[size_t(o)] = int32_t(uint32_t(c[o]) - 128u * uint32_t(sums[o]));
    }
  }

  // Values beyond the outermost codes have these codes, and a clamp after a clamp is one clamp.
  void close() {
    if (!codes) return;
    const float first = std::fmax(float(-128 - out_zero) * out_scale, -FLT_MAX);
    const float last = std::fmin(float(127 - out_zero) * out_scale, FLT_MAX);
    low = std::fmin(std::fmax(low, first), last);
    high = std::fmin(std::fmax(high, first), last);
  }
};

#ifdef JAXRMILS_VNNI

// The constants of an epilogue in vectors.
struct EpilogueVectors {
  __m512 low, high, out_scale, residual_scale;
  __m512i out_zero, residual_zero;
  explicit EpilogueVectors(const Epilogue& e)
      : low(_mm512_set1_ps(e.low)),
        high(_mm512_set1_ps(e.high)),
        out_scale(_mm512_set1_ps(e.out_scale)),
        residual_scale(_mm512_set1_ps(e.residual_scale)),
        out_zero(_mm512_set1_epi32(e.out_zero)),
        residual_zero(_mm512_set1_epi32(e.residual_zero)) {}

  // Codes of clamped values.
  __m512i quantized(__m512 y) const {
    return _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_div_ps(y, out_scale)), out_zero);
  }
};

template <Residual kind, bool codes>
inline void finish_vector(const Epilogue& e, const EpilogueVectors& k, __m512i sum,
                          __m512 scale, __m512 offset, int64_t at, __mmask16 some) {
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
  y = _mm512_min_ps(_mm512_max_ps(y, k.low), k.high);
  if constexpr (codes) {
    const __m128i bytes = _mm512_cvtepi32_epi8(k.quantized(y));
    int8_t* out = static_cast<int8_t*>(e.out) + at;
    if (some == 0xffff) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    } else {
      _mm_mask_storeu_epi8(out, some, bytes);
    }
  } else {
    _mm512_mask_storeu_ps(static_cast<float*>(e.out) + at, some, y);
  }
}

inline __mmask16 existing(int64_t channels) {
  return channels >= kLanes ? 0xffff : __mmask16((1u << channels) - 1);
}

template <Residual kind, bool codes>
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
      finish_vector<kind, codes>(e, k, sum, scale, offset, at, some);
    }
  }
}

#else

template <Residual kind, bool codes>
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
      y = std::fmin(std::fmax(y, e.low), e.high);
      if (codes) {
        const float code = std::nearbyint(y / e.out_scale) + float(e.out_zero);
        static_cast<int8_t*>(e.out)[at] = int8_t(std::fmin(std::fmax(code, -128.f), 127.f));
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
  auto run = finish_rows<Residual::kNone, false>;
  switch (e.kind) {
    case Residual::kNone:
      if (e.codes) run = finish_rows<Residual::kNone, true>;
      break;
    case Residual::kFloat:
      run = e.codes ? finish_rows<Residual::kFloat, true> : finish_rows<Residual::kFloat, false>;
      break;
    case Residual::kCodes:
      run = e.codes ? finish_rows<Residual::kCodes, true> : finish_rows<Residual::kCodes, false>;
      break;
  }
  run(e, sums, pitch, rows, row, channel, count);
}

}  // namespace jaxrmils
