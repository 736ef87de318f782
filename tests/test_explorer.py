"""The explorer of docs/explorer.md in a headless Chromium: its numbers against Python's, its controls, bad photos."""

import base64
import gzip
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from helpers import missing
from svit.images import read_image
from svit.training.data import eval_transform
from svit.visualize import Association, WatchedLayer, borders, last_of_stages, mean_colours, watch

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "docs" / "explorer"
SAMPLES = ("chelsea", "coffee", "astronaut", "rocket", "hubble", "retina")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


def load(name: str):
    """A module of docs/explorer, which is no package."""
    spec = importlib.util.spec_from_file_location(f"explorer_{name}", SOURCES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright: pip install '.[dev]'")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing("Chromium: apt-get install chromium, or CHROMIUM=PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def site(browser, packages, tmp_path_factory) -> Path:
    """What `make docs` builds."""
    if shutil.which("npm") is None:
        missing("npm: apt-get install npm")
    for package in (
        "mkdocs",
        "material",
        "mkdocstrings_handlers.python",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "skimage",
    ):
        try:
            importlib.import_module(package)
        except ImportError:
            missing(f"{package}: pip install '.[docs,export]'")
    folder = tmp_path_factory.mktemp("site")
    for command in (
        [SOURCES / "build.py", packages],
        ["-m", "mkdocs", "build", "--strict", "--site-dir", folder],
    ):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(packages / "page", folder / "explorer", dirs_exist_ok=True)
    return folder


class Plain(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving(site: Path, handler=Plain):
    """The address of the page, in a folder below the server's root, as on GitHub Pages."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{site.name}/explorer.html"
        server.shutdown()


@pytest.fixture
def visit(browser, site):
    """Opens the page in a window of its own and waits for the classes; an error in the console fails the test."""
    problems = []
    with serving(site) as address, ExitStack() as stack:

        def visit(link: str = "", wait: bool = True, at: str = address, **options):
            options = {"viewport": {"width": 1280, "height": 1300}, **options}
            context = browser.new_context(**options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
            page.goto(at + link)
            if wait:
                page.wait_for_selector(".explorer[data-state=ready]")
            return page

        visit.problems = problems
        yield visit
    assert not problems


@pytest.fixture(scope="module")
def page(browser, site):
    """A page that tests share; each starts from a link of its own."""
    with serving(site) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1300})
        page.goto(address)
        page.wait_for_selector(".explorer[data-state=ready]")
        yield page
        page.close()


def follow(page, sample: str, size: int, rest: str = "") -> None:
    script = "link => { before = explorer.result; history.replaceState(null, '', '#'); location.hash = link; }"
    page.evaluate(script, f"#sample={sample}&size={size}{rest}")
    page.wait_for_function(f"explorer.result !== before && explorer.result.name === '{sample}'")
    assert page.evaluate("explorer.result.size") == size


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return timm.create_model("svit_nano.photos20", pretrained=True).eval()


@torch.no_grad()
def look(model: torch.nn.Module, file, size: int) -> tuple[torch.Tensor, torch.Tensor, list[WatchedLayer]]:
    """What Python sees: the pixels (size, size, 3) in 0 ... 255, the logits, the layers of both stages."""
    preprocessing = {**resolve_model_data_config(model), "input_size": (3, size, size)}
    image = eval_transform(preprocessing)(read_image(file))
    with watch(model) as layers:
        logits = model(image[None])[0]
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = ((image * std + mean) * 255).round().permute(1, 2, 0)
    return pixels, logits, list(last_of_stages(layers).values())[:2]


def upload(page, name: str, content: bytes) -> None:
    """Chooses a file and waits until the page has said something about it."""
    page.set_input_files("#explorer-file", {"name": name, "mimeType": "image/jpeg", "buffer": content})
    page.wait_for_function("name => document.querySelector('#explorer-status').textContent.includes(name)", arg=name)


def seen(page) -> torch.Tensor:
    """The pixels (size, size, 3) that the page's model sees."""
    values = page.evaluate("Array.from(explorer.result.pixels)")
    size = page.evaluate("explorer.result.size")
    return torch.tensor(values, dtype=torch.float32).reshape(size, size, 4)[..., :3]


def canvas(page) -> torch.Tensor:
    """The picture (height, width, 3)."""
    script = """() => { const c = document.querySelector('#explorer-picture');
        return c.toDataURL('image/png').split(',')[1]; }"""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(page.evaluate(script)))).convert("RGB")))


