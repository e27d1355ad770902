// Depthwise two-dimensional convolutions (NHWC, one output channel per input channel).
//
// vpdpbusd sums four neighbouring bytes, so four rows of a column are brought side by side. Such
// quads serve all taps of a row of the kernel, and all output rows whose window lies in their
// rows: with a kernel of three rows and no strides, two. They are kept for a few columns at a
// time, and every output row multiplies them with weights that are shifted to its place: in shift
// r the kernel's first row is the r-th of its quads.

#pragma once

#include "conv.h"

namespace jaxrmils {

constexpr int kQuad = 4;

// Weights are [channels / 16][kernel rows / 4][kernel columns][16 channels][4 rows].
struct DepthwiseWeights {
  const int8_t* packed;
  int64_t groups;  // channels / 16, rounded up
  int64_t quads;   // kernel rows / 4, rounded up
};

// How many output rows' windows lie in the same quads.
inline int64_t sharing_rows(const Window& g, const DepthwiseWeights& w) {
  return g.stride_h == 1 && g.dilation_h == 1 ? w.quads * kQuad - g.kernel_height + 1 : 1;
}

// The part of an output that one call computes: rows [top, top + rows) of an image.
struct Part {
  const Window& g;
  const DepthwiseWeights& w;
  const Epilogue& e;
  const int8_t* image;
  int8_t zero;
  int64_t pixel;  // index of the image's first output pixel
  int64_t top, rows;
};

#ifdef JAXRMILS_VNNI

// Vectors of 64, 32 or 16 channels. Unpacking works within 128 bits, so that of four vectors of
// int32 the j-th has channels 16 l + 4 j + (0..3) in its lane l, and packing restores the order.
template <int kWidth>
struct Channels;

#define JAXRMILS_CHANNELS(kWidth, P, I, F, LOAD, STORE, Mask)                                   \
  template <>                                                                                   \
  struct Channels<kWidth> {                                                                     \
    using Int = I;                                                                              \
    using Float = F;                                                                            \
    static Int load(const void* p) { return LOAD(p); }                                          \
    static void store(void* p, Int v) { STORE(p, v); }                                          \
    static Int load_some(uint64_t m, const void* p) {                                           \
      return P##_maskz_loadu_epi8(Mask(m), p);                                                  \
    }                                                                                           \
    static void store_some(void* p, uint64_t m, Int v) { P##_mask_storeu_epi8(p, Mask(m), v); } \
    static Int bytes(char b) { return P##_set1_epi8(b); }                                       \
    static Int low8(Int a, Int b) { return P##_unpacklo_epi8(a, b); }                           \
    static Int high8(Int a, Int b) { return P##_unpackhi_epi8(a, b); }                          \
    static Int low16(Int a, Int b) { return P##_unpacklo_epi16(a, b); }                         \
    static Int high16(Int a, Int b) { return P##_unpackhi_epi16(a, b); }                        \
    static Int left(Int v, int n) { return P##_sll_epi32(v, _mm_cvtsi32_si128(n)); }            \
    static Int right(Int v, int n) { return P##_srl_epi32(v, _mm_cvtsi32_si128(n)); }           \
    static Int sum(Int acc, Int x, Int w) { return P##_dpbusd_epi32(acc, x, w); }               \
    static Int shorts(int v) { return P##_set1_epi16(short(v)); }                               \
    static Int add16(Int a, Int b) { return P##_adds_epi16(a, b); }                             \
    static Int pack32(Int a, Int b) { return P##_packs_epi32(a, b); }                           \
    static Int pack16(Int a, Int b) { return P##_packs_epi16(a, b); }                           \
    static Float floats(float v) { return P##_set1_ps(v); }                                     \
    static Float to_float(Int v) { return P##_cvtepi32_ps(v); }                                 \
    static Int to_int(Float v) { return P##_cvtps_epi32(v); }                                   \
    static Float load_floats(const float* p) { return P##_loadu_ps(p); }                        \
    static Float mul(Float a, Float b) { return P##_mul_ps(a, b); }                             \
    static Float add(Float a, Float b) { return P##_add_ps(a, b); }                             \
    static Float fma(Float a, Float b, Float c) { return P##_fmadd_ps(a, b, c); }               \
    static Float fnma(Float a, Float b, Float c) { return P##_fnmadd_ps(a, b, c); }             \
    static Int max8(Int a, Int b) { return P##_max_epi8(a, b); }                                \
    static Int min8(Int a, Int b) { return P##_min_epi8(a, b); }                                \
  };
#define JAXRMILS_LOAD256(p) _mm256_loadu_si256(static_cast<const __m256i*>(p))
#define JAXRMILS_LOAD128(p) _mm_loadu_si128(static_cast<const __m128i*>(p))
#define JAXRMILS_STORE256(p, v) _mm256_storeu_si256(static_cast<__m256i*>(p), v)
#define JAXRMILS_STORE128(p, v) _mm_storeu_si128(static_cast<__m128i*>(p), v)
JAXRMILS_CHANNELS(64, _mm512, __m512i, __m512, _mm512_loadu_si512, _mm512_storeu_si512, __mmask64)
JAXRMILS_CHANNELS(32, _mm256, __m256i, __m256, JAXRMILS_LOAD256, JAXRMILS_STORE256, __mmask32)
JAXRMILS_CHANNELS(16, _mm, __m128i, __m128, JAXRMILS_LOAD128, JAXRMILS_STORE128, __mmask16)
#undef JAXRMILS_CHANNELS
#undef JAXRMILS_LOAD256
#undef JAXRMILS_LOAD128
#undef JAXRMILS_STORE256
#undef JAXRMILS_STORE128

constexpr int64_t kQuadBytes = 16 << 10;  // of quads that are kept at a time

template <int kWidth>
struct DepthwiseBlock {
  using V = Channels<kWidth>;
  using Int = typename V::Int;
  using Float = typename V::Float;
  static constexpr int kFloats = kWidth / 4;  // in a vector

  const Part& part;
  int64_t channel;  // the block's first
  int64_t count;    // channels that exist
  uint64_t some;
  Int* weights;     // [shift][tap][4], taps as in the packed weights
  Int* quads;       // [column][quad][4]
  int32_t* sums;    // of a row, where the epilogue is not finished here
  alignas(64) float scale[kWidth];
  alignas(64) float offset[kWidth];
  alignas(64) int32_t correction[kWidth];

  // What the four vectors hold where channels are in order, four bytes for each.
  template <class T>
  static void spread(T* to, const T* from, int64_t group_pitch) {
    constexpr int kLanes16 = kWidth / 16, kFour = 16 / sizeof(T);
    for (int j = 0; j < 4; ++j) {
      for (int l = 0; l < kLanes16; ++l) {
        std::memcpy(to + (j * kLanes16 + l) * kFour, from + l * group_pitch + j * kFour, 16);
      }
    }
  }

  void prepare() {
    const DepthwiseWeights& w = part.w;
    spread(scale, &part.e.scale[size_t(channel)], 16);
    spread(offset, &part.e.offset[size_t(channel)], 16);
    spread(correction, &part.e.correction[size_t(channel)], 16);
    const int64_t width = part.g.kernel_width, taps = w.quads * width;
    const int8_t* packed = w.packed + channel / 16 * taps * 64;
    for (int64_t t = 0; t < taps; ++t) {
      spread(reinterpret_cast<int8_t*>(weights + 4 * t), packed + 64 * t, taps * 64);
    }
    // A row further down: the last of a quad becomes the first of the next.
    const int64_t shifts = sharing_rows(part.g, w);
    for (int s = 1; s < shifts; ++s) {
      Int* to = weights + s * taps * 4;
      for (int64_t i = 0; i < taps * 4; ++i) {
        to[i] = V::left(weights[i], 8 * s);
        if (i >= width * 4) to[i] |= V::right(weights[i - width * 4], 32 - 8 * s);
      }
    }
  }

  // Brings columns [first, first + columns) of the padded input side by side for output rows from
  // `oh` on. Rows of no window have weights of zero, and may hold anything.
  void collect(int64_t oh, int64_t used_rows, int64_t first, int64_t columns) {
    const Window& g = part.g;
    const Int sign = V::bytes(char(0x80)), fill = V::bytes(char(uint8_t(part.zero) ^ 0x80));
    const int64_t low = std::clamp<int64_t>(g.left - first, 0, columns);
    const int64_t high = std::clamp<int64_t>(g.width + g.left - first, low, columns);
    const int64_t step = part.w.quads * 4;
    alignas(64) int8_t padding[kWidth];
    std::memset(padding, part.zero, sizeof(padding));
    for (int64_t q = 0; q < part.w.quads; ++q) {
      const int8_t* row[kQuad] = {padding};
      int64_t pitch[kQuad] = {};
      for (int i = 0; i < kQuad; ++i) {
        const int64_t ih = oh * g.stride_h - g.top + (kQuad * q + i) * g.dilation_h;
        const bool inside = ih >= 0 && ih < g.height;
        if (kQuad * q + i >= used_rows) {
          row[i] = row[0];
          pitch[i] = pitch[0];
        } else if (inside) {
          row[i] = part.image + (ih * g.width + first - g.left) * g.channels + channel;
          pitch[i] = g.channels;
        } else {
          row[i] = padding;
          pitch[i] = 0;
        }
      }
      Int* to = quads + q * 4;
      const auto pad = [&](int64_t from, int64_t end) {
        for (int64_t i = from; i < end; ++i) {
          for (int j = 0; j < 4; ++j) to[i * step + j] = fill;
        }
      };
      const auto run = [&](auto load) {
        for (int64_t i = low; i < high; ++i) {
          const Int a = load(row[0] + i * pitch[0]), b = load(row[1] + i * pitch[1]);
          const Int c = load(row[2] + i * pitch[2]), d = load(row[3] + i * pitch[3]);
          const Int ab = V::low8(a, b), AB = V::high8(a, b);
          const Int cd = V::low8(c, d), CD = V::high8(c, d);
          to[i * step + 0] = V::low16(ab, cd) ^ sign;
          to[i * step + 1] = V::high16(ab, cd) ^ sign;
          to[i * step + 2] = V::low16(AB, CD) ^ sign;
          to[i * step + 3] = V::high16(AB, CD) ^ sign;
        }
      };
      pad(0, low);
      if (count == kWidth) {
        run([](const int8_t* p) { return V::load(p); });
      } else {
        run([this](const int8_t* p) { return V::load_some(some, p); });
      }
      pad(high, columns);
    }
  }

  // `kTaps` vectors of weights times the quads of every output, results finished here or kept as
  // sums. Where kTaps is 0, any number, which does not stay in registers. Two outputs at a time
  // share what is read of weights and channels.
  template <int kTaps, bool kHere>
  void multiply(const Int* w, int64_t pixel, int64_t first, int64_t outputs) const {
    const int64_t steps = part.w.quads * 4;
    const int64_t across = part.g.dilation_w * steps, next = part.g.stride_w * steps;
    const int64_t pitch = part.e.channels;
    const Codes codes(part.e);
    Int kept[kTaps > 0 ? 4 * kTaps : 1];
    for (int t = 0; t < 4 * kTaps; ++t) kept[t] = w[t];
    int8_t* out = static_cast<int8_t*>(part.e.out) + (pixel + first) * pitch + channel;
    int32_t* to = sums + first * kWidth;
    const Int* x = quads;
    for (int64_t i = 0; i < outputs; i += 2, x += 2 * next, out += 2 * pitch, to += 2 * kWidth) {
      // The second of a last pair without one is the first again.
      const bool both = i + 1 < outputs;
      const Int* pair = both ? x + next : x;
      Int one[4], two[4];
      for (int j = 0; j < 4; ++j) one[j] = two[j] = V::load(correction + j * kFloats);
      if constexpr (kTaps > 0) {
        for (int t = 0; t < kTaps; ++t) {
          for (int j = 0; j < 4; ++j) {
            one[j] = V::sum(one[j], x[t * across + j], kept[4 * t + j]);
            two[j] = V::sum(two[j], pair[t * across + j], kept[4 * t + j]);
          }
        }
      } else {
        const Int* tap = w;
        for (int64_t q = 0; q < steps; q += 4) {
          for (int64_t t = 0, at = q; t < part.g.kernel_width; ++t, at += across, tap += 4) {
            for (int j = 0; j < 4; ++j) {
              Int held = tap[j];
              asm("" : "+v"(held));  // else it is read twice
              one[j] = V::sum(one[j], x[at + j], held);
              two[j] = V::sum(two[j], pair[at + j], held);
            }
          }
        }
      }
      if constexpr (kHere) {
        write(codes, one, two, out, both ? out + pitch : out);
      } else {
        keep(one, to);
        if (both) keep(two, to + kWidth);
      }
    }
  }

  struct Codes {
    Int low, high, out_zero;
    Float out_scale, inverse;
    explicit Codes(const Epilogue& e)
        : low(V::bytes(e.low_code)),
          high(V::bytes(e.high_code)),
          out_zero(V::shorts(e.out_zero)),
          out_scale(V::floats(e.out_scale)),
          inverse(V::floats(1 / e.out_scale)) {}

    // See `Divisor`.
    Int steps(Float y) const {
      const Float q = V::mul(y, inverse);
      return V::to_int(V::fma(V::fnma(q, out_scale, y), inverse, q));
    }
  };

  // Sums to codes; see `finish_vectors`.
  void write(const Codes& k, const Int (&one)[4], const Int (&two)[4], int8_t* out,
             int8_t* next) const {
    Float y[4], z[4];
    for (int j = 0; j < 4; ++j) {
      const Float factor = V::load_floats(scale + j * kFloats);
      const Float added = V::load_floats(offset + j * kFloats);
      y[j] = V::add(V::mul(V::to_float(one[j]), factor), added);
      z[j] = V::add(V::mul(V::to_float(two[j]), factor), added);
    }
    store(next, packed(k, z));
    store(out, packed(k, y));
  }

  static Int packed(const Codes& k, const Float (&y)[4]) {
    const Int first = V::pack32(k.steps(y[0]), k.steps(y[1]));
    const Int last = V::pack32(k.steps(y[2]), k.steps(y[3]));
    const Int codes = V::pack16(V::add16(first, k.out_zero), V::add16(last, k.out_zero));
    return V::min8(V::max8(codes, k.low), k.high);
  }

  void store(int8_t* to, Int codes) const {
    if (count == kWidth) {
      V::store(to, codes);
    } else {
      V::store_some(to, some, codes);
    }
  }

  // Sums with their channels in order.
  void keep(const Int (&acc)[4], int32_t* to) const {
    alignas(64) int32_t apart[kWidth];
    for (int j = 0; j < 4; ++j) V::store(apart + j * kFloats, acc[j]);
    for (int l = 0; l < kWidth / 16; ++l) {
      for (int j = 0; j < 4; ++j) std::memcpy(to + 16 * l + 4 * j, apart + j * kFloats + 4 * l, 16);
    }
  }

  void run() {
    const Window& g = part.g;
    const DepthwiseWeights& w = part.w;
    prepare();
    const bool here = part.e.codes && part.e.in_range && part.e.kind == Residual::kNone &&
                      !part.e.function.table;
    const int64_t taps = w.quads * g.kernel_width;
    const int64_t together = sharing_rows(g, w);
    const int64_t span = (g.kernel_width - 1) * g.dilation_w + 1;
    const int64_t held = kQuadBytes / (w.quads * 4 * int64_t(sizeof(Int)));
    const int64_t most = std::max<int64_t>((held - span) / g.stride_w + 1, 1);
    const int64_t chunk = ceil_div(g.out_width, ceil_div(g.out_width, most));
    for (int64_t r = 0; r < part.rows; r += together) {
      const int64_t oh = part.top + r, rows = std::min(together, part.rows - r);
      for (int64_t s = 0; s < rows; ++s) {
        // Quads are made once for the rows that share them, and kept only if one chunk is all.
        const int64_t pixel = part.pixel + (oh + s) * g.out_width;
        const Int* shifted = weights + s * taps * 4;
        for (int64_t first = 0; first < g.out_width; first += chunk) {
          const int64_t outputs = std::min(chunk, g.out_width - first);
          if (s == 0 || chunk < g.out_width) {
            collect(oh, g.kernel_height + together - 1, first * g.stride_w,
                    (outputs - 1) * g.stride_w + span);
          }
          if (here && w.quads == 1 && g.kernel_width == 3) {
            multiply<3, true>(shifted, pixel, first, outputs);
          } else if (here) {
            multiply<0, true>(shifted, pixel, first, outputs);
          } else {
            multiply<0, false>(shifted, pixel, first, outputs);
          }
        }
        if (!here) finish(part.e, sums, kWidth, g.out_width, pixel, channel, count);
      }
    }
  }
};

// Computes channels [channel, channel + kWidth) of a part.
template <int kWidth>
void depthwise_block(const Part& part, int64_t channel) {
  using Int = typename Channels<kWidth>::Int;
  thread_local Scratch scratch;
  const Window& g = part.g;
  const int64_t taps = sharing_rows(g, part.w) * part.w.quads * g.kernel_width * 4;
  const int64_t span = (g.kernel_width - 1) * g.dilation_w + 1;
  const int64_t held = std::max<int64_t>(
      kQuadBytes / int64_t(sizeof(Int)), (span + g.stride_w) * part.w.quads * 4);
  const size_t vectors = size_t(taps + held) * sizeof(Int);
  uint8_t* memory = scratch.at_least(vectors + size_t(g.out_width * kWidth) * 4);
  const int64_t count = std::min<int64_t>(kWidth, g.channels - channel);
  Int* weights = reinterpret_cast<Int*>(memory);
  DepthwiseBlock<kWidth> block{part, channel, count, ~uint64_t{0} >> (64 - count), weights,
                               weights + taps, reinterpret_cast<int32_t*>(memory + vectors),
                               {}, {}, {}};
  block.run();
}

inline void depthwise_part(const Part& part) {
  int64_t channel = 0;
  for (; channel + 48 < part.g.channels; channel += 64) depthwise_block<64>(part, channel);
  for (; channel + 16 < part.g.channels; channel += 32) depthwise_block<32>(part, channel);
  if (channel < part.g.channels) depthwise_block<16>(part, channel);
}

#else

inline void depthwise_part(const Part& part) {
  const Window& g = part.g;
  const int64_t taps = part.w.quads * g.kernel_width;
  for (int64_t r = part.top; r < part.top + part.rows; ++r) {
    for (int64_t ow = 0; ow < g.out_width; ++ow) {
      for (int64_t c = 0; c < g.channels; ++c) {
        const int8_t* w = part.w.packed + c / 16 * taps * 64 + c % 16 * kQuad;
        int32_t sum = part.e.correction[size_t(c)];
        for (int64_t kh = 0; kh < g.kernel_height; ++kh) {
          for (int64_t kw = 0; kw < g.kernel_width; ++kw) {
            const int64_t ih = r * g.stride_h - g.top + kh * g.dilation_h;
            const int64_t iw = ow * g.stride_w - g.left + kw * g.dilation_w;
            const bool inside = ih >= 0 && ih < g.height && iw >= 0 && iw < g.width;
            const int8_t x = inside ? part.image[(ih * g.width + iw) * g.channels + c] : part.zero;
            const int64_t tap = kh / kQuad * g.kernel_width + kw;
            sum = int32_t(uint32_t(sum) + uint32_t((x + 128) * w[tap * 64 + kh % kQuad]));
          }
        }
        finish(part.e, &sum, 1, 1, part.pixel + r * g.out_width + ow, c, 1);
      }
    }
  }
}

#endif

template <class Pool>
void depthwise(Pool& pool, const Window& g, const int8_t* x, int8_t zero,
               const DepthwiseWeights& w, const Epilogue& e) {
  const int64_t outputs = g.out_height * g.out_width;
  if (outputs == 0 || g.batch == 0 || g.channels == 0) return;
  const double work = double(g.batch * outputs) * double(w.quads * g.kernel_width * w.groups);
  const int64_t threads = work < 20e3 ? 1 : std::max<int64_t>(pool.num_threads(), 1);
  // As many output rows as half of the second cache holds inputs of, shared among threads.
  const int64_t fit = kL2 / 2 / (g.width * g.channels * g.stride_h);
  int64_t height = std::clamp<int64_t>(fit, 8, g.out_height > 8 ? g.out_height : 8);
  const int64_t wanted = threads > 1 ? ceil_div(3 * threads, g.batch) : 1;
  height = std::min(height, std::max<int64_t>(ceil_div(g.out_height, wanted), 2));
  height = std::min(round_up(height, sharing_rows(g, w)), g.out_height);
  const int64_t strips = ceil_div(g.out_height, height);
  parallel_for(pool, threads, g.batch * strips, [&](int64_t task) {
    const int64_t n = task / strips, top = task % strips * height;
    depthwise_part({g, w, e, x + n * g.height * g.width * g.channels, zero, n * outputs, top,
                    std::min(height, g.out_height - top)});
  });
}

}  // namespace jaxrmils
