"""Images from encoded files to one size, as TensorFlow operations.

Every function that needs TensorFlow gets it from `tensorflow()`, which hides the accelerators from
it first: TensorFlow would otherwise take all of their memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cnnjax.data.image_files import fit_image, parse_fit, shrunk_size

# M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of mallopt(3).
_MALLOC_OPTIONS = {-3: 32 * 2**20, -1: 256 * 2**20, -2: 32 * 2**20}
# (image tensor [height, width, channels], seed int64 [2]) -> image tensor.
HostAugment = Callable[[Any, Any], Any]


def tensorflow() -> Any:
    """Imports TensorFlow (6 to 12 seconds the first time) and hides all accelerators from it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Of no use for reading data, and TensorFlow announces it at each start.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        # RuntimeError: the user's own program has initialized TensorFlow's devices already.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    return tf


@functools.cache
def keep_freed_memory() -> None:
    """Makes glibc keep what threads free, some tens of MB each, instead of returning it at once.

    Threads that decode ask for the same few hundred KB again for each image. Given back to the
    system in between, each page is cleared anew: as much time again as decoding a small photograph.
    Other C libraries are left alone.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, num_bytes in _MALLOC_OPTIONS.items():
            mallopt(parameter, num_bytes)


def decoder(
    feature: Any,
    image_size: tuple[int, int] | None,
    fit: str,
    host_augment: HostAugment | None,
    smallest_area: float = 0.0,
) -> HostAugment:
    """Returns `(encoded, seed) -> image`: decoded, augmented and fitted.

    Args:
      feature: the tfds feature of the image.
      image_size: (height, width); None where all images have the feature's.
      fit: of the whole image: see `cnnjax.data.image_files.fit_image`.
      host_augment: `(image, seed) -> image`, before the image is fitted.
      smallest_area: above 0 a random part is decoded: see `random_crop_decoder`.
    """

    def whole(encoded: Any, seed: Any) -> Any:
        if parse_fit(fit)[0] == "center":
            return pillow_tensor(encoded, feature.shape[2])
        return feature.decode_example(encoded)

    decode: HostAugment = whole
    if smallest_area:
        decode = random_crop_decoder(feature, image_size or feature.shape[:2], smallest_area)
        # It has the size already, and is not to be cut again.
        fit = "resize"
    fitted = (lambda image: image) if image_size is None else tensor_fitter(image_size, fit)
    if host_augment is None:
        return lambda encoded, seed: fitted(decode(encoded, seed))
    return lambda encoded, seed: fitted(host_augment(decode(encoded, seed), seed))


def tensor_fitter(size: tuple[int, int], fit: str) -> Callable[[Any], Any]:
    """`cnnjax.data.image_files.fit_image` as TensorFlow operations on one uint8 image.

    Where nothing is scaled, the two are the same; scaled pixels may differ by rounding.
    """
    tf = tensorflow()
    height, width = size
    kind, share = parse_fit(fit)
    if kind == "crop":
        return _tensor_cropper(size, share)
    if kind == "center":
        return lambda image: _by_python(
            lambda pixels: fit_image(pixels, size, fit), image, (*size, image.shape[-1])
        )

    def fitted_size(image: Any) -> Any:
        if kind == "resize":
            return tf.constant([height, width])
        found = tf.cast(tf.shape(image)[:2], tf.float32)
        scale = tf.minimum(1.0, tf.reduce_min(tf.constant([height, width], tf.float32) / found))
        return tf.maximum(1, tf.cast(tf.round(found * scale), tf.int32))

    def fitted(image: Any) -> Any:
        static = image.shape[:2]
        fits_as_it_is = static.is_fully_defined() and (
            tuple(static) == size
            or (kind == "pad" and shrunk_size(tuple(static), size) == tuple(static))
        )
        if not fits_as_it_is:
            image = resize_tensor(image, fitted_size(image))
        found = tf.shape(image)
        top, left = (height - found[0]) // 2, (width - found[1]) // 2
        below, right = height - found[0] - top, width - found[1] - left
        image = tf.pad(image, [[top, below], [left, right], [0, 0]])
        return tf.ensure_shape(image, [height, width, None])

    return fitted


def pillow_tensor(encoded: Any, channels: int) -> Any:
    """Decodes an image as Pillow does, whose JPEG differs from TensorFlow's by rounding."""
    mode = "L" if channels == 1 else "RGB"

    def decode(content: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert(mode)).reshape(image.height, image.width, channels)

    return _by_python(decode, encoded, (None, None, channels))


def _by_python(function: Callable, tensor: Any, shape: tuple[int | None, ...]) -> Any:
    tf = tensorflow()
    made = tf.numpy_function(function, [tensor], tf.uint8, stateful=False)
    return tf.ensure_shape(made, shape)


def _tensor_cropper(size: tuple[int, int], share: float) -> Callable[[Any], Any]:
    """`fit_image` with `"crop:SHARE"` as TensorFlow operations on one uint8 image."""
    tf = tensorflow()

    def cropped(image: Any) -> Any:
        found = tf.cast(tf.shape(image)[:2], tf.float32)
        wanted = tf.constant(size, tf.float32)
        window = tf.round(wanted * (share * tf.reduce_min(found / wanted)))
        window = tf.maximum(1, tf.cast(window, tf.int32))
        start = (tf.shape(image)[:2] - window) // 2
        image = image[start[0] : start[0] + window[0], start[1] : start[1] + window[1]]
        return resize_tensor(image, size)

    return cropped


def random_crop_decoder(
    feature: Any, size: tuple[int, int], smallest_area: float
) -> Callable[[Any, Any], Any]:
    """Returns `(encoded, seed) -> image`, a random part of the image stretched to `size`.

    Szegedy et al. 2015 (arXiv 1409.4842), section 6: the part's area is uniform in
    [`smallest_area`, 1] of the image's, its width 3/4 to 4/3 of its height; where ten draws do not
    fit into the image, it is the whole. Of a JPEG only what the part needs is decoded.

    Args:
      feature: the tfds feature of the image.
      size: (height, width).
      smallest_area: in (0, 1]; 0.08 in the paper.
    """
    tf = tensorflow()
    channels = feature.shape[2]

    def window_of(shape: Any, seed: Any) -> Any:
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(smallest_area, 1.0),
            max_attempts=10,
        )
        return tf.concat([begin[:2], extent[:2]], axis=0)

    def from_jpeg(encoded: Any, seed: Any) -> Any:
        window = window_of(tf.io.extract_jpeg_shape(encoded), seed)
        return tf.image.decode_and_crop_jpeg(encoded, window, channels=channels)

    def from_other(encoded: Any, seed: Any) -> Any:
        image = feature.decode_example(encoded)
        window = window_of(tf.shape(image), seed)
        return tf.slice(image, [window[0], window[1], 0], [window[2], window[3], channels])

    def decoded(encoded: Any, seed: Any) -> Any:
        image = tf.cond(
            tf.io.is_jpeg(encoded),
            lambda: from_jpeg(encoded, seed),
            lambda: from_other(encoded, seed),
        )
        return resize_tensor(tf.ensure_shape(image, (None, None, channels)), size)

    return decoded


def resize_tensor(image: Any, size: Any, *, antialias: bool = True) -> Any:
    """Resizes a uint8 image tensor to (height, width), bilinear."""
    tf = tensorflow()
    image = tf.round(tf.image.resize(image, size, antialias=antialias))
    if antialias:  # The weights of many pixels add up to one only up to rounding.
        image = tf.clip_by_value(image, 0.0, 255.0)
    return tf.cast(image, tf.uint8)
