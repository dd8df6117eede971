"""Only @triton.jit functions: no policy, no device queries, no autograd. Launch parameters live in backends/triton."""
