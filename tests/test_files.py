"""Files and directories that are whole or not there, also after a power cut."""

from pathlib import Path

import pytest

from zo_offload import files


def test_the_name_of_each_directory_that_is_made_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    with files.new_directory(tmp_path / "one" / "two" / "tag") as aside:
        (aside / "file").write_text("whole")
    assert (tmp_path / "one" / "two" / "tag" / "file").read_text() == "whole"
    assert synced[:2] == [tmp_path, tmp_path / "one"]
    assert synced[-1] == tmp_path / "one" / "two"


def test_a_directory_is_this_users_alone_and_those_above_it_as_usual(tmp_path: Path):
    files.make_directory(tmp_path / "above" / "it")
    (tmp_path / "usual").mkdir()
    made = [tmp_path / name for name in ("above/it", "above", "usual")]
    private, above, usual = (path.stat().st_mode & 0o777 for path in made)
    assert private == 0o700
    assert above == usual
    files.make_directory(tmp_path / "usual")
    assert (tmp_path / "usual").stat().st_mode & 0o777 == usual
