// What XLA calls. Shapes are checked in kernels.py.

#include "batched.h"
#include "conv.h"
#include "depthwise.h"
#include "xla/ffi/api/ffi.h"

#include <utility>

namespace ffi = xla::ffi;

namespace jaxrmils {
namespace {

using Codes = ffi::Buffer<ffi::S8>;
using Ints = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;

Epilogue epilogue(int64_t products, Floats scale, Floats offset, Ints correction,
                  ffi::AnyBuffer residual, Floats residual_scale, Ints residual_zero,
                  Floats out_scale, Ints out_zero, Floats table, float reach, float low,
                  float high, ffi::AnyBuffer out) {
  Epilogue e;
  e.set_channels(int64_t(scale.element_count()), scale.typed_data(), offset.typed_data(),
                 correction.typed_data());
  // A residual of another size than the result stands for none.
  if (residual.element_count() == out.element_count()) {
    e.kind = residual.element_type() == ffi::S8 ? Residual::kCodes : Residual::kFloat;
    e.residual = residual.untyped_data();
    e.residual_scale = *residual_scale.typed_data();
    e.residual_zero = *residual_zero.typed_data();
  }
  if (const int64_t rows = table.dimensions()[0]; rows > 0) {
    e.function = {table.typed_data(), rows, kLanes / reach};
  }
  e.low = low;
  e.high = high;
  e.codes = out.element_type() == ffi::S8;
  e.out_scale = *out_scale.typed_data();
  e.out_zero = *out_zero.typed_data();
  e.out = out.untyped_data();
  e.close(products);
  return e;
}

Window window(Codes x, ffi::AnyBuffer out, ffi::Span<const int64_t> kernel,
              ffi::Span<const int64_t> strides, ffi::Span<const int64_t> low_padding,
              ffi::Span<const int64_t> dilation) {
  const auto in = x.dimensions(), to = out.dimensions();
  return {in[0],          in[1],          in[2],       in[3],       kernel[0], kernel[1],
          strides[0],     strides[1],     low_padding[0], low_padding[1],
          dilation[0],    dilation[1],    to[1],       to[2]};
}

ffi::Error dot_target(ffi::ThreadPool pool, Codes x, Codes weights, Floats scale, Floats offset,
                      Ints correction, ffi::AnyBuffer residual, Floats residual_scale,
                      Ints residual_zero, Floats out_scale, Ints out_zero, Floats table,
                      ffi::Result<ffi::AnyBuffer> out, float low, float high, float reach) {
  const int64_t products = x.dimensions()[1];
  const Epilogue e = epilogue(products, scale, offset, correction, residual, residual_scale,
                              residual_zero, out_scale, out_zero, table, reach, low, high, *out);
  const auto packed = weights.dimensions(), in = x.dimensions();
  dot(pool, in[0], in[1], x.typed_data(), {weights.typed_data(), packed[1], packed[0]}, e);
  return ffi::Error::Success();
}

ffi::Error conv_target(ffi::ThreadPool pool, Codes x, Codes weights, Floats scale, Floats offset,
                       Ints correction, ffi::AnyBuffer residual, Floats residual_scale,
                       Ints residual_zero, Floats out_scale, Ints out_zero, Floats table,
                       Ints x_zero, ffi::Result<ffi::AnyBuffer> out, float low, float high,
                       float reach,
                       ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> strides,
                       ffi::Span<const int64_t> low_padding,
                       ffi::Span<const int64_t> dilation) {
  const int64_t products = kernel[0] * kernel[1] * x.dimensions()[3];
  const Epilogue e = epilogue(products, scale, offset, correction, residual, residual_scale,
                              residual_zero, out_scale, out_zero, table, reach, low, high, *out);
  const auto packed = weights.dimensions();
  convolve(pool, window(x, *out, kernel, strides, low_padding, dilation), x.typed_data(),
           int8_t(*x_zero.typed_data()), {weights.typed_data(), packed[1], packed[0]}, e);
  return ffi::Error::Success();
}

ffi::Error depthwise_target(ffi::ThreadPool pool, Codes x, Codes weights, Floats scale,
                            Floats offset, Ints correction, ffi::AnyBuffer residual,
                            Floats residual_scale, Ints residual_zero, Floats out_scale,
                            Ints out_zero, Floats table, Ints x_zero,
                            ffi::Result<ffi::AnyBuffer> out, float low, float high,
                            float reach, ffi::Span<const int64_t> kernel,
                            ffi::Span<const int64_t> strides,
                            ffi::Span<const int64_t> low_padding,
                            ffi::Span<const int64_t> dilation) {
  const int64_t products = kernel[0] * kernel[1];
  const Epilogue e = epilogue(products, scale, offset, correction, residual, residual_scale,
                              residual_zero, out_scale, out_zero, table, reach, low, high, *out);
  const auto packed = weights.dimensions();
  depthwise(pool, window(x, *out, kernel, strides, low_padding, dilation), x.typed_data(),
            int8_t(*x_zero.typed_data()),
            {weights.typed_data(), packed[0], packed[1]}, e);
  return ffi::Error::Success();
}

ffi::Error batched_target(ffi::ThreadPool pool, Codes lhs, Codes rhs, Floats scale,
                          Floats offset, Ints correction, ffi::AnyBuffer residual,
                          Floats residual_scale, Ints residual_zero, Floats out_scale,
                          Ints out_zero, Floats table, Ints lhs_zero, Ints rhs_zero,
                          ffi::Result<ffi::AnyBuffer> out, float low, float high, float reach,
                          ffi::Span<const int64_t> batch, ffi::Span<const int64_t> lhs_strides,
                          ffi::Span<const int64_t> rhs_strides,
                          ffi::Span<const int64_t> sizes) {
  // Either factor may have a zero point: twice as much as with a weight.
  const Epilogue e = epilogue(2 * sizes[2], scale, offset, correction, residual,
                              residual_scale, residual_zero, out_scale, out_zero, table, reach,
                              low, high, *out);
  const size_t dims = batch.size();
  const auto outer = [&](ffi::Span<const int64_t> s) {
    return std::vector<int64_t>(s.begin(), s.begin() + dims);
  };
  const BatchedShape shape{outer(batch),          outer(lhs_strides),    outer(rhs_strides),
                           sizes[0],              sizes[1],              sizes[2],
                           lhs_strides[dims],     lhs_strides[dims + 1], rhs_strides[dims],
                           rhs_strides[dims + 1]};
  batched_product(pool, shape, lhs.typed_data(), rhs.typed_data(), *lhs_zero.typed_data(),
                  *rhs_zero.typed_data(), e);
  return ffi::Error::Success();
}

// The operands that all targets share.
auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Codes>()           // x
      .Arg<Codes>()           // weights
      .Arg<Floats>()          // scale
      .Arg<Floats>()          // offset
      .Arg<Ints>()            // correction
      .Arg<ffi::AnyBuffer>()  // residual
      .Arg<Floats>()          // its scale
      .Arg<Ints>()            // its zero point
      .Arg<Floats>()          // the result's scale
      .Arg<Ints>()            // the result's zero point
      .Arg<Floats>();         // the function's table
}

// The result and the numbers that all targets share.
template <class Binding>
auto with_result(Binding operands) {
  return std::move(operands)
      .template Ret<ffi::AnyBuffer>()
      .template Attr<float>("low")
      .template Attr<float>("high")
      .template Attr<float>("reach");
}

auto window_binding() {
  return with_result(binding().Arg<Ints>())  // x_zero
      .Attr<ffi::Span<const int64_t>>("kernel")
      .Attr<ffi::Span<const int64_t>>("strides")
      .Attr<ffi::Span<const int64_t>>("low_padding")
      .Attr<ffi::Span<const int64_t>>("dilation");
}

auto batched_binding() {
  return with_result(binding().Arg<Ints>().Arg<Ints>())  // lhs_zero, rhs_zero
      .Attr<ffi::Span<const int64_t>>("batch")
      .Attr<ffi::Span<const int64_t>>("lhs_strides")
      .Attr<ffi::Span<const int64_t>>("rhs_strides")
      .Attr<ffi::Span<const int64_t>>("sizes");
}

}  // namespace
}  // namespace jaxrmils

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxrmils_dot, jaxrmils::dot_target,
                              jaxrmils::with_result(jaxrmils::binding()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxrmils_batched_dot, jaxrmils::batched_target,
                              jaxrmils::batched_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxrmils_conv, jaxrmils::conv_target, jaxrmils::window_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxrmils_depthwise, jaxrmils::depthwise_target,
                              jaxrmils::window_binding());

extern "C" const char* jaxrmils_instructions() {
#ifdef JAXRMILS_VNNI
  return "avx512_vnni";
#else
  return "portable";
#endif
}
