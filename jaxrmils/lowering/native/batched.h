// Products of two activations: many small products, whose right operands are packed on the way.

#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"

namespace jaxrmils {

// Sizes and strides, in codes. The result is contiguous: batch dims, rows, columns.
struct BatchedShape {
  std::vector<int64_t> sizes, lhs, rhs;  // of batch dims
  int64_t rows, columns, depth;
  int64_t lhs_row, lhs_inner, rhs_column, rhs_inner;

  int64_t batches() const {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
  }

  int64_t at(const std::vector<int64_t>& strides, int64_t batch) const {
    int64_t offset = 0;
    for (size_t d = sizes.size(); d-- > 0; batch /= sizes[d]) {
      offset += batch % sizes[d] * strides[d];
    }
    return offset;
  }
};

#ifdef JAXRMILS_VNNI

// Four codes of each of 16 neighbours, from four rows of them `pitch` apart.
inline __m512i interleaved(const int8_t* from, int64_t pitch) {
  __m128i r[4];
  for (int64_t j = 0; j < 4; ++j) {
    r[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j * pitch));
  }
  const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpackhi_epi8(r[0], r[1]);
  const __m128i c = _mm_unpacklo_epi8(r[2], r[3]), d = _mm_unpackhi_epi8(r[2], r[3]);
  const __m256i low = _mm256_set_m128i(_mm_unpackhi_epi16(a, c), _mm_unpacklo_epi16(a, c));
  const __m256i high = _mm256_set_m128i(_mm_unpackhi_epi16(b, d), _mm_unpacklo_epi16(b, d));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Rows of 16 numbers of four bytes become columns.
inline void transpose(__m512i (&r)[kLanes]) {
  __m512i t[kLanes];
  each([&](auto i) JAXRMILS_INLINE {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }, Numbers<8>());
  each([&](auto i) JAXRMILS_INLINE {
    constexpr int first = 4 * i;
    r[first] = _mm512_unpacklo_epi64(t[first], t[first + 2]);
    r[first + 1] = _mm512_unpackhi_epi64(t[first], t[first + 2]);
    r[first + 2] = _mm512_unpacklo_epi64(t[first + 1], t[first + 3]);
    r[first + 3] = _mm512_unpackhi_epi64(t[first + 1], t[first + 3]);
  }, Numbers<4>());
  // A quarter of r[4 i + c] is now column 4 q + c of rows 4 i to 4 i + 3, q the quarter's number.
  each([&](auto c) JAXRMILS_INLINE {
    constexpr int even = 0x88, odd = 0xdd;
    const __m512i low = _mm512_shuffle_i32x4(r[c], r[4 + c], even);
    const __m512i high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], even);
    const __m512i low_odd = _mm512_shuffle_i32x4(r[c], r[4 + c], odd);
    const __m512i high_odd = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], odd);
    r[c] = _mm512_shuffle_i32x4(low, high, even);
    r[4 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, even);
    r[8 + c] = _mm512_shuffle_i32x4(low, high, odd);
    r[12 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, odd);
  }, Numbers<4>());
}

#endif

