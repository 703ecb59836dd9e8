"""A stopwatch that counts training time apart from everything else."""

from contextlib import contextmanager
from time import perf_counter

from torch._dynamo import callback_handler


class Stopwatch:
    """Seconds of training, between start() and stop(), and of overhead, which is all other time since it was made.

    >>> clock = Stopwatch()
    >>> before = clock.start(); clock.stop()
    >>> clock.training > 0 and clock.overhead > 0
    True
    """

    def __init__(self):
        self.made_at, self.started_at = perf_counter(), None
        self.training = self.earlier = 0.0

    def start(self) -> float:
        """Start, and return the seconds of training so far."""
        self.started_at = perf_counter()
        return self.training

    def stop(self):
        self.training += perf_counter() - self.started_at
        self.started_at = None

    @property
    def overhead(self) -> float:
        """To be read while it is stopped."""
        return self.earlier + perf_counter() - self.made_at - self.training

    def restore(self, training: float, overhead: float):
        """Add the times of a run that is resumed."""
        self.training += training
        self.earlier += training + overhead

    @contextmanager
    def stopped_while_compiling(self):
        """Count torch.compile as overhead. It compiles in the middle of a step, at the first and whenever a shape changes."""
        interrupted = False

        def on_start(_):
            nonlocal interrupted
            interrupted = self.started_at is not None
            if interrupted:
                self.stop()

        def on_end(_):
            if interrupted:
                self.start()

        callback_handler.register_start_callback(on_start)
        callback_handler.register_end_callback(on_end)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(on_start)
            callback_handler.remove_end_callback(on_end)
