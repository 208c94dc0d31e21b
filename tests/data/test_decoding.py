"""Images cut out of larger ones: the middle for tests, random parts for training."""

import numpy as np
import pytest
from PIL import Image

from cnnjax.data import first_examples, open_dataset, split_batches, synthetic, training_pipeline
from cnnjax.data.decoding import random_crop_decoder, tensor_fitter, tensorflow
from cnnjax.data.image_files import fit_image, parse_fit
from cnnjax.errors import UserError
from tests.data.conftest import made_photos


def gradient_image(height, width):
    """Row number in channel 0, column number in channel 1."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], -1).astype(np.uint8)


def test_crop_cuts_the_middle_out():
    # 80 / 100 of a shorter side of 100 is 80: of a size of 80 nothing is scaled.
    image = gradient_image(100, 140)
    np.testing.assert_array_equal(fit_image(image, (80, 80), "crop:0.8"), image[10:90, 30:110])
    np.testing.assert_array_equal(fit_image(image, (100, 100), "crop:1"), image[:, 20:120])


@pytest.mark.parametrize("shape", [(100, 140), (91, 60), (16, 20)])
def test_crop_is_the_same_in_tensorflow_up_to_rounding(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = fit_image(image, (24, 24), "crop")
    found = tensor_fitter((24, 24), "crop")(tensorflow().constant(image)).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("fit", ["cut", "crop:0", "crop:1.5", "crop:half", "pad:0.5"])
def test_other_fits_are_refused(fit):
    with pytest.raises(UserError, match="fit"):
        parse_fit(fit)


@pytest.fixture(scope="module")
def encoded():
    tf = tensorflow()
    image = gradient_image(200, 250)
    return {"jpeg": tf.io.encode_jpeg(image, quality=100), "png": tf.io.encode_png(image)}


class PhotoFeature:
    """What the decoder asks of a tfds feature."""

    shape = (None, None, 3)

    @staticmethod
    def decode_example(encoded):
        return tensorflow().io.decode_image(encoded, channels=3, expand_animations=False)


def test_random_parts_are_places_of_the_image_and_have_the_areas_asked_for(encoded):
    tf = tensorflow()
    size, smallest = (20, 20), 0.25
    decode = tf.function(random_crop_decoder(PhotoFeature, size, smallest), autograph=False)
    areas, ratios = [], []
    for number in range(60):
        seed = tf.constant([3, number], tf.int64)
        image = decode(encoded["png"], seed).numpy().astype(float)
        assert image.shape == (*size, 3)
        # A stretched part is a slope whose steps say how large the part is.
        height, width = (np.ptp(image[..., axis]) / 19 * 20 for axis in (0, 1))
        areas.append(height * width / (200 * 250))
        ratios.append(width / height)
        if number < 5:
            jpeg = decode(encoded["jpeg"], seed).numpy().astype(float)
            assert np.abs(jpeg - image).max() <= 6
    assert smallest * 0.9 < min(areas) < 0.4
    assert 0.6 < max(areas) <= 1.05
    assert 3 / 4 * 0.9 < min(ratios) < 0.95 < 1.05 < max(ratios) < 4 / 3 * 1.1


def test_a_streamed_dataset_is_trained_on_random_parts_and_tested_on_the_middle(tfds_dir):
    options = {"pipeline": "stream", "data_dir": tfds_dir, "image_size": 4, "validation": 0}
    dataset = open_dataset("tfds:made_photos", fit="crop", smallest_area=0.3, **options)
    batches = [next(training_pipeline(dataset, 6, seed=1).batches(step)) for step in (0, 0, 1)]
    images = [np.asarray(batch["image"]) for batch in batches]
    np.testing.assert_array_equal(images[0], images[1])
    whole = open_dataset("tfds:made_photos", fit="crop", **options)
    seen = np.asarray(next(training_pipeline(whole, 6, seed=1).batches(0))["image"])
    middles = [fit_image(photo, (4, 4), "crop").astype(int) for photo in made_photos()]
    assert all(min(np.abs(image - middle).max() for middle in middles) <= 1 for image in seen)
    assert not np.array_equal(images[0], seen)


def test_random_parts_of_what_is_in_memory_are_refused(tfds_dir):
    with pytest.raises(UserError, match=r"smallest_area=0\.08 .*stream"):
        open_dataset("mnist", smallest_area=0.08)
    with pytest.raises(UserError, match="smallest_area=2"):
        open_dataset("mnist", smallest_area=2)


@pytest.mark.parametrize(
    ("name", "size", "shape", "num_classes"),
    [("cifar10", None, (32, 32, 3), 10), ("imagenet2012", 16, (16, 16, 3), 1000)],
)
def test_made_images_have_the_shape_and_the_classes_of_the_dataset(name, size, shape, num_classes):
    dataset = synthetic.stand_in(f"tfds:{name}", image_size=size)
    assert dataset.image_shape == shape
    assert dataset.num_classes == num_classes
    assert "synthetic images" in dataset.name
    assert dataset.checksum == synthetic.stand_in(f"tfds:{name}", image_size=size).checksum


def test_no_images_are_made_for_a_folder():
    with pytest.raises(UserError, match="tfds:NAME"):
        synthetic.stand_in("folder:photos")


SHAPES = ((100, 140), (141, 100), (61, 90), (37, 37), (300, 257))


def torchvisions(image, resize, crop, interpolation):
    """`CenterCrop(crop)(Resize(resize)(image))` of torchvision 0.28 on an image of Pillow's."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_long = int(resize * long / short)
    size = (resize, new_long) if width <= height else (new_long, resize)
    scaled = image.resize(size, getattr(Image.Resampling, interpolation.upper()))
    top, left = (round((side - crop) / 2.0) for side in (size[1], size[0]))
    return np.asarray(scaled.crop((left, top, left + crop, top + crop)))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("resize", "crop"), [(64, 56), (57, 57), (73, 48)])
