"""Random changes of training images, filters of all images, and the policies that name them."""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "alternating",
        "change",
        "color",
        "corrupt",
        "corruption_blurs",
        "corruption_weather",
        "corruptions",
        "filters",
        "geometry",
        "jpeg",
        "mixup",
        "pixels",
        "policy",
        "randaugment",
        "sampling",
        "views",
    ),
    {
        "alternating": ("alternating_flip",),
        "corruptions": ("corruption",),
        "change": ("Geometric", "Move", "apply_per_image", "compose"),
        "geometry": ("affine_move", "random_affine", "random_flip", "sampled_move"),
        "pixels": ("normalize",),
        "policy": ("make_augment",),
        "filters": ("make_filter",),
        "views": ("fixed_views", "two_views"),
    },
)

if TYPE_CHECKING:
    from cnnjax.augment import alternating as alternating
    from cnnjax.augment import change as change
    from cnnjax.augment import color as color
    from cnnjax.augment import corrupt as corrupt
    from cnnjax.augment import corruption_blurs as corruption_blurs
    from cnnjax.augment import corruption_weather as corruption_weather
    from cnnjax.augment import corruptions as corruptions
    from cnnjax.augment import filters as filters
    from cnnjax.augment import geometry as geometry
    from cnnjax.augment import jpeg as jpeg
    from cnnjax.augment import mixup as mixup
    from cnnjax.augment import pixels as pixels
    from cnnjax.augment import policy as policy
    from cnnjax.augment import randaugment as randaugment
    from cnnjax.augment import sampling as sampling
    from cnnjax.augment import views as views
    from cnnjax.augment.alternating import alternating_flip as alternating_flip
    from cnnjax.augment.change import Geometric as Geometric
    from cnnjax.augment.change import Move as Move
    from cnnjax.augment.change import apply_per_image as apply_per_image
    from cnnjax.augment.change import compose as compose
    from cnnjax.augment.corruptions import corruption as corruption
    from cnnjax.augment.filters import make_filter as make_filter
    from cnnjax.augment.geometry import affine_move as affine_move
    from cnnjax.augment.geometry import random_affine as random_affine
    from cnnjax.augment.geometry import random_flip as random_flip
    from cnnjax.augment.geometry import sampled_move as sampled_move
    from cnnjax.augment.pixels import normalize as normalize
    from cnnjax.augment.policy import make_augment as make_augment
    from cnnjax.augment.views import fixed_views as fixed_views
    from cnnjax.augment.views import two_views as two_views