def numbers(page, expression: str) -> torch.Tensor:
    return torch.tensor(page.evaluate(f"Array.from({expression})"))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(("name", "size"), [*((name, 128) for name in SAMPLES), ("chelsea", 512)])
def test_samples(page, model, site, name, size):
    """Logits, association and attention of each sample are Python's, and so are the texts and the regions."""
    follow(page, name, size, "&x=0.3&y=0.6")
    pixels, logits, layers = look(model, site / "explorer" / "samples" / f"{name}.jpg", size)
    assert torch.equal(seen(page), pixels)
    torch.testing.assert_close(numbers(page, "explorer.result.logits"), logits, rtol=0, atol=1e-3)

    shares, best = logits.softmax(0).topk(5)
    names = [model.pretrained_cfg["label_names"][i].replace("_", " ") for i in best]
    found = [item.inner_text().split("\n") for item in page.locator("#explorer-classes li").all()]
    assert [name for name, _ in found] == names
    assert [float(share.rstrip(" %")) for _, share in found] == pytest.approx((100 * shares).tolist(), abs=0.6)
    assert re.match(rf"{size} x {size} pixels: the model took \d+ ms", page.inner_text("#explorer-time"))

    for number, layer in enumerate(layers, 1):
        page.check(f"input[name=explorer-stage][value='{number}']")
        expected = layer.association()
        check_stage(page, expected, layer, (0.3, 0.6))


def check_stage(page, expected: Association, layer: WatchedLayer, point: tuple[float, float]) -> None:
    (H, W), (h, w) = expected.size, expected.cell
    hh, ww = expected.q.shape[:2]
    q = expected.q.reshape(hh, ww, 9, h, w).permute(2, 0, 3, 1, 4).reshape(9, H, W)
    found = numbers(page, "explorer.look().found.q").reshape(9, H, W)
    torch.testing.assert_close(found, q, rtol=0, atol=1e-3)
    labels = numbers(page, "explorer.look().labels").reshape(H, W)
    assert (labels != expected.assignment()).float().mean() < 1e-3  # two shares may be equal but for rounding

    row, col = expected.owner(point)
    assert page.evaluate("explorer.look().token") == row * ww + col
    x, y = int(point[0] * W), int(point[1] * H)
    assert f"Pixel {x + 1}, {y + 1} of the {W} x {H} map" in page.inner_text("#explorer-point")
    assert f"row {row + 1}, column {col + 1} of {hh} x {ww}" in page.inner_text("#explorer-point")
    shown = [cell.inner_text() for cell in page.locator("#explorer-near td").all()]
    for k, text in enumerate(shown):
        if 0 <= y // h + k // 3 - 1 < hh and 0 <= x // w + k % 3 - 1 < ww:
            assert float(text.rstrip(" %")) == pytest.approx(100 * q[k, y, x].item(), abs=0.6)
        else:
            assert text == "-"
    attention = layer.attention(row, col).mean(0).flatten()
    torch.testing.assert_close(numbers(page, "explorer.look().attention"), attention, rtol=0, atol=1e-3)


