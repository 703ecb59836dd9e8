"""How machines executed a run: what autotuning chose, and on which machine; and what differs between runs. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class ExecutionPlan:
    """How this machine trains a model."""

    dtype: str  # of matrix products: float32 or bfloat16
    fast: bool  # use the C++ kernels of fast/
    micro_batch_size: int  # sequences per forward pass
    threads: int  # of the CPU
    compile: bool  # torch.compile each layer

    def __str__(self):
        kernels = "our C++ kernels" if self.fast else "PyTorch alone"
        return (
            f"{self.dtype}, {kernels}, {self.micro_batch_size} row{'s' * (self.micro_batch_size > 1)} at a time, "
            f"{self.threads} thread{'s' * (self.threads > 1)}, {'compiled' if self.compile else 'not compiled'}"
        )


@dataclass(frozen=True)
class Stage:
    """A part of a run, up to the next stage. A run has several if it was resumed with another plan or on another machine."""

    from_step: int
    plan: ExecutionPlan
    machine: dict[str, str | int]  # of training.machine.describe_machine


def different_execution(label: str, *groups: Sequence) -> list[str]:
    """Name in one line what differs between groups of runs (runs.folder.Run) in plan or machine; empty if nothing does.

    Of a run that predates the record only what its config prescribes is compared.
    """
    known = [values_of(runs) for runs in groups]
    differing = []
    for name in dict.fromkeys(name for values in known for name in values):
        sides = list(dict.fromkeys("/".join(sorted(values[name])) for values in known if name in values))
        if len(sides) > 1:
            differing.append(f"{name} {' and '.join(sides)}")
    return [f"{label} were executed differently: {', '.join(differing)}"] if differing else []


def values_of(runs: Sequence) -> dict[str, set[str]]:
    """The values of each setting in the plans and machines of some runs, as text."""
    values = {}
    for run in runs:
        stages = [asdict(stage.plan) | stage.machine for stage in run.stages]
        for stage in stages or [prescribed(run.train_config)]:
            for name, value in stage.items():
                values.setdefault(name, set()).add(str(value))
    return values


def prescribed(config) -> dict:
    """The part of the plan that a TrainConfig leaves no choice about."""
    settings = {field.name: getattr(config, field.name) for field in fields(ExecutionPlan)}
    return {name: value for name, value in settings.items() if value not in ("auto", None)}
