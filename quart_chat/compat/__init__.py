"""What we use of other libraries by other than their public API: a file or folder for each library.

Every file names the versions that it was checked against, checks that what it needs is there, and
falls back to the plain public way. Tests fail in words when an upgrade breaks one.
"""
