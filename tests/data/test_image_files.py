"""Image files of all kinds, and a person's picture of a digit as MNIST would have it."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cnnjax.data import digit_from_image, image_to_shape, mnist, read_image
from cnnjax.data.image_files import fit_image, open_image, upright_size
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


def png_chunks(path):
    """The chunks of a PNG file, `(kind, whole bytes)` each."""
    content, found = path.read_bytes(), []
    start = 8
    while start < len(content):
        (length,) = struct.unpack(">I", content[start : start + 4])
        found.append((content[start + 4 : start + 8], content[start : start + 12 + length]))
        start += 12 + length
    return found


def png_chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def raw_png(path, depth, color, width, rows, *, clear):
    """A PNG file of these rows of bytes, with a tRNS chunk."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", pixels), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts))
    return path


# (bits, PNG's color type, two pixels of which the first is transparent, tRNS): every kind but
# palettes and those with an alpha channel.
CLEAR = [
    (1, 0, b"\x40", b"\0\0"),
    (2, 0, b"\x70", b"\0\1"),
    (4, 0, b"\x35", b"\0\3"),
    (8, 0, b"\x09\x0a", b"\0\x09"),
    (16, 0, b"\x12\x34\x12\x35", b"\x12\x34"),
    (8, 2, b"\1\2\3\1\2\4", b"\0\1\0\2\0\3"),
    (16, 2, b"\1\1\2\2\3\3\1\1\2\2\4\4", b"\1\1\2\2\3\3"),
]


@pytest.mark.parametrize(
    ("bits", "color", "row", "clear"),
    CLEAR,
    ids=[f"{bits}-{'RGB' if color else 'L'}" for bits, color, *_ in CLEAR],
)
def test_a_transparent_color_is_transparent_in_every_type(tmp_path, bits, color, row, clear):
    image = read_image(raw_png(tmp_path / "clear.png", bits, color, 2, [row], clear=clear))
    assert image[0, :, 3].tolist() == [0, 255]
    # As of RGBA files, the corner is white; the other pixel is what it is.
    shown = image_to_shape(image, (1, 2, 3))
    assert (shown[0, 0] == 255).all() and (shown[0, 1] == image[0, 1, :3]).all()


def test_transparency_of_palettes_and_channels_is_laid_over_white(tmp_path):
    gray = np.array([[0, 200]], np.uint8)
    palette = Image.fromarray(gray).convert("P")
    layers = {
        "palette.png": (palette, {"transparency": 0}),
        "alphas.png": (palette, {"transparency": bytes([0, *[255] * 255])}),
        "palette.gif": (palette, {"transparency": 0}),
        "la.png": (Image.merge("LA", [Image.fromarray(gray), Image.fromarray(gray)]), {}),
        "rgba.webp": (
            Image.merge("RGBA", [Image.fromarray(each) for each in (gray, gray, gray, gray)]),
            {"lossless": True},
        ),
    }
    for name, (image, options) in layers.items():
        shown = image_to_shape(read_image(saved(tmp_path, image, name, **options)), (1, 2, 3))
        assert (shown[0, 0] == 255).all(), name


def turned(path, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(path, exif=exif, **options)
    return path


def late_exif(path):
    """Moves the EXIF of a PNG file behind its pixels, as the format allows."""
    chunks = png_chunks(path)
    exif = [each for each in chunks if each[0] == b"eXIf"]
    assert exif
    others = [each for each in chunks if each[0] != b"eXIf"]
    ordered = [*others[:-1], *exif, others[-1]]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(whole for _, whole in ordered))
    return path


@pytest.mark.parametrize("suffix", ["png", "late.png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_measured_as_it_is_shown(tmp_path, suffix, orientation):
    options = {"lossless": True} if suffix == "webp" else {}
    path = turned(tmp_path / f"image.{suffix}", orientation, **options)
    if suffix == "late.png":
        late_exif(path)
    # EXIF 2.32, section 4.6.4: where row 0 and column 0 of the file are in the picture.
    pixels = gradient()
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].T,
        8: np.rot90(pixels),
    }[orientation]
    found = read_image(path)
    assert found.shape[:2] == upright.shape
    assert np.abs(found[..., 0].astype(int) - upright).max() <= 3 * (suffix == "jpg")
    with open_image(path) as image:
        assert upright_size(image) == upright.shape


