"""The data set file: annotations read, checked and stored in columns; photos and run lengths."""
