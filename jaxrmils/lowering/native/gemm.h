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

constexpr int kMaxRows = 14;  // of a tile of one or two panels
constexpr int kFewRows = 6;   // of a tile of three or four panels
// Of a tile of two, and of three or four panels, whose epilogue needs registers too. Beyond this
// depth taller tiles are better, and a detour of their sums through memory costs little.
constexpr int kHereRows = 8, kHereFewRows = 4;
constexpr int64_t kHereQuads = 200;
constexpr int64_t kL1 = 24 << 10, kL2 = 256 << 10;  // bytes that rows and results may take

// What a tile writes: its sums, or codes without a residual, or with one in codes.
enum class Here { kSums, kCodes, kCodesWithResidual };

// Rows times panels of weights. Writes results of `channels` channels from `channel` on, rows from
// `row` on, or sums[i * kPanels * 16 + 16 v + lane]. `of_row`, where there is one, has what is added
// to the sums of every row.
#ifdef JAXRMILS_VNNI

// _mm512_dpbusd_epi32, of which compilers copy the sums back and forth.
[[gnu::always_inline]] inline void add_products(__m512i& sums, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
}

template <int kRows, int kPanels, Here kHere>
void tile(const uint8_t* rows, int64_t stride, const int8_t* weights, int64_t panel,
          int64_t quads, const Epilogue& e, const int32_t* of_row, int64_t row, int64_t channel,
          int64_t channels, int32_t* sums) {
  constexpr Numbers<kRows> every_row;
  constexpr Numbers<kPanels> every_panel;
  __m512i acc[kRows][kPanels];
  each([&](auto v) JAXRMILS_INLINE {
    const __m512i start = _mm512_loadu_si512(&e.correction[size_t(channel + v * kLanes)]);
    each([&](auto i) JAXRMILS_INLINE { acc[i][v] = start; }, every_row);
  }, every_panel);
  if (of_row) {
    each([&](auto i) JAXRMILS_INLINE {
      const __m512i more = _mm512_set1_epi32(of_row[i]);
      each([&](auto v) JAXRMILS_INLINE { acc[i][v] = _mm512_add_epi32(acc[i][v], more); },
           every_panel);
    }, every_row);
  }
  // Every third row has a pointer, the others an index register: fewer registers than rows.
  constexpr Numbers<(kRows + 2) / 3> every_pointer;
  const uint8_t* at[(kRows + 2) / 3];
  each([&](auto j) JAXRMILS_INLINE { at[j] = rows + 3 * j * stride; }, every_pointer);
  for (int64_t q = 0; q < quads; ++q, weights += 64) {
    __m512i w[kPanels];
    // The panels that come after these are asked for; behind the last one that does nothing.
    each([&](auto v) JAXRMILS_INLINE {
      w[v] = _mm512_loadu_si512(weights + v * panel);
      _mm_prefetch(reinterpret_cast<const char*>(weights + (kPanels + v) * panel), _MM_HINT_T1);
    }, every_panel);
    each([&](auto i) JAXRMILS_INLINE {
      int32_t four;
      std::memcpy(&four, at[i / 3] + (i % 3) * stride, 4);
      const __m512i x = _mm512_set1_epi32(four);
      each([&](auto v) JAXRMILS_INLINE {
        add_products(acc[i][v], x, w[v]);
      }, every_panel);
    }, every_row);
    each([&](auto j) JAXRMILS_INLINE { at[j] += 4; }, every_pointer);
  }
  if constexpr (kHere != Here::kSums) {
    constexpr Residual kind =
        kHere == Here::kCodesWithResidual ? Residual::kCodes : Residual::kNone;
    const EpilogueVectors k(e);
    each([&](auto v) JAXRMILS_INLINE {
      const int64_t o = channel + v * kLanes, at = row * e.channels + o;
      const __mmask16 some = existing(channels - v * kLanes);
      const __m512 scale = _mm512_loadu_ps(&e.scale[size_t(o)]);
      const __m512 offset = _mm512_loadu_ps(&e.offset[size_t(o)]);
      each([&](auto group) JAXRMILS_INLINE {
        constexpr int i = kTogether * group;
        constexpr int n = kRows - i < kTogether ? kRows - i : kTogether;
        __m512i sum[n];
        each([&](auto r) JAXRMILS_INLINE { sum[r] = acc[i + r][v]; }, Numbers<n>());
        finish_vectors<kind, Result::kCodesInRange, false>(e, k, sum, scale, offset,
                                                           at + i * e.channels, some);
      }, Numbers<(kRows + kTogether - 1) / kTogether>());
    }, every_panel);
  } else {
    each([&](auto i) JAXRMILS_INLINE {
      each([&](auto v) JAXRMILS_INLINE {
        _mm512_storeu_si512(sums + (i * kPanels + v) * kLanes, acc[i][v]);
      }, every_panel);
    }, every_row);
  }
}

#else

