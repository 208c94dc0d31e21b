"""Weights in Keras's files, read and written without Keras.

- `.weights.h5`, Keras 3: `layers/conv2d_17/vars/0` and so on. A layer is found by its class and its
  place among the model's layers of that class; its name is an attribute of it.
- `.keras`: a zip archive of such a file and the architecture, `config.json`, as Keras describes it.
  It is written on the pattern of another, whose weights are replaced.
- `.h5` of Keras 2 (the files that keras.applications downloads): a group for each layer's name.

The names of the arrays are the same for all: `conv1_bn/moving_mean`, the layer's name and the
variable's; the names of models or `Sequential`s that hold the layer stand before it.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from cnnjax.convert import sizes
from cnnjax.errors import UserError

Arrays = dict[str, np.ndarray]

ARCHIVED = "model.weights.h5"
# Models within models within ...
DEEPEST_MODEL = 16
ARCHITECTURE = "config.json"
VERSIONS = "metadata.json"
# The variables of a layer in the order in which Keras numbers them, by the name of its class.
VARIABLES = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "conv2d": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "depthwise_conv2d": ("depthwise_kernel", "bias"),
    "layer_normalization": ("gamma", "beta"),
    "layer_scale": ("gamma",),
    "normalization": ("mean", "variance", "count"),
}
# The variables that tell a layer's class, the surest first.
TELLING = {
    "moving_mean": "batch_normalization",
    "depthwise_kernel": "depthwise_conv2d",
    "kernel": "conv2d",
    "beta": "layer_normalization",
    "gamma": "layer_scale",
    "mean": "normalization",
}
# Of the differences from a template that an error lists.
MOST_LINES = 20
# Layers that Keras named, whose numbers go on from model to model of one program.
AUTOMATIC = re.compile(rf"(?P<kind>{'|'.join(VARIABLES)})(_(?P<number>\d+))?")


def read(path: Path) -> Arrays:
    """Returns `{name: array}` of a `.keras`, `.weights.h5` or `.h5` file, in the file's order.

    Layers to which Keras gave the names are numbered from 0, as in a program's first model.

    Raises:
      UserError: the file is of none of these formats, or holds links to others.
      OSError, ValueError, KeyError, zipfile.BadZipFile: it is damaged.
    """
    import h5py

    source: Any = path
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            if ARCHIVED not in archive.namelist():
                raise UserError(f"it has no {ARCHIVED}: save the model again with Keras 3.")
            sizes.check_archive(archive)
            source = io.BytesIO(archive.read(ARCHIVED))
    with h5py.File(source, "r") as file:
        if "layer_names" in file.attrs or "model_weights" in file:
            datasets = dict(_keras_2(file))
        elif "layers" in file:
            datasets = dict(_keras_3(_within(file, "layers"), ""))
        else:
            raise UserError(
                f"its groups are {', '.join(file) or 'none'}: neither Keras 3's weights of a "
                "Functional or Sequential model (layers) nor Keras 2's (layer_names)."
            )
        return {name: _array(value) for name, value in _numbered_from_zero(datasets).items()}


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes the weights of a Keras model, for its `load_weights`, as a `.weights.h5` file.

    Keras finds a layer by its place among those of its class, so the order of the arrays counts: it
    is that of `from_cnnjax(..., framework="keras")` and of `read`.

    Args:
      file: to write to.
      arrays: `{name: array}`.
      metadata: attributes of the file.

    Raises:
      UserError: a name is not of the form that `read` returns.
    """
    import h5py

    layers: dict[str, Arrays] = {}
    for name, array in arrays.items():
        layer, _, variable = name.rpartition("/")
        layers.setdefault(layer, {})[variable] = np.asarray(array)
    content = io.BytesIO()
    with h5py.File(content, "w") as target:
        target.attrs.update(metadata)
        places = _places({layer: _kind(layer, layers[layer]) for layer in layers})
        for layer, variables in layers.items():
            group = target.create_group(places[layer]).create_group("vars")
            group.attrs["name"] = layer.rpartition("/")[2]
            order = [name for name in VARIABLES[_kind(layer, variables)] if name in variables]
            for number, name in enumerate(order):
                dataset = group.create_dataset(str(number), data=variables[name])
                if variables[name].dtype == ml_dtypes.bfloat16:
                    dataset.attrs["dtype"] = "bfloat16"
    file.write(content.getbuffer())


