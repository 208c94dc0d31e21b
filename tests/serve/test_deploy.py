"""What lies in deploy/: checked by the official tools and schemas, and against the application."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted([*DEPLOY.glob("kubernetes/*.yaml"), *DEPLOY.glob("kserve/*.yaml")])


def documents(path):
    yaml = pytest.importorskip("yaml")
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


@pytest.fixture(scope="module")
def families():
    """The names and labels of every metric that the application has."""
    pytest.importorskip("prometheus_client")
    from cnnjax.serve.measures import Measures
    from cnnjax.serve.watch.observer import Watch

    measures = Measures()
    Watch({}, measures.registry)
    found = {}
    for collector in set(measures.registry._collector_to_names):
        for name in measures.registry._collector_to_names[collector]:
            found[name] = set(collector._labelnames)
    return found


def used(expression):
    """Returns the metrics of an expression, and the labels that are asked of any of them."""
    names = set(re.findall(r"\b(?:cnnjax_\w+)", expression))
    return names, set(re.findall(r"[{,]\s*(\w+)=~?\"", expression))


def expressions():
    for group in documents(DEPLOY / "alerts.yml")[0]["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in json.loads((DEPLOY / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def test_every_metric_of_rules_and_dashboard_is_there(families):
    seen = set()
    for title, expression in expressions():
        names, labels = used(expression)
        assert names <= set(families), title
        own = set().union(*(families[name] for name in names)) if names else {"job"}
        assert labels <= own | {"instance"}, title
        seen |= names
    for name in ("cnnjax_drift_score", "cnnjax_refused_total", "cnnjax_request_seconds_bucket"):
        assert name in seen


def test_every_reason_that_rules_ask_for_is_one():
    from cnnjax.serve import refusals
    from cnnjax.serve.guard.refusal import REASONS

    pytest.importorskip("fastapi")
    from cnnjax.serve.http import asgi, web  # noqa: F401 - they define more of them.

    def reasons(kind):
        return {kind.reason}.union(*(reasons(each) for each in kind.__subclasses__()))

    known = set(REASONS) | reasons(refusals.Refused)
    for title, expression in expressions():
        for pattern in re.findall(r'reason=~?"([^"]*)"', expression):
            assert set(pattern.split("|")) <= known, title


def test_the_dashboard_is_one_of_grafanas_own_schema():
    """Read and written by Grafana's own library, nothing of it is lost."""
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard").Dashboard
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    content = json.loads((DEPLOY / "dashboard.json").read_text())
    written = json.loads(JSONEncoder(sort_keys=True).encode(dashboard.from_json(content)))

    def check_kept(told, kept):
        if isinstance(told, dict):
            for key, value in told.items():
                check_kept(value, kept[key])
        elif isinstance(told, list):
            for value, other in zip(told, kept, strict=True):
                check_kept(value, other)
        else:
            assert told == kept

    check_kept(content, written)
    assert len(content["panels"]) == len(written["panels"]) > 20


def test_the_dashboard_has_a_place_for_each_panel():
    panels = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for place in (panel["gridPos"] for panel in panels):
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24 and (x, y) not in cells
                cells.add((x, y))


@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
        ("check", "config", "prometheus.yml"),
    ],
)
def test_promtool_accepts_rules_and_configuration(words, tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not here")
    for path in DEPLOY.glob("*.yml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "metrics.key").write_text("cnnjax_key")
    done = subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@pytest.mark.parametrize("version", [pytest.param("1.30", marks=pytest.mark.slow), "1.37"])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_are_valid_by_the_schemas_of_kubernetes(path, version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        if "kserve" in document["apiVersion"]:
            # Their containers and their metadata are those of Kubernetes.
            containers = document["spec"].get("containers", [])
            document = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": document["metadata"],
                "spec": {"containers": containers or [{"name": "none", "image": "none"}]},
            }
        kubernetes_validate.validate(document, version, strict=True)


def check_fields(value, kind, where):
    """Checks that each field of a document is one of KServe's types, by its client's own maps.

    Types of Kubernetes are left to `test_manifests_are_valid_by_the_schemas_of_kubernetes`.
    """
    import kserve.models

    if found := re.fullmatch(r"list\[(.*)\]", kind):
        for number, each in enumerate(value):
            check_fields(each, found[1], f"{where}[{number}]")
    elif (model := getattr(kserve.models, kind, None)) is not None:
        fields = {name: model.openapi_types[own] for own, name in model.attribute_map.items()}
        for name, each in value.items():
            assert name in fields, f"{where}.{name}"
            check_fields(each, fields[name], f"{where}.{name}")
    elif kind in ("str", "int", "bool", "float"):
        assert type(value).__name__ == kind, where


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("kserve/*.yaml")), ids=lambda path: path.stem)
def test_manifests_have_the_fields_of_the_client_of_kserve(path):
    pytest.importorskip("kserve")
    for document in documents(path):
        version = document["apiVersion"].rpartition("/")[2]
        kind = f"{version[0].upper()}{version[1:]}{document['kind']}"
        check_fields(document, kind, kind)
        with pytest.raises(AssertionError):
            check_fields({**document, "spec": {"predicter": {}}}, kind, kind)


def test_the_server_takes_the_flags_of_the_manifests():
    pytest.importorskip("tyro")
    from cnnjax.commands.serve import Config
    from cnnjax.run import cli

    taken = 0
    for path in MANIFESTS:
        for document in documents(path):
            template = document["spec"].get("template", document) if "spec" in document else {}
            for container in template.get("spec", {}).get("containers", ()):
                flags = [word for flag in container["args"] for word in flag.split("=", 1) if word]
                config = cli.parse(Config, flags, program="cnnjax serve")
                ports = {port["containerPort"] for port in container["ports"]}
                assert config.host == "0.0.0.0" and config.port in ports
                taken += 1
    assert taken == 2


def test_the_image_is_pinned_hashed_and_not_root():
    import tomllib

    text = (DEPLOY / "Containerfile").read_text()
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.MULTILINE)
    assert text.count("pip install") == text.count("--require-hashes") + text.count("--no-index")
    entries = re.split(r"\n(?=\S)", (DEPLOY / "requirements.lock").read_text().strip())
    names = set()
    for entry in entries:
        name = re.match(r"([a-z0-9.-]+)(\[[a-z,]+\])?==[^ ;]+", entry)
        assert name and re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
        names.add(name[1])
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    for needed in [*project["dependencies"], *project["optional-dependencies"]["serve"]]:
        if "!=" in needed:  # What other machines take instead.
            continue
        assert re.split(r"[\[>;=]", needed)[0].strip().replace("_", "-").lower() in names, needed
