"""The kernels' PTX on a CPU, watched more closely than a GPU can; see ``machine.cpp``."""
