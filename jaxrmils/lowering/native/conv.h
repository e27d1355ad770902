// Dense two-dimensional convolutions (NHWC), as products of pixels with all their taps.

#pragma once

#include "gemm.h"

namespace jaxrmils {

struct Window {
  int64_t batch, height, width, channels;  // of the input
  int64_t kernel_height, kernel_width;
  int64_t stride_h, stride_w, top, left, dilation_h, dilation_w;
  int64_t out_height, out_width;
};

// A pixel's window that padding is part of, from input row `top` and column `iw` on.
inline void copy_border(const Window& g, const int8_t* image, uint8_t fill, int64_t top,
                        int64_t iw, uint8_t* run) {
  const int64_t c = g.channels;
  for (int64_t kh = 0; kh < g.kernel_height; ++kh, run += g.kernel_width * c) {
    const int64_t ih = top + kh * g.dilation_h;
    if (ih < 0 || ih >= g.height) {
      std::memset(run, fill, size_t(g.kernel_width * c));
    } else if (g.dilation_w == 1) {
      const int8_t* from = image + (ih * g.width + iw) * c;
      const int64_t low = std::clamp<int64_t>(-iw, 0, g.kernel_width);
      const int64_t high = std::clamp<int64_t>(g.width - iw, low, g.kernel_width);
      if (low > 0) std::memset(run, fill, size_t(low * c));
      copy_flipped(run + low * c, from + low * c, (high - low) * c);
      if (high < g.kernel_width) {
        std::memset(run + high * c, fill, size_t((g.kernel_width - high) * c));
      }
    } else {
      for (int64_t kw = 0; kw < g.kernel_width; ++kw) {
        const int64_t at = iw + kw * g.dilation_w;
        if (at < 0 || at >= g.width) {
          std::memset(run + kw * c, fill, size_t(c));
        } else {
          copy_flipped(run + kw * c, image + (ih * g.width + at) * c, c);
        }
      }
    }
  }
}

// Writes pixels [first, first + count) of the output with all their taps, row by row of the
// kernel; neighbours in a row of the kernel are neighbours in memory.
inline void copy_pixels(const Window& g, const int8_t* x, int8_t zero, int64_t first,
                        int64_t count, uint8_t* to, int64_t stride) {
  const int64_t c = g.channels, pixels = g.out_height * g.out_width;
  if (g.kernel_height == 1 && g.kernel_width == 1 && g.stride_h == 1 && g.stride_w == 1 &&
      g.top == 0 && g.left == 0 && g.out_height == g.height && g.out_width == g.width) {
    x += first * c;
    if (stride == c) return copy_flipped(to, x, count * c);
    for (int64_t i = 0; i < count; ++i) copy_flipped(to + i * stride, x + i * c, c);
    return;
  }
  const uint8_t fill = uint8_t(zero) ^ 0x80;
  int64_t n = first / pixels, oh = first % pixels / g.out_width, ow = first % g.out_width;
  for (int64_t i = 0; i < count; ++i, to += stride) {
    const int8_t* image = x + n * g.height * g.width * c;
    const int64_t iw = ow * g.stride_w - g.left, top = oh * g.stride_h - g.top;
    if (g.dilation_w == 1 && iw >= 0 && iw + g.kernel_width <= g.width && top >= 0 &&
        top + (g.kernel_height - 1) * g.dilation_h < g.height) {
      // Inside. What is written too much is overwritten by the next pixel.
      copy_window(to, image + (top * g.width + iw) * c, g.kernel_height,
                  g.dilation_h * g.width * c, g.kernel_width * c);
    } else {
      copy_border(g, image, fill, top, iw, to);
    }
    if (++ow == g.out_width) {
      ow = 0;
      if (++oh == g.out_height) oh = 0, ++n;
    }
  }
}

template <class Pool>
void convolve(Pool& pool, const Window& g, const int8_t* x, int8_t zero, const Weights& w,
              const Epilogue& e) {
  const auto copy = [&](int64_t first, int64_t count, uint8_t* to, int64_t stride) {
    copy_pixels(g, x, zero, first, count, to, stride);
  };
  product(pool, w, e, g.batch * g.out_height * g.out_width, copy);
}

template <class Pool>
void dot(Pool& pool, int64_t rows, int64_t k, const int8_t* x, const Weights& w,
         const Epilogue& e) {
  const auto copy = [&](int64_t first, int64_t count, uint8_t* to, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) copy_flipped(to + i * stride, x + (first + i) * k, k);
  };
  product(pool, w, e, rows, copy);
}

}  // namespace jaxrmils
