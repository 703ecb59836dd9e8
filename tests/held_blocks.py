"""A plugin for tests of Ctrl-C: a block that waits for it, so that no test depends on how fast a training is.

B batch, T time, D model dim.
"""

import os
import signal
import time
from pathlib import Path

from tools import LoggingModule

SECONDS = 120  # to wait at most


class Held(LoggingModule):
    """x as it is. Where $HELD names a folder, step 4 leaves a file there and goes on after Ctrl-C.  (B, T, D) → (B, T, D)"""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        waits = signal.getsignal(signal.SIGINT)
        if self.training and "HELD" in os.environ and waits is not signal.default_int_handler:
            self.steps += 1
            if self.steps == 4:
                Path(os.environ["HELD"], str(os.getpid())).touch()
                until = time.monotonic() + SECONDS
                while signal.getsignal(signal.SIGINT) is waits and time.monotonic() < until:
                    time.sleep(0.01)
        return x


BLOCKS = {"Held": Held}
