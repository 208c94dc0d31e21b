"""Names of other libraries: what they mean, the fields they give, what is near a wrong one."""

import pytest

from cnnjax import convert, models
from cnnjax.commands import models as command
from cnnjax.errors import UserError
from cnnjax.models import elsewhere


@pytest.mark.parametrize(
    ("text", "name", "library", "tag"),
    [
        ("resnet50", "resnet50", "", ""),
        ("ResNet50", "resnet50", "keras", ""),
        ("keras/ResNet50V2", "resnet50_v2", "keras", ""),
        ("torchvision/resnet50", "resnet50", "torchvision", ""),
        ("timm/resnet50", "resnet50", "timm", ""),
        ("resnet50.a1_in1k", "resnet50", "timm", "a1_in1k"),
        ("timm/resnetv2_50.a1h_in1k", "resnet50_v2", "timm", "a1h_in1k"),
        ("hf-hub:timm/seresnet50.ra2_in1k", "se_resnet50", "timm", "ra2_in1k"),
        ("mobilenetv3_large_100", "mobilenet_v3_large", "timm", ""),
        ("tf_efficientnet_b0.ns_jft_in1k", "efficientnet_b0", "timm", "ns_jft_in1k"),
        ("ResNet50_Weights.IMAGENET1K_V2", "resnet50", "torchvision", "IMAGENET1K_V2"),
        ("RegNet_Y_400MF_Weights", "regnet_y_400mf", "torchvision", ""),
        ("regnety_080_tv", "regnet_y_8gf", "timm", ""),
        ("EfficientNetB7", "efficientnet_b7", "keras", ""),
    ],
)
def test_names_of_other_libraries(text, name, library, tag):
    found = models.find(text)
    assert (found.name, found.library, found.tag) == (name, library, tag)
    assert models.input_shape(text) == models.input_shape(name)
    assert models.canonical_classes(text) == 1000


def test_a_network_has_the_fields_of_the_library_that_was_named():
    keras, ours = (models.create(name, num_classes=10) for name in ("ResNet50", "resnet50"))
    assert (keras.version, keras.conv_bias, keras.layers.norm_epsilon) == ("v1", True, 1.001e-5)
    assert (ours.version, ours.conv_bias) == ("v1.5", False)
    assert models.create("mobilenetv1_100", num_classes=10).layers.activation == "relu6"
    assert models.create("tf_efficientnet_b0", num_classes=10).padding == "same"
    # What is given goes before them.
    name, fields = models.read_model("ResNet50(version=v2_slim)", {"conv_bias": False})
    assert (name, fields["version"], fields["conv_bias"]) == ("resnet50", "v2_slim", False)
    assert models.presets("ResNet50")["conv_bias"] is True
    assert models.model_fields("ResNet50")["version"] == "v1"


def test_every_name_gives_what_its_library_computes():
    for name, row in models.MODELS.items():
        for library, there in row.also.items():
            if library not in elsewhere.LIBRARIES:
                continue
            assert models.find(f"{library}/{there}").name == name
            model = models.create(f"{library}/{there}", num_classes=10)
            if library in convert.frameworks_for(model):
                # Refuses other fields than the library has.
                convert.names._check_fields(model, convert.find_names(model, library))


def test_no_library_has_a_name_twice():
    for library in elsewhere.LIBRARIES:
        theirs = [row.also[library] for row in models.MODELS.values() if library in row.also]
        assert len(theirs) == len(set(theirs))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resnetv2_51", "unknown model 'resnetv2_51': did you mean resnetv2_50"),
        ("ResNet51", "did you mean ResNet50"),
        ("keras/resnet50", "did you mean keras/ResNet50"),
        ("tim/resnet50", "unknown library of a model's name 'tim': did you mean timm"),
        # timm calls it otherwise.
        ("timm/resnet50_v2", "unknown model 'timm/resnet50_v2': did you mean"),
        ("resnet99.a1_in1k", "unknown model"),
        ("", "unknown model '': `cnnjax models` lists what there is.$"),
        (".", "unknown model '.'"),
    ],
)
def test_unknown_names_get_the_nearest_of_all_libraries(text, said):
    with pytest.raises(UserError, match=said):
        models.create(text, num_classes=10)


def test_the_command_says_which_definition_it_means(capsys):
    command.main(["ResNet50"])
    printed = capsys.readouterr().out
    assert printed.startswith(
        "ResNet50 is keras's network: resnet50(version=v1, conv_bias=True, norm_epsilon=1.001e-05)"
    )
    # Of keras.applications.ResNet50: 25,636,712, of which 53,120 are not trained.
    assert "25,583,592" in printed
    command.main(["resnet50"])
    printed = capsys.readouterr().out
    assert (
        "other libraries' definitions: keras/ResNet50 (with version=v1, conv_bias=True" in printed
    )


def test_timms_networks_without_tf_have_pytorchs_padding():
    there, here = (
        models.create(name, num_classes=10)
        for name in ("timm/efficientnet_lite0", "timm/tf_efficientnet_lite0")
    )
    assert (there.padding, there.layers.norm_epsilon) == ("symmetric", 1e-5)
    assert (here.padding, here.layers.norm_epsilon) == ("same", 1e-3)
    for model in (there, here):
        convert.names._check_fields(model, convert.find_names(model, "timm"))
    assert models.find("efficientnet_lite0.ra_in1k").arguments["padding"] == "symmetric"


@pytest.mark.parametrize("number", [True, 10**12])
def test_impossible_numbers_of_classes_are_refused(number):
    with pytest.raises(UserError, match="num_classes"):
        models.create("resnet18", num_classes=number)
