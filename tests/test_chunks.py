"""Results that survive a kill."""

import pytest
import torch

from flowmo_diffusers.engine.chunks import Chunks


DESCRIPTION = {"network": {"name": "inception", "sizes": (1, 2)}, "rounding": "nearest"}


def filled(folder, count=7, size=3):
    chunks = Chunks(folder, DESCRIPTION, count, size)
    for chunk in range(len(chunks)):
        items = torch.tensor(list(chunks.items(chunk)))
        chunks.write(chunk, {"number": items, "pool": items[:, None] * torch.ones(2)}, [["bad", chunk]])
    return chunks


def test_items_are_divided_once_each(tmp_path):
    """The last chunk is shorter; processes together have every chunk once."""
    chunks = Chunks(tmp_path, DESCRIPTION, 7, 3)
    assert [list(chunks.items(n)) for n in range(len(chunks))] == [[0, 1, 2], [3, 4, 5], [6]]
    assert sorted(n for process in range(2) for n in chunks.missing(process, 2)) == [0, 1, 2]


def test_what_was_written_comes_back_in_order(tmp_path):
    chunks = filled(tmp_path)
    assert chunks.read("number")["number"].tolist() == list(range(7))
    assert chunks.read("pool")["pool"][:, 1].tolist() == list(range(7))
    assert chunks.notes() == [["bad", 0], ["bad", 1], ["bad", 2]]
    assert chunks.columns() == {"number", "pool"}
    assert [len(part["number"]) for part in chunks.stream("number")] == [3, 3, 1]


def test_only_what_is_missing_is_asked_for(tmp_path):
    """A run that was killed after the first chunk goes on with the second."""
    chunks = Chunks(tmp_path, DESCRIPTION, 7, 3)
    chunks.write(0, {"number": torch.arange(3)})
    assert Chunks(tmp_path, DESCRIPTION, 7, 3).missing() == [1, 2]
    with pytest.raises(OSError, match="rows-000001.safetensors is missing"):
        chunks.read("number")


def test_a_killed_write_leaves_nothing(tmp_path):
    """Half a file never counts as a chunk."""
    chunks = Chunks(tmp_path, DESCRIPTION, 7, 3)
    with pytest.raises(Exception):  # noqa: B017
        chunks.write(0, {"number": "no tensor"})
    assert chunks.missing() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["description.json"]


def test_chunks_without_rows_lack_columns(tmp_path):
    """A chunk all of whose images are bad."""
    chunks = Chunks(tmp_path, DESCRIPTION, 4, 2)
    chunks.write(0, {}, ["all bad"])
    chunks.write(1, {"number": torch.arange(2, 4)})
    assert chunks.read("number")["number"].tolist() == [2, 3]
    assert chunks.notes() == ["all bad"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"description": {**DESCRIPTION, "rounding": "float"}}, "rounding is 'nearest' there and 'float' here"),
        ({"description": {**DESCRIPTION, "jpeg": 75}}, "jpeg is None there and 75 here"),
        ({"count": 8}, "count is 7 there and 8 here"),
        ({"size": 2}, "chunk_size is 3 there and 2 here"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, change, message):
    """A cache of another protocol is an error that names the difference."""
    filled(tmp_path)
    with pytest.raises(ValueError, match=message):
        Chunks(tmp_path, **{"description": DESCRIPTION, "count": 7, "size": 3} | change)


def test_empty_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="count=0"):
        Chunks(tmp_path, DESCRIPTION, 0, 3)
