"""A run's directory is its own, and none is left behind that holds nothing."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cnnjax.errors import UserError
from cnnjax.run import files


def test_runs_of_the_same_moment_get_directories_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(files.new_directory, [tmp_path / "runs" / "a"] * 8))
    assert len(set(made)) == 8
    assert all(directory.is_dir() for directory in made)


def test_where_no_directory_can_be_made_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write the run directory .*runs/a"):
        files.new_directory(tmp_path / "runs" / "a")


def test_a_start_that_fails_leaves_no_empty_directory(tmp_path):
    empty, full = (files.new_directory(tmp_path / name) for name in ("empty", "full"))
    (full / "config.json").touch()
    for directory in (empty, full):
        with pytest.raises(UserError), files.writing_errors(directory):
            raise UserError("a setting is wrong")
    assert not empty.exists() and full.exists()
