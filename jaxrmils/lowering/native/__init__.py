"""Integer kernels in C++ for CPUs, which rescale and quantize sums before they are written."""
