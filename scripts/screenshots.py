"""Make the pictures of pages that README and docs show, from the digits network alone.

    python scripts/screenshots.py

Needs Chromium, its driver and selenium (extra `dev`). Writes docs/img/explain.png, docs/img/explain-dark.png and
docs/img/report.png, each below 200 kB.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

import onnxcar as car

ROOT = Path(__file__).resolve().parents[1]
DIGITS = Path("models") / "digits"  # relative: paths stand on the pages
LARGEST = 200_000  # bytes
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync")


def pages(folder: Path) -> dict[str, Path]:
    """The pages: filters of the convolutions, half of them removed; both networks side by side."""
    model = car.load(DIGITS / "model.onnx")
    gray = car.Preprocess(channels="gray")
    chosen, test = (car.Npz(DIGITS / name, gray) for name in ("select.npz", "test.npz"))
    run = car.prune(model, chosen, stop=car.Stop(ratio=0.5), test_data=test)
    found = car.explain(model, chosen, layers=["conv*"], removed=run.record["removed"])
    compared = car.compare({"digits": model, "pruned": run.model}, test)
    return {
        "explain": found.to_html(folder / "explain.html"),
        "report": compared.to_html(folder / "report.html", record=run.record),
    }


def browser(width: int, height: int) -> Any:
    """A headless Chromium with a window of that size.

    Raises:
        SystemExit: It is not installed.
    """
    try:
        from selenium import webdriver
    except ImportError:
        sys.exit("error: selenium is not installed; pip install -e '.[dev]'")
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        sys.exit("error: no chromium with chromedriver on the path; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def save(shot: bytes, path: Path) -> None:
    """Write a screenshot with as many colours as fit into the limit."""
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    for colours in (256, 128, 64, 32):
        stream = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
        if stream.tell() <= LARGEST:
            break
    path.write_bytes(stream.getvalue())
    print(f"{path.relative_to(ROOT)}  {image.size[0]}x{image.size[1]}, {stream.tell()} bytes")


def main() -> None:
    """Write the pictures."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    os.chdir(ROOT)
    out = ROOT / "docs" / "img"
    out.mkdir(exist_ok=True)
    opened = browser(1240, 1080)
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = pages(Path(folder))
            opened.get(made["explain"].as_uri())
            opened.execute_script("document.querySelector('#filters').scrollIntoView()")
            time.sleep(1.5)  # pictures are drawn as they come into view
            save(opened.get_screenshot_as_png(), out / "explain.png")
            dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
            opened.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
            time.sleep(0.5)
            save(opened.get_screenshot_as_png(), out / "explain-dark.png")
            opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
            opened.get(made["report"].as_uri())
            time.sleep(0.5)
            save(opened.get_screenshot_as_png(), out / "report.png")
    finally:
        opened.quit()


if __name__ == "__main__":
    main()
