"""Photos ranked for each sentence, and the pools that bounds leave of a ranking."""
