"""Resident tiles, resampled beforehand, gathered into frames."""
