"""Images, class maps and boxes move by one draw; colors change images only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import ndimage

from cnnjax.augment import (
    Geometric,
    Move,
    affine_move,
    change,
    geometry,
    make_augment,
    sampled_move,
)
from cnnjax.data import fields as kinds
from cnnjax.errors import UserError

KEY = jax.random.key(0)
HEIGHT, WIDTH, COUNT = 40, 48, 12
COLORS = np.array([[0.2, 0.1, 0.4], [0.9, 0.3, 0.5], [0.4, 0.8, 0.7]], np.float32)
EDGE, OUTSIDE, BEYOND = 200, 255, 99
FIELDS = {
    "image": kinds.Image(),
    "classes": kinds.ClassMap(3),
    # The same, but for what is near an edge between classes; its padding is another one.
    "core": kinds.ClassMap(3, ignore=BEYOND),
    "boxes": kinds.Boxes(3),
}
READ_TWICE = "shift:2,rotate:10,flip,noise:0,scale:0.1"
# Every name of a policy that moves pixels, and several at once.
MOVING = (
    "flip",
    "shift:4",
    "crop:4",
    "crop:3:reflect",
    "resized_crop:0.3",
    "elastic:20:4",
    "rotate:30",
    "scale:0.3",
    "translate:4",
    "shear:20",
    "rotate:15,scale:0.2,translate:2,shear:10,flip",
    READ_TWICE,
)
AUTOMATIC = ("randaugment:1:20", "randaugment:2:9", "trivialaugment")
NOT_MOVING = (
    "brightness:0.5",
    "contrast:0.5",
    "saturation:0.5",
    "hue:0.3",
    "noise:0.1",
    "salt_and_pepper:0.1",
    "blur:1",
    "median:1",
    "erase:1",
    "cutout:9",
)


def hull(inside):
    """(top, left, bottom, right) of the pixels that are True."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], np.float32)


