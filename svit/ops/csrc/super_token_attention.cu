#include <algorithm>

#include "launch.h"
#include "super_token_attention.cuh"

namespace svit {
namespace {

// Calls f.operator()<C, HEIGHT, WIDTH>() for the sizes that are compiled; false for others.
template <typename F>
bool for_sizes(int64_t C, int64_t height, int64_t width, F f) {
  if (height == 8 && width == 8 && C == 64) return f.template operator()<64, 8, 8>(), true;
  if (height == 8 && width == 8 && C == 96) return f.template operator()<96, 8, 8>(), true;
  if (height == 4 && width == 4 && C == 128) return f.template operator()<128, 4, 4>(), true;
  if (height == 4 && width == 4 && C == 192) return f.template operator()<192, 4, 4>(), true;
  return false;
}

template <typename T, bool MANY>
struct Run {
  const AttentionArguments<T>& arguments;
  const Tensor& x;

  template <int C, int HEIGHT, int WIDTH>
  void operator()() const {
    using Kernel = SuperTokenAttention<T, C, HEIGHT, WIDTH, MANY>;
    const Grid grid = arguments.grid;
    const int blocks = MANY ? grid.rows : 1;
    launch(super_token_attention<T, C, HEIGHT, WIDTH, MANY>, arguments, x, x.size(0) * blocks, 32 * grid.columns,
           typename Kernel::Layout(grid.rows / blocks, grid.columns).bytes, blocks);
  }
};

template <typename T>
void run(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& qkv_weight,
         const Tensor& qkv_bias, const Tensor& proj_weight, const Tensor& proj_bias, const OptionalTensor& scale,
         int64_t height, int64_t width, bool clusters, const Tensor& y, const OptionalTensor& s,
         const OptionalTensor& q, const OptionalTensor& mass) {
  const Grid grid = {static_cast<int>(x.size(1) / height), static_cast<int>(x.size(2) / width)};
  const AttentionArguments<T> arguments = {
      pointer<T>(x), parameters<T>(norm_weight), parameters<T>(norm_bias), parameters<T>(qkv_bias),
      parameters<T>(proj_bias), pointer<T>(qkv_weight), pointer<T>(proj_weight), pointer<float>(scale),
      pointer<T>(y), pointer<T>(s), pointer<T>(q), pointer<float>(mass), static_cast<float>(eps), grid};
  STD_TORCH_CHECK(clusters || q, "svit: q is needed without clusters");
  STD_TORCH_CHECK(grid.rows <= MOST_BLOCKS && grid.columns <= MOST_COLUMNS, "svit: a grid of at most 8 x 8 cells");
  const bool served = clusters ? for_sizes(x.size(3), height, width, Run<T, true>{arguments, x})
                               : for_sizes(x.size(3), height, width, Run<T, false>{arguments, x});
  STD_TORCH_CHECK(served, "svit: no kernel for ", x.size(3), " channels in cells of ", height, " x ", width);
}

void attention(Tensor x, Tensor norm_weight, Tensor norm_bias, double eps, Tensor qkv_weight, Tensor qkv_bias,
               Tensor proj_weight, Tensor proj_bias, OptionalTensor scale, int64_t height, int64_t width,
               bool clusters, Tensor y, OptionalTensor s, OptionalTensor q, OptionalTensor mass) {
  const auto typed = x.scalar_type() == ScalarType::BFloat16 ? run<bf16> : run<fp16>;
  typed(x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, proj_weight, proj_bias, scale, height, width, clusters,
        y, s, q, mass);
}

struct ActiveClusters {
  Grid grid;
  int device;
  int* most;

  template <int C, int HEIGHT, int WIDTH>
  void operator()() const {
    *most = std::min(of<bf16, C, HEIGHT, WIDTH>(), of<fp16, C, HEIGHT, WIDTH>());
  }

  template <typename T, int C, int HEIGHT, int WIDTH>
  int of() const {
    using Kernel = SuperTokenAttention<T, C, HEIGHT, WIDTH, true>;
    return max_active_clusters(super_token_attention<T, C, HEIGHT, WIDTH, true>, device, 32 * grid.columns,
                               typename Kernel::Layout(1, grid.columns).bytes, grid.rows);
  }
};

template <bool MANY>
struct Bytes {
  int rows, columns;
  int* bytes;

  template <int C, int HEIGHT, int WIDTH>
  void operator()() const {
    *bytes = typename SuperTokenAttention<bf16, C, HEIGHT, WIDTH, MANY>::Layout(rows, columns).bytes;
  }
};

}  // namespace
}  // namespace svit

// Bytes of shared memory that a block wants for a grid of cells; 0 for sizes that are not compiled.
extern "C" int svit_attention_bytes(int C, int height, int width, int rows, int columns, int clusters) {
  int bytes = 0;
  if (clusters) {
    svit::for_sizes(C, height, width, svit::Bytes<true>{1, columns, &bytes});
  } else {
    svit::for_sizes(C, height, width, svit::Bytes<false>{rows, columns, &bytes});
  }
  return bytes;
}

// Clusters, one an image of a grid of cells, that the current device holds at a time: 0 where it cannot run even one.
extern "C" int svit_attention_max_active_clusters(int C, int height, int width, int rows, int columns, int device) {
  int most = 0;
  svit::for_sizes(C, height, width, svit::ActiveClusters{{rows, columns}, device, &most});
  return most;
}

// Whether the library holds code, or PTX, for GPUs that have clusters.
extern "C" int svit_has_clusters() {
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};
  for (const int architecture : architectures) {
    if (architecture >= 900) return 1;
  }
  return 0;
}

STABLE_TORCH_LIBRARY_IMPL(svit_cuda, CUDA, library) {
  library.impl("super_token_attention", TORCH_BOX(&svit::attention));
}
