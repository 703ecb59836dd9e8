"""Write the tables of README.md from the files in results/.

    python benchmarks/tables.py            # after a script with --save NAME
    python benchmarks/tables.py --check    # only compare

In README.md the tables of a file stand between <!-- results/NAME.json --> and <!-- end -->. The file has the command, the
machine, and the raw results, from which the script's tables(raw) makes the tables. Instead of raw results, an older file has the
numbers of a table that was printed, and says so.
"""

import importlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from script import HERE, Row, page, results_file, run_script

README = HERE / "README.md"


@dataclass(frozen=True)
class Arguments:
    check: bool = False  # write nothing; fail if README.md and the results differ


def main(arguments: Arguments):
    text = README.read_text(encoding="utf-8")
    if arguments.check and rendered(text) != text:
        raise ValueError("README.md differs from results/: run python benchmarks/tables.py")
    README.write_text(rendered(text), encoding="utf-8")


def rendered(text: str) -> str:
    """Replace what stands between each <!-- results/NAME.json --> and <!-- end -->."""
    marker = r"(<!-- results/([\w.-]+)\.json -->\n).*?(<!-- end -->)"
    return re.sub(marker, lambda match: match[1] + block(read(match[2])) + match[3], text, flags=re.DOTALL)


def read(name: str) -> dict:
    return json.loads(results_file(name).read_text(encoding="utf-8"))


def block(result: dict) -> str:
    """Command, machine, source and tables of a results file as markdown."""
    origin = f"{result['machine']}. {result.get('source', '')}".strip()
    return f"```bash\n{result['command']}\n```\n\n{origin}\n\n{page(tables_of(result))}\n"


def tables_of(result: dict) -> dict[str, list[Row]]:
    """Tables by caption, from the raw results or, without them, from the numbers that were printed."""
    if "raw" in result:
        script = Path(shlex.split(result["command"])[1]).stem
        return importlib.import_module(script).tables(result["raw"])
    return {
        caption: [dict(zip(printed["columns"], row, strict=True)) for row in printed["rows"]]
        for caption, printed in result["printed"].items()
    }


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