def test_center_is_what_published_weights_are_tested_with_to_the_pixel(interpolation, resize, crop):
    for height, width in SHAPES:
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        fit = f"center(resize={resize}, interpolation={interpolation})"
        expected = torchvisions(Image.fromarray(pixels), resize, crop, interpolation)
        np.testing.assert_array_equal(fit_image(pixels, (crop, crop), fit), expected)
        tensor = tensor_fitter((crop, crop), fit)(tensorflow().constant(pixels))
        np.testing.assert_array_equal(tensor, expected)
        gray = fit_image(pixels[..., :1], (crop, crop), fit)
        of_gray = torchvisions(Image.fromarray(pixels[..., 0]), resize, crop, interpolation)
        np.testing.assert_array_equal(gray[..., 0], of_gray)


def test_center_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    for height, width in SHAPES:
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        mode = transforms.InterpolationMode.BICUBIC
        steps = [transforms.Resize(64, mode), transforms.CenterCrop(56)]
        expected = np.asarray(transforms.Compose(steps)(Image.fromarray(pixels)))
        found = fit_image(pixels, (56, 56), "center(resize=64, interpolation=bicubic)")
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ("center(resize=0)", "at least 1 pixel"),
        ("center(interpolation=bicubbic)", "did you mean bicubic"),
        ("center(resize=20)", "no middle of 24x24"),
    ],
)
def test_what_has_no_middle_is_refused(fit, message):
    with pytest.raises(UserError, match=message):
        fit_image(np.zeros((40, 40, 3), np.uint8), (24, 24), fit)


@pytest.mark.parametrize("pipeline", ["stream", "resident"])
def test_center_of_tfds_is_decoded_and_scaled_by_pillow(tfds_dir, pipeline):
    fit = "center(resize=8, interpolation=bicubic)"
    options = {"data_dir": tfds_dir, "image_size": 6, "validation": 0, "fit": fit}
    dataset = open_dataset("tfds:made_photos", pipeline=pipeline, **options)
    found = np.asarray(first_examples(dataset, "train").image)
    expected = {fit_image(photo, (6, 6), fit).tobytes() for photo in made_photos()}
    assert {image.tobytes() for image in found} <= expected
    batches = split_batches(dataset, "train", 4)
    streamed = np.concatenate([np.asarray(b["image"])[np.asarray(b["mask"])] for b in batches])
    np.testing.assert_array_equal(streamed, found)
