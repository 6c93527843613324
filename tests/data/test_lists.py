from __future__ import annotations

from pathlib import Path

import pytest

from mae_et.data.decode import ImageError
from mae_et.data.sources import open_source
from tests.data.trees import contents, write_images


def write_list(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_list_of_paths(tmp_path):
    write_images(tmp_path, "pictures/a.png", "pictures/b c#1.png", "far/d.png")
    text = f"# two near, one far\n\npictures/b c#1.png\n  \npictures/a.png\r\n{tmp_path}/far/d.png"
    source = open_source("list", write_list(tmp_path / "list.txt", text))
    assert contents(source) == [(1, -1), (0, -1), (2, -1)]
    assert source.classes == ()
    assert source.describe(1) == f"{tmp_path}/pictures/a.png (line 5 of {tmp_path}/list.txt)"


def test_list_with_numbers(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    source = open_source("list", write_list(tmp_path / "list.txt", "\ufeffa.png\t2\nb.png\nc.png\t0\n"))
    assert contents(source) == [(0, 2), (1, -1), (2, 0)]
    assert source.classes == ("0", "1", "2")


def test_list_with_names(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    source = open_source("list", write_list(tmp_path / "list.txt", "a.png\twolf\nb.png\t7 up\nc.png\t3\nd.png\n"))
    assert source.classes == ("3", "7 up", "wolf")
    assert contents(source) == [(0, 2), (1, 1), (2, 0), (3, -1)]


def test_lists_of_splits_share_their_classes(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    write_list(tmp_path / "train.txt", "a.png\tant\nb.png\tbee\n")
    write_list(tmp_path / "val.txt", "b.png\tbee\n")
    assert contents(open_source("list", tmp_path, "val")) == [(1, 1)]
    with pytest.raises(ValueError, match=r"no test\.txt \(it has train, val\)"):
        open_source("list", tmp_path, "test")
    write_list(tmp_path / "val.txt", "# new\nb.png\tcat\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 2: label 'cat' is none of the 2"):
        open_source("list", tmp_path, "val")


def test_missing_files_of_a_list_are_found_when_read(tmp_path):
    write_images(tmp_path, "a.png")
    source = open_source("list", write_list(tmp_path / "list.txt", "a.png\n# gone:\nb.png\n"))
    assert len(source) == 2
    source.image(0)
    with pytest.raises(ImageError, match=r"b\.png \(line 3 of .*list\.txt\): cannot be read: No such file"):
        source.image(1)


@pytest.mark.parametrize(
    ("path", "reason"), [("a\0b.png", "null byte"), ("x" * 5000, "too long"), ("loop", "symbolic")]
)
def test_lines_that_can_be_no_path_are_bad_images(tmp_path, path, reason):
    (tmp_path / "loop").symlink_to("loop")
    source = open_source("list", write_list(tmp_path / "list.txt", f"a.png\n{path}\n"))
    with pytest.raises(ImageError, match=rf"line 2 of .*: cannot be read: .*{reason}"):
        source.image(1)


def test_all_ends_of_lines_and_other_spaces(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.png\rb.png\r\n\tonly a label\n \xe3\x80\x80 \n  # no\n c.png \t x\ty ")
    source = open_source("list", tmp_path / "list.txt")
    lines = [f"{tmp_path}/{name} (line {i} of {tmp_path}/list.txt)" for name, i in (("a.png", 1), ("b.png", 2))]
    assert [source.describe(i) for i in range(2)] == lines
    assert source.describe(2).endswith("/ (line 3 of " + f"{tmp_path}/list.txt)")
    assert source.describe(3) == f"{tmp_path}/c.png (line 6 of {tmp_path}/list.txt)"
    assert source.classes == ("only a label", "x\ty")
    assert source.labels.tolist() == [-1, -1, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n\n", "lists no images"),
        ("a.png\t-1\n", "'-1' is no class number"),
        ("a.png\t01\n", "'01' is no class number"),
        ("a.png\t4000000000\n", "'4000000000' is no class number"),
    ],
)
def test_useless_lists(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        open_source("list", write_list(tmp_path / "list.txt", text))


def test_a_list_that_is_no_text(tmp_path):
    write_images(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"a\.png is not a UTF-8 text file"):
        open_source("list", tmp_path / "a.png")


def test_one_list_has_one_split(tmp_path):
    with pytest.raises(ValueError, match=r"used for split 'train'; for 'val' .*val\.txt"):
        open_source("list", write_list(tmp_path / "list.txt", "a.png\n"), "val")
