// The entry points of a kernel, one for each number of blocks of a cluster. Included at the end of a kernel that has
// line_scan<CLUSTER>(parameters), after KERNEL and KERNEL_THREADS (of a block at most) are defined.
#pragma once

#define NAME_OF(kernel, cluster) kernel##_##cluster
#define ENTRY_NAME(kernel, cluster) NAME_OF(kernel, cluster)
#define ENTRY(CLUSTER, ATTRIBUTES)                                                    \
  extern "C" __global__ void ATTRIBUTES __launch_bounds__(KERNEL_THREADS, 1)          \
      ENTRY_NAME(KERNEL, CLUSTER)(const __grid_constant__ Parameters a) { line_scan<CLUSTER>(a); }

ENTRY(1, )
#if __CUDA_ARCH__ >= 900
ENTRY(2, __cluster_dims__(2, 1, 1))
ENTRY(4, __cluster_dims__(4, 1, 1))
ENTRY(8, __cluster_dims__(8, 1, 1))
#endif
