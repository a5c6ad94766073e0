#ifndef BALLAST_KERNELS_STREAM_H_
#define BALLAST_KERNELS_STREAM_H_

// A CUDA stream, by its own tag so that host-only code needs no CUDA header; nullptr on the CPU.
struct CUstream_st;

namespace ballast {
using Stream = CUstream_st*;
}  // namespace ballast

#endif  // BALLAST_KERNELS_STREAM_H_
