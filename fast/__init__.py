"""The same numbers, sooner: C++ kernels for the CPU and a chunked loss."""
