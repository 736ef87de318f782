// What a warp, a block and a cluster do together: tensor-core products, transposed loads, sums, barriers.
//
// Lane l of a warp has g = l / 4 and t = l % 4. A product D (16 x 8) += A (16 x 16) B (16 x 8) takes, two neighbouring
// values in 32 bits: a[0], a[1] rows g and g + 8 at columns 2t, 2t + 1, a[2], a[3] the same at columns + 8; b[0] rows
// 2t, 2t + 1 at column g, b[1] rows + 8; d[0], d[1] row g at columns 2t, 2t + 1, d[2], d[3] row g + 8. (PTX ISA, mma.m16n8k16.)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace svit {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Dynamic shared memory of the block.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices from shared memory. Lane 8 i + j names row j of matrix i (16 bytes); register i then holds row g,
// columns 2t, 2t + 1 of matrix i, or of its transpose.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// An 8 x 8 matrix in registers, as above, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t r) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(r));
  return d;
}

__device__ __forceinline__ float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Ends the program with an error.
__device__ __forceinline__ void stop() { __trap(); }

// 16 bytes from global to shared memory, on the way until `wait_for_copies` of the same thread; the others of the block
// see them after a barrier behind that. `ahead`: how many of the last commits may still be on their way.
__device__ __forceinline__ void copy(void* to_shared, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int AHEAD>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD) : "memory");
}

// What is loaded behind it is not asked for before it.
__device__ __forceinline__ void hold_loads() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

// The same place in shared memory, or the same number, of which the compiler knows nothing: it keeps it in a register
// instead of computing it again, and computes what depends on it where that stands.
__device__ __forceinline__ char* opaque(char* shared) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(address));
  return static_cast<char*>(__cvta_shared_to_generic(address));
}
__device__ __forceinline__ int opaque(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

constexpr float LOG2_E = 1.44269504f;

// 2^x to about 1e-7; 0 for what float32 cannot hold in full.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to about 1e-7.
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }

// The blocks of a thread-block cluster (sm_90), which reach each other's shared memory; or a block alone.
template <bool MANY>
struct Cluster {
  static __device__ __forceinline__ int rank() { return 0; }
  static __device__ __forceinline__ int size() { return 1; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  // `p`, in shared memory, as the block `rank` has it.
  template <typename P>
  static __device__ __forceinline__ P* in(P* p, int) {
    return p;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <>
struct Cluster<true> {
  static __device__ __forceinline__ int rank() {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return static_cast<int>(r);
  }
  static __device__ __forceinline__ int size() {
    uint32_t n;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return static_cast<int>(n);
  }
  static __device__ __forceinline__ void sync() {
    __syncwarp();  // what follows is for whole warps
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  template <typename P>
  static __device__ __forceinline__ P* in(P* p, int rank) {
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
    return reinterpret_cast<P*>(there);
  }
};
#endif

// Two values in 32 bits, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both);
template <>
__device__ __forceinline__ float2 unpack<bf16>(uint32_t both) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
}
template <>
__device__ __forceinline__ float2 unpack<fp16>(uint32_t both) {
  return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// The sums of two pairs.
template <typename T>
__device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t add<bf16>(uint32_t a, uint32_t b) {
  const auto pair = [](uint32_t& bits) { return *reinterpret_cast<__nv_bfloat162*>(&bits); };
  const __nv_bfloat162 sum = __hadd2(pair(a), pair(b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}
template <>
__device__ __forceinline__ uint32_t add<fp16>(uint32_t a, uint32_t b) {
  const auto pair = [](uint32_t& bits) { return *reinterpret_cast<__half2*>(&bits); };
  const __half2 sum = __hadd2(pair(a), pair(b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(fp16 value) { return __half2float(value); }

// A vector of parameters, in T or in float32.
template <typename T>
struct Parameters {
  const void* values;
  bool wide;

  __device__ __forceinline__ float operator[](int i) const {
    return wide ? static_cast<const float*>(values)[i] : to_float(static_cast<const T*>(values)[i]);
  }
  // Two from an even i on.
  __device__ __forceinline__ float2 pair(int i) const {
    return wide ? static_cast<const float2*>(values)[i / 2] : unpack<T>(static_cast<const uint32_t*>(values)[i / 2]);
  }
};

}  // namespace svit
