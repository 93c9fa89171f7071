"""A single photo with its proportions kept, on a border."""
