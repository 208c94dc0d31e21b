"""`cnnjax models`: the list, one network, mistakes."""

import re
from pathlib import Path

import pytest

from cnnjax.commands.models import main
from cnnjax.errors import UserError


def test_it_lists(capsys):
    assert main(["lenet5*"]) == 0
    printed = capsys.readouterr().out
    assert "lenet5_1998" in printed
    assert "60,000" in printed
    assert "281,640" in printed


def test_it_prints_one_model(capsys):
    assert main(["cnn_32_64_dense64", "--num-classes", "26"]) == 0
    printed = capsys.readouterr().out
    assert "dense1  Dense     64" in printed
    assert f"{64 * 26 + 26:,}" in printed
    assert "source: cnnjax.models.simple.SimpleCNN(dense_widths=(64,))" in printed
    place = re.search(r"^in (.*simple\.py), line (\d+)$", printed, re.MULTILINE)
    assert Path(place[1]).read_text().splitlines()[int(place[2]) - 1].startswith("class SimpleCNN(")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vgg61"], "unknown model 'vgg61': did you mean vgg"),
        (["zzz*"], "no model matches 'zzz*'"),
        (["lenet5", "--image-shape", "8", "8", "1"], "at least 16x16 pixels, got 8x8"),
        (["lenet5", "--num-classes", "ten"], "--num-classes: invalid int value: 'ten'"),
        (["--classes"], "unrecognized arguments: --classes (see cnnjax models --help)"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        main(arguments)
    assert "\n" not in str(error.value)
