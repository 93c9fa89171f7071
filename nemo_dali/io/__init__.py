"""nemo_dali's own files and the machine below them: HDF5 written whole and mapped, caches, threads, progress."""
