"""What holds for every family, for small members that a test file of their own has.

Each check is the test of the same rule elsewhere, run on one more network.
"""

from tests.models import test_dtypes, test_families, test_remat


def check_family(name, model, monkeypatch, *, side=8):
    """Gradients, half precision, and rematerialized blocks of a network of 3 classes."""
    monkeypatch.setitem(test_families.MODELS, name, model)
    monkeypatch.setitem(test_dtypes.MODELS, name, (model, (side, side, 3)))
    monkeypatch.setitem(test_remat.MODELS, name, (model, side))
    test_families.test_half_precision_computes_in_it_and_keeps_parameters_in_float32(name)
    test_families.test_an_image_without_batch_axis_is_one_clear_error(name)
    for dtype in ("bfloat16", "float16"):
        test_dtypes.test_layers_compute_in_it_and_what_adds_up_is_float32(name, dtype)
    test_remat.test_paths_stay_and_only_training_recomputes(name)
    test_families.test_gradient_reaches_every_parameter(name)
