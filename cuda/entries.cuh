// The entry point of a kernel for BLOCKS (of the preamble) blocks of a cluster. Included at the end of a kernel that has
// line_scan<CLUSTER>(parameters), after KERNEL and KERNEL_THREADS (of a block at most) are defined.
#pragma once

#define NAME_OF(kernel, blocks) kernel##_##blocks
#define ENTRY_NAME(kernel, blocks) NAME_OF(kernel, blocks)
#if BLOCKS > 1
#define TOGETHER __cluster_dims__(BLOCKS, 1, 1)
#else
#define TOGETHER
#endif

extern "C" __global__ void TOGETHER __launch_bounds__(KERNEL_THREADS, 1)
    ENTRY_NAME(KERNEL, BLOCKS)(const __grid_constant__ Parameters a) { line_scan<BLOCKS>(a); }
