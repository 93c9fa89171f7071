"""A mosaic's cells: photos resampled into their boxes of a frame and normalised, and the target's mask."""
