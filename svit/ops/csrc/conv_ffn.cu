#include "conv_ffn.cuh"
#include "launch.h"

namespace svit {
namespace {

template <typename T, int C>
void run(const ConvFFNArguments<T>& arguments, const Tensor& x) {
  constexpr int ROWS = rows_of_tile(C);
  using Kernel = ConvFFN<T, C, ROWS>;
  const int64_t tiles = Kernel::Tile::down(arguments.H) * Kernel::Tile::across(arguments.W);
  launch(conv_ffn<T, C, ROWS>, arguments, x, x.size(0) * tiles, Kernel::THREADS, Kernel::BYTES);
}

template <typename T>
void run(const Tensor& x, const Tensor& residual, const Tensor& weight1, const Tensor& bias1, const Tensor& taps,
         const Tensor& depthwise_bias, const Tensor& weight2, const Tensor& bias2, const Tensor& y) {
  const ConvFFNArguments<T> arguments = {
      pointer<T>(x), pointer<T>(residual), pointer<T>(weight1), pointer<T>(weight2), parameters<T>(bias1),
      parameters<T>(bias2), parameters<T>(taps), parameters<T>(depthwise_bias), pointer<T>(y),
      static_cast<int>(x.size(1)), static_cast<int>(x.size(2))};
  switch (x.size(3)) {
    case 64: return run<T, 64>(arguments, x);
    case 96: return run<T, 96>(arguments, x);
    case 128: return run<T, 128>(arguments, x);
    case 192: return run<T, 192>(arguments, x);
    default: STD_TORCH_CHECK(false, "svit: no kernel for ", x.size(3), " channels");
  }
}

void ffn(Tensor x, Tensor residual, Tensor weight1, Tensor bias1, Tensor taps, Tensor depthwise_bias, Tensor weight2,
         Tensor bias2, Tensor y) {
  const auto typed = x.scalar_type() == ScalarType::BFloat16 ? run<bf16> : run<fp16>;
  typed(x, residual, weight1, bias1, taps, depthwise_bias, weight2, bias2, y);
}

}  // namespace
}  // namespace svit

// Bytes of shared memory that a block wants; 0 for channels that are not compiled.
extern "C" int svit_conv_ffn_bytes(int C) {
  switch (C) {
    case 64: return svit::ConvFFN<svit::bf16, 64, svit::rows_of_tile(64)>::BYTES;
    case 96: return svit::ConvFFN<svit::bf16, 96, svit::rows_of_tile(96)>::BYTES;
    case 128: return svit::ConvFFN<svit::bf16, 128, svit::rows_of_tile(128)>::BYTES;
    case 192: return svit::ConvFFN<svit::bf16, 192, svit::rows_of_tile(192)>::BYTES;
    default: return 0;
  }
}

STABLE_TORCH_LIBRARY_IMPL(svit_cuda, CUDA, library) { library.impl("conv_ffn", TORCH_BOX(&svit::ffn)); }