def read_template(path: Path) -> dict[str, bytes]:
    """Returns the parts of a `.keras` file that `write_archive` needs.

    Raises:
      UserError: it is none, or has no weights of Keras 3.
      OSError, zipfile.BadZipFile: it is damaged.
    """
    if path.suffix != ".keras":
        raise UserError("it is no .keras file: name one that Keras's model.save has written.")
    with zipfile.ZipFile(path) as archive:
        for part in (ARCHIVED, ARCHITECTURE, VERSIONS):
            if part not in archive.namelist():
                raise UserError(f"it has no {part}: save the model again with Keras 3.")
        return {part: archive.read(part) for part in (VERSIONS, ARCHITECTURE, ARCHIVED)}


def write_archive(
    file: BinaryIO,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    template: Mapping[str, bytes],
) -> None:
    """Writes a `.keras` file, for `keras.models.load_model`: a template's, with other weights.

    The model is not compiled: the optimizer and its state, if the template has them, are left out.

    Args:
      file: to write to.
      arrays: `{name: array}`, as `read` returns them; each tensor of the template once, whatever
        the order.
      metadata: attributes of the weights.
      template: of `read_template`.

    Raises:
      UserError: the tensors or their shapes are not the template's.
    """
    import h5py

    content = io.BytesIO(template[ARCHIVED])
    with h5py.File(content, "r+") as target:
        datasets = _numbered_from_zero(dict(_keras_3(_within(target, "layers"), "")))
        _check_same(arrays, datasets)
        for name, dataset in datasets.items():
            _replace(dataset, arrays[name])
        if "optimizer" in target:
            del target["optimizer"]
        target.attrs.update(metadata)
    architecture = json.loads(template[ARCHITECTURE])
    architecture["compile_config"] = None
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(VERSIONS, template[VERSIONS])
        archive.writestr(ARCHITECTURE, json.dumps(architecture))
        archive.writestr(ARCHIVED, content.getbuffer())


def _check_same(arrays: Mapping[str, np.ndarray], datasets: Mapping[str, Any]) -> None:
    """Raises a UserError that lists what differs between weights and the template for them."""
    problems = [f"{name} is not in the template" for name in arrays if name not in datasets]
    problems += [f"the template's {name} is missing" for name in datasets if name not in arrays]
    for name in arrays.keys() & datasets.keys():
        ours, theirs = np.shape(arrays[name]), tuple(datasets[name].shape)
        if ours != theirs:
            problems.append(f"{name} is {list(ours)}, the template's {list(theirs)}")
    if problems:
        shown = "".join(f"\n  {line}" for line in sorted(problems)[:MOST_LINES])
        raise UserError(
            f"the template is of another network, image or number of classes, {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}:{shown}"
        )


def _kind(layer: str, variables: Mapping[str, np.ndarray]) -> str:
    """Returns the class of a layer, as Keras writes it, told by its variables."""
    kind = next((TELLING[name] for name in TELLING if name in variables), "")
    if kind == "conv2d" and variables["kernel"].ndim == 2:
        kind = "dense"
    if not layer or not set(variables) <= set(VARIABLES.get(kind, ())):
        raise UserError(
            f"{layer or 'a layer without name'} has {', '.join(sorted(variables))}, as no layer of "
            "keras.applications: write .weights.h5 files from the names of framework='keras'."
        )
    return kind


def _places(kinds: Mapping[str, str]) -> dict[str, str]:
    """Returns the group of each layer: its class and its number among those of its model."""
    counts: dict[str, int] = {}
    models: dict[str, str] = {"": ""}

    def count(base: str) -> str:
        counts[base] = counts.get(base, -1) + 1
        return f"{base}_{counts[base]}" if counts[base] else base

    places = {}
    for layer, kind in kinds.items():
        *parents, _ = layer.split("/")
        inside = ""
        for parent in parents:
            outside, inside = inside, f"{inside}{parent}/"
            if inside not in models:
                models[inside] = count(f"{models[outside]}layers/sequential") + "/"
        places[layer] = count(f"{models[inside]}layers/{kind}")
    return places


