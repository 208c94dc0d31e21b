"""Features of tfds datasets as fields of any task."""

import numpy as np
import pytest

import cnnjax
from cnnjax.data import load_features
from cnnjax.data.fields import Boxes, ClassMap, Image, Label, Scalar, Tokens, Waveform
from cnnjax.errors import NotPreparedError, UserError

COUNTS = {"train": 20, "test": 5}


def scene(number):
    """A dark square on a light ground, whose side and place depend on the number."""
    height, width, top, left = 8 + 2 * (number % 2), 12, number % 4, number % 5
    image = np.full((height, width, 3), 200, np.uint8)
    mask = np.ones((height, width, 1), np.uint8)
    image[top : top + 3, left : left + 4] = 20
    mask[top : top + 3, left : left + 4] = 2
    box = np.array([[top / height, left / width, (top + 3) / height, (left + 4) / width]])
    return {
        "image": image,
        "mask": mask,
        "objects": {"bbox": box.astype(np.float32)[: number % 3], "label": [1, 1][: number % 3]},
        "kind": number % 3,
        "brightness": np.float32(number) / 10,
        "sound": np.linspace(-1, 1, 6).astype(np.float32),
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from cnnjax.data.decoding import tensorflow

    tensorflow()
    import tensorflow_datasets as tfds

    directory = tmp_path_factory.mktemp("scenes")
    f = tfds.features
    tfds.dataset_builders.store_as_tfds_dataset(
        name="made_scenes",
        version="1.0.0",
        data_dir=directory,
        features=f.FeaturesDict(
            {
                "image": f.Image(shape=(None, None, 3)),
                "mask": f.Image(shape=(None, None, 1)),
                "objects": f.Sequence(
                    {
                        "bbox": f.Tensor(shape=(4,), dtype=np.float32),
                        "label": f.ClassLabel(num_classes=2),
                    }
                ),
                "kind": f.ClassLabel(num_classes=3),
                "brightness": f.Scalar(np.float32),
                "sound": f.Tensor(shape=(6,), dtype=np.float32),
            }
        ),
        split_datasets={
            split: [(number, stored(number)) for number in range(count)]
            for split, count in COUNTS.items()
        },
        disable_shuffling=True,
    )
    return directory


def stored(number):
    example = scene(number)
    boxes = example["objects"]["bbox"]
    labels = [1] * len(boxes)
    return example | {"objects": {"bbox": boxes, "label": labels}}


FIELDS = {"image": Image(), "class_map": ClassMap(2)}
HOW = {"features": {"class_map": "mask"}, "change": {"class_map": lambda mask: mask - 1}}


def test_images_and_class_maps_are_stretched_together(data_dir):
    data = load_features(
        "tfds:made_scenes", FIELDS, **HOW, data_dir=data_dir, image_size=(16, 24), validation=4
    )
    sizes = [len(getattr(data, split)["image"]) for split in ("train", "validation", "test")]
    assert sizes == [16, 4, 5]
    assert data.test["image"].shape == (5, 16, 24, 3)
    assert data.test["class_map"].dtype == np.uint8
    for number in range(0, 5, 2):  # Of 8 x 12 pixels: twice as large, exactly.
        wanted = (scene(number)["mask"][..., 0] - 1).repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(data.test["class_map"][number], wanted)
    # What is dark is the square.
    dark = data.test["image"].mean(-1) < 100
    assert (dark & (data.test["class_map"] == 0)).mean() < 0.01


def test_boxes_are_in_pixels_and_missing_ones_zero(data_dir):
    fields = {"image": Image(), "boxes": Boxes(3)}
    data = load_features(
        "tfds:made_scenes",
        fields,
        features={"boxes": "objects/bbox"},
        data_dir=data_dir,
        image_size=(16, 24),
    )
    boxes = data.test["boxes"]
    assert boxes.shape == (5, 3, 4)
    assert not boxes[0].any() and not boxes[3].any()  # They have none.
    np.testing.assert_allclose(boxes[2, 0], [2 * 2, 2 * 2, 2 * 5, 2 * 6], rtol=1e-6)
    with pytest.raises(UserError, match="boxes are in pixels of an image"):
        load_features(
            "made_scenes",
            {"boxes": Boxes(3)},
            features={"boxes": "objects/bbox"},
            data_dir=data_dir,
        )


def test_numbers_texts_and_sounds(data_dir):
    fields = {
        "kind": Label(3),
        "brightness": Scalar(),
        "sound": Waveform(),
        "words": Tokens(7, length=4),
    }
    data = load_features(
        "tfds:made_scenes?train=train[:10]&test=train[10:]",
        fields,
        features={"words": "kind"},
        change={"words": lambda kind: np.arange(1, 1 + kind)},
        data_dir=data_dir,
    )
    assert data.test["kind"].tolist() == [number % 3 for number in range(10, 20)]
    np.testing.assert_allclose(data.test["brightness"], np.arange(10, 20) / 10, rtol=1e-6)
    assert data.test["sound"].shape == (10, 6, 1)
    assert data.test["words"][:3].tolist() == [[1, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0]]
    # Nothing is lost and nothing doubled by what is held out.
    assert len(data.train["kind"]) + len(data.validation["kind"]) == 10


@pytest.mark.parametrize(
    ("fields", "how", "message"),
    [
        (FIELDS, {}, "feature of made_scenes/1.0.0 'class_map'"),
        ({"image": Image(), "m": Image()}, {"features": {"m": "objects/box"}}, "'box'.*bbox"),
        (
            FIELDS,
            HOW,
            r"image of example 1 .* is \[10, 12, 3\], of others \[8, 12, 3\]: give image",
        ),
        ({"image": Image()}, {"features": {"image": "kind"}}, r"int64 \[\], not an 8-bit image"),
        (FIELDS, HOW | {"change": {}, "image_size": 8}, "class_map of .* 2"),
        (
            {"image": Image(), "boxes": Boxes(1)},
            {"features": {"boxes": "objects/bbox"}, "change": {"boxes": lambda b: np.ones((2, 4))}},
            r"there are 2 boxes, more than Boxes\(1\)",
        ),
        (
            {"t": Tokens(9, length=2)},
            {"features": {"t": "kind"}, "change": {"t": lambda kind: np.arange(3)}},
            r"int64 \[3\], not at most 2 integers",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(fields, how, message, data_dir):
    with pytest.raises(UserError, match=message) as error:
        load_features("tfds:made_scenes", fields, data_dir=data_dir, **how)
    assert "\n" not in str(error.value)


def test_what_is_not_on_disk_says_how_to_get_it(tmp_path):
    with pytest.raises(NotPreparedError, match=r"prepare_data\.py oxford_iiit_pet"):
        load_features("tfds:oxford_iiit_pet", {"image": Image()}, data_dir=tmp_path)


@pytest.mark.slow
def test_a_segmentation_is_trained_on_them(data_dir, tmp_path):
    data = load_features("tfds:made_scenes", FIELDS, **HOW, data_dir=data_dir, image_size=16)
    trained = cnnjax.run.train(
        cnnjax.models.create("unet", num_classes=2, widths=(4, 8), norm="batch"),
        cnnjax.tasks.segmentation.segmentation(2),
        data,
        learning_rate=0.03,
        epochs=30,
        batch_size=9,
        devices=1,
        run_dir=str(tmp_path / "run"),
    )
    assert trained.summary["test_mean_iou"] > 0.9
