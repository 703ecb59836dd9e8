"""Make the pictures of README.md from presets, shipped runs and committed notebooks, and its table of results.

    python docs/pictures.py             # all pictures, into docs/images/, and the table
    python docs/pictures.py diff train  # some of them
    python docs/pictures.py results     # the table of results alone, which needs no browser

A picture is a page that this repository writes, reduced to its main parts and rendered by Chromium or Chrome.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import nbformat
import torch
from nbconvert import HTMLExporter
from PIL import Image, ImageChops, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.comparison import bits_per_byte
from metrics.story_losses import read_losses
from model import GPT
from runs.folder import Run, group_members, group_names
from runs.presets import preset
from tools import show_shapes

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT, SCALE = 960, 2400, 2  # of the window in CSS pixels, and image pixels per CSS pixel
BORDER = 16  # image pixels of white around the content
COLORS = 255  # of the palette, to keep the files small
THUMBNAIL = (480, 320)  # image pixels
COMPARED = "0.5m_short_and_thick", "0.5m_5foot11_and_skinnyfat", "0.5m_tall_and_skinny"
SHOWN = {  # words of the cell whose output is the thumbnail of a notebook
    "train": "LivePlot(", "testing_modules": "attention.show(x, rope=rope)", "model_evaluation": "plot_all_curves(*",
    "inference": "plt.subplots(2, 3", "build_tokenizer": "smaller.to_html(sentences)",
}  # fmt: skip


def results() -> str:
    """A markdown table: what each shipped run or group of seeds reached on all of its validation stories, and in which time."""
    lines = ["| run | data | parameters | minutes | bits per byte |", "|---|---|---|---|---|"]
    for name in group_names():
        members = [Run(member) for member in group_members(name)]
        scored = [read_losses(run.name) for run in members]
        bits = [bits_per_byte(losses) for losses, _ in scored]
        reached = f"{sum(bits) / len(bits):.3f}" + f" ({min(bits):.3f} to {max(bits):.3f}, {len(bits)} seeds)" * (len(bits) > 1)
        minutes = sum(run.log()["seconds"].iloc[-1] for run in members) / len(members) / 60
        facts = scored[0][1].data, f"{scored[0][1].parameters:,}", f"{minutes:.1f}", reached
        lines.append(f"| [{name}](trained_models/{members[0].name}) | " + " | ".join(facts) + " |")
    return "\n".join(lines) + "\n"


def with_results(text: str) -> str:
    """Replace the table between <!-- results --> and <!-- end -->."""
    return re.sub(r"(<!-- results -->\n).*?(<!-- end -->)", lambda mark: mark[1] + results() + mark[2], text, flags=re.DOTALL)


def shapes(page: Path) -> str:
    """The attention block of the preset 1m, line by line."""
    model = GPT(preset("1m").model, vocab_size=1024)
    attention = model.layers[0].branches[0].blocks[1]
    with torch.no_grad(), show_shapes(attention, html=page):
        model(torch.zeros(2, 100, dtype=torch.long))
    return "h1 { display: none } body { margin: 0 }"


def diff(page: Path) -> str:
    """What the example experiment changes in the base model; the weights of equal parts are hidden."""
    run("evaluation", "diff", "0.5m_short_and_thick", "example/forgetting", "--html", str(page))
    return "h1, p, .same :is(br, small) { display: none } body { margin: 0 }"


def compare(page: Path) -> str:
    """The verdict on the three shipped groups of seeds: sentences, intervals, curves over time."""
    run("evaluation", "compare", *COMPARED, "--html", str(page))
    return """
        body { width: 40em; margin: 0; padding: 0 }
        body > :not(.verdict, svg, .plots:has(figure)), figure:not(:nth-child(3)) { display: none }
        .plots { display: block } svg { max-width: none }
    """


def collage(page: Path) -> str:
    """A layer string, the shapes in one of its blocks, and the verdict on models of such layers, from the other pictures."""
    layers = preset("1m").model.layers.replace("Attn", "<b>Attn</b>")
    page.write_text(f"""<html lang="en"><head><meta charset="utf-8"></head><body>
        <section><h1>1. A model is a string</h1><code>"{layers}"</code></section>
        <section><h1>2. See the shapes in it</h1><img src="{(IMAGES / "shapes.png").as_uri()}"></section>
        <section><h1>3. Learn which model is better</h1><img src="{(IMAGES / "compare.png").as_uri()}"></section>
        </body></html>""", encoding="utf-8")  # fmt: skip
    return """
        body { margin: 0; font: 20px/1.5 system-ui, sans-serif; display: grid; grid-template-columns: 1fr 1fr; gap: 1rem 2rem }
        section:first-child { grid-column: 1 / -1 } h1 { font-size: 26px; margin: 0 0 .4rem; color: #0072b2 }
        code { font-size: 30px; background: #8881; padding: .3rem .6rem } b { color: #d55e00 } img { width: 100% }
    """


def notebook(name: str, page: Path) -> str:
    """The output of one cell of a committed notebook."""
    whole = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    whole.cells = [cell for cell in whole.cells if cell.cell_type == "code" and SHOWN[name] in cell.source][:1]
    html, _ = HTMLExporter(exclude_input=True, exclude_output_prompt=True).from_notebook_node(whole)
    page.write_text(html, encoding="utf-8")
    return "body { margin: 0; padding: 0 !important } .jp-OutputPrompt { display: none } main { zoom: 0.8 }"


def run(*words: str):
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True)


def screenshot(browser: str, page: Path, image: Path):
    subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--force-device-scale-factor={SCALE}",
         f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={image}", page.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip


def crop(image: Path, size: tuple[int, int] | None = None):
    """Trim the empty space around the content, shrink it to the top of a size, if there is one, and reduce the colors."""
    picture = Image.open(image).convert("RGB")
    paper = Image.new("RGB", picture.size, "white")
    content = picture.crop(ImageChops.difference(picture, paper).getbbox())
    if size:
        content = ImageOps.fit(content, size, centering=(0, 0))
    ImageOps.expand(content, 0 if size else BORDER, "white").quantize(COLORS).save(image, optimize=True)


def main(names: list[str]):
    pictures = {"shapes": shapes, "diff": diff, "compare": compare, "collage": collage}  # which shows two of the others
    pictures |= {name: partial(notebook, name) for name in SHOWN}
    names = names or [*pictures, "results"]
    if unknown := set(names) - {*pictures, "results"}:
        sys.exit(f"error: no picture is called {unknown.pop()!r}. There are: {', '.join(pictures)}, results")
    if "results" in names:
        readme = ROOT / "README.md"
        readme.write_text(with_results(readme.read_text(encoding="utf-8")), encoding="utf-8")
        names.remove("results")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if names and browser is None:
        sys.exit(f"error: no browser found ({', '.join(BROWSERS)}). Install one: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            page, image = Path(folder) / f"{name}.html", IMAGES / f"{name}.png"
            style = pictures[name](page)
            html = page.read_text(encoding="utf-8")
            page.write_text(html.replace("</head>", f"<style>{style}</style></head>", 1), encoding="utf-8")
            screenshot(browser, page, image)
            crop(image, THUMBNAIL if name in SHOWN else None)
            print(f"{image.relative_to(ROOT)}: {image.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
