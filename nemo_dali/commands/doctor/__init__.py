"""``nemo-dali doctor``: what is installed, whether it fits this machine, and whether the pixels are right."""
