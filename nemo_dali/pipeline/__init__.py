"""DALI graphs that read, decode and draw photos on the CPU or a GPU, and the operators they are made of."""
