"""`python -m weft.worker`: started by the node agent, not by people."""

import sys

from weft.worker.process import main

if __name__ == "__main__":
    sys.exit(main())
