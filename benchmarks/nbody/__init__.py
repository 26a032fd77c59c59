"""N-body: the first experiment of the BLIP paper, on torch modules of our own."""
