"""Random changes of training images, filters of all images, and the policies that name them."""

from typing import TYPE_CHECKING

from cnnjax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    (
        "color",
        "corrupt",
        "filters",
        "geometry",
        "mixup",
        "policy",
        "randaugment",
        "views",
    ),
    {
        "geometry": (
            "apply_per_image",
            "compose",
            "normalize",
            "random_affine",
            "random_flip",
        ),
        "policy": ("make_augment",),
        "filters": ("make_filter",),
        "views": ("fixed_views", "two_views"),
    },
)

if TYPE_CHECKING:
    from cnnjax.augment import color as color
    from cnnjax.augment import corrupt as corrupt
    from cnnjax.augment import filters as filters
    from cnnjax.augment import geometry as geometry
    from cnnjax.augment import mixup as mixup
    from cnnjax.augment import policy as policy
    from cnnjax.augment import randaugment as randaugment
    from cnnjax.augment import views as views
    from cnnjax.augment.filters import make_filter as make_filter
    from cnnjax.augment.geometry import apply_per_image as apply_per_image
    from cnnjax.augment.geometry import compose as compose
    from cnnjax.augment.geometry import normalize as normalize
    from cnnjax.augment.geometry import random_affine as random_affine
    from cnnjax.augment.geometry import random_flip as random_flip
    from cnnjax.augment.policy import make_augment as make_augment
    from cnnjax.augment.views import fixed_views as fixed_views
    from cnnjax.augment.views import two_views as two_views
