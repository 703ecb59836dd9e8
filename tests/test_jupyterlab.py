"""Every notebook runs in a real JupyterLab in Chromium. Slow: python -m pytest -m slow tests/test_jupyterlab.py

Screenshots are left in pytest's temporary folder, which --basetemp names.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pandas as pd
import pytest
from test_notebooks import EXAMPLE, NOTEBOOKS, REPOSITORY, code_cells, is_parameters, read

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]
MINUTES = 60_000  # in ms
SMALL = {  # parameters with which a notebook is done in seconds
    "build_tokenizer": {"data": "storyworld:300", "num_stories": 200, "vocab_size": 128},
    "inference": {"run": "0.5m_short_and_thick-seed0", "max_new_tokens": 10},
    "model_evaluation": {"groups": ("0.5m_short_and_thick-seed0", "0.5m_tall_and_skinny-seed0"), "num_stories": 5,
                         "data_if_missing": "storyworld:300"},
    "testing_modules": {"num_layers": 2},
    "train": {"preset": "0.5m_short_and_thick", "data": "storyworld:300", "max_minutes": 0.05, "eval_every": 10},
    EXAMPLE: {"data": "storyworld:300", "max_steps": 2, "eval_every": 1},
}  # fmt: skip
NOTEBOOK = "window.jupyterapp?.shell?.currentWidget"
RUN_ALL = "window.jupyterapp.commands.execute('notebook:run-all-cells')"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab on a copy of the repository, with no settings of the user: its address and its folder."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(REPOSITORY, root / "repository", ignore=shutil.ignore_patterns(".*", "__pycache__", "tests"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
           "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR", "BASEGPT_CACHE")  # fmt: skip
    unset = ("MPLBACKEND", "BASEGPT_RUNS", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {name: str(root / name.lower()) for name in own} | {"CXX": "no-such-compiler"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}", f"--notebook-dir={root}",
               "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    with open(root / "log.txt", "w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, server)
            yield address, root
        finally:
            server.terminate()  # its kernels, too


def wait_for(address: str, server: subprocess.Popen):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return urlopen(f"{address}/api")
        except URLError:
            time.sleep(0.5)
    raise RuntimeError("JupyterLab did not start: see its log.txt")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_notebook(lab, browser, tmp_path):
    """Open a copy of a notebook in a folder of the repository, with other parameters; a picture of it is saved at the end."""
    address, root = lab
    pages = []

    def open_it(name: str, folder: Path, /, **parameters):
        path = folder / f"{Path(name).name}.ipynb"
        notebook = read(name)
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, root / path)
        page = browser.new_page(viewport={"width": 1200, "height": 4000})
        page.set_default_timeout(5 * MINUTES)
        page.goto(f"{address}/lab/tree/{path.as_posix()}?reset")
        page.wait_for_function(f"{NOTEBOOK}?.context?.sessionContext?.session?.kernel?.status == 'idle'")
        pages.append(page)
        change(page, **parameters)
        return page

    yield open_it
    for number, page in enumerate(pages):
        page.screenshot(path=tmp_path / f"{number}.png")
        page.evaluate(f"{NOTEBOOK}.context.sessionContext.shutdown()")
        page.close()


def change(page, **parameters):
    """Add assignments to the cell of parameters."""
    number = next(number for number, cell in enumerate(shown(page).cells) if is_parameters(cell))
    lines = "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    page.evaluate("([number, lines]) => { const cell = " + NOTEBOOK + ".content.model.cells.get(number).sharedModel;"
                  "cell.setSource(cell.getSource() + lines) }", [number, lines])  # fmt: skip


def shown(page):
    return nbformat.from_dict(page.evaluate(f"{NOTEBOOK}.content.model.toJSON()"))


def check(page) -> str:
    """All cells were run, without an error or text on pink; returns what was printed."""
    cells = code_cells(shown(page))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert all(cell.execution_count for cell in cells)
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_to_its_end_in_another_folder(open_notebook, name):
    folder = Path("repository", EXAMPLE).parent if name == EXAMPLE else Path("repository/docs")
    page = open_notebook(name, folder, **SMALL[name])
    page.evaluate(RUN_ALL)
    check(page)


def test_training_is_stopped_resumed_and_run_again(open_notebook, lab):
    runs = lab[1] / "repository" / "trained_models"
    page = open_notebook("train", Path("repository"), **SMALL["train"] | {"max_minutes": 0.5, "name": "one"})
    page.evaluate(f"window.running = {RUN_ALL}; 0")
    page.wait_for_function(f"JSON.stringify({NOTEBOOK}.content.model.toJSON()).split('image/png').length > 4")  # and metadata
    page.click('[data-command="notebook:interrupt-kernel"]')
    page.evaluate("window.running")
    assert "stopped after step" in check(page)
    stopped = last_step(runs / "one")
    change(page, resume=True)
    page.evaluate(RUN_ALL)
    assert "stopped after step" not in check(page)
    assert last_step(runs / "one") > stopped
    change(page, resume=False, name="two", max_minutes=0.05)
    page.evaluate(RUN_ALL)
    check(page)
    assert last_step(runs / "two") > 0


def last_step(run: Path) -> int:
    return pd.read_csv(run / "log_data.csv")["step"].iloc[-1]
