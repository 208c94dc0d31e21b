"""`cnnjax explain`: its page, its table, its errors."""

import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

import cnnjax
from cnnjax.commands import explain as command
from cnnjax.errors import UserError
from cnnjax.explain import belief, named, page
from cnnjax.run import classifier, cli, settings

METHODS = "gradient,grad_cam,occlusion(window=7,stride=7),guided_backpropagation"


def said(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(command.Config, command.main, [str(argument) for argument in argv])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_explained_on_one_page(run, capsys, tmp_path):
    out = said(capsys, "--run", run, "--methods", METHODS, "--count", 2, "--check", 4, "--top", 2)
    for method in (*named.read(METHODS), belief.RANDOM):
        assert re.search(rf"^{re.escape(getattr(method, 'text', method))} .*±", out, re.M)
    assert "sensitivity-n" in out
    text = (run / "explain" / "index.html").read_text()
    # Self-contained: nothing is fetched.
    assert not re.search(r"(src|href)=.(https?:)?//", text)
    # Two images; for each two classes of three methods and of one at each of LeNet's two stages.
    assert text.count("data:image/png") == 2 * (1 + 2 * (3 + 2))
    assert sorted(path.name for path in (run / "explain").glob("*.png")) == ["0.png", "1.png"]

    picture = tmp_path / "mine.png"
    Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).save(picture)
    flags = ("--methods", "gradient", "--check", 0, "--prepare", "image", "--out", tmp_path / "o")
    said(capsys, "--run", run, picture, *flags)
    assert "mine.png" in (tmp_path / "o" / "index.html").read_text()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--methods", "grad_cam,saliency"), "saliency"),
        (("--methods", "occlusion(size=4)"), "window"),
        (("--layers", "stage9"), "stage"),
        (("--layers", "head"), "no image"),
        (("--top", "0"), "--top"),
        (("--methods", ""), "no method"),
        (("--methods", "lrp(rule=epsilom)"), "did you mean epsilon"),
        (("--methods", "gradient(channels=keep)"), "sum or max"),
        (("--methods", "lrp,gradient(channels=sun)"), "sum or max"),
        (("--classes", "10"), "no class 10: the network has 0 to 9"),
        (("--classes", "cat"), "unknown class 'cat'"),
        (("--layers", "stage9", "missing.png"), "stage9"),
        (("--dataset", "folder:nowhere"), "nowhere"),
        (("--dataset", "digits"), "checksum"),
        (("--randomized-labels", "nowhere"), "nowhere"),
        (("--run", "nowhere"), "nowhere"),
        (("missing.png",), "missing.png"),
    ],
)
def test_bad_input_is_one_error_before_any_page(run, flags, text, capsys):
    argv = [*([] if "--run" in flags else ["--run", str(run)]), "--check", "0", *flags]
    argv += ["--out", str(run / "never")]
    with pytest.raises(SystemExit) as stop:
        cli.run(command.Config, command.main, argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()) == 1
    assert not (run / "never" / "index.html").exists()


def test_a_map_is_red_where_it_speaks_for_and_blue_where_against():
    image = np.full((2, 3, 1), 128, np.uint8)
    pixels = page.painted(image, np.array([[1.0, 0, -1], [0.5, 0, np.nan]])).astype(int)
    red, blue = pixels[..., 0], pixels[..., 2]
    assert red[0, 0] > blue[0, 0]
    assert red[0, 2] < blue[0, 2]
    assert red[1, 0] > blue[1, 0]
    assert (red == blue)[:, 1].all()
    assert red[1, 2] == blue[1, 2]


def test_a_blind_method_fails_and_the_gradient_of_a_linear_network_does_not():
    """The image itself, as a map, is the same whatever the network has learned."""
    model = cnnjax.models.create("mlp", num_classes=4, dense_widths=())
    image = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    variables = model.init(jax.random.key(2), image)
    blind = named.Method("blind", "gradient", lambda model, variables, image, target: image[..., 0])
    beliefs = belief.examine(
        jax.random.key(0), model, variables, image, [blind, *named.read("gradient_times_input")]
    )
    assert [each.method for each in beliefs] == ["blind", "gradient_times_input", belief.RANDOM]
    assert beliefs[0].random_all == pytest.approx((1.0, 0.0), abs=1e-5)
    assert [each.fails for each in beliefs] == [True, False, False]
    # Nor may it hardly change with a random last layer.
    assert beliefs[1]._replace(random_head=(0.95, 0.0)).fails
    assert "fails" in belief.table(beliefs, 6).splitlines()[2]
    with pytest.raises(UserError, match="no images"):
        belief.examine(jax.random.key(0), model, variables, image[:0], [blind])


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_clicks_change_the_maps_in_a_browser(tmp_path):
    image = np.zeros((4, 4, 1), np.uint8)
    keys = [("cam", layer, place) for place in (0, 1) for layer in ("low", "high")]
    keys += [("<other>", "", 0), ("<other>", "", 1)]
    maps = {key: np.eye(4) * value - np.eye(4)[::-1] for value, key in enumerate(keys, 1)}
    picture = page.Picture("a & b", image, [("cat", 0.7), ("</script>", 0.3)], maps)
    path = page.write_page(tmp_path / "page.html", [picture], heading="<i>")
    script = """<script>
    const sources = () => [...document.querySelectorAll("[data-method]")].map((i) => i.src);
    const steps = [sources()];
    document.querySelector('button[data-place="1"]').click(); steps.push(sources());
    document.querySelector('button[data-layer="0"]').click(); steps.push(sources());
    const result = JSON.stringify(steps.map((step) => step.map((source) => source.length > 99)));
    const changed = steps[0].map((_, i) => steps.map((s) => s[i]).filter((s, j, all) =>
        j === 0 || s !== all[j - 1]).length);
    document.title = `loaded ${result} changed ${changed}`;
    </script>"""
    path.write_text(path.read_text().replace("</body>", script + "</body>"))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    # The map of a layer changes by class and by layer, the other by class alone.
    assert title == "loaded [[true,true],[true,true],[true,true]] changed 3,2"
    assert "<i>" not in re.sub(r"(?s)<script>.*?</script>", "", done.stdout)


@pytest.mark.slow
def test_a_network_without_relus_is_explained_by_the_other_methods(tmp_path, capsys):
    directory = tmp_path / "run"
    argv = ["--model", "lenet5", "--model-arguments", "activation=tanh", "--devices", "1"]
    argv += ["--smoke", "--run-dir", str(directory)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])
        settings.launch(classifier.Config, classifier.main, argv)
    assert not stop.value.code
    out = said(capsys, "--run", directory, "--count", 1, "--check", 2)
    assert "without guided_backpropagation: lenet5 has no ReLU" in out
    assert "2 of 16 images or more" in out
    with pytest.raises(SystemExit) as stop:
        cli.run(
            command.Config,
            command.main,
            ["--run", str(directory), "--methods", "guided_backpropagation"],
        )
    assert stop.value.code == 2
    assert "Leave it out" in capsys.readouterr().err