template <int kRows, int kPanels, Here kHere>
void tile(const uint8_t* rows, int64_t stride, const int8_t* weights, int64_t panel,
          int64_t quads, const Epilogue& e, const int32_t* of_row, int64_t, int64_t channel,
          int64_t, int32_t* sums) {
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kPanels; ++v) {
      int32_t acc[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t start = uint32_t(e.correction[size_t(channel + v * kLanes + lane)]);
        acc[lane] = int32_t(start + (of_row ? uint32_t(of_row[i]) : 0));
      }
      for (int64_t q = 0; q < quads; ++q) {
        const uint8_t* x = rows + i * stride + 4 * q;
        const int8_t* w = weights + v * panel + 64 * q;
        for (int lane = 0; lane < kLanes; ++lane) {
          int32_t sum = 0;
          for (int j = 0; j < 4; ++j) sum += int32_t(x[j]) * w[4 * lane + j];
          acc[lane] = int32_t(uint32_t(acc[lane]) + uint32_t(sum));
        }
      }
      std::memcpy(sums + (i * kPanels + v) * kLanes, acc, sizeof(acc));
    }
  }
}

#endif

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int64_t, const Epilogue&,
                      const int32_t*, int64_t, int64_t, int64_t, int32_t*);

template <int kPanels, Here kHere, size_t... rows>
Tile choose(int64_t count, std::index_sequence<rows...>) {
  static constexpr Tile tiles[] = {tile<int(rows) + 1, kPanels, kHere>...};
  return tiles[count - 1];
}

template <Here kHere>
Tile choose(int64_t rows, int64_t panels) {
  constexpr bool apart = kHere == Here::kSums;
  constexpr std::make_index_sequence<kMaxRows> one;
  constexpr std::make_index_sequence<apart ? kMaxRows : kHereRows> two;
  constexpr std::make_index_sequence<apart ? kFewRows : kHereFewRows> more;
  if (panels == 4) return choose<4, kHere>(rows, more);
  if (panels == 3) return choose<3, kHere>(rows, more);
  if (panels == 2) return choose<2, kHere>(rows, two);
  return choose<1, kHere>(rows, one);
}

inline Tile choose([[maybe_unused]] Here here, int64_t rows, int64_t panels) {
#ifdef JAXRMILS_VNNI
  if (here == Here::kCodes) return choose<Here::kCodes>(rows, panels);
  if (here == Here::kCodesWithResidual) return choose<Here::kCodesWithResidual>(rows, panels);
#endif
  return choose<Here::kSums>(rows, panels);
}

// Whether tiles finish their results themselves.
inline Here where([[maybe_unused]] const Epilogue& e, [[maybe_unused]] int64_t quads) {
#ifdef JAXRMILS_VNNI
  if (e.codes && e.in_range && !e.function.table && quads <= kHereQuads) {
    if (e.kind == Residual::kNone) return Here::kCodes;
    if (e.kind == Residual::kCodes) return Here::kCodesWithResidual;
  }
#endif
  return Here::kSums;
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
                     int64_t row, int64_t count, int64_t first, int64_t last,
                     const int32_t* of_row = nullptr) {
  alignas(64) int32_t sums[kMaxRows * 2 * kLanes > kFewRows * 4 * kLanes
                               ? kMaxRows * 2 * kLanes
                               : kFewRows * 4 * kLanes];
  const int64_t panel = w.quads * 64;
  const Here here = where(e, w.quads);
  const bool apart = here == Here::kSums;
  const int64_t few = apart ? kFewRows : kHereFewRows, wide = count <= few ? 4 : 2;
  for (int64_t p = first; p < last;) {
    const int64_t panels = std::min(wide, last - p);
    const int64_t most = panels > 2 ? few : panels == 2 && !apart ? kHereRows : kMaxRows;
    const int64_t channel = p * kLanes;
    const int64_t channels = std::min(panels * kLanes, e.channels - channel);
    // Tiles of equal height: a short last one would read weights for few products.
    for (int64_t i = 0, tiles = ceil_div(count, most); tiles > 0; --tiles) {
      const int64_t height = ceil_div(count - i, tiles);
      choose(here, height, panels)(rows + i * stride, stride, w.packed + p * panel, panel,
                                   w.quads, e, of_row ? of_row + i : nullptr, row + i, channel,
                                   channels, sums);
      if (apart) finish(e, sums, panels * kLanes, height, row + i, channel, channels);
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
    const int64_t wanted = 4 * threads;
    if (chunks < wanted) {
      const int64_t shortest = std::min<int64_t>(chunk, 8 * kMaxRows);
      chunks = std::min(wanted, ceil_div(rows, shortest));
    }
    if (chunks < wanted) {
      groups = std::min(ceil_div(wanted, chunks), ceil_div(w.panels, 4));
    }
  }
  // Every thread gets as many.
  if (groups == 1) chunks = std::min(round_up(chunks, threads), rows);
  chunk = ceil_div(rows, chunks);
  chunks = ceil_div(rows, chunk);
  // Groups of an even number of panels, which tiles take by two; rather more groups than larger.
  const int64_t width = groups > 1 ? std::max<int64_t>(w.panels / groups & ~1, 2) : w.panels;
  groups = ceil_div(w.panels, width);
  parallel_for(pool, threads, chunks * groups, [&](int64_t task) {
    thread_local Scratch scratch;
    uint8_t* copied = scratch.at_least(size_t(chunk * stride + kSlack));
    const int64_t row = task % chunks * chunk, count = std::min(chunk, rows - row);
    const int64_t first = task / chunks * width, last = std::min(first + width, w.panels);
    copy(row, count, copied, stride);
    multiply(w, e, copied, stride, row, count, first, last);
  });
}

}  // namespace jaxrmils
