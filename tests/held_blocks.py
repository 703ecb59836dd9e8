"""A plugin for tests of Ctrl-C: a block that waits for it, so that no test depends on the speed of training.

B batch, T time, D model dim.
"""

import os
import signal
import time
from pathlib import Path

from tools import LoggingModule

SECONDS = 120  # to wait at most


class Held(LoggingModule):
    """The identity. If $HELD names a folder, step 4 leaves a file there and waits for Ctrl-C.  (B, T, D) -> (B, T, D)"""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        handler = signal.getsignal(signal.SIGINT)
        # only where training has put its handler: the checks before it run the block as well, and a shell may ignore SIGINT
        if self.training and "HELD" in os.environ and callable(handler) and handler is not signal.default_int_handler:
            self.steps += 1
            if self.steps == 4:
                Path(os.environ["HELD"], str(os.getpid())).touch()
                deadline = time.monotonic() + SECONDS
                while signal.getsignal(signal.SIGINT) is handler and time.monotonic() < deadline:
                    time.sleep(0.01)
        return x


BLOCKS = {"Held": Held}
