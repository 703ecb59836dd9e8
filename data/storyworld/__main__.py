"""python -m data.storyworld --count 3: tell stories of the built-in world, or grade those of a file."""

import sys

import tyro

from data.storyworld.world import main

if __name__ == "__main__":
    try:
        tyro.cli(main, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
