"""Files that are never seen half written."""

import os
from pathlib import Path

import pytest

from flowmo_diffusers.engine.files import atomic_file, atomic_folder, remove_partial


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_folder_takes_its_place_with_the_index_last(tmp_path, monkeypatch):
    """Catches a `model_index.json` that is there before the weights it points at, or other files that are lost."""
    target = tmp_path / "out"
    (target / "logs").mkdir(parents=True)
    (target / "logs" / "log").write_text("kept")
    (target / "model_index.json").write_text("old")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new)), replace(old, new)))
    with atomic_folder(target) as folder:
        assert folder.parent == target  # on one file system, so that renaming is atomic
        (folder / "model_index.json").write_text("new")
        (folder / "autoencoder" / "deep").mkdir(parents=True)
        (folder / "autoencoder" / "weights").write_text("w")
        (folder / "autoencoder" / "deep" / "file").write_text("d")
        assert (target / "model_index.json").read_text() == "old"
    assert content(target) == {
        "logs/log": "kept",
        "model_index.json": "new",
        "autoencoder/weights": "w",
        "autoencoder/deep/file": "d",
    }
    assert {path.relative_to(target).as_posix() for path in moved} == set(content(target)) - {"logs/log"}
    assert moved[-1] == target / "model_index.json"
    assert not list(target.glob(".partial-*"))


def test_folder_is_untouched_on_failure(tmp_path):
    """Catches a run that dies while it saves and takes the model of the run before with it."""
    (tmp_path / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="power cut"):
        with atomic_folder(tmp_path) as folder:
            (folder / "weights").write_text("ne")
            raise RuntimeError("power cut")
    assert content(tmp_path) == {"weights": "old"}
    assert list(tmp_path.iterdir()) == [tmp_path / "weights"]


def test_file(tmp_path):
    """Catches a picture or a checkpoint that is seen half written, or temporary files left behind."""
    target = tmp_path / "new" / "file.pth"
    for text in ("first", "second"):
        with atomic_file(target) as path:
            assert path.parent == target.parent and path.suffix == ".pth"
            path.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert content(tmp_path) == {"new/file.pth": text}
    with pytest.raises(RuntimeError, match="power cut"):
        with atomic_file(target) as path:
            path.write_text("thi")
            raise RuntimeError("power cut")
    assert content(tmp_path) == {"new/file.pth": "second"}


def test_atomic_folder_leaves_no_older_layout(tmp_path):
    """Shards of an earlier save that survive beside a later, unsharded one and are loaded in its place."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights-1-of-2.safetensors").write_text("old")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").write_text("kept")
    with atomic_folder(tmp_path) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights.safetensors").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights.safetensors"]
    assert (tmp_path / "logs" / "events").read_text() == "kept"


def test_remove_partial(tmp_path):
    """Catches what killed writers left that fills the disk, or a removal of anything else."""
    kept = ["checkpoint-1/weights", "partial-not", "a.partial-b"]
    left = [".partial-12-out.png", ".partial-checkpoint-2/weights", "best/.partial-x/deep/weights"]
    for name in (*kept, *left):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    remove_partial(tmp_path)
    assert set(content(tmp_path)) == set(kept)
    assert not list(tmp_path.rglob(".partial-*"))
    remove_partial(tmp_path / "nowhere")
