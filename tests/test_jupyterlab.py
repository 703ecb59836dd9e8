"""Every notebook runs in a real JupyterLab in Chromium. Slow: python -m pytest -m slow -n 0 tests/test_jupyterlab.py

Screenshots are left in pytest's temporary folder, which --basetemp names.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from test_notebooks import EXAMPLE, NOTEBOOKS, REPOSITORY, code_cells, is_parameters

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]
MINUTES = 60_000  # in ms
SMALL = {  # parameters with which a notebook is done in seconds
    "build_tokenizer": {"data": "storyworld:300", "num_stories": 200, "vocab_size": 128},
    "inference": {"run": "0.5m_short_and_thick-seed0", "max_new_tokens": 10},
    "model_evaluation": {"groups": ("0.5m_short_and_thick-seed0", "0.5m_tall_and_skinny-seed0"), "num_stories": 5,
                         "data_if_missing": "storyworld:300"},
    "testing_modules": {"num_layers": 2},
    "train": {"data": "storyworld:300", "max_steps": 3, "eval_every": 2},
    EXAMPLE: {"data": "storyworld:300", "max_steps": 2, "eval_every": 1},
}  # fmt: skip
NOTEBOOK = "window.jupyterapp.shell.currentWidget"
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
    """Open a notebook in a new window, with other parameters; the window is saved as a picture at the end."""
    address, root = lab
    windows = []

    def open_it(path: str, **parameters):
        notebook = nbformat.read(root / path, as_version=4)
        assignments = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        next(cell for cell in notebook.cells if is_parameters(cell)).source += f"\n{assignments}\n"
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, root / path)
        page = browser.new_page(viewport={"width": 1200, "height": 2400})
        page.set_default_timeout(5 * MINUTES)
        page.goto(f"{address}/lab/tree/{path}?reset")
        page.wait_for_function(f"{NOTEBOOK}?.context?.sessionContext?.session?.kernel?.status == 'idle'")
        windows.append(page)
        return page

    yield open_it
    for number, page in enumerate(windows):
        page.screenshot(path=tmp_path / f"{number}.png")
        page.evaluate(f"{NOTEBOOK}.context.sessionContext.shutdown()")
        page.close()


def as_shown(page):
    """The notebook in a window; an error, or text on pink, is a failure."""
    notebook = nbformat.from_dict(page.evaluate(f"{NOTEBOOK}.content.model.toJSON()"))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    return notebook


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_to_its_end(open_notebook, name):
    page = open_notebook(f"repository/{name}.ipynb", **SMALL[name])
    page.evaluate(RUN_ALL)
    assert all(cell.execution_count for cell in code_cells(as_shown(page)))
