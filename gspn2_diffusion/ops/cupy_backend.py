"""CUDA kernels through CuPy (being written)."""
def availability():
    return False, "the kernels are not written yet"
