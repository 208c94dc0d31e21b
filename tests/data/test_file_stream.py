"""Image files streamed from a folder: what is read, what is drawn, and that it can be repeated."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cnnjax.data import load
from cnnjax.data.file_stream import (
    random_windows,
    scan_files,
    stream_files,
    stream_files_evaluation,
)
from cnnjax.data.image_files import resize_image
from cnnjax.data.pipelines import epoch_indices
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

NUM_FILES = 22
SIZE = (24, 20)


def smooth_image(number, height=90, width=120):
    """A slope in each direction and the file's number: no JPEG changes it by much."""
    rows, columns = np.mgrid[:height, :width]
    number = np.full_like(rows, 10 * number)
    return np.stack([rows * 2, columns * 2, number], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEG files of two sizes; one of them turned by its EXIF, one gray, one a PNG file."""
    path = tmp_path_factory.mktemp("files") / "images"
    for number in range(NUM_FILES):
        directory = path / f"class{number % 2}"
        directory.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(smooth_image(number, width=120 - number % 2 * 30))
        name, options = f"{number:02}.jpg", {"quality": 95}
        if number == 3:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        if number == 4:
            image = image.convert("L")
        if number == 5:
            name, options = f"{number:02}.png", {}
        image.save(directory / name, **options)
    return path


@pytest.fixture(scope="module")
def files(folder):
    names = sorted(folder.rglob("*.*"), key=lambda path: path.stem)
    return scan_files(names, np.arange(NUM_FILES) % 2)


def take(pipeline, first_step, count):
    batches = pipeline.batches(first_step)
    found = [jax.device_get(next(batches)) for _ in range(count)]
    batches.close()
    return found


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def cut(files, batch_size=5, **options):
    settings = {"seed": 3, "image_size": SIZE, "smallest_area": 0.2, "mirror": True} | options
    return stream_files(files, batch_size, **settings)


def test_headers_say_size_kind_and_channels(files):
    assert files.sizes[:4].tolist() == [[90, 120], [90, 90], [90, 120], [90, 90]]
    assert np.flatnonzero(~files.is_plain).tolist() == [3, 5]
    assert files.num_channels == 3
    with pytest.raises(UserError, match="22 files and 2 labels"):
        scan_files(files.names, np.zeros(2))


@pytest.mark.parametrize("antialias", [True, False])
def test_batches_do_not_depend_on_threads_processes_or_where_a_run_starts(files, antialias):
    whole = take(cut(files, antialias=antialias, num_threads=1), 0, 9)
    assert_same(take(cut(files, antialias=antialias, num_threads=3), 6, 3), whole[6:])
    for rows in (np.array([0, 3]), np.array([1, 2, 4])):
        part = take(cut(files, antialias=antialias, rows=rows), 2, 4)
        expected = [{name: array[rows] for name, array in batch.items()} for batch in whole[2:6]]
        assert_same(part, expected)
    other = take(cut(files, antialias=antialias, seed=4), 0, 1)
    assert not np.array_equal(other[0]["image"], whole[0]["image"])


def test_the_order_is_that_of_resident_data_and_each_epoch_draws_anew(files):
    batches = take(cut(files), 0, 8)
    for epoch in (0, 1):
        order = epoch_indices(NUM_FILES, 5, 3, epoch)
        for batch, index in zip(batches[4 * epoch : 4 * epoch + 4], order, strict=True):
            assert batch["label"].tolist() == (index % 2).tolist()
            # The third channel is the number, but of the gray file and of the turned one.
            is_color = ~np.isin(index, (3, 4))
            shown = batch["image"][is_color, ..., 2].mean((1, 2))
            np.testing.assert_allclose(shown, 10 * index[is_color], atol=4)
    assert not np.array_equal(batches[0]["image"], batches[4]["image"])


@pytest.mark.parametrize("antialias", [True, False])
def test_parts_are_the_windows_that_were_drawn(files, antialias):
    pipeline = cut(files, antialias=antialias, mirror=False, batch_size=NUM_FILES)
    (batch,) = take(pipeline, 0, 1)
    index = epoch_indices(NUM_FILES, NUM_FILES, 3, 0)[0]
    draws = numpy_generator(3, "files", 0, 0).random((NUM_FILES, 10, 4))
    windows = random_windows(files.sizes[index], draws, 0.2)
    for image, number, (top, left, height, width) in zip(
        batch["image"], index, windows, strict=True
    ):
        if number in (3, 4):
            continue
        part = smooth_image(number)[top : top + height, left : left + width]
        expected = resize_image(part, SIZE)
        assert np.abs(image.astype(float) - expected).mean() < 4.0


def test_windows_have_the_areas_asked_for_and_lie_in_the_image():
    generator = np.random.default_rng(0)
    sizes = np.tile([[300, 500]], (4000, 1))
    top, left, height, width = random_windows(sizes, generator.random((4000, 10, 4)), 0.08).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 300).all() and (left + width <= 500).all()
    share = height * width / (300 * 500)
    assert 0.078 < share.min() < 0.1 and share.max() > 0.7
    is_part = height < 300
    ratio = (width / height)[is_part]
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35
    # A part of a narrow image cannot have nearly its area: it is the whole.
    narrow = random_windows(np.array([[10, 400]]), generator.random((1, 10, 4)), 0.9)
    assert narrow.tolist() == [[0, 0, 10, 400]]


@pytest.mark.parametrize("fit", ["pad", "resize", "crop"])
def test_whole_images_have_the_pixels_of_the_dataset_in_memory(folder, files, fit):
    loaded = load(f"folder:{folder}", image_size=SIZE, fit=fit, validation=0)
    expected = {image.tobytes() for part in (loaded.train, loaded.test) for image in part.image}
    batches = stream_files_evaluation(files, 8, image_size=SIZE, fit=fit)
    seen = [image for batch in batches for image in np.asarray(batch["image"])[batch["mask"]]]
    assert len(seen) == NUM_FILES
    assert {image.tobytes() for image in seen} == expected
    trained = take(stream_files(files, 11, seed=0, image_size=SIZE, fit=fit), 0, 2)
    images = np.concatenate([batch["image"] for batch in trained])
    assert {image.tobytes() for image in images} == expected


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_evaluation_sees_each_file_once_in_order(files, process_count):
    parts = [
        list(stream_files_evaluation(files, 6, image_size=SIZE, fit="resize", rows=rows))
        for rows in np.split(np.arange(6), process_count)
    ]
    labels = []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            labels += np.asarray(batch["label"])[np.asarray(batch["mask"])].tolist()
    assert labels == files.labels.tolist()


@pytest.mark.parametrize("antialias", [True, False])
def test_large_jpeg_files_are_decoded_at_the_scale_needed(tmp_path, antialias):
    """Each pixel of an image four times the size is a mean of 16: no stripe is left."""
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "0.jpg", quality=100, subsampling=0)
    files = scan_files([tmp_path / "0.jpg"] * 2, np.zeros(2))
    pipeline = cut(files, 2, image_size=(40, 40), smallest_area=0.99, antialias=antialias)
    (batch,) = take(pipeline, 0, 1)
    np.testing.assert_allclose(batch["image"].astype(float), 100.0, atol=3)


def test_a_damaged_file_is_named(files, tmp_path):
    content = Path(files.names[0]).read_bytes()
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(content[: len(content) // 2])
    for smallest_area in (0.0, 0.5):
        pipeline = cut(
            scan_files([damaged, *files.names[:3]], np.zeros(4)), 4, smallest_area=smallest_area
        )
        with pytest.raises(UserError, match=r"damaged\.jpg"):
            take(pipeline, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 23}, "batch_size=23 is larger than the 22"),
        ({"smallest_area": 1.5}, "smallest_area=1.5"),
        ({"fit": "cut"}, "unknown fit 'cut'"),
    ],
)
def test_errors_come_before_reading(files, options, message):
    with pytest.raises(UserError, match=message):
        cut(files, **options)


@pytest.mark.slow
def test_a_pipeline_left_open_ends_with_the_program(files):
    """TensorFlow's threads call Python to resize: they may not do so when it takes itself apart."""
    program = (
        "import sys, numpy as np\n"
        "from cnnjax.data.file_stream import scan_files, stream_files\n"
        "files = scan_files(sys.argv[1:], np.zeros(len(sys.argv) - 1))\n"
        "options = dict(seed=0, image_size=(24, 20), smallest_area=0.1)\n"
        "left_open = stream_files(files, 8, **options).batches(0)\n"
        "print(next(left_open)['image'].shape)"
    )
    command = [sys.executable, "-c", program, *files.names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "(8, 24, 20, 3)\n"), done.stderr[-2000:]
