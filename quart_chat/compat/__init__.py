"""Uses of other libraries beyond their public API: a file or folder for each library.

Every file names the versions that it was checked against, checks for what it needs, and falls back
to the public API. Tests name what an upgrade breaks.
"""
