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

// Calls use(the configuration) of a launch on the device, which is the current one: `cluster` blocks together.
template <typename Arguments, typename F>
cudaError_t with_configuration(void (*kernel)(Arguments), int32_t device, int64_t blocks, int threads,
                               int shared_memory, int cluster, F use) {
  // The same limit at every launch: another thread may be launching the kernel with another size.
  int limit = 0;
  cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_memory);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return use(config);
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
  const auto start = [&](cudaLaunchConfig_t& config) {
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, arguments);
  };
  check(with_configuration(kernel, device, blocks, threads, shared_memory, cluster, start), "launch");
}

// How many clusters of `cluster` blocks the current device holds at a time: 0 where it cannot run even one.
template <typename Arguments>
int max_active_clusters(void (*kernel)(Arguments), int32_t device, int threads, int shared_memory, int cluster) {
  int most = 0;
  const auto ask = [&](cudaLaunchConfig_t& config) {
    if (cluster > 1) return cudaOccupancyMaxActiveClusters(&most, kernel, &config);
    int processors = 0;  // a block alone is no cluster
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&most, kernel, threads, config.dynamicSmemBytes);
    }
    most *= processors;
    return error;
  };
  if (with_configuration(kernel, device, cluster, threads, shared_memory, cluster, ask) == cudaSuccess) return most;
  cudaGetLastError();  // it has been answered: the next launch must not find it
  return 0;
}

}  // namespace svit
