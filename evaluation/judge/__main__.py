"""python -m evaluation.judge: the same as python -m evaluation judge."""

import sys

from evaluation.__main__ import main

if __name__ == "__main__":
    main(["judge", *sys.argv[1:]])
