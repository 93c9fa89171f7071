"""Plan rows drawn and laid out, and words masked, by random words of (seed, epoch, position)."""
