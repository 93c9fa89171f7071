"""Files of our own and the machine below them: HDF5 written whole and mapped, caches, threads, progress."""
