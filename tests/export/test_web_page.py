"""The page that runs a network in a browser: its files, its images, its answers, its errors."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

from cnnjax import convert, data, export, models
from cnnjax.commands import convert as convert_command
from cnnjax.commands import export as command
from cnnjax.data import image_to_shape
from cnnjax.data.image_files import parse_fit
from cnnjax.errors import UserError
from cnnjax.export import web
from tests.export import browser

NODE = shutil.which("node")
PREPARE = Path(web.PAGE) / "prepare.js"
RUNTIME = Path(
    os.environ.get("CNNJAX_ONNXRUNTIME_WEB")
    or Path(os.environ.get("HOME", "/")) / ".cache" / "cnnjax" / web.ARCHIVE
)
needs_browser = pytest.mark.skipif(
    not (browser.PROGRAM and RUNTIME.exists()), reason=f"needs Chromium and {web.ARCHIVE}"
)


def rgba(image):
    """Gray or RGB pixels as a canvas has them."""
    image = np.asarray(image, np.uint8)
    image = image[..., None] if image.ndim == 2 else image
    image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    opaque = np.full((*image.shape[:2], 1), 255, np.uint8)
    return np.concatenate([image, opaque], axis=-1) if image.shape[-1] == 3 else image


def drawn(points, width=20, size=280):
    picture = Image.new("L", (size, size), 255)
    ImageDraw.Draw(picture).line(points, fill=0, width=width, joint="curve")
    return rgba(picture)


def pictures():
    """Drawings and photographs of digits: large, small, thin, noisy, unevenly lit, transparent."""
    generator = np.random.default_rng(0)
    image = data.load("mnist").test.image[:8, :, :, 0]
    found = [drawn([(60, 50), (210, 60), (120, 240)], width=width) for width in (2, 9, 24)]
    for number, (height, width) in enumerate([(60, 61), (131, 90), (212, 264), (28, 28)]):
        large = Image.fromarray(255 - image[number]).resize((width, height))
        noise = generator.normal(0, 6, (height, width)) + np.linspace(0, 50, width)
        found.append(rgba(np.clip(np.asarray(large) * 0.7 + noise, 0, 255)))
    clear = rgba(image[4])
    clear[..., 3] = image[4]
    return [*found, rgba(image[5]), clear]


def in_node(expression, given):
    program = f"const prepare = require({json.dumps(str(PREPARE))});"
    program += "const given = JSON.parse(require('fs').readFileSync(0));"
    program += "const pixels = (p) => ({...p, data: Uint8ClampedArray.from(p.data)});"
    program += f"console.log(JSON.stringify({expression}));"
    done = subprocess.run(
        [NODE, "-e", program], input=json.dumps(given), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def as_pixels(image):
    return {"height": image.shape[0], "width": image.shape[1], "data": image.ravel().tolist()}


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_digits_are_prepared_as_in_python():
    given = pictures()
    expression = "given.map((p) => Array.from(prepare.digit(pixels(p)).data))"
    found = in_node(expression, [as_pixels(image) for image in given])
    for image, bytes_ in zip(given, found, strict=True):
        wanted = data.digit_from_image(image)
        # Last bits of sums decide which pixels of the border count.
        assert np.abs(np.reshape(bytes_, (28, 28, 1)) - wanted.astype(int)).max() <= 3
        assert np.mean(np.reshape(bytes_, (28, 28, 1)) == wanted) > 0.99
    blank = rgba(np.full((30, 30), 200))
    assert in_node("prepare.digit(pixels(given))", as_pixels(blank)) is None
    with pytest.raises(UserError, match="no digit found"):
        data.digit_from_image(blank)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_images_are_brought_to_size_as_in_python():
    generator = np.random.default_rng(1)
    cases = []
    for fit in (
        *("pad", "resize", "crop", "crop:0.9", "center(resize=40, interpolation=bicubic)"),
        *("center(resize=36, interpolation=lanczos)", "center(resize=40, interpolation=nearest)"),
    ):
        for shape, channels in (((53, 71, 4), 3), ((21, 90, 4), 1), ((32, 36, 3), 3)):
            cases.append((fit, channels, rgba(generator.integers(0, 256, shape))))
    given = [
        {"pixels": as_pixels(image), "shape": [32, 36, channels], "fit": fit_of(fit)}
        for fit, channels, image in cases
    ]
    expression = (
        "given.map((g) => Array.from(prepare.image(pixels(g.pixels), g.shape, 'image', g.fit)))"
    )
    for (fit, channels, image), bytes_ in zip(cases, in_node(expression, given), strict=True):
        wanted = image_to_shape(image, (32, 36, channels), fit=fit)
        np.testing.assert_array_equal(np.reshape(bytes_, wanted.shape), wanted, err_msg=fit)


def fit_of(fit):
    kind, how = parse_fit(fit)
    return {"kind": kind, **(dataclasses.asdict(how) if kind == "center" else {"share": how})}


def network(shape, num_classes=10, **fields):
    """Returns a random network of images as they are stored, its variables and its signature."""
    model = models.create("cnn_32_64", num_classes=num_classes, widths=(3, 4), **fields)
    image = jnp.zeros((1, *shape))
    variables = model.init(jax.random.key(0), image, train=False)
    # Far from even probabilities.
    variables = jax.tree.map(lambda leaf: 3 * leaf, variables)
    forward = export.forward_of(model, lambda image: image.astype(jnp.float32) / 255 - 0.2)
    return forward, variables, export.Signature(shape, "uint8")


def written(folder, shape=(28, 28, 1), num_classes=10, runtime="", **said):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    forward, variables, signature = network(shape, num_classes)
    names = [f"class {number}" for number in range(max(2, num_classes))]
    metadata = {"run": "a <run>", "model": "cnn", "class_names": names, "fit": "pad"} | said
    web.write(folder, forward, variables, signature, metadata=metadata, runtime=str(runtime))
    return forward, variables


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder in place of the runtime's, whose content counts as known."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    for name in web.SHA256:
        (folder / "dist" / name).write_bytes(name.encode() * 3)
    digests = {name: hashlib.sha256(name.encode() * 3).hexdigest() for name in web.SHA256}
    monkeypatch.setattr(web, "SHA256", digests)
    return folder


def test_a_page_holds_all_that_it_names_and_fetches_nothing(stand_in, tmp_path):
    page = tmp_path / "page"
    forward, variables = written(page, runtime=stand_in, prepare="digit")
    text = (page / "index.html").read_text()
    named = re.findall(r'(?:src|href)="(.*?)"', text)
    assert len(named) == 7
    for name in named:
        assert (page / name).is_file(), name
    for name in ("index.html", "page.js", "prepare.js", "style.css"):
        content = (page / name).read_text()
        assert not re.search(r"https?://|fetch\(|XMLHttpRequest|url\(", content), name
    # What it was written of is what it holds.
    run = export.opened(page, "web")
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    np.testing.assert_allclose(run(images), forward(variables, images), rtol=1e-4, atol=1e-4)
    assert json.loads(export.runtimes.about(page, "web")["class_names"])[9] == "class 9"
    assert web.is_page(page) and not web.is_page(stand_in)
    written(page, runtime=stand_in)


@pytest.mark.slow
def test_the_command_writes_the_page_of_a_run(stand_in, tmp_path, capsys):
    lenet = models.create("lenet5", num_classes=10)
    table = convert.entries(lenet, (28, 28, 1), convert.find_names(lenet, "pytorch"))
    draw = np.random.default_rng(0).normal
    arrays = {entry.name: 0.1 * draw(size=entry.their_shape).astype("f") for entry in table}
    convert.write(tmp_path / "weights.npz", arrays)
    run, page = tmp_path / "lenet", tmp_path / "page"
    convert_command.main(convert_command.Config(tmp_path / "weights.npz", run, model="lenet5"))
    card = json.loads((run / "model.json").read_text())
    for dataset, prepare in ((None, "image"), ("mnist", "digit")):
        (run / "model.json").write_text(json.dumps(card | {"dataset": dataset}))
        flags = {"run": str(run), "out": page, "format": "web", "runtime": str(stand_in)}
        assert command.main(command.Config(**flags, check=8)) == 0
        said = json.loads((page / "model.js").read_text().partition(" = ")[2].rstrip(";\n"))
        assert (said["title"], said["prepare"]) == ("lenet: lenet5", prepare)
        assert (len(said["class_names"]), said["image_shape"]) == (10, [28, 28, 1])
    assert f"written   {page}" in capsys.readouterr().out


def test_the_runtime_is_read_of_archives_and_folders_and_verified(stand_in, tmp_path, monkeypatch):
    archive = tmp_path / web.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(stand_in / "dist", "package/dist")
    assert web.find_runtime(str(archive)) == web.find_runtime(str(stand_in))
    assert web.find_runtime(str(stand_in / "dist")) == web.find_runtime(str(stand_in))
    cache = tmp_path / "cache"
    (cache / "cnnjax").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    shutil.copy(archive, cache / "cnnjax" / web.ARCHIVE)
    assert web.find_runtime() == web.find_runtime(str(archive))

    (stand_in / "dist" / web.WASM).write_bytes(b"other")
    with pytest.raises(UserError, match=r"threaded.wasm of .* is not that of onnxruntime-web 1"):
        web.find_runtime(str(stand_in))
    (stand_in / "dist" / web.WASM).unlink()
    with pytest.raises(UserError, match=r"has no ort-wasm-simd-threaded\.wasm"):
        web.find_runtime(str(stand_in))
    archive.write_bytes(b"no archive")
    with pytest.raises(UserError, match="is no archive of onnxruntime-web"):
        web.find_runtime(str(archive))
    with pytest.raises(UserError, match="no such file or folder; run npm pack"):
        web.find_runtime(str(tmp_path / "nowhere"))


def test_without_npm_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    remedy = "run npm pack onnxruntime-web@1.30.0, and give --runtime onnxruntime-web-1.30.0.tgz"
    with pytest.raises(UserError, match="npm, which fetches it, is not installed") as error:
        web.find_runtime()
    assert remedy in str(error.value)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(UserError, match=r"npm could not fetch .* \(no network\)") as error:
        web.find_runtime()
    assert remedy in str(error.value)


def test_a_folder_of_other_files_and_other_images_are_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "mine.txt").write_text("mine")
    flags = {"run": "none", "out": tmp_path, "format": "web"}
    with pytest.raises(UserError, match="holds other files; name a new folder"):
        command.main(command.Config(**flags))
    with pytest.raises(UserError, match="--preprocess none: a page prepares images"):
        command.main(command.Config(**flags, preprocess="none"))
    with pytest.raises(UserError, match="--batch 4: a page has one image at a time"):
        command.main(command.Config(**flags, batch=4))
    with pytest.raises(UserError, match=r"model\.js"):
        web.read_onnx(tmp_path)


@pytest.mark.slow
@needs_browser
def test_a_digit_is_written_and_answered_as_in_python(tmp_path):
    page = tmp_path / "page"
    forward, variables = written(page, runtime=RUNTIME, prepare="digit")
    with browser.opened_browser(tmp_path / "profile") as tab:
        tab.open(page / "index.html", "globalThis.cnnjaxReady")
        assert tab.value("document.title") == "a <run>: cnn"
        box = tab.value("{const b = paper.getBoundingClientRect(); [b.left, b.top, b.width]}")
        place = lambda x, y: (box[0] + x * box[2], box[1] + y * box[2])  # noqa: E731
        tab.stroke([place(0.3, 0.2), place(0.5, 0.21), place(0.7, 0.22), place(0.4, 0.8)])
        tab.wait("globalThis.cnnjaxAnswer && !running && !again")
        answer = tab.value("cnnjaxAnswer")
        picture = base64.b64decode(tab.value("paper.toDataURL()").partition(",")[2])
        shares = tab.value("[...document.querySelectorAll('.share')].map((e) => e.textContent)")
        best = tab.value("document.querySelector('#bars .best .name').textContent")

        image = data.digit_from_image(np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA")))
        np.testing.assert_array_equal(np.reshape(answer["bytes"], (28, 28, 1)), image)
        wanted = np.asarray(jax.nn.softmax(forward(variables, image[None])))[0]
        np.testing.assert_allclose(answer["probabilities"], wanted, atol=1e-5)
        assert best == f"class {wanted.argmax()}"
        assert shares[wanted.argmax()] == f"{100 * wanted.max():.1f}%"

        tab.value("document.getElementById('clear').click()")
        assert tab.value("cnnjaxAnswer") is None
        # A finger.
        tab.value(
            "for (const [kind, x] of [['down', 60], ['move', 90], ['up', 90]]) paper.dispatchEvent("
            "new PointerEvent('pointer' + kind, {pointerType: 'touch', pointerId: 7, button: 0,"
            "clientX: paper.getBoundingClientRect().left + x,"
            "clientY: paper.getBoundingClientRect().top + 2 * x}))"
        )
        tab.wait("globalThis.cnnjaxAnswer")
        # On a phone nothing is wider than the screen.
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True},
        )
        assert tab.value("document.documentElement.scrollWidth") <= 320
        assert not [event for event in tab.events if event["method"] == "Runtime.exceptionThrown"]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("num_classes", "channels"), [(12, 3), (1, 1)])
def test_an_image_is_read_and_answered_as_in_python(tmp_path, num_classes, channels):
    page, shape = tmp_path / "page", (30, 32, channels)
    forward, variables = written(page, shape, num_classes, RUNTIME, fit="crop")
    generator = np.random.default_rng(2)
    noise = Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8)).resize((70, 50))
    noise.save(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("no image")
    with browser.opened_browser(tmp_path / "profile") as tab:
        tab.open(page / "index.html", "globalThis.cnnjaxReady")
        root = tab.call("DOM.getDocument")["root"]["nodeId"]
        file = tab.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        tab.call("DOM.setFileInputFiles", files=[str(tmp_path / "photo.png")], nodeId=file)
        tab.wait("globalThis.cnnjaxAnswer")
        answer = tab.value("cnnjaxAnswer")
        image = image_to_shape(np.asarray(noise), shape, fit="crop")
        np.testing.assert_array_equal(np.reshape(answer["bytes"], shape), image)
        logits = forward(variables, image[None])
        wanted = jax.nn.softmax(logits) if num_classes > 1 else jax.nn.sigmoid(logits)
        found = answer["probabilities"] if num_classes > 1 else answer["probabilities"][1:]
        np.testing.assert_allclose(found, np.asarray(wanted)[0], atol=1e-5)
        assert tab.value("document.querySelectorAll('#bars li').length") == min(
            10, max(2, num_classes)
        )
        starts = (
            "[...document.querySelectorAll('.track')].map((e) => e.getBoundingClientRect().left)"
        )
        assert len(set(tab.value(starts))) == 1
        tab.call("DOM.setFileInputFiles", files=[str(tmp_path / "notes.txt")], nodeId=file)
        tab.wait("document.querySelector('#answer.bad')")
        assert "notes.txt is no image" in tab.value("find('answer').textContent")
