"""``nemo-dali report``: a page to choose tau and K by eye."""
