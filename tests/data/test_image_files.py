"""Image files of all kinds, and a person's picture of a digit as MNIST would have it."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cnnjax.data import digit_from_image, image_to_shape, mnist, read_image
from cnnjax.data.image_files import fit_image
from cnnjax.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return mnist.read()["test"].image[:40]


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def gradient(height=6, width=9):
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def test_modes(tmp_path):
    gray = gradient()
    path = saved(tmp_path, Image.fromarray(gray))
    assert (read_image(path) == gray[..., None]).all()
    color = np.stack([gray, gray + 50, gray + 100], axis=-1)
    assert (read_image(saved(tmp_path, Image.fromarray(color))) == color).all()
    alpha = np.concatenate([color, gray[..., None]], axis=-1)
    assert (read_image(saved(tmp_path, Image.fromarray(alpha))) == alpha).all()
    gray_alpha = np.stack([gray, gray + 7], axis=-1)
    read = read_image(saved(tmp_path, Image.fromarray(gray_alpha, "LA")))
    assert (read == gray_alpha[..., [0, 0, 0, 1]]).all()
    deep = gray.astype(np.uint16) * 257
    assert (read_image(saved(tmp_path, Image.fromarray(deep))) == gray[..., None]).all()
    bits = read_image(saved(tmp_path, Image.fromarray(gray > 20)))
    assert (bits == 255 * (gray > 20)[..., None]).all()
    palette = Image.fromarray(color).quantize(256)
    assert (read_image(saved(tmp_path, palette, "image.gif")) == color).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.fromarray(gradient()), "image.png", exif=exif)
    assert (read_image(path)[..., 0] == np.rot90(gradient(), -1)).all()


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"no image file '.*missing.png'"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="is a directory"):
        read_image(tmp_path)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text.png' is not an image"):
        read_image(tmp_path / "text.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty.png' is not an image"):
        read_image(tmp_path / "empty.png")
    for name in ("noise.png", "noise.jpg"):
        noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
        path = saved(tmp_path, Image.fromarray(noise), name)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=f"cannot decode image '.*{name}'"):
            read_image(path)


def test_too_many_pixels_are_refused_by_the_header(tmp_path):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"bomb.png"):
        read_image(path)
    path = saved(tmp_path, Image.fromarray(gradient(30, 40)))
    with pytest.raises(UserError, match="has 40 x 30 pixels, more than the 1,199"):
        read_image(path, max_pixels=1199)


def test_fit():
    image = gradient(4, 6)[..., None]
    padded = fit_image(image, (7, 7))
    assert (padded[1:5, 0:6] == image).all()
    assert padded.sum() == image.sum()
    # Twice too large: the aspect stays, and averages of 2x2 pixels remain.
    flat = np.repeat(np.repeat(np.array([[10, 90]], np.uint8), 4, 0), 4, 1)[..., None]
    shrunk = fit_image(flat, (4, 4))
    assert (shrunk[[0, 3]] == 0).all()
    assert (shrunk[1:3, 0] == 10).all() and (shrunk[1:3, 3] == 90).all()
    assert fit_image(flat, (3, 5), "resize").shape == (3, 5, 1)
    with pytest.raises(UserError, match="unknown fit 'cut'"):
        fit_image(image, (7, 7), "cut")


def test_channels():
    color = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    # ITU-R 601: red weighs 0.299.
    assert (image_to_shape(color, (2, 2, 1)) == 76).all()
    gray = np.full((2, 2, 1), 9, np.uint8)
    assert (image_to_shape(gray, (3, 3, 3)) == 9).all()
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (image_to_shape(clear, (2, 2, 3)) == 255).all()
    with pytest.raises(UserError, match="of 2 channels"):
        image_to_shape(gray, (2, 2, 2))


def on_paper(digit, *, inverse=False, light=1.0, noise=0.0, seed=0):
    """The digit, ten times as large, in blue ink on a wide sheet of cream paper; or chalk."""
    large = Image.fromarray(digit[..., 0]).resize((200, 200), Image.Resampling.BICUBIC)
    ink = np.zeros((240, 300, 1))
    ink[20:220, 75:275, 0] = np.asarray(large) / 255.0
    paper, pen = np.array([240.0, 235.0, 220.0]), np.array([20.0, 30.0, 90.0])
    if inverse:
        paper, pen = pen, paper
    shade = np.linspace(light, 1.0, 300)[None, :, None]
    grain = noise * np.random.default_rng(seed).standard_normal((240, 300, 3))
    return np.clip((paper * (1 - ink) + pen * ink) * shade + grain, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("style", "bound"),
    [
        ({}, 8.0),
        ({"inverse": True}, 8.0),
        ({"light": 0.6, "noise": 6.0}, 10.0),
        ({"inverse": True, "noise": 6.0}, 10.0),
    ],
)
def test_a_drawn_mnist_digit_comes_back(tmp_path, digits, style, bound):
    differences, strangers = [], []
    for index, digit in enumerate(digits):
        path = saved(tmp_path, Image.fromarray(on_paper(digit, **style)))
        found = digit_from_image(read_image(path)).astype(float)
        assert found.shape == (28, 28, 1)
        differences.append(np.abs(found - digit).mean())
        strangers.append(np.abs(found - digits[index - 1]).mean())
    # Of 255 gray levels; another digit differs by 40 on average.
    assert np.mean(differences) < bound and np.max(differences) < 3 * bound
    assert np.mean(strangers) > 30


def test_a_digit_of_mnist_hardly_changes(digits):
    differences = [np.abs(digit_from_image(digit) * 1.0 - digit).mean() for digit in digits]
    assert np.mean(differences) < 3.0


def test_transparent_drawings(digits):
    for level in (0, 255):
        drawing = np.full((28, 28, 4), level, np.uint8)
        drawing[..., 3] = digits[0][..., 0]
        found = digit_from_image(drawing).astype(float)
        assert np.abs(found - digits[0]).mean() < 3.0


def test_box_and_center_of_mass():
    picture = Image.new("L", (90, 160), 255)
    ImageDraw.Draw(picture).polygon([(10, 20), (30, 20), (50, 120), (10, 120)], fill=0)
    digit = digit_from_image(np.asarray(picture)[..., None])[..., 0].astype(float)
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    # The longer side fills 20 pixels, and the aspect of 41 to 101 is kept.
    assert np.ptp(rows) + 1 == 20
    assert np.ptp(columns) + 1 == round(20 * 41 / 101)
    center = [axis @ np.arange(28) / axis.sum() for axis in (digit.sum(1), digit.sum(0))]
    np.testing.assert_allclose(center, 14.0, atol=0.51)


def test_thin_strokes_are_thickened_and_specks_removed():
    picture = Image.new("L", (400, 400), 255)
    draw = ImageDraw.Draw(picture)
    draw.line([(200, 50), (200, 350)], fill=0, width=3)
    draw.line([(100, 350), (300, 350)], fill=0, width=3)
    clean = digit_from_image(np.asarray(picture)[..., None])
    # Three pixels of 300 would be a fifth of a pixel of 20.
    assert (clean.max(axis=1) > 200).all(axis=1).sum() >= 20
    middle = clean[10, :, 0].astype(float)
    assert 1.5 <= middle.sum() / 255 <= 4.0
    draw.point([(5, 5), (395, 10), (20, 390)], fill=0)
    assert (digit_from_image(np.asarray(picture)[..., None]) == clean).all()


def test_other_sizes(digits):
    assert digit_from_image(on_paper(digits[0]), size=32).shape == (32, 32, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (28, 28, 1), (200, 300, 3)])
def test_blank_pictures(shape):
    with pytest.raises(UserError, match=f"no digit found: .* {shape[1]} x {shape[0]} pixels"):
        digit_from_image(np.full(shape, 130, np.uint8))
