"""What ``nemo-dali`` does: one module a command, and the command line that calls them."""
