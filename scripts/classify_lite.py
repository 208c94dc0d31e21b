"""Classifies images with a .tflite file, on a Raspberry Pi or any small computer.

    pip install ai-edge-litert pillow
    python classify_lite.py model.tflite photo.jpg
    python classify_lite.py model.tflite digit.png --invert --time 200 --threads 1

This one file is all that has to be copied there, with what `cnnjax export --run RUN --out
model.tflite` wrote: the network, and model.tflite.json with class names and image size. It needs
neither JAX nor TensorFlow nor cnnjax. `--invert` is for dark digits on light paper, as MNIST's are
light on dark. `--time N` prints the median milliseconds of N calls, and the memory of the process.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image, ImageOps


def prepared(image, shape, fit):
    """Returns uint8 [height, width, channels] of a PIL image, as the training images were made."""
    height, width, channels = shape
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    if fit == "pad":
        # Shrunk as a whole where it is too large, then centered on black.
        image.thumbnail((width, height), Image.Resampling.BILINEAR)
        canvas = Image.new(image.mode, (width, height))
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = canvas
    elif fit.startswith(("crop", "center")):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(height, width, channels)


def probabilities(logits):
    """Softmax of several logits, sigmoid of one: then of the first class and the second."""
    if len(logits) == 1:
        second = 1 / (1 + np.exp(-logits[0]))
        return np.array([1 - second, second])
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def classify(reader, image):
    """Returns the logits of one image."""
    entry, result = reader.get_input_details()[0], reader.get_output_details()[0]
    reader.set_tensor(entry["index"], image[None])
    reader.invoke()
    return reader.get_tensor(result["index"])[0]


def main():
    """Prints the likeliest classes of each image."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--top", type=int, default=3, help="classes to print")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--invert", action="store_true", help="of dark digits on light paper")
    parser.add_argument(
        "--time", type=int, default=0, metavar="CALLS", help="measure so many calls"
    )
    arguments = parser.parse_args()
    beside = arguments.model.with_name(f"{arguments.model.name}.json")
    for path in (arguments.model, beside, *arguments.images):
        if not path.is_file():
            sys.exit(f"there is no file {path}")
    about = json.loads(beside.read_text())
    names, shape = about["class_names"], about["input_shape"][1:]
    if about["input_dtype"] != "uint8":
        sys.exit(f"{arguments.model} takes float32: export it without --preprocess none")
    reader = Interpreter(str(arguments.model), num_threads=arguments.threads)
    reader.allocate_tensors()
    for path in arguments.images:
        with Image.open(path) as file:
            image = prepared(file, shape, about.get("fit", "resize"))
        image = 255 - image if arguments.invert else image
        likely = probabilities(classify(reader, image))
        best = likely.argsort()[::-1][: arguments.top]
        print(f"{path}: " + "  ".join(f"{names[i]} {likely[i]:.1%}" for i in best))
    if arguments.time:
        times = []
        for _ in range(arguments.time):
            start = time.perf_counter()
            classify(reader, image)
            times.append((time.perf_counter() - start) * 1e3)
        # Kilobytes on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{statistics.median(times):.3g} ms a call of one image with {arguments.threads} "
            f"threads, {peak:.0f} MiB of memory at most"
        )


if __name__ == "__main__":
    main()