def test_xmp_turns_too_and_comments_behind_the_pixels_do_not(tmp_path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = saved(tmp_path, Image.fromarray(gradient()), "xmp.webp", lossless=True, xmp=xmp)
    assert read_image(path).shape == (9, 6, 3)
    with open_image(path) as image:
        assert upright_size(image) == (9, 6)
    path = saved(tmp_path, Image.fromarray(gradient()))
    text = png_chunk(b"tEXt", b"date:create\x002026")
    content = path.read_bytes()
    path.write_bytes(content[:-12] + text + content[-12:])
    with open_image(path) as image:
        assert upright_size(image) == (6, 9)


def deep(tmp_path, values, name="deep.tif", **options):
    return saved(tmp_path, Image.fromarray(values), name, **options)


def test_deep_images_keep_their_brightness_relative_to_each_other(tmp_path):
    ramp = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    for scale in (1.0, 0.25):
        wanted = np.round(ramp * scale * 255)[..., None]
        assert (read_image(deep(tmp_path, ramp * np.float32(scale))) == wanted).all()
        whole = np.round(ramp * scale * 65535).astype(np.uint16)
        for name in ("deep.tif", "deep.png"):
            found = read_image(deep(tmp_path, whole, name)).astype(int)
            assert np.abs(found - wanted).max() <= 1
        found = read_image(deep(tmp_path, whole.astype(">u2"), "big.tif")).astype(int)
        assert np.abs(found - wanted).max() <= 1
    assert (read_image(deep(tmp_path, 0 * ramp)) == 0).all()


def test_twelve_bits_and_inverted_gray(tmp_path):
    # Two pixels of 12 bits in three bytes: 0 and 4095; and 16 bits of which 0 is white.
    path = tmp_path / "twelve.tif"
    entries = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 3)]
    body = b"".join(
        struct.pack("<HHI", tag, kind, count) + struct.pack("<I", value)
        for tag, kind, count, value in entries
    )
    start = struct.pack("<2sHI", b"II", 42, 12) + b"\x00\x0f\xff\x00"
    path.write_bytes(start + struct.pack("<H", len(entries)) + body + bytes(4))
    assert read_image(path)[0, :, 0].tolist() == [0, 255]
    white = np.array([[0, 65535]], np.uint16)
    path = saved(tmp_path, Image.fromarray(white), "inverted.tif", tiffinfo={262: 0})
    assert read_image(path)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.5, np.nan]], np.float32), r"1 pixels that are not numbers"),
        (np.array([[0.5, np.inf]], np.float32), r"1 pixels that are not numbers"),
        (np.array([[0.5, 255.0]], np.float32), r"floats from 0.5 to 255, .* divide all images"),
        (np.array([[-0.5, 1.0]], np.float32), r"floats from -0.5 to 1, "),
        (np.array([[7, 70_000]], np.int32), r"integers of 32 bits, of which none is known"),
    ],
)
def test_values_without_a_range_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as error:
        read_image(deep(tmp_path, values))
    assert "deep.tif" in str(error.value) and "\n" not in str(error.value)


def test_modes_that_are_rarer(tmp_path):
    color = np.zeros((2, 3, 3), np.uint8) + np.array([200, 100, 0], np.uint8)
    cmyk = saved(tmp_path, Image.fromarray(color).convert("CMYK"), "cmyk.jpg", quality=95)
    assert np.abs(read_image(cmyk).astype(int) - color).max() <= 6
    frames = [Image.fromarray(gradient() + shift) for shift in (0, 60)]
    for name in ("animated.gif", "animated.png", "animated.webp", "pages.tif"):
        lossless = {"lossless": True} if name.endswith("webp") else {}
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **lossless)
        assert (read_image(path)[..., 0] == gradient()).all(), name


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_the_content_of_a_file_is_read_as_the_file(mode, kind, tmp_path):
    if (kind, mode) in (("WEBP", "1"), ("WEBP", "LA"), ("WEBP", "P"), ("WEBP", "I;16")):
        pytest.skip("the format has no such images")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    gray = pixels[..., 0].astype(np.uint16)
    image = Image.fromarray(gray) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    path = tmp_path / f"image.{kind.lower()}"
    image.save(path, kind, **({"transparency": 0} if (kind, mode) == ("PNG", "L") else {}))
    np.testing.assert_array_equal(read_image(path.read_bytes()), read_image(path))


def test_the_content_of_a_file_opens_no_path():
    with pytest.raises(UserError, match="'sent' is not an image in a format known to Pillow"):
        read_image(b"/etc/hostname")
