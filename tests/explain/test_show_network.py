"""`cnnjax show-network`: its page, its table, its errors; and what it is made of."""

import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

from cnnjax.commands import show_network as command
from cnnjax.explain.inside import page, views
from cnnjax.run import cli


def said(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(command.Config, command.main, [str(argument) for argument in argv])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_network_is_shown_on_one_page(run, capsys):
    flags = ("--channels", 2, "--count", 2, "--examples", 150, "--top", 3, "--points", 40)
    out = said(capsys, "--run", run, *flags, "--steps", 3, "--classes", "7", "--maps", 4)
    # Stages that are no images are counted among the neurons too.
    for stage, channels in (("stage1", 6), ("stage2", 16), ("stage3", 120), ("stage4", 84)):
        assert re.search(rf"^{stage} +{channels} +[\d.]+% ", out, re.M)
    text = (run / "network" / "index.html").read_text()
    assert not re.search(r"(src|href)=.(https?:)?//", text)
    assert "receptive field: 16 x 16 pixels, stride 4" in text
    # Of each of two layers: maps of two images, a field, filters, and two channels of two pictures;
    # a class; the sheet of the points.
    assert text.count("data:image/png") == 2 * (2 + 1 + 1 + 2 * 2) + 1 + 1
    names = {path.name for path in (run / "network").glob("*.png")}
    assert {"classes.png", "fields.png", "filters-conv2.png", "maps-stage1-1.png"} <= names
    assert {"channels-stage2.png", "points.png"} <= names


@pytest.mark.slow
def test_files_alone_are_looked_at_where_there_are_no_data(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "cnnjax.run.again.data_of_run",
        lambda *a, **k: (_ for _ in ()).throw(command.UserError("x")),
    )
    picture = tmp_path / "mine.png"
    Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).save(picture)
    flags = ("--steps", 0, "--layers", "conv1", "--prepare", "image", "--out", tmp_path / "o")
    out = said(capsys, "--run", run, picture, *flags)
    assert "only the given images are looked at" in out
    text = (tmp_path / "o" / "index.html").read_text()
    assert "mine.png" in text and "6 x 6 pixels, stride 2" in text
    # Neither points nor made images; the layers that were asked for alone.
    assert "<svg" not in text and "made for it" not in text and "stage3" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--layers", "stage9"), "did you mean"),
        (("--layers", "head"), "head is no image"),
        (("--channels", "0"), "--channels 0"),
        (("--count", "-1"), "--count -1"),
        (("--top", "0"), "--top 0"),
        (("--points", "2"), "--points 2: give at least 4"),
        (("--classes", "seven"), "class"),
        (("--parametrization", "wavelet"), "wavelet"),
        (("--run", "nowhere"), "nowhere"),
        (("missing.png",), "missing.png"),
        (("--dataset", "folder:nowhere"), "nowhere"),
        (("--dataset", "digits"), "digits"),
    ],
)
def test_bad_input_is_one_error_before_any_page(run, flags, text, capsys):
    argv = [*([] if "--run" in flags else ["--run", str(run)]), *flags]
    argv += ["--out", str(run / "never")]
    with pytest.raises(SystemExit) as stop:
        cli.run(command.Config, command.main, argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()) == 1
    assert not (run / "never").exists()


def points_of(count, seed=0):
    draw = np.random.default_rng(seed)
    return views.Points(
        {"PCA": draw.normal(size=(count, 2)), "t-SNE": draw.normal(size=(count, 2))},
        np.arange(count) % 2,
        np.array([0, *(np.arange(1, count) % 2)]) ^ np.eye(1, count, 1, dtype=int)[0],
        ("<cat>", "dog"),
        draw.integers(0, 256, (count, 5, 4, 1)).astype(np.uint8),
    )


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_clicks_change_layer_and_point_in_a_browser(tmp_path):
    tile = views._joined(np.full((1, 4, 4, 3), 9, np.uint8), 1, 0)
    content = page.png(tile)
    channels = [views.Channel(3, "a < b", content, content)]
    layers = [views.Layer(f"stage{n}", ["fact"], [("maps", content)], channels) for n in (1, 2)]
    path = page.write_page(
        tmp_path / "page.html",
        layers,
        heading="<i>",
        points=points_of(10),
        classes=[("7", content)],
    )
    script = """<script>
    const said = () => document.getElementById("told").textContent;
    const visible = () => [...document.querySelectorAll("section")].map((s) => !s.hidden);
    const place = () => document.querySelector('circle[data-image="2"]').getAttribute("cx");
    const before = [visible(), place()];
    document.querySelector('button[data-layer="0"]').click();
    document.querySelector('button[data-map="0"]').click();
    const first = said();
    document.querySelector('circle[data-image="4"]').dispatchEvent(new Event("click"));
    const kept = said();
    document.querySelector('circle[data-image="6"]').dispatchEvent(new Event("mouseover"));
    const seen = getComputedStyle(document.getElementById("seen"));
    document.title = JSON.stringify({
      before: before[0], after: visible(), moved: place() !== before[1], first, kept, last: said(),
      loaded: [...document.images].every((image) => image.complete && image.naturalWidth > 0),
      shown: seen.backgroundImage.length > 99 && seen.width, wrong: document.querySelectorAll(
        "circle.wrong").length });
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
    told = page.json.loads(page.html.unescape(title))
    assert told["before"] == [False, True] and told["after"] == [True, False]
    assert told["moved"] and told["loaded"]
    assert told["wrong"] == 1 and told["first"] == "test image 1: dog, taken for <cat>"
    # A click keeps what it shows.
    assert told["kept"] == told["last"] == "test image 4: <cat>"
    assert told["shown"] == "200px"
    assert "<i>" not in re.sub(r"(?s)<script>.*?</script>", "", done.stdout)


def test_sheets_and_crops_are_what_they_say():
    tiles = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 2, 2, 1), np.uint8)
    joined = views.sprites(tiles, 2)[..., 0]
    np.testing.assert_array_equal(joined[:2], [[0, 0, 1, 1]] * 2)
    np.testing.assert_array_equal(joined[2:], [[2, 2, views.GAP, views.GAP]] * 2)
    assert views.sheet(tiles, 3).shape == (64, 3 * 64 + 2 * 2, 1)
    maps = views.stretched(np.array([[[0.0, -1]], [[5.0, 5]]]))
    np.testing.assert_array_equal(maps[..., 0], [[[255, 0]], [[0, 0]]])
    made = np.full((2, 4, 4, 1), 9, np.uint8)
    rows = views.channel_sheet([[tiles[0], tiles[1]], [tiles[2]]], list(made))
    assert rows.shape == (64 * 2 + 2, 3 * 64 + 2 * 2, 1)
    assert [int(rows[100, x, 0]) for x in (30, 90, 160)] == [2, views.GAP, 9]
    assert views.thumbnails(np.zeros((2, 100, 90, 3), np.uint8)).shape == (2, 33, 30, 3)
    assert views.most_varying(np.array([0.1, 3, 2, np.nan]), 2) == [1, 2]


@pytest.mark.slow
def test_the_seed_decides_what_is_made():
    """Another seed, another image; the same, the same."""
    from cnnjax import models
    from cnnjax.explain import inside

    model = models.create("mlp", num_classes=3, dense_widths=())
    variables = model.init(jax.random.key(0), np.zeros((1, 6, 6, 1), np.float32))
    made = [
        np.asarray(
            inside.maximize(jax.random.key(seed), model, variables, (6, 6, 1), [0], steps=1)[0]
        )
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2]).max() > 0.001
