"""DALI graphs: photos read, decoded and drawn on CPU or GPU, and the operators they are made of."""
