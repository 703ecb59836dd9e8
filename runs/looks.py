"""First looks: which runs there were when two groups were first compared, in looks.json beside the run folders.

Seeds that are added because the first verdict was open need a stricter test, so compare records its first look.
"""

import json

from runs.files import write_atomically
from runs.folder import runs_folder

MAX_SEEDS = 20  # per group, up to which seeds may be added after a first look


def seeds_at_first_look(groups: dict[str, dict[str, str]]) -> int | None:
    """The seeds of the smaller group when these two were first compared; None if this is the first look, which is recorded.

    groups: for each of the two names, the digest of the weights of each run. The same runs are still the first look; if all runs
    are others, a new comparison begins.

    Raises ValueError if looks.json is damaged, OSError if it cannot be written.
    """
    path = runs_folder() / "looks.json"
    try:
        looks = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        first = next((look for look in looks if look.keys() == groups.keys()), None)
        remaining = first and [run for name in groups for run in groups[name].items() & first[name].items()]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: restore it, or delete it to treat all comparisons as new") from error
    if first == groups:
        return None
    if remaining:
        return min(map(len, first.values()))
    try:
        write_atomically(path, json.dumps([look for look in looks if look is not first] + [groups], indent=1).encode())
    except OSError as error:
        raise OSError(f"could not record this look in {path} ({error.strerror})") from error
    return None
