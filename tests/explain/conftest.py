"""What tests of several commands look at."""

import pytest

from cnnjax.run import classifier, settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a LeNet-5 that was trained for seconds, without figures."""
    directory = tmp_path_factory.mktemp("explained") / "run"
    argv = ["--model", "lenet5", "--devices", "1", "--smoke", "--run-dir", str(directory)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])
        settings.launch(classifier.Config, classifier.main, argv)
    assert not stop.value.code
    return directory
