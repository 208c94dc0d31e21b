"""RegNet: the stages that the formula gives are those that the authors published."""

import pytest

from cnnjax import models
from cnnjax.models import regnet


@pytest.mark.parametrize(
    ("name", "depths", "widths", "group_width"),
    [
        # arXiv 2003.13678, appendix: the boxes of the X and Y models.
        ("regnet_x_400mf", (1, 2, 7, 12), (32, 64, 160, 400), 16),
        ("regnet_x_3_2gf", (2, 6, 15, 2), (96, 192, 432, 1008), 48),
        ("regnet_x_32gf", (2, 7, 13, 1), (336, 672, 1344, 2520), 168),
        ("regnet_y_400mf", (1, 3, 6, 6), (48, 104, 208, 440), 8),
        ("regnet_y_1_6gf", (2, 6, 17, 2), (48, 120, 336, 888), 24),
        ("regnet_y_8gf", (2, 4, 10, 1), (224, 448, 896, 2016), 56),
    ],
)
def test_stages_are_the_published_ones(name, depths, widths, group_width):
    preset = models.presets(name)
    preset.pop("se_ratio", None)
    table = regnet.stage_table(**preset)
    assert table == [
        (depth, width, group_width) for depth, width in zip(depths, widths, strict=True)
    ]


def test_y_has_gates_and_x_has_none():
    assert models.create("regnet_y_400mf", num_classes=10).se_ratio == 0.25
    assert models.create("regnet_x_400mf", num_classes=10).se_ratio == 0
