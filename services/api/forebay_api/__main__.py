"""`python -m forebay_api`: the api in the foreground."""

import sys

from forebay_api.server import main

if __name__ == "__main__":
    sys.exit(main())
