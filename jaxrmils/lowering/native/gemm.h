// Products of rows of codes with packed weights, finished tile by tile.
//
// Weights are [o / 16][k / 4][16 o][4 k]: panels of 16 output channels, whose vectors hold four
// neighbours in k for each channel. Rows (pixels of a convolution with all their taps, or rows of
// a dot) are copied once, sign bits flipped, into a thread's own memory; a tile of up to 14 rows
// by 32 channels then stays in registers over all of k.

#pragma once

#include <algorithm>
#include <utility>

#include "epilogue.h"
#include "parallel.h"
#include "vectors.h"

namespace jaxrmils {

constexpr int kMaxRows = 14;   // of a tile of one or two panels
constexpr int kFewRows = 6;    // of a tile of four panels
constexpr int64_t kL1 = 24 << 10, kL2 = 256 << 10;  // bytes that rows and results may take

// sums[i * pitch + 16 v + lane] = start[16 v + lane] + rows[i] . weights[v][:, lane]
#ifdef JAXRMILS_VNNI

template <int kRows, int kPanels>
void tile(const uint8_t* rows, int64_t stride, const int8_t* weights, int64_t panel,
          int64_t quads, const int32_t* start, int32_t* sums, int64_t pitch) {
  __m512i acc[kRows][kPanels];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels; ++v) acc[i][v] = _mm512_loadu_si512(start + v * kLanes);
  }
  // Every third row has a pointer, the others an index register: fewer registers than rows.
  constexpr int kPointers = (kRows + 2) / 3;
  const uint8_t* at[kPointers];
#pragma GCC unroll 8
  for (int j = 0; j < kPointers; ++j) at[j] = rows + 3 * j * stride;
  for (int64_t q = 0; q < quads; ++q) {
    __m512i w[kPanels];
#pragma GCC unroll 4
    for (int v = 0; v < kPanels; ++v) w[v] = _mm512_loadu_si512(weights + v * panel);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      int32_t four;
      std::memcpy(&four, at[i / 3] + (i % 3) * stride, 4);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < kPanels; ++v) acc[i][v] = _mm512_dpbusd_epi32(acc[i][v], x, w[v]);
    }
    weights += 64;
#pragma GCC unroll 8
    for (int j = 0; j < kPointers; ++j) at[j] += 4;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels; ++v) {
      _mm512_storeu_si512(sums + i * pitch + v * kLanes, acc[i][v]);
    }
  }
}

#else

template <int kRows, int kPanels>
void tile(const uint8_t* rows, int64_t stride, const int8_t* weights, int64_t panel,
          int64_t quads, const int32_t* start, int32_t* sums, int64_t pitch) {
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kPanels; ++v) {
      int32_t acc[kLanes];
      std::memcpy(acc, start + v * kLanes, sizeof(acc));
      for (int64_t q = 0; q < quads; ++q) {
        const uint8_t* x = rows + i * stride + 4 * q;
        const int8_t* w = weights + v * panel + 64 * q;
        for (int lane = 0; lane < kLanes; ++lane) {
          int32_t sum = 0;
          for (int j = 0; j < 4; ++j) sum += int32_t(x[j]) * w[4 * lane + j];
          acc[lane] = int32_t(uint32_t(acc[lane]) + uint32_t(sum));
        }
      }
      std::memcpy(sums + i * pitch + v * kLanes, acc, sizeof(acc));
    }
  }
}

#endif

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int64_t,
                      const int32_t*, int32_t*, int64_t);

template <int kPanels, size_t... rows>
Tile choose(int64_t count, std::index_sequence<rows...>) {
  static constexpr Tile tiles[] = {tile<int(rows) + 1, kPanels>...};
  return tiles[count - 1];
}

inline Tile choose(int64_t rows, int64_t panels) {
  if (panels == 4) return choose<4>(rows, std::make_index_sequence<kFewRows>());
  if (panels == 3) return choose<3>(rows, std::make_index_sequence<kFewRows>());
  if (panels == 2) return choose<2>(rows, std::make_index_sequence<kMaxRows>());
  return choose<1>(rows, std::make_index_sequence<kMaxRows>());
}

struct Weights {
  const int8_t* packed;
  int64_t quads;   // k / 4, rounded up
  int64_t panels;  // output channels / 16, rounded up
};

