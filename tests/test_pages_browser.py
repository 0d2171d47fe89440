"""The pages in a real browser: nothing in the console, names do nothing, controls sort and filter.

Needs Chromium with its driver and selenium (extra `dev`); skipped where one of them is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxcar as car
from onnxcar.explanation import explain
from onnxcar.pages._explanation import PATCHES
from tests import known_net
from tests.known_net import BLUE, DEAD, RED, SAME

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TAG = "<script>alert(1)</script>"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1400",
)


def driver() -> Any:
    """A headless Chromium, or the test is skipped with the reason."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install onnxcar[dev]")
    from selenium import webdriver

    assert selenium
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    chromedriver = shutil.which("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver on the path: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    opened = driver()
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Pages of the network made by hand, whose class, layer and file are called like a script."""
    folder = tmp_path_factory.mktemp("pages")
    model, path = known_net.write(folder, classes=(TAG, "red", "blue"))
    proto = car.load(model).proto
    proto.graph.node[0].name = TAG
    odd = car.from_proto(proto)
    data = car.Npz(path, car.Preprocess.preset("unit")).for_input((None, 3, 8, 8))
    out = {"explain": folder / "index.html", "compare": folder / "compare.html"}
    explain(odd, data, threads=1, removed={"w": [SAME]}).to_html(out["explain"])
    space = car.analyze(odd)
    cut = car.remove(space, car.Plan([space.groups[BLUE].id]))
    car.compare({TAG: odd, "cut": cut}, data, runs=0).to_html(out["compare"], command=TAG)
    return out


def opened(browser, path: Path) -> Any:
    browser.get(path.as_uri())
    return browser


def script(browser, code: str) -> Any:
    return browser.execute_script(code)


def quiet(browser) -> bool:
    """Whether the console is empty and no dialog is open."""
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert
    entries = browser.get_log("browser")
    assert not entries
    return True


def cards(browser) -> list[int]:
    """Numbers of the filters on the page, in order."""
    found = script(browser, "return [...document.querySelectorAll('.card')].map((c) => Number(c.id.slice(2)))")
    return [int(x) for x in found]


def choose(browser, name: str, value: str) -> None:
    code = f"const s = document.getElementById('{name}'); s.value = '{value}'; s.dispatchEvent(new Event('change'));"
    script(browser, code + "s.dispatchEvent(new Event('input'));")


@pytest.mark.parametrize("name", ["explain", "compare"])
def test_pages_open_with_nothing_in_the_console_and_names_stay_text(browser, pages, name):
    opened(browser, pages[name])
    assert quiet(browser)
    assert TAG in script(browser, "return document.body.innerText")
    assert (
        script(
            browser, "return performance.getEntriesByType('resource').filter((r) => !r.name.startsWith('data:')).length"
        )
        == 0
    )


def test_the_policy_refuses_what_is_not_ours(browser, pages):
    opened(browser, pages["explain"])
    script(
        browser,
        "const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
        "document.body.append(s); const i = new Image(); i.src = 'file:///etc/hostname'; document.body.append(i);",
    )
    assert script(browser, "return window.hit") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_sorting_and_filtering_do_what_they_say(browser, pages):
    opened(browser, pages["explain"])
    assert len(cards(browser)) == 8
    assert cards(browser)[0] == BLUE  # by CAR, the largest first
    choose(browser, "sort", "order")
    assert cards(browser) == list(range(8))
    choose(browser, "sort", "colour")
    assert set(cards(browser)[:3]) == {RED, SAME, BLUE}
    choose(browser, "show", "dead")
    assert DEAD in cards(browser)
    assert RED not in cards(browser)
    choose(browser, "show", "removed")
    assert cards(browser) == [SAME]
    choose(browser, "show", "twin")
    assert {RED, SAME} <= set(cards(browser))
    assert BLUE not in cards(browser)
    choose(browser, "show", "")
    choose(browser, "layer", "1")
    assert sorted(cards(browser)) == [5, 6, 7]
    choose(browser, "layer", "")
    choose(browser, "find", "blue")
    assert BLUE in cards(browser)
    assert "of 8 filters" in script(browser, "return document.getElementById('count').textContent")
    assert quiet(browser)


def test_a_twin_is_one_step_away(browser, pages):
    opened(browser, pages["explain"])
    script(browser, f"document.querySelector('#f-{RED} .pair button').click()")
    assert script(browser, "return document.activeElement.id") == f"f-{SAME}"
    assert "lit" in script(browser, f"return document.getElementById('f-{SAME}').className")


def test_the_keyboard_reaches_every_control(browser, pages):
    opened(browser, pages["explain"])
    tags = script(
        browser,
        "return [...document.querySelectorAll('#tools select, #tools input, #tools button, .card button, summary')]"
        ".every((e) => e.tabIndex >= 0)",
    )
    assert tags
    code = "return [...document.querySelectorAll('#tools select, #tools input')].every((e) => e.labels.length)"
    labelled = script(browser, code)
    assert labelled
    named = "(e) => e.getAttribute('aria-label') || e.ariaHidden"
    assert script(browser, f"return [...document.querySelectorAll('canvas, svg')].every({named})")


def test_patches_show_the_images(browser, pages):
    opened(browser, pages["explain"])
    choose(browser, "sort", "order")
    code = f"""
    const done = arguments[0];
    setTimeout(() => {{
      const canvas = document.querySelector('#f-{BLUE} canvas');
      const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      let red = 0, blue = 0;
      for (let i = 0; i < d.length; i += 4) if (d[i + 3]) {{ red += d[i]; blue += d[i + 2]; }}
      done([red, blue]);
    }}, 600);"""
    red, blue = browser.execute_async_script(code)
    assert red == 0
    assert blue > 1_000_000


def test_thousands_of_filters_stay_quick(browser, tmp_path):
    """5,000 filters with patches and class bars: only some are drawn, whatever the order."""
    from onnxcar.pages._html import render
    from onnxcar.pages._sheets import pack

    rng = np.random.default_rng(0)
    sheet = pack(list(rng.integers(0, 256, (9, 30, 30, 3), np.uint8)), 100_000)
    patches = [[0, *place] for place in sheet.places]
    bars = [[f"class {k}", 9, 0.1, -0.1, 0.3, 0.2, k == 0] for k in range(8)]
    rows = [
        {"l": i % 10, "i": i // 10, "v": float(rng.normal()), "r": 1, "k": i % 50, "c": 0.1, "w": [[0, 0.5]], "h": 0.5,
         "p": patches, "b": {"p": 0.1, "q": 0.1, "speaks": i % 7 == 0, "entries": bars}}
        for i in range(5000)
    ]  # fmt: skip
    layer = {
        "node": "conv", "before": 500, "after": 500, "dead": 0, "clusters": 50, "twin_distance": 0.5,
        "twin_distance_after": 0.5, "field": None,
    }  # fmt: skip
    facts = {
        "layers": [layer] * 10,
        "data": {"samples": 9, "path": "x"},
        "model": {"params": 1, "macs": 1},
        "base": {"value": 0.5, "correct": 1, "samples": 2},
        "reliability": None,
        "class_sets": [{"class": "class 0", "samples": 9}],
        "metric": "top1",
        "maximised": None,
        "similarity": "responses",
    }
    page = {"layers": [["conv", "conv", 500, 500, 50, None]] * 10, "images": ["an image"], "sheets": 1}
    text = render(
        "explanation.html", scripts=("explanation.js",), title="large", facts=facts, n_filters=5000, widest=500,
        rows=rows, page=page, sheets=sheet.uris,
    )  # fmt: skip
    path = tmp_path / "large.html"
    path.write_text(text, encoding="utf-8")
    opened(browser, path)
    assert 0 < len(cards(browser)) < 500
    choose(browser, "sort", "car-up")
    first = cards(browser)[0]
    assert rows[first]["v"] == min(row["v"] for row in rows)
    choose(browser, "show", "speaks")
    assert script(browser, "return document.getElementById('count').textContent") == "715 of 5000 filters"
    drawn = cards(browser)
    assert all(i % 7 == 0 for i in drawn)
    assert 0 < len(drawn) < 100
    assert script(browser, "return document.querySelectorAll('.card canvas').length") == len(drawn)
    assert quiet(browser)
    assert PATCHES == 9


def test_what_is_filtered_out_is_not_printed_and_no_control_is(browser, pages, tmp_path):
    import base64

    opened(browser, pages["explain"])
    choose(browser, "show", "dead")
    shown = cards(browser)
    print_media = {"media": "print"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", print_media)
    try:
        for control in ("tools", "more"):
            style = script(browser, f"return getComputedStyle(document.getElementById('{control}')).display")
            assert style == "none", control
        style = script(browser, "return getComputedStyle(document.querySelector('.card')).breakInside")
        assert style == "avoid"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
    assert cards(browser) == shown
    assert quiet(browser)


def test_a_screenshot_is_a_picture_of_the_page(browser, pages, tmp_path):
    from PIL import Image

    opened(browser, pages["explain"])
    shot = tmp_path / "shot.png"
    assert browser.save_screenshot(str(shot))
    image = Image.open(shot).convert("RGB")
    assert image.size[0] >= 1200
    assert len(image.getcolors(1 << 24)) > 50
