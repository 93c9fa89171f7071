"""What ``nemo-dali`` does: one module per command, and the command line that calls them."""
