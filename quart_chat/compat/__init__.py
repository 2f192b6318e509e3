"""Libraries whose inside we depend on: one file or folder each.

Every part names the versions that it was checked against, the hooks that it uses and why. It checks
that the inside is as expected; if not, the library's plain public way is taken, with a warning.
"""
