"""In which arithmetic a model computes, and the kernels that do it."""