// Bytes between rows in a thread's memory: whole quads, and not a multiple of 4096, which would
// put the rows of a tile into the same few lines of the cache.
inline int64_t row_stride(int64_t quads) {
  const int64_t lines = ceil_div(4 * quads, 64);
  return lines == 1 ? round_up(4 * quads, 16) : 64 * (lines | 1);
}

// The results of `count` copied rows from output row `row` on, for panels [first, last).
inline void multiply(const Weights& w, const Epilogue& e, const uint8_t* rows, int64_t stride,
                     int64_t row, int64_t count, int64_t first, int64_t last) {
  alignas(64) int32_t sums[kMaxRows * 2 * kLanes > kFewRows * 4 * kLanes
                               ? kMaxRows * 2 * kLanes
                               : kFewRows * 4 * kLanes];
  const int64_t panel = w.quads * 64;
  const int64_t wide = count <= kFewRows ? 4 : 2;
  for (int64_t p = first; p < last;) {
    const int64_t panels = std::min(wide, last - p);
    const int64_t most = panels > 2 ? kFewRows : kMaxRows;
    const int64_t channels = std::min(panels * kLanes, e.channels - p * kLanes);
    const int64_t pitch = panels * kLanes;
    // Tiles of equal height: a short last one would read weights for few products.
    for (int64_t i = 0, tiles = ceil_div(count, most); tiles > 0; --tiles) {
      const int64_t height = ceil_div(count - i, tiles);
      choose(height, panels)(rows + i * stride, stride, w.packed + p * panel, panel, w.quads,
                             &e.correction[size_t(p * kLanes)], sums, pitch);
      finish(e, sums, pitch, height, row + i, p * kLanes, channels);
      i += height;
    }
    p += panels;
  }
}

// All rows times all weights. copy(first, count, to, stride) writes rows, sign bits flipped.
template <class Pool, class Copy>
void product(Pool& pool, const Weights& w, const Epilogue& e, int64_t rows, Copy copy) {
  if (rows == 0 || w.panels == 0) return;
  const int64_t stride = row_stride(w.quads);
  const int64_t out = e.channels * (e.codes ? 1 : 4);
  const int64_t weight_bytes = w.quads * 64 * w.panels;
  // Rows that are kept while all weights pass. Where weights stay in the nearest cache, rows and
  // results should too; else the more rows, the less often weights are read.
  const bool small = weight_bytes <= kL1 / 2;
  int64_t chunk = (small ? kL1 : kL2) / (stride + (small ? out : 0));
  chunk = std::max<int64_t>(chunk / kMaxRows, small ? 4 : 2) * kMaxRows;
  chunk = std::min(chunk, rows);
  const double products = double(rows) * double(w.quads) * double(w.panels);
  const int64_t threads = products < 40e3 ? 1 : std::max<int64_t>(pool.num_threads(), 1);
  int64_t chunks = ceil_div(rows, chunk), groups = 1;
  if (threads > 1) {
    // A few tasks for every thread, by rows while chunks stay long and then by channels.
    const int64_t wanted = 3 * threads;
    if (chunks < wanted) {
      const int64_t shortest = std::min<int64_t>(chunk, 8 * kMaxRows);
      chunks = std::min(wanted, ceil_div(rows, shortest));
    }
    if (chunks < wanted) {
      groups = std::min(ceil_div(wanted, chunks), ceil_div(w.panels, 4));
    }
  }
  chunk = ceil_div(rows, chunks);
  chunks = ceil_div(rows, chunk);
  // Groups of an even number of panels, which tiles take by two.
  const int64_t width = round_up(ceil_div(w.panels, groups), groups > 1 ? 2 : 1);
  groups = ceil_div(w.panels, width);
  parallel_for(pool, threads, chunks * groups, [&](int64_t task) {
    thread_local Scratch scratch;
    uint8_t* copied = scratch.at_least(size_t(chunk * stride));
    const int64_t row = task % chunks * chunk, count = std::min(chunk, rows - row);
    const int64_t first = task / chunks * width, last = std::min(first + width, w.panels);
    copy(row, count, copied, stride);
    multiply(w, e, copied, stride, row, count, first, last);
  });
}

}  // namespace jaxrmils