// Packs the right operand of one product, [columns / 16, depth / 4, 16, 4] filled up with zeros.
inline void pack_columns(const BatchedShape& g, const int8_t* from, int8_t* to) {
  const int64_t quads = ceil_div(g.depth, 4), panels = ceil_div(g.columns, kLanes);
  if (g.depth % 4 != 0 || g.columns % kLanes != 0) {
    std::memset(to, 0, size_t(panels * quads * 64));
  }
  for (int64_t p = 0; p < panels; ++p, to += quads * 64) {
    const int64_t first = p * kLanes, count = std::min<int64_t>(kLanes, g.columns - first);
    const int8_t* panel = from + first * g.rhs_column;
    int64_t done = 0;  // quads
#ifdef JAXRMILS_VNNI
    if (g.rhs_inner == 1 && count == kLanes) {
      for (; 4 * (done + kLanes) <= g.depth; done += kLanes) {
        __m512i r[kLanes];
        each([&](auto i) JAXRMILS_INLINE {
          r[i] = _mm512_loadu_si512(panel + i * g.rhs_column + 4 * done);
        }, Numbers<kLanes>());
        transpose(r);
        each([&](auto i) JAXRMILS_INLINE {
          _mm512_storeu_si512(to + (done + i) * 64, r[i]);
        }, Numbers<kLanes>());
      }
    } else if (g.rhs_column == 1 && count == kLanes) {
      for (; 4 * (done + 1) <= g.depth; ++done) {
        const __m512i quads_of_16 = interleaved(panel + 4 * done * g.rhs_inner, g.rhs_inner);
        _mm512_storeu_si512(to + done * 64, quads_of_16);
      }
    }
#endif
    for (int64_t k = 4 * done; k < g.depth; ++k) {
      for (int64_t lane = 0; lane < count; ++lane) {
        to[k / 4 * 64 + lane * 4 + k % 4] = panel[lane * g.rhs_column + k * g.rhs_inner];
      }
    }
  }
}

// The sum of every column's codes.
inline void sum_columns(const int8_t* packed, int64_t quads, int64_t panels, int32_t* sums) {
  for (int64_t p = 0; p < panels; ++p, packed += quads * 64, sums += kLanes) {
#ifdef JAXRMILS_VNNI
    __m512i total = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; ++q) {
      add_products(total, _mm512_set1_epi8(1), _mm512_loadu_si512(packed + q * 64));
    }
    _mm512_storeu_si512(sums, total);
#else
    std::fill_n(sums, kLanes, 0);
    for (int64_t i = 0; i < quads * 64; ++i) sums[i % 64 / 4] += packed[i];
#endif
  }
}

// Rows of the left operand with their sign bits flipped.
inline void copy_rows(const BatchedShape& g, const int8_t* from, int64_t count, uint8_t* to,
                      int64_t stride) {
  if (g.lhs_inner == 1) {
    for (int64_t i = 0; i < count; ++i) copy_flipped(to + i * stride, from + i * g.lhs_row, g.depth);
    return;
  }
  int64_t row = 0;  // the first that is not copied
#ifdef JAXRMILS_VNNI
  const __m512i sign = _mm512_set1_epi8(char(0x80));
  for (; g.lhs_row == 1 && row + kLanes <= count; row += kLanes) {
    for (int64_t k = 0; k < g.depth; k += 64) {
      const int64_t rest = std::min<int64_t>(g.depth - k, 64), quads = rest / 4;
      const int8_t* block = from + row + k * g.lhs_inner;
      __m512i r[kLanes] = {};
      for (int64_t q = 0; q < quads; ++q) {
        r[q] = _mm512_xor_si512(interleaved(block + 4 * q * g.lhs_inner, g.lhs_inner), sign);
      }
      transpose(r);
      for (int64_t i = 0; i < kLanes; ++i) {
        uint8_t* end = to + (row + i) * stride + k;
        if (quads == kLanes) {
          _mm512_storeu_si512(end, r[i]);
          continue;
        }
        _mm512_mask_storeu_epi8(end, (uint64_t{1} << 4 * quads) - 1, r[i]);
        for (int64_t j = 4 * quads; j < rest; ++j) {
          end[j] = uint8_t(block[i + j * g.lhs_inner]) ^ 0x80;
        }
      }
    }
  }
#endif
  for (; row < count; ++row) {
    for (int64_t k = 0; k < g.depth; ++k) {
      to[row * stride + k] = uint8_t(from[row * g.lhs_row + k * g.lhs_inner]) ^ 0x80;
    }
  }
}

