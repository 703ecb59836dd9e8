"""Draw the pictures of README.md from presets and shipped runs.

    python docs/pictures.py            # all of them, into docs/images/
    python docs/pictures.py shapes     # one: shapes, diff or compare; the last takes two minutes

Each is a page that this repository writes, reduced to its main parts and rendered by Chromium or Chrome.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageChops, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import GPT
from runs.presets import preset
from tools import show_shapes

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT, SCALE = 960, 2400, 2  # of the window in CSS pixels, and image pixels per CSS pixel
BORDER = 16  # image pixels of white around the content
COLORS = 255  # of the palette, to keep the files small


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
    names = "0.5m_short_and_thick", "0.5m_5foot11_and_skinnyfat", "0.5m_tall_and_skinny"
    run("evaluation", "compare", *names, "--html", str(page))
    return """
        body { display: grid; grid-template-columns: 1fr 1fr; align-items: center; column-gap: 1em }
        body > :not(.verdict, svg, .plots:has(figure)), figure:not(:nth-child(3)) { display: none }
        .verdict { grid-column: 1 / -1; margin-top: 0 }
    """


def run(*words: str):
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True)


def screenshot(browser: str, page: Path, image: Path):
    subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--force-device-scale-factor={SCALE}",
         f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={image}", page.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip


def crop(image: Path):
    """Trim the empty space around the content, and reduce the colors."""
    picture = Image.open(image).convert("RGB")
    paper = Image.new("RGB", picture.size, "white")
    content = picture.crop(ImageChops.difference(picture, paper).getbbox())
    ImageOps.expand(content, BORDER, "white").quantize(COLORS).save(image, optimize=True)


def main(names: list[str]):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: no browser found ({', '.join(BROWSERS)}). Install one: apt-get install chromium")
    pictures = {"shapes": shapes, "diff": diff, "compare": compare}
    if unknown := set(names) - set(pictures):
        sys.exit(f"error: no picture is called {unknown.pop()!r}. There are: {', '.join(pictures)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names or pictures:
            page, image = Path(folder) / f"{name}.html", ROOT / "docs" / "images" / f"{name}.png"
            style = pictures[name](page)
            html = page.read_text(encoding="utf-8")
            page.write_text(html.replace("</head>", f"<style>{style}</style></head>", 1), encoding="utf-8")
            screenshot(browser, page, image)
            crop(image)
            print(f"{image.relative_to(ROOT)}: {image.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
