// From PyTorch's tensors to kernels, through LibTorch's stable ABI: one library serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <warp.h>

#include <optional>

namespace svit {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
T* pointer(const OptionalTensor& t) {
  return t ? pointer<T>(*t) : nullptr;
}

template <typename T>
Parameters<T> parameters(const Tensor& t) {
  return {t.data_ptr(), t.scalar_type() == ScalarType::Float};
}

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "svit: ", what, ": ", cudaGetErrorString(error));
}

// Runs a kernel on the current stream of the tensor's device, `cluster` blocks together if more than one.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, const Tensor& like, int64_t blocks, int threads,
            int shared_memory, int cluster = 1) {
  if (blocks == 0) return;
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "svit: no current CUDA stream");
  // The same limit at every launch: another thread may be launching the kernel with another size.
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_memory);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments), "launch");
}

}  // namespace svit