def scene():
    """A rectangle and a disc, well within the image, whose color says the class of each pixel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    classes = np.zeros((HEIGHT, WIDTH), np.uint8)
    classes[9:27, 8:22] = 1
    classes[np.hypot(y - 24, x - 33) < 8] = 2
    flat = ndimage.minimum_filter(classes, 7) == ndimage.maximum_filter(classes, 7)
    boxes = np.stack([hull(classes == 1), hull(classes == 2), np.zeros(4, np.float32)])
    example = {
        "image": COLORS[classes],
        "classes": classes,
        "core": np.where(flat, classes, EDGE).astype(np.uint8),
        "boxes": boxes,
    }
    return {name: jnp.asarray(np.stack([array] * COUNT)) for name, array in example.items()}


BATCH = scene()


@functools.cache
def changed(texts, fields=tuple(FIELDS)):
    """Applies each policy to the scene: all in one program, which compiles once."""
    chosen = {name: FIELDS[name] for name in fields}
    changes = {text: make_augment(text, num_classes=3, fields=chosen) for text in texts}
    batch = {name: BATCH[name] for name in fields}

    @jax.jit
    def all_of_them(key, batch):
        return {text: change(key, batch, 0) for text, change in changes.items()}

    return jax.tree.map(np.asarray, all_of_them(KEY, batch))


@pytest.mark.slow
@pytest.mark.parametrize("text", MOVING)
def test_a_class_map_moves_with_its_image(text):
    result = changed(MOVING)[text]
    assert result["classes"].dtype == np.uint8
    assert set(np.unique(result["classes"])) <= {0, 1, 2, OUTSIDE}
    inside = np.isin(result["core"], (0, 1, 2))
    assert inside.mean() > 0.35
    np.testing.assert_array_equal(result["classes"][inside], result["core"][inside])
    np.testing.assert_allclose(result["image"][inside], COLORS[result["core"][inside]], atol=1e-4)
    assert len(np.unique(result["classes"], axis=0)) > 1
    np.testing.assert_array_equal(result["classes"] == OUTSIDE, result["core"] == BEYOND)


@pytest.mark.parametrize("text", MOVING)
def test_a_box_holds_what_was_in_it(text):
    result = changed(MOVING)[text]
    assert result["boxes"].dtype == np.float32
    # Each reading at the nearest pixels moves an edge by half a pixel at most.
    slack = 1.01 if text == READ_TWICE else 0.51
    tight = 0
    for classes, boxes in zip(result["classes"], result["boxes"], strict=True):
        assert (boxes[2] == 0).all()
        for number, box in enumerate(boxes[:2], start=1):
            if not (classes == number).any():
                continue
            found = hull(classes == number)
            check_holds(box, found, slack)
            cut = (found <= 0).any() or found[2] == HEIGHT or found[3] == WIDTH
            if number == 1 and not cut and text != READ_TWICE:
                # The hull of a rectangle's corners is its own, up to a pixel at a sharp corner.
                np.testing.assert_allclose(box, found, atol=1.0)
                tight += 1
    assert tight >= 2 or text == READ_TWICE


def check_holds(box, found, slack):
    assert (box[:2] <= found[:2] + slack).all() and (box[2:] >= found[2:] - slack).all()


@pytest.mark.slow
@pytest.mark.parametrize("text", AUTOMATIC)
def test_automatic_policies_move_class_maps_with_their_images(text):
    """Colors change, but all of a class alike: within a class the image is of one color."""
    result = changed(AUTOMATIC)[text]
    moved = 0
    for index in range(COUNT):
        image, core, boxes, classes = (
            result[name][index] for name in ("image", "core", "boxes", "classes")
        )
        moved += (np.asarray(BATCH["core"][index]) != core).any()
        # Within a pixel of the border an image is blended with the black outside.
        blended = ndimage.maximum_filter(core == BEYOND, 3, mode="constant", cval=True)
        for number in (0, 1, 2):
            inside = image[(core == number) & ~blended]
            assert len(inside) == 0 or np.ptp(inside, axis=0).max() < 0.02
        if (classes == 1).any():
            check_holds(boxes[0], hull(classes == 1), 1.01)
    assert moved >= 1


def test_colors_leave_class_maps_and_boxes():
    for text, result in changed(NOT_MOVING).items():
        for name in ("classes", "core", "boxes"):
            np.testing.assert_array_equal(result[name], BATCH[name], err_msg=text)
        assert (result["image"] != BATCH["image"]).any(), text


@pytest.mark.slow
def test_images_are_changed_as_without_other_keys():
    texts = (*MOVING, *NOT_MOVING)
    alone, together = changed(texts, ("image",)), changed(texts)
    for text in texts:
        # Where a position falls between pixels, its last bits show in the image.
        np.testing.assert_allclose(alone[text]["image"], together[text]["image"], atol=2e-4)


def test_no_fields_mean_image_and_label():
    batch = {"image": BATCH["image"], "label": jnp.arange(COUNT) % 3, "mask": jnp.ones(COUNT, bool)}
    given = {"image": kinds.Image(), "label": kinds.Label(3)}
    for text in ("flip,rotate:10,hue:0.1,mixup:0.2", "crop:4,elastic:20"):
        plain = jax.jit(make_augment(text, num_classes=3))(KEY, batch, 0)
        by_fields = jax.jit(make_augment(text, num_classes=3, fields=given))(KEY, batch, 0)
        for name in batch:
            np.testing.assert_array_equal(plain[name], by_fields[name])


def test_all_images_of_an_example_change_by_one_draw():
    fields = {"image": kinds.Image(), "target": kinds.Image(), "label": kinds.Label(3)}
    batch = {"image": BATCH["image"], "target": BATCH["image"], "label": jnp.arange(COUNT)}
    change = make_augment("flip,rotate:10,noise:0.1", num_classes=3, fields=fields)
    result = jax.jit(change)(KEY, batch, 0)
    np.testing.assert_array_equal(result["image"], result["target"])
    np.testing.assert_array_equal(result["label"], batch["label"])


@pytest.mark.parametrize("fill", [-1.0, -2.0])
def test_what_comes_from_outside_has_the_fields_padding(fill):
    fields = {"image": kinds.Image(), "classes": kinds.ClassMap(3, ignore=17)}
    batch = {"image": jnp.ones((50, 9, 11, 1)), "classes": jnp.ones((50, 9, 11), jnp.uint8)}
    for function in (
        geometry.pad_and_crop(3, fill=fill),
        geometry.random_affine(40, (0.5, 1.1), 3.0, fill=fill),
    ):
        change = make_augment((function,), num_classes=3, fields=fields)
        result = jax.tree.map(np.asarray, jax.jit(change)(KEY, batch, 0))
        image, classes = result["image"][..., 0], result["classes"]
        assert set(np.unique(classes)) == {1, 17}
        assert (classes[image == fill] == 17).all() and (image == fill).sum() > 100
        assert (classes[image == 1] == 1).all() and (image == 1).sum() > 100


ZERO = (
    "flip:0",
    "shift:0",
    "crop:0",
    "resized_crop:1:1:1",
    "elastic:0",
    "rotate:0",
    "scale:0",
    "translate:0",
    "shear:0",
)


def check_zero(texts):
    fields = {name: FIELDS[name] for name in ("image", "classes", "boxes")}
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 20, (2, 3, 2))
    boxes = np.concatenate([low, low + rng.uniform(2, 18, (2, 3, 2))], axis=-1)
    batch = {
        "image": jnp.asarray(rng.uniform(size=(2, HEIGHT, WIDTH, 3)), jnp.float32),
        "classes": jnp.asarray(rng.integers(0, 3, (2, HEIGHT, WIDTH)), jnp.uint8),
        "boxes": jnp.asarray(boxes, jnp.float32),
    }
    changes = {text: make_augment(text, num_classes=3, fields=fields) for text in texts}
    results = jax.jit(lambda key: {text: f(key, batch, 0) for text, f in changes.items()})(KEY)
    for text, result in results.items():
        np.testing.assert_array_equal(result["classes"], batch["classes"], err_msg=text)
        np.testing.assert_allclose(result["boxes"], boxes, atol=1e-4, err_msg=text)


def test_nothing_moves_at_zero():
    check_zero(ZERO)


@pytest.mark.slow
def test_nothing_moves_at_zero_of_automatic_policies():
    check_zero(("randaugment:2:0", "trivialaugment:0"))


def test_a_quarter_turn_by_hand():
    classes = jnp.asarray(np.random.default_rng(0).integers(0, 9, (7, 7)), jnp.uint8)
    move = affine_move((7, 7), jnp.array([[0.0, -1.0], [1.0, 0.0]]), jnp.zeros(2))
    np.testing.assert_array_equal(move.class_map(classes, 255), np.rot90(classes, -1))
    inside = np.zeros((7, 7), bool)
    inside[1:3, 2:6] = True
    boxes = jnp.asarray(hull(inside))[None]
    np.testing.assert_allclose(move.boxes(boxes)[0], hull(np.rot90(inside, -1)), atol=1e-6)


def test_boxes_are_cut_at_the_border_and_lost_beyond():
    boxes = jnp.array([[1, 4, 3, 8], [1, 0, 3, 2], [2, 6, 4, 8], [5, 5, 5, 9], [6, 3, 2, 4]], float)
    expected = [[1, 7, 3, 8], [1, 3, 3, 5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    by_map = affine_move((8, 8), jnp.eye(2), jnp.array([3.0, 0.0]))
    rows, columns = np.mgrid[:8, :8].astype(np.float32)
    by_places = sampled_move(jnp.asarray(rows), jnp.asarray(columns - 3))
    for move in (by_map, by_places):
        np.testing.assert_allclose(move.boxes(boxes), expected, atol=1e-6)


def random_case(height, width, seed):
    """An image and a class map of which every pixel is another one, and a box."""
    rng = np.random.default_rng(seed)
    classes = jnp.arange(height * width, dtype=jnp.uint8).reshape(height, width)
    top, bottom = np.sort(rng.choice(height + 1, 2, replace=False))
    left, right = np.sort(rng.choice(width + 1, 2, replace=False))
    boxes = jnp.array([[top, left, bottom, right]], jnp.float32)
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    image = jnp.stack([classes / 255.0, jnp.asarray(inside, jnp.float32)], axis=-1)
    return image, classes, boxes


sizes = st.sampled_from([(1, 1), (1, 9), (7, 1), (6, 11)])
seeds = st.integers(0, 2**31 - 1)


@functools.cache
def compiled(change):
    """The change of an image alone, and its move of everything."""

    @jax.jit
    def of_all(key, image, classes, boxes):
        move = change.draw(key, classes.shape)
        return (
            change(key, image),
            move.image(image),
            move.class_map(classes, 255),
            move.boxes(boxes),
        )

    return lambda *arguments: map(np.asarray, of_all(*arguments))


FLIP = geometry.random_flip()
SHIFTS = {pixels: geometry.random_shift(pixels, fill=0.0) for pixels in (0, 1, 4)}


@settings(max_examples=40)
@given(sizes, seeds)
def test_a_flip_of_anything(size, seed):
    image, classes, boxes = random_case(*size, seed)
    key = jax.random.key(seed)
    alone, moved_image, moved, moved_boxes = compiled(FLIP)(key, image, classes, boxes)
    np.testing.assert_array_equal(moved_image, alone)
    flipped = (moved != np.asarray(classes)).any()
    np.testing.assert_array_equal(moved, classes[:, ::-1] if flipped else classes)
    np.testing.assert_array_equal(moved_image, image[:, ::-1] if flipped else image)
    np.testing.assert_array_equal(moved_boxes[0], hull(moved_image[..., 1] > 0))
    twice = compiled(FLIP)(key, moved_image, moved, moved_boxes)
    for back, before in zip(twice, (image, image, classes, boxes), strict=True):
        np.testing.assert_array_equal(back, before)


@settings(max_examples=60)
@given(sizes, seeds, st.sampled_from(sorted(SHIFTS)))
def test_a_shift_of_anything(size, seed, pixels):
    image, classes, boxes = random_case(*size, seed)
    alone, moved_image, moved, moved_boxes = compiled(SHIFTS[pixels])(
        jax.random.key(seed), image, classes, boxes
    )
    np.testing.assert_array_equal(moved_image, alone)
    shown = moved != 255
    levels = np.asarray(image)[..., 0].reshape(-1)
    expected = np.where(shown, levels[np.where(shown, moved, 0)], 0)
    np.testing.assert_array_equal(moved_image[..., 0], expected)
    offsets = np.argwhere(shown) - np.stack(np.divmod(moved[shown], size[1]), axis=-1)
    assert len(np.unique(offsets, axis=0)) <= 1 and (np.abs(offsets) <= pixels).all()
    assert shown.any() or pixels >= min(size)
    left = moved_image[..., 1] > 0
    np.testing.assert_array_equal(moved_boxes[0], hull(left) if left.any() else np.zeros(4))


@pytest.mark.slow
def test_the_same_on_any_number_of_devices():
    """Under jit over a mesh, shard_map and pmap, and for a part of the batch alone."""
    batch = {name: jnp.concatenate([array, array[:4]]) for name, array in BATCH.items()}
    change = make_augment("flip,rotate:20,shift:2,noise:0.1", num_classes=3, fields=FIELDS)
    whole = jax.jit(change)(KEY, batch, 0)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = PartitionSpec("data")
    part = len(batch["image"]) // len(jax.devices())

    def on_device(key, batch):
        return change(key, batch, part * jax.lax.axis_index("data"))

    spread = jax.device_put(batch, NamedSharding(mesh, split))
    parts = jax.tree.map(lambda x: x.reshape(-1, part, *x.shape[1:]), batch)
    by_pmap = jax.pmap(on_device, "data", in_axes=(None, 0))(KEY, parts)
    results = {
        "jit": jax.jit(change)(KEY, spread, 0),
        "shard_map": jax.jit(
            jax.shard_map(on_device, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split)
        )(KEY, spread),
        "pmap": jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_pmap),
    }
    for name, result in results.items():
        for key in FIELDS:
            off = np.abs(np.asarray(result[key], np.float32) - np.asarray(whole[key], np.float32))
            # A place halfway between pixels may be read from either.
            assert (off > 1e-3).mean() < 1e-3, (name, key)
    alone = jax.jit(change)(KEY, jax.tree.map(lambda x: x[8:12], batch), 8)
    np.testing.assert_allclose(alone["boxes"], whole["boxes"][8:12], atol=1e-3)


def test_images_have_gradients_and_class_maps_are_carried_along():
    change = make_augment("flip,rotate:20,elastic:20,hue:0.1", num_classes=3, fields=FIELDS)

    @jax.jit
    def loss(image):
        result = change(KEY, {**BATCH, "image": image}, 0)
        return jnp.sum(result["image"] * (result["classes"] == 1)[..., None])

    slope = np.asarray(jax.grad(loss)(BATCH["image"]))
    assert np.isfinite(slope).all()
    # What is in the rectangle after the move is what was in it before.
    of_object = slope[np.asarray(BATCH["classes"] == 1)].sum()
    assert of_object > 0.8 * slope.sum() > 0


def image_only():
    return Geometric(lambda key, size: Move(lambda image: image), kinds=("image",))


@pytest.mark.parametrize(
    ("policy", "keys", "message"),
    [
        ("flip,mixup:0.2", "image label classes", "cannot mix 'classes' .ClassMap. with them"),
        ("cutmix:1", "image label boxes", "cannot mix 'boxes' .Boxes. with them: leave it out"),
        (
            "mixup:0.2",
            "image classes",
            "needs 'label', a field of Label, and the keys are image, c",
        ),
        ("flip,augmix", "image classes", r"^augmix moves image, and cannot move 'classes' .class_"),
        (
            "augmix",
            "image boxes",
            r"^augmix moves image, and cannot move 'boxes' .boxes. with them",
        ),
        ("flip", "boxes", "augmentation changes images, and none of boxes is an image"),
        ((image_only(),), "image boxes", "image_only moves image, and cannot move 'boxes'"),
        ((change.compose(image_only()),), "image boxes", "moves image, and cannot move 'boxes'"),
    ],
)
def test_what_is_refused(policy, keys, message):
    fields = {**FIELDS, "label": kinds.Label(3)}
    with pytest.raises(UserError, match=message):
        make_augment(policy, num_classes=3, fields={key: fields[key] for key in keys.split()})


def test_different_sizes_are_refused():
    change = make_augment("flip", num_classes=3, fields=FIELDS)
    with pytest.raises(UserError, match=r"\(image 40x48, classes 20x24, core 40x48\): one draw"):
        change(KEY, {**BATCH, "classes": BATCH["classes"][:, ::2, ::2]}, 0)
