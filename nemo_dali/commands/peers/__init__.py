"""``nemo-dali bench peers``: the same mosaics by what people would use instead of the Loader, timed in the same run."""
