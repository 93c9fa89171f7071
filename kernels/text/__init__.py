"""A batch's sentences as tokens, taken from all of a data set's."""
