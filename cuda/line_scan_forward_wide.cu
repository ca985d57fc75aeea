// The tiled forward kernel for long stretches of few channels: tiled.cuh.
#define WIDE 1
#include "line_scan_forward_tiled.cu"