inline int32_t sum_bytes(const uint8_t* bytes, int64_t n) {
  int32_t sum = 0;
#ifdef JAXRMILS_VNNI
  __m512i total = _mm512_setzero_si512();
  for (; n >= 64; n -= 64, bytes += 64) {
    add_products(total, _mm512_loadu_si512(bytes), _mm512_set1_epi8(1));
  }
  sum = _mm512_reduce_add_epi32(total);
#endif
  for (int64_t i = 0; i < n; ++i) sum += bytes[i];
  return sum;
}

// With x' = x + 128 in the left operand, zero points a and b, and K the depth,
//
//   sum (x - a) (w - b) = sum x' w - (a + 128) sum w + b (K (a + 128) - sum x'):
//
// a product like that with a weight, a number for every column and one for every row.
template <class Pool>
void batched_product(Pool& pool, const BatchedShape& g, const int8_t* lhs, const int8_t* rhs,
                     int32_t lhs_zero, int32_t rhs_zero, const Epilogue& e) {
  const int64_t batches = g.batches();
  const int64_t quads = ceil_div(g.depth, 4), panels = ceil_div(g.columns, kLanes);
  const int64_t stride = row_stride(quads);
  const double products = double(batches) * double(g.rows) * double(quads) * double(panels);
  const int64_t threads = products < 40e3 ? 1 : std::max<int64_t>(pool.num_threads(), 1);
  // A few tasks for every thread; each packs the right operand for itself.
  const int64_t wanted = threads > 1 ? ceil_div(3 * threads, batches) : 1;
  const int64_t per_task = std::max<int64_t>(ceil_div(g.rows, wanted), std::min<int64_t>(
      g.rows, 4 * kMaxRows));
  const int64_t groups = ceil_div(g.rows, per_task);
  const int64_t chunk = std::min(per_task, std::max<int64_t>(kL2 / stride / kMaxRows, 1) *
                                               kMaxRows);
  const int64_t packed_bytes = round_up(panels * quads * 64, 64);
  const int64_t out_size = e.codes ? 1 : 4;
  const int64_t residual_size = e.kind == Residual::kCodes ? 1 : 4;
  parallel_for(pool, threads, batches * groups, [&](int64_t task) {
    thread_local Scratch scratch;
    const int64_t batch = task / groups, start = task % groups * per_task;
    int8_t* packed = reinterpret_cast<int8_t*>(
        scratch.at_least(size_t(packed_bytes + chunk * stride + kSlack)));
    uint8_t* copied = reinterpret_cast<uint8_t*>(packed) + packed_bytes;
    pack_columns(g, rhs + g.at(g.rhs, batch), packed);
    Epilogue own = e;
    std::vector<int32_t> sums(size_t(panels * kLanes)), of_row(static_cast<size_t>(chunk));
    sum_columns(packed, quads, panels, sums.data());
    for (int64_t o = 0; o < g.columns; ++o) {
      own.correction[size_t(o)] -= (lhs_zero + 128) * sums[size_t(o)];
    }
    const int64_t before = batch * g.rows * g.columns;
    own.out = static_cast<char*>(e.out) + before * out_size;
    if (e.residual) {
      own.residual = static_cast<const char*>(e.residual) + before * residual_size;
    }
    const int8_t* from = lhs + g.at(g.lhs, batch);
    const int64_t end = std::min(start + per_task, g.rows);
    for (int64_t row = start; row < end; row += chunk) {
      const int64_t count = std::min(chunk, end - row);
      copy_rows(g, from + row * g.lhs_row, count, copied, stride);
      for (int64_t i = 0; i < count && rhs_zero != 0; ++i) {
        const int32_t sum = sum_bytes(copied + i * stride, g.depth);
        of_row[size_t(i)] = rhs_zero * (int32_t(g.depth) * (lhs_zero + 128) - sum);
      }
      multiply({packed, quads, panels}, own, copied, stride, row, count, 0, panels,
               rhs_zero == 0 ? nullptr : of_row.data());
    }
  });
}

}  // namespace jaxrmils
