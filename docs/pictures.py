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
from runs.folder import Run, group_members, group_of
from runs.presets import preset
from runs.tables import at_most
from tools import show_shapes

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT, SCALE = 1000, 2400, 2  # of the window in CSS pixels, and image pixels per CSS pixel
BORDER = 16  # image pixels of white around the content
COLORS = 255  # of the palette, to keep the files small
THUMBNAIL = (480, 320)  # image pixels
COMPARED = "0.5m_short_and_thick", "0.5m_5foot11_and_skinnyfat", "0.5m_tall_and_skinny"
SHOWN = {  # words of the cell whose output is the thumbnail of a notebook
    "train": "LivePlot(", "testing_modules": "attention.show(x, rope=rope)", "model_evaluation": "plot_all_curves(*",
    "inference": "plt.subplots(2, 3", "build_tokenizer": "to_html(sentences)",
}  # fmt: skip


def shipped() -> list[str]:
    """The runs and groups of seeds that git knows."""
    files = subprocess.check_output(["git", "ls-files", "trained_models/*/model.pth"], cwd=ROOT, text=True)
    runs = [Path(file).parent.name for file in files.split()]
    return list(dict.fromkeys(group_of(name) or name for name in runs))


def results(names: list[str]) -> str:
    """A markdown table: what runs or groups of seeds reached on all of their validation stories, and in which time."""
    lines = ["| run | data | parameters | minutes | bits per byte |", "|---|---|---|---|---|"]
    for name in names:
        members = [Run(member) for member in group_members(name)]
        scored = [read_losses(run.name) for run in members]
        bits = [bits_per_byte(losses) for losses, _ in scored]
        reached = at_most(sum(bits) / len(bits), scored[0][1].is_bound, ".3f")
        reached += f" ({min(bits):.3f} to {max(bits):.3f}, {len(bits)} seeds)" * (len(bits) > 1)
        minutes = sum(run.log()["seconds"].iloc[-1] for run in members) / len(members) / 60
        kind = "in all" if members[0].seconds_include_overhead() else "of training"
        facts = scored[0][1].data, f"{scored[0][1].parameters:,}", f"{minutes:.1f} {kind}", reached
        lines.append(f"| [{name}](trained_models/{members[0].name}) | " + " | ".join(facts) + " |")
    return "\n".join(lines) + "\n"


def with_results(text: str, names: list[str]) -> str:
    """Replace the table between <!-- results --> and <!-- end -->."""
    return re.sub(r"(<!-- results -->\n).*?(<!-- end -->)", rf"\g<1>{results(names)}\g<2>", text, flags=re.DOTALL)


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


def collage(page: Path) -> str:
    """A layer string, the shapes in its layer, and the verdict on three shipped groups of models with such layers."""
    verdict, image = page.with_name("verdict.html"), page.with_name("verdict.png")
    run("evaluation", "compare", *COMPARED, "--html", str(verdict))
    draw(verdict, image, """
        body { width: 40rem; margin: 0; padding: 0; font-size: 0 } .plots { display: block } svg { max-width: none }
        body > :not(.verdict, svg, .plots:has(svg)), figure:not(:nth-child(3)) { display: none }
    """)
    config = preset(COMPARED[0]).model
    model = GPT(config, vocab_size=1024)
    with torch.no_grad(), show_shapes(model.layers[0], html=page, lines=False):
        model(torch.zeros(2, 100, dtype=torch.long))
    tree = page.read_text(encoding="utf-8")
    steps = f'<h2>A layer is a string</h2><code>"{config.layers}"</code><h2>See the shapes in it</h2>'
    tree = tree.replace("<body>", f"<body><section>{steps}", 1)
    verdict = f'<h2>Learn which model is better</h2><img src="{image.as_uri()}">'
    page.write_text(tree.replace("</body>", f"</section><section>{verdict}</section></body>", 1), encoding="utf-8")
    return """
        body { margin: 0; padding: 0; max-width: none; display: grid; grid-template-columns: 1.15fr 1fr; gap: 2rem }
        h1 { display: none } h2 { border: 0; margin: 0 0 .5rem; color: #0072b2; font-size: 1.4rem } img { width: 100% }
        section > code { display: inline-block; font-size: 1.2rem; padding: .5rem .8rem; margin-bottom: 1.5rem }
        .shape-tree.shape-tree.shape-tree pre { font-size: 10.5px }
    """


def notebook(name: str, page: Path) -> str:
    """The output of one cell of a committed notebook."""
    whole = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    whole.cells = [cell for cell in whole.cells if cell.cell_type == "code" and SHOWN[name] in cell.source][:1]
    html, _ = HTMLExporter(exclude_input=True, exclude_output_prompt=True).from_notebook_node(whole)
    page.write_text(html, encoding="utf-8")
    return "body { margin: 0; padding: 0 !important } .jp-OutputPrompt { display: none } main { width: 620px }"


def run(*words: str):
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True)


def draw(page: Path, image: Path, style: str, size: tuple[int, int] | None = None):
    """Render a page with another style, and trim the empty space around its content, or cut it to a size."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: no browser found ({', '.join(BROWSERS)}). Install one: apt-get install chromium")
    html = page.read_text(encoding="utf-8").replace("</head>", f"<style>{style}</style></head>", 1)
    page.write_text(html, encoding="utf-8")
    subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--force-device-scale-factor={SCALE}",
         f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={image}", page.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip
    picture = Image.open(image).convert("RGB")
    paper = Image.new("RGB", picture.size, "white")
    content = picture.crop(ImageChops.difference(picture, paper).getbbox())
    if size:
        thumbnail = Image.new("RGB", size, "white")
        thumbnail.paste(ImageOps.contain(content, (size[0] - BORDER, HEIGHT * SCALE)), (BORDER // 2, BORDER // 2))
        content = thumbnail
    else:
        content = ImageOps.expand(content, BORDER, "white")
    content.quantize(COLORS).save(image, optimize=True)


def main(names: list[str]):
    pictures = {"collage": collage, "shapes": shapes, "diff": diff} | {name: partial(notebook, name) for name in SHOWN}
    names = names or [*pictures, "results"]
    if unknown := set(names) - {*pictures, "results"}:
        sys.exit(f"error: no picture is called {unknown.pop()!r}. There are: {', '.join(pictures)}, results")
    if "results" in names:
        readme = ROOT / "README.md"
        readme.write_text(with_results(readme.read_text(encoding="utf-8"), shipped()), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(pictures.get, names):
            page, image = Path(folder) / f"{name}.html", ROOT / "docs" / "images" / f"{name}.png"
            style = pictures[name](page)
            draw(page, image, style, THUMBNAIL if name in SHOWN else None)
            print(f"{image.relative_to(ROOT)}: {image.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
