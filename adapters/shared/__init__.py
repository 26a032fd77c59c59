"""What several adapters need: files and names of weights, graphs, kernels of e3nn's convolution."""
