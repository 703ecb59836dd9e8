"""python -m evaluation.judge A B --model gpt-4o-mini: a large model grades and compares the stories of runs."""

import sys

from evaluation.judge.judging import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: what was answered is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
