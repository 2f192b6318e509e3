"""simloom needs Python 3.12: on an older one there is nothing to collect here."""

import sys

collect_ignore_glob = ["*"] if sys.version_info < (3, 12) else []
