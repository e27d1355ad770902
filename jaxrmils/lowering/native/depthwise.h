// Depthwise two-dimensional convolutions (NHWC, one output channel per input channel).
//
// A thread copies the rows that a strip of output rows reads into its own memory, with padding
// and flipped sign bits. Four taps of a channel are then brought side by side, and vpdpbusd sums
// them at once.

#pragma once

#include "conv.h"

namespace jaxrmils {

// Weights are [channels / 16][taps / 4][16 channels][4 taps].
struct DepthwiseWeights {
  const int8_t* packed;
  int64_t quads;   // taps / 4, rounded up
  int64_t groups;  // channels / 16, rounded up
};

// Where a strip's copied rows and taps lie.
struct Strip {
  const uint8_t* rows;
  int64_t pixel;                  // bytes between pixels: channels, rounded up to 16
  int64_t step_h, step_w;         // bytes between the windows of neighbouring outputs
  std::vector<int64_t> taps;      // bytes from a window's first pixel, filled up to quads
};

// The sums of 16 channels from `channel` on of `count` outputs of a row.
inline void depthwise_row(const Strip& s, const uint8_t* window, const int8_t* weights,
                          int64_t quads, int64_t count, int32_t* sums) {
  for (int64_t i = 0; i < count; ++i, window += s.step_w, sums += kLanes) {
    int32_t acc[kLanes] = {};
    for (int64_t q = 0; q < quads; ++q) {
      for (int j = 0; j < 4; ++j) {
        const uint8_t* x = window + s.taps[size_t(4 * q + j)];
        const int8_t* w = weights + 64 * q + j;
        for (int lane = 0; lane < kLanes; ++lane) acc[lane] += int32_t(x[lane]) * w[4 * lane];
      }
    }
    std::memcpy(sums, acc, sizeof(acc));
  }
}

template <class Pool>
void depthwise(Pool& pool, const Window& g, const int8_t* x, int8_t zero,
               const DepthwiseWeights& w, const Epilogue& e) {
  const int64_t outputs = g.batch * g.out_height * g.out_width;
  if (outputs == 0 || w.groups == 0) return;
  const int64_t c = g.channels, pixel = w.groups * kLanes;
  const int64_t span_h = (g.kernel_height - 1) * g.dilation_h + 1;
  const int64_t span_w = (g.kernel_width - 1) * g.dilation_w + 1;
  const int64_t width = (g.out_width - 1) * g.stride_w + span_w;
  const double work = double(outputs) * double(w.quads * w.groups);
  const int64_t threads = work < 20e3 ? 1 : std::max<int64_t>(pool.num_threads(), 1);
  // As many output rows as half of the second cache holds inputs of.
  const int64_t fit = ((kL2 / 2) / (width * pixel) - span_h) / g.stride_h + 1;
  int64_t height = std::clamp<int64_t>(fit, 1, g.out_height);
  if (g.batch * ceil_div(g.out_height, height) < 3 * threads) {
    height = std::min(height, ceil_div(g.out_height, ceil_div(3 * threads, g.batch)));
  }
  const int64_t strips = ceil_div(g.out_height, height);
  std::vector<int64_t> taps(size_t(4 * w.quads), 0);
  for (int64_t t = 0; t < g.kernel_height * g.kernel_width; ++t) {
    const int64_t row = t / g.kernel_width * g.dilation_h;
    taps[size_t(t)] = (row * width + t % g.kernel_width * g.dilation_w) * pixel;
  }
  parallel_for(pool, threads, g.batch * strips, [&](int64_t task) {
    thread_local Scratch scratch, results;
    const int64_t n = task / strips, oh = task % strips * height;
    const int64_t rows = std::min(height, g.out_height - oh);
    const int64_t in_rows = (rows - 1) * g.stride_h + span_h;
    uint8_t* copied = scratch.at_least(size_t(in_rows * width * pixel));
    const int64_t low = std::clamp<int64_t>(g.left, 0, width);
    const int64_t high = std::clamp<int64_t>(g.width + g.left, low, width);
    const uint8_t fill = uint8_t(zero) ^ 0x80;
    for (int64_t r = 0; r < in_rows; ++r) {
      const int64_t ih = oh * g.stride_h - g.top + r;
      uint8_t* to = copied + r * width * pixel;
      if (ih < 0 || ih >= g.height) {
        std::memset(to, fill, size_t(width * pixel));
        continue;
      }
      const int8_t* from = x + ((n * g.height + ih) * g.width + low - g.left) * c;
      std::memset(to, fill, size_t(low * pixel));
      if (pixel == c) {
        copy_flipped(to + low * pixel, from, (high - low) * c);
      } else {
        for (int64_t i = low; i < high; ++i, from += c) copy_flipped(to + i * pixel, from, c);
      }
      std::memset(to + high * pixel, fill, size_t((width - high) * pixel));
    }
    const Strip s{copied, pixel, g.stride_h * width * pixel, g.stride_w * pixel, taps};
    int32_t* sums =
        reinterpret_cast<int32_t*>(results.at_least(size_t(g.out_width * kLanes) * 4));
    for (int64_t group = 0; group < w.groups; ++group) {
      const int8_t* weights = w.packed + group * w.quads * 64;
      for (int64_t r = 0; r < rows; ++r) {
        depthwise_row(s, copied + r * s.step_h + group * kLanes, weights, w.quads, g.out_width,
                      sums);
        finish(e, sums, kLanes, g.out_width, ((n * g.out_height) + oh + r) * g.out_width,
               group * kLanes, std::min<int64_t>(kLanes, c - group * kLanes));
      }
    }
  });
}

}  // namespace jaxrmils