def test_regions_of_any_shares(page):
    """As in svit.visualize, also where shares outside the grid are the largest."""
    q = torch.rand(3, 3, 9, 16, generator=torch.Generator().manual_seed(0)).softmax(2)  # 3 x 3 cells of 4 x 4 pixels
    expected = Association(q, (4, 4), (12, 12))
    script = """async q => {
        const {assignment, region} = await import(new URL('explorer/regions.js', location.href));
        const found = {q: Float32Array.from(q), side: 12, grid: 3};
        return [Array.from(assignment(found)), Array.from(region(found, 5))];
    }"""
    maps = q.reshape(3, 3, 9, 4, 4).permute(2, 0, 3, 1, 4)
    labels, region = page.evaluate(script, maps.flatten().tolist())
    assert torch.equal(torch.tensor(labels).reshape(12, 12), expected.assignment())
    torch.testing.assert_close(torch.tensor(region).reshape(12, 12), expected.weights(1, 2))


def test_picture(page, model, site):
    """What is drawn: cells, learned regions, mean colours, heat."""
    follow(page, "coffee", 128, "&x=0.1&y=0.1&shares=0&borders=0")
    pixels, _, (layer, _) = look(model, site / "explorer" / "samples" / "coffee.jpg", 128)
    found = layer.association()
    unit = 896 // 128
    middle = slice(unit // 2, None, unit)
    # The point and the outline of its super token lie in the upper left 3 x 3 cells, 96 pixels. Below them:
    below = (slice(100, 128), slice(0, 128))

    def drawn() -> torch.Tensor:
        return canvas(page)[middle, middle][below].float()

    assert torch.equal(drawn(), pixels[below])
    page.get_by_label("mean colours").check()
    expected = mean_colours(pixels, found.assignment())
    torch.testing.assert_close(drawn(), expected[below], rtol=0, atol=1)
    page.get_by_label("From cells to learned").fill("0")
    expected = mean_colours(pixels, found.cells())
    torch.testing.assert_close(drawn(), expected[below], rtol=0, atol=1)
    page.get_by_label("From cells to learned").fill("1")

    page.get_by_label("the soft region").check()
    row, col = found.owner((0.1, 0.1))
    grey, faint = pixels.mean(-1, keepdim=True).expand(-1, -1, 3), torch.tensor([0.0, 0.0, 4.0])
    assert found.weights(row, col)[25:].max() == 0  # outside the 3 x 3 cells around it
    torch.testing.assert_close(drawn(), (0.8 * grey + 0.2 * faint)[below], rtol=0, atol=1)
    page.get_by_label("looks at").check()
    attention = found.spread(layer.attention(row, col).mean(0))
    opacity = 0.2 + 0.6 * attention / attention.max()
    colour = heat(attention / attention.max())
    share, colour = (torch.repeat_interleave(torch.repeat_interleave(t, 4, 0), 4, 1) for t in (opacity, colour))
    expected = (1 - share[..., None]) * grey + share[..., None] * colour
    torch.testing.assert_close(drawn(), expected[below], rtol=0, atol=1.5)

    page.get_by_role("radio", name="the photo").check()
    page.get_by_label("borders of the regions").check()
    picture, yellow = canvas(page), torch.tensor([255, 236, 60])
    edges = borders(found.assignment())
    edges = edges[(edges[:, :, 1] > 24).all(1)]  # below the point's super token
    ends = (edges.float().mean(1) * 28).long()
    assert len(edges) > 20
    assert ((picture[ends[:, 1], ends[:, 0]].float() - yellow).abs().max(1)[0] < 90).float().mean() > 0.9


def heat(values: torch.Tensor) -> torch.Tensor:
    """The colour map of draw.js, (..., 3)."""
    text = re.search(r"HEAT = (\[.*?\]\]);", (SOURCES / "draw.js").read_text(), re.DOTALL)[1]
    stops = torch.tensor(json.loads(text), dtype=torch.float32)
    place = values * (len(stops) - 1)
    below = place.long().clamp(max=len(stops) - 2)
    return stops[below] + (place - below)[..., None] * (stops[below + 1] - stops[below])


@pytest.mark.parametrize(
    "size", [(1, 1), (33, 700), (131, 128), (128, 129), (20000, 1000), (301, 450), (450, 301), (4001, 3003)]
)
def test_pixels_are_those_of_pillow(page, model, size):
    """The resize is exact, smaller and larger, wide and high."""
    noise = np.random.default_rng(0).integers(0, 256, (min(size[1], 300), min(size[0], 300), 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)
    content = encoded(image, "PNG")
    follow(page, "retina", 128)
    upload(page, "noise.png", content)
    assert torch.equal(seen(page), look(model, io.BytesIO(content), 128)[0])
    assert f"noise.png, {size[0]} x {size[1]} pixels" in page.inner_text("#explorer-status")


def photo(site: Path) -> Image.Image:
    return read_image(site / "explorer" / "samples" / "rocket.jpg")


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("kind", ["cmyk", "orientation 6", "orientation 3", "progressive", "webp", "grey", "palette"])
def test_kinds_of_photos(page, model, site, kind):
    """They are read as Python reads them."""
    image, options, form = photo(site), {}, "JPEG"
    if kind == "cmyk":
        image = image.convert("CMYK")
    elif kind.startswith("orientation"):
        options["exif"] = exif(int(kind[-1]))
    elif kind == "progressive":
        options["progressive"] = True
    elif kind == "webp":
        form = "WEBP"
    else:
        image, form = image.convert("L" if kind == "grey" else "P"), "PNG"
    content = encoded(image, form, **options)
    follow(page, "retina", 256)
    upload(page, "my photo.jpg", content)
    pixels, logits, _ = look(model, io.BytesIO(content), 256)
    torch.testing.assert_close(seen(page), pixels, rtol=0, atol=2)
    torch.testing.assert_close(numbers(page, "explorer.result.logits"), logits, rtol=0, atol=1e-3)
    width, height = (427, 640) if kind == "orientation 6" else (640, 427)
    expected = f"my photo.jpg, {width} x {height} pixels: the model sees the square in the centre."
    assert page.inner_text("#explorer-status") == expected


def test_bad_photos(page, site):
    """A message names the file; the picture stays, and the next photo is shown."""
    follow(page, "retina", 128)
    jpeg = encoded(photo(site), "JPEG")
    unreadable = "the browser cannot read it as an image; expected a photo, such as a JPEG, PNG or WebP file"
    for name, content, message in (
        ("notes.txt", b"not an image", unreadable),
        ("empty.jpg", b"", unreadable),
        ("cut short.jpg", jpeg[: len(jpeg) // 2], unreadable),
        ("large.png", encoded(Image.new("1", (20000, 10000)), "PNG"),
         "has 20000 x 10000 pixels, 200 million; expected at most 179 million"),
    ):  # fmt: skip
        upload(page, name, content)
        assert page.inner_text("#explorer-status") == f"{name}: {message}"
        assert page.locator("#explorer-status").evaluate("e => e.classList.contains('explorer-error')")
        assert page.evaluate("explorer.result.name") == "retina"
    upload(page, "good.jpg", jpeg)
    assert page.evaluate("explorer.result.name") == "good.jpg"
    assert not page.locator("#explorer-status").evaluate("e => e.classList.contains('explorer-error')")


def test_drop_and_paste(page, site):
    follow(page, "retina", 128)
    content = list(encoded(photo(site), "PNG"))
    for name, event in (("dropped.png", "DragEvent('drop', {dataTransfer: t, bubbles: true})"),
                        ("pasted.png", "ClipboardEvent('paste', {clipboardData: t, bubbles: true})")):  # fmt: skip
        page.evaluate(
            f"""([name, bytes]) => {{
                const t = new DataTransfer();
                t.items.add(new File([new Uint8Array(bytes)], name, {{type: 'image/png'}}));
                document.querySelector('.explorer').dispatchEvent(new {event});
            }}""",
            [name, content],
        )
        page.wait_for_function("name => explorer.result.name === name", arg=name)
    assert page.evaluate("explorer.result.width") == 640


def test_pointer_and_keys(page):
    follow(page, "retina", 128)
    picture = page.locator("#explorer-picture")
    box = picture.bounding_box()

    def place() -> list[int]:
        return page.evaluate("[explorer.look().x, explorer.look().y]")

    def move(x: float, y: float) -> None:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])

    move(0.51, 0.26)
    assert place() == [16, 8]
    page.mouse.down()  # holds the point
    page.mouse.up()
    move(0.9, 0.9)
    assert place() == [16, 8]
    page.mouse.down()
    page.mouse.up()
    assert place() == [28, 28]
    move(0.01, 0.99)
    assert place() == [0, 31]

    picture.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)  # ArrowDown stops at the border
    assert place() == [1, 31]
    assert page.inner_text("#explorer-point").startswith("Pixel 2, 32 of the 32 x 32 map.")


def test_keyboard_and_names(visit):
    """Everything has a name for screen readers, and can be reached by the Tab key."""
    page = visit("#size=128")
    for role, name in (
        ("button", "Sample: a cup of coffee"),
        ("button", "Camera"),
        ("button", "Copy a link"),
        ("button", "Save the picture"),
        ("application", "The photo. Arrow keys move the point."),
        ("radio", "2, later"),
        ("radio", "what the super token looks at"),
        ("checkbox", "borders of the regions"),
        ("slider", "Image size"),
        ("table", "Shares of the pixel"),
    ):
        assert page.get_by_role(role, name=name).count() == 1, name
    assert page.get_by_label("Choose a photo").count() == 1

    page.get_by_role("button", name="Sample: a cat").focus()
    reached = []
    for _ in range(18):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || 'sample'"))
        page.keyboard.press("Tab")
    assert list(dict.fromkeys(reached)) == [
        "sample",
        *(f"explorer-{name}" for name in ("file", "camera", "picture", "stage", "view", "borders", "shares", "way")),
        *(f"explorer-{name}" for name in ("size", "link", "save")),
    ]  # fmt: skip


def test_link_and_picture(visit):
    """A link reproduces the view, and the saved picture is the one on the page."""
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Sample: a rocket").click()
    page.wait_for_function("explorer.result.name === 'rocket'")
    page.get_by_label("2, later").check()
    page.get_by_label("looks at").check()
    page.get_by_label("From cells to learned").fill("0.6")
    page.get_by_label("Image size").fill("320")
    page.get_by_label("borders of the regions").uncheck()
    page.locator("#explorer-picture").click(position={"x": 100, "y": 300})
    page.wait_for_function("explorer.result.size === 320")
    page.get_by_role("button", name="Copy a link").click()
    page.wait_for_function("document.querySelector('#explorer-status').textContent === 'The link is copied.'")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    expected = dict(sample="rocket", size=320, stage=2, view="attention", way=0.6, borders=False, shares=True)
    state = page.evaluate("explorer.state")
    assert {key: state[key] for key in expected} == expected

    other = visit(at=link)
    assert other.evaluate("explorer.state") == state
    assert torch.equal(canvas(other), canvas(page))

    with page.expect_download() as download:
        page.get_by_role("button", name="Save the picture").click()
    assert download.value.suggested_filename == "super-tokens-rocket.png"
    saved = torch.from_numpy(np.array(Image.open(download.value.path()).convert("RGB")))
    assert torch.equal(saved, canvas(page))


def test_wrong_links(visit):
    """What a link says wrongly is as usual."""
    usual = visit().evaluate("explorer.state")
    wrong = visit("#sample=../x&size=130&stage=3&view=none&way=2&x=&y=nan&other=1")
    assert wrong.evaluate("explorer.state") == usual


def test_sample_that_does_not_exist(visit):
    page = visit("#sample=none", wait=False)
    page.wait_for_selector(".explorer-error")
    assert page.inner_text("#explorer-status") == "none: the sample does not load (404 File not found)"
    page.get_by_role("button", name="Sample: a rocket").click()
    page.wait_for_function("explorer.result?.name === 'rocket'")
    assert len(visit.problems) == 1  # Chromium's own line about the 404
    visit.problems.clear()


def test_model_that_does_not_load(browser, site):
    with serving(site) as address:
        context = browser.new_context()
        context.route("**/model.onnx", lambda route: route.fulfill(status=404))
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector(".explorer-error")
        expected = f"The model does not load: {address.replace('explorer.html', 'explorer/model.onnx')}: 404 Not Found"
        assert page.inner_text("#explorer-status") == expected
        context.close()


def test_camera(visit):
    """Frame after frame, until the button is pressed again or a photo is chosen."""
    page = visit("#size=128")
    button = page.get_by_role("button", name="Camera")
    for stop in (button, page.get_by_role("button", name="Sample: a rocket")):
        button.click()
        page.wait_for_function("explorer.result.name === 'camera'")
        first = seen(page)
        page.evaluate("before = explorer.result")
        page.wait_for_function("explorer.result !== before")
        assert button.get_attribute("aria-pressed") == "true"
        assert first.std() > 10
        stop.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert page.evaluate("document.querySelector('#explorer-video').srcObject") is None
    page.wait_for_function("explorer.result.name === 'rocket'")


def test_a_camera_that_was_stopped_is_seen_at_another_size(visit):
    page = visit("#size=128")
    button = page.get_by_role("button", name="Camera")
    button.click()
    page.wait_for_function("explorer.result.name === 'camera'")
    button.click()
    page.locator("#explorer-size").fill("192")
    page.wait_for_function("explorer.result.name === 'camera' && explorer.result.size === 192")
    assert page.locator(".explorer-error").count() == 0


def test_a_camera_that_comes_too_late_is_let_go(visit):
    """While the browser asks, the visitor presses again, or chooses a sample."""
    page = visit("#size=128")
    page.evaluate(
        """() => {
        const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        [window.streams, window.answers] = [[], []];
        navigator.mediaDevices.getUserMedia = async (what) => {
            await new Promise((resolve) => answers.push(resolve));
            streams.push(await ask(what));
            return streams.at(-1);
        };
    }"""
    )
    button = page.get_by_role("button", name="Camera")
    button.click()
    button.click()
    page.get_by_role("button", name="Sample: a rocket").click()
    page.wait_for_function("explorer.result.name === 'rocket'")
    page.evaluate("answers.forEach((answer) => answer())")
    page.wait_for_function("streams.length === 2")
    page.wait_for_function("streams.flatMap((s) => s.getTracks()).every((track) => track.readyState === 'ended')")
    assert page.evaluate("document.querySelector('#explorer-video').srcObject") is None
    assert page.evaluate("explorer.result.name") == "rocket"


def test_a_page_without_https_says_so(visit):
    page = visit("#size=128")
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    page.get_by_role("button", name="Camera").click()
    page.wait_for_selector(".explorer-error")
    expected = "The camera does not start: this page has no access, which takes https"
    assert page.inner_text("#explorer-status") == expected


def test_another_size_while_a_photo_loads(visit):
    page = visit("#size=128")
    held = []
    page.route("**/samples/rocket.jpg", lambda route: held.append(route))
    page.get_by_role("button", name="Sample: a rocket").click()
    page.locator("#explorer-size").fill("192")
    page.wait_for_timeout(300)
    for route in held:
        route.continue_()
    page.wait_for_function("explorer.result.name === 'rocket' && explorer.result.size === 192")


def test_a_link_to_a_heading_leaves_the_photo(visit):
    page = visit("#limits")
    page.wait_for_timeout(400)
    assert page.evaluate("location.hash") == "#limits"
    upload(page, "mine.jpg", (ROOT / "docs/images/bccd.webp").read_bytes())
    page.wait_for_function("explorer.result.name === 'mine.jpg'")
    page.evaluate("location.hash = '#data'")
    page.wait_for_timeout(400)
    assert page.evaluate("location.hash") == "#data"
    assert page.evaluate("explorer.result.name") == "mine.jpg"


def test_keys_and_buttons_of_the_browser_are_left_to_it(visit):
    page = visit("#size=128")
    page.locator("#explorer-picture").focus()
    before = page.evaluate("({...explorer.state})")
    for key in ("Control+ArrowLeft", "Meta+ArrowUp"):
        page.keyboard.press(key)
    assert page.evaluate("explorer.state") == before
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("explorer.state.x") < before["x"]
    page.locator("#explorer-picture").click(button="right")
    assert page.locator(".explorer-held").count() == 0
    page.locator("#explorer-picture").click()
    assert page.locator(".explorer-held").count() == 1


def test_a_program_that_does_not_load(browser, site):
    with serving(site) as address:
        context = browser.new_context()
        context.route("**/worker.js", lambda route: route.abort())
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector(".explorer-error")
        status = page.locator("#explorer-status")
        assert status.inner_text().startswith("The model's program does not load. Reload the page")
        status.evaluate("element => { element.textContent = ''; }")
        page.get_by_role("button", name="Sample: a rocket").click()
        assert status.inner_text().startswith("The model's program does not load. Reload the page")
        context.close()


def test_no_camera(visit):
    page = visit("#size=128")
    page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = async () => { throw new Error('Permission denied'); }; }"
    )
    page.get_by_role("button", name="Camera").click()
    page.wait_for_selector(".explorer-error")
    assert page.inner_text("#explorer-status") == "The camera does not start: Permission denied"


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_widths_and_themes(visit, width, scheme):
    """Nothing is wider than the window, and text stands out from what is behind it."""
    page = visit("#size=128", viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 1000)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    box = page.locator("#explorer-picture").bounding_box()
    assert box["width"] == pytest.approx(box["height"], abs=1)
    assert width < 1000 or box["width"] > 600
    for selector in ("#explorer-point", "#explorer-classes li span", ".explorer button", ".explorer label"):
        assert contrast(page, selector) > 4.5, selector
    if width < 1000:
        page.touchscreen.tap(box["x"] + 0.7 * box["width"], box["y"] + 0.8 * box["height"])
        assert page.evaluate("[explorer.look().x, explorer.look().y]") == [22, 25]


