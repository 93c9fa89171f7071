"""A ref's run lengths as the mask of its cell."""