def _keras_3(layers: Any, inside: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields the datasets of the layers of one model, then those of models within it."""
    if depth > DEEPEST_MODEL:
        raise UserError(f"its models are nested more than {DEEPEST_MODEL} deep: it is damaged.")
    for key in sorted(layers, key=_kind_and_number):
        layer = _within(layers, key)
        variables: Any = {}
        name = key
        if "vars" in layer:
            variables = _within(layer, "vars")
            name = str(variables.attrs.get("name", ""))
        if len(variables) and not name:
            raise UserError(
                f"its layer {key} has no name: load it with Keras 3.6 or later and save it again."
            )
        kind = _kind_and_number(key)[0]
        for number, variable in _variable_names(kind, list(variables)).items():
            yield f"{inside}{name}/{variable}", _stored(_within(variables, number))
        if "layers" in layer:
            yield from _keras_3(_within(layer, "layers"), f"{inside}{name}/", depth + 1)


def _kind_and_number(key: str) -> tuple[str, int]:
    kind, _, number = key.rpartition("_")
    return (kind, int(number)) if kind and number.isdigit() else (key, 0)


def _variable_names(kind: str, numbers: list[str]) -> dict[str, str]:
    """Returns `{number: name}` of a layer's variables; a number is the name where none is known."""
    names = VARIABLES.get(kind, ())
    if kind == "batch_normalization" and sorted(numbers) == ["0", "1", "2"]:
        # Without scales (`scale=False`) the numbers begin at beta.
        names = names[1:]
    known = {str(number): name for number, name in enumerate(names)}
    return {number: known.get(number, number) for number in sorted(numbers, key=_kind_and_number)}


def _keras_2(file: Any) -> Iterator[tuple[str, Any]]:
    """Yields the datasets of a file of Keras 2, whose weights have their layers' names."""
    depthwise = _depthwise_layers(file.attrs.get("model_config", "{}"))
    group = file if "layer_names" in file.attrs else _within(file, "model_weights")
    for layer in _texts(group, "layer_names"):
        weights = _within(group, layer)
        names = [name.removesuffix(":0") for name in _texts(weights, "weight_names")]
        owners = {name.rpartition("/")[0].rpartition("/")[2] for name in names}
        for name, key in zip(names, _texts(weights, "weight_names"), strict=True):
            path, _, variable = name.rpartition("/")
            # A Sequential's weights have the names of its layers in theirs.
            owner = f"{layer}/{path.rpartition('/')[2]}" if len(owners) > 1 else layer
            if variable == "kernel" and layer in depthwise:
                variable = "depthwise_kernel"
            yield f"{owner}/{variable}", _stored(_within(weights, key))


def _depthwise_layers(config: str) -> set[str]:
    """Returns the layers whose kernels Keras 3 calls only kernels in files of the old format."""
    layers = json.loads(config).get("config", {}).get("layers", [])
    return {row["config"]["name"] for row in layers if row["class_name"] == "DepthwiseConv2D"}


def _texts(group: Any, attribute: str) -> list[str]:
    """Returns a list of names; Keras 2 cuts long ones into attributes with numbers."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    texts = [text for part in parts for text in group.attrs[part]]
    return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]


def _within(group: Any, key: str) -> Any:
    """Returns what a group holds under `key`; not through links, which may leave the file."""
    import h5py

    for part in key.split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UserError(f"{group.name} holds no {part} of its own: it is damaged or a link.")
        group = group[part]
    return group


def _stored(dataset: Any) -> Any:
    """Returns a dataset whose numbers are in its file; a UserError for another."""
    if (
        dataset.external
        or dataset.is_virtual
        or (dataset.size and not dataset.id.get_storage_size())
    ):
        raise UserError(f"the numbers of {dataset.name} are not in the file.")
    sizes.check_expansion(dataset.name, dataset.nbytes, dataset.id.get_storage_size())
    return dataset


def _array(dataset: Any) -> np.ndarray:
    array = np.asarray(dataset[()])
    return array.view(ml_dtypes.bfloat16) if _is_bfloat16(dataset) else array


def _replace(dataset: Any, array: np.ndarray) -> None:
    """Puts other numbers into a dataset, in the dtype that it has."""
    dtype = np.dtype(ml_dtypes.bfloat16) if _is_bfloat16(dataset) else dataset.dtype
    dataset[...] = np.asarray(array).astype(dtype).view(dataset.dtype)


def _is_bfloat16(dataset: Any) -> bool:
    return dataset.attrs.get("dtype") == "bfloat16"


def _numbered_from_zero(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns `arrays` with the layers that Keras named numbered as in a fresh program."""
    found: dict[str, set[int]] = {}
    for name in arrays:
        match = AUTOMATIC.fullmatch(name.split("/")[-2])
        if match:
            found.setdefault(match["kind"], set()).add(int(match["number"] or 0))
    ranks = {kind: sorted(numbers) for kind, numbers in found.items()}

    def rename(name: str) -> str:
        *parents, layer, variable = name.split("/")
        match = AUTOMATIC.fullmatch(layer)
        if match:
            rank = ranks[match["kind"]].index(int(match["number"] or 0))
            layer = f"{match['kind']}_{rank}" if rank else match["kind"]
        return "/".join([*parents, layer, variable])

    return {rename(name): array for name, array in arrays.items()}