def contrast(page, selector: str) -> float:
    """Of text to the page behind it, as WCAG defines it."""
    script = "([selector, property]) => getComputedStyle(document.querySelector(selector))[property]"
    text, behind = (page.evaluate(script, of) for of in ([selector, "color"], ["body", "backgroundColor"]))

    def values(colour: str) -> tuple[np.ndarray, float]:
        parts = [float(part) for part in re.findall(r"[\d.]+", colour)]
        return np.array(parts[:3]) / 255, parts[3] if len(parts) > 3 else 1.0

    def luminance(rgb: np.ndarray) -> float:
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    (front, opacity), (back, _) = values(text), values(behind)
    light, dark = sorted((luminance(opacity * front + (1 - opacity) * back), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_threads(visit, site, model):
    """With the headers of `make explorer` the model runs in threads, with the same numbers."""
    with serving(site, load("serve").Handler) as address:
        page = visit("#sample=coffee&size=128", at=address)
        assert page.evaluate("crossOriginIsolated")
        _, logits, _ = look(model, site / "explorer" / "samples" / "coffee.jpg", 128)
        torch.testing.assert_close(numbers(page, "explorer.result.logits"), logits, rtol=0, atol=1e-3)


def test_download_size(site):
    """Less than 12 MB compressed."""
    files = [file for file in (site / "explorer").rglob("*") if file.is_file()]
    assert len(files) > 12
    assert sum(len(gzip.compress(file.read_bytes(), 6)) for file in files) < 12e6
    assert not [file for file in files if file.suffix in (".py", ".md") or file.name.startswith("package")]


def test_types(site, packages):
    """tsc finds no error in the JavaScript, whose types stand in comments."""
    for file in (*SOURCES.glob("*.js"), SOURCES / "tsconfig.json"):
        shutil.copy(file, packages)
    done = subprocess.run(["npx", "tsc", "--project", "."], cwd=packages, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_build_without_npm(monkeypatch, tmp_path):
    try:
        build = load("build")
    except ImportError as error:
        missing(str(error))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="explorer: needs npm, which comes with Node.js"):
        build.build(tmp_path)
