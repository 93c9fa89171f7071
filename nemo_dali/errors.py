"""The exceptions that nemo_dali raises for files, state and data.

    NemoError
    ├── AnnotationError   annotation files: missing, malformed, untrusted, inconsistent
    ├── FileFormatError   a .h5 file of ours: wrong format, version or data set, truncated, not writable
    ├── PhotoError        a photo: missing, corrupt, of a different size than annotated
    ├── StateError        a saved loader state that does not fit this loader
    └── ToldElsewhere     another rank failed and reports it itself

A wrong *argument* is a ValueError. Every message is one sentence that says what is wrong, then the remedy.
"""


class NemoError(Exception):
    """Base of all; the command line prints its text and exits with 1."""


class AnnotationError(NemoError):
    """An annotation file cannot be used."""


class FileFormatError(NemoError):
    """A dataset or table file cannot be read or written."""


class PhotoError(NemoError):
    """A photo cannot be used; the message names it."""


class StateError(NemoError):
    """A saved state cannot be restored into this loader."""


class ToldElsewhere(NemoError):
    """Another rank failed and reports it itself; this one just ends. The command line prints nothing."""
