"""A worker process with the fake unit: as `python -m weft.worker`, but it starts in no time."""

import sys

from support.fake_unit import build_fake
from weft.worker.process import main

if __name__ == "__main__":
    sys.exit(main(build=build_fake))
