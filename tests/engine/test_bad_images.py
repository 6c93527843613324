"""The ledger of unreadable images: the same rows and counts whatever the ranks, saves and interruptions."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mae_et.data.loader import Batch
from mae_et.data.replacing import BadImage
from mae_et.engine.bad_images import BadImages, BadImagesError
from mae_et.tracking import read_metrics

IMAGES, EVERY, STEPS = 200, 4, 24
BROKEN = {i for i in range(IMAGES) if i % 7 == 3}  # 28


def describe(i: int) -> str:
    return f"photos/{i}.jpg"


def batch_of(asked: list[int], also: list[int] = ()) -> Batch:
    """A batch in which the broken ones failed; `also` failed in their place."""
    bad = [BadImage(i, f"photos/{i}.jpg: is damaged") for i in [*asked, *also] if i in BROKEN]
    column = torch.tensor(asked)
    return Batch(torch.zeros(len(asked), 1, 1, 1, dtype=torch.uint8), column, column, column, tuple(bad))


def batches() -> list[Batch]:
    """A batch of 8 for every step; every third replacement failed as well."""
    drawn = random.Random(3)
    made = []
    for step in range(STEPS):
        asked = [drawn.randrange(IMAGES) for _ in range(8)]
        failed = [i for i in asked if i in BROKEN]
        made.append(batch_of(asked, [drawn.choice(sorted(BROKEN))] if failed and step % 3 == 0 else []))
    return made


def ledger(path: Path, limit: float = 1.0, is_main: bool = True) -> BadImages:
    return BadImages(path, describe, IMAGES, limit, is_main)


def run(book: BadImages, steps: range, save_at: tuple[int, ...] = ()) -> list[dict[str, float]]:
    rows, shown = [], batches()
    for step in steps:
        book.note(shown[step])
        if (step + 1) % EVERY == 0:
            rows.append(book.settle(step + 1))
        if step + 1 in save_at:
            book.gather()
    return rows


def test_counts_and_rows_are_what_was_shown(tmp_path):
    """Against counts made by hand from the batches."""
    path = tmp_path / "bad_images.jsonl"
    rows = run(ledger(path), range(STEPS))
    replaced, seen, expected = 0, {}, []
    for step, batch in enumerate(batches()):
        replaced += sum(i in BROKEN for i in batch.indices.tolist())
        for image, _ in batch.bad:
            seen.setdefault(image, EVERY * (step // EVERY + 1))
        if (step + 1) % EVERY == 0:
            expected.append({"data/replaced": replaced, "data/bad_images": len(seen)} if seen else {})
    assert rows == expected
    assert replaced > len(seen) / 2 > 5
    assert read_metrics(path) == [
        {"step": step, "image": image, "path": f"photos/{image}.jpg", "error": "is damaged"}
        for step, image in sorted((step, image) for image, step in seen.items())
    ]


def test_a_run_without_bad_images_leaves_no_file(tmp_path):
    book = ledger(tmp_path / "bad_images.jsonl", limit=0)
    book.note(batch_of([0, 1, 2]))
    assert book.settle(1) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("saved", range(1, STEPS, 2))
def test_an_interrupted_run_has_the_rows_of_one_that_was_not(tmp_path, saved):
    """It went on for some steps after its checkpoint, and was killed in the middle of a row."""
    whole = tmp_path / "whole.jsonl"
    rows = run(ledger(whole), range(STEPS))
    path = tmp_path / "run.jsonl"
    first = ledger(path)
    before = run(first, range(saved), save_at=(saved,))
    values = json.dumps(first.values())
    assert json.loads(values) == first.values()  # a checkpoint insists on it
    run(first, range(saved, min(saved + 6, STEPS)))
    with path.open("a") as file:
        file.write('{"step": 9, "image": 1')
    second = ledger(path)
    second.restore(json.loads(values), saved)
    assert before + run(second, range(saved, STEPS), save_at=(saved + 1, saved + 2)) == rows
    assert path.read_bytes() == whole.read_bytes()


def test_rows_of_a_start_that_never_saved_are_dropped(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "run.jsonl"
    run(ledger(whole), range(STEPS))
    run(ledger(path), range(9))
    assert path.stat().st_size
    run(ledger(path), range(STEPS))
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("limit", "ends"), [(0.03, False), (0.0299, True), (0, True)])
def test_more_than_the_limit_ends_the_run(tmp_path, limit, ends):
    path = tmp_path / "bad_images.jsonl"
    book = ledger(path, limit)
    six = sorted(BROKEN)[:6]  # 3 % of 200
    for image in six:
        book.note(batch_of([image, 0, 0]))
    if not ends:
        assert book.settle(5) == {"data/replaced": 6, "data/bad_images": 6}
        return
    with pytest.raises(BadImagesError) as caught:
        book.settle(5)
    said = str(caught.value)
    assert said.startswith(f"6 of 200 images could not be read, more than data.max_bad={limit:g} allows: ")
    assert "photos/3.jpg: is damaged; photos/10.jpg: is damaged; photos/17.jpg: is damaged; and 3 more" in said
    assert "photos/24.jpg" not in said
    assert str(path) in said
    assert "raise data.max_bad" in said
    assert [row["image"] for row in read_metrics(path)] == six


def test_names_that_are_no_text_are_spelled_out(tmp_path):
    name = os.fsdecode(b"photos/na\xefve \xe2\x98\x83.jpg")
    book = BadImages(tmp_path / "bad.jsonl", lambda _: name, 10, 0.0, True)
    book.note(Batch(*[torch.tensor([4])] * 4, (BadImage(4, f"{name}: is damaged"),)))
    with pytest.raises(BadImagesError, match=r"photos/na\\xefve ☃.jpg: is damaged"):
        book.settle(1)
    row = {"step": 1, "image": 4, "path": "photos/na\\xefve ☃.jpg", "error": "is damaged"}
    assert read_metrics(tmp_path / "bad.jsonl") == [row]
    json.dumps(book.values(), ensure_ascii=False).encode()


RANK = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from mae_et.data.loader import Batch
from mae_et.engine.bad_images import BadImagesError
from tests.engine.test_bad_images import EVERY, STEPS, batches, ledger
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
rows, ended = [], None
path = folder / "run.jsonl" if rank == 0 else folder / "nobody" / "run.jsonl"
book = ledger(path, 0.1, rank == 0)
try:
    for step, batch in enumerate(batches()):
        mine = slice(4 * rank, 4 * rank + 4)
        asked = set(batch.indices[mine].tolist())
        others = set(batch.indices.tolist())
        bad = tuple(b for b in batch.bad if b.image in asked or (b.image not in others and rank == 1))
        book.note(Batch(*(tensor[mine] for tensor in batch.tensors), bad))
        if (step + 1) % EVERY == 0:
            rows.append(book.settle(step + 1))
        if step == 5:
            book.gather()
            values = json.loads(json.dumps(book.values()))
            book = ledger(path, 0.1, rank == 0)
            book.restore(values, step + 1)
except BadImagesError as error:
    ended = str(error)
print(json.dumps([rows, ended]))
dist.destroy_process_group()
"""


def test_two_ranks_keep_the_ledger_of_one(tmp_path, repository):
    """Resumed once; then too many are bad, which both say. Only the main rank touches the file."""
    path = tmp_path / "whole" / "run.jsonl"
    path.parent.mkdir()
    book, rows, shown = ledger(path, 0.1), [], batches()
    with pytest.raises(BadImagesError) as caught:  # noqa: PT012
        for step in range(STEPS):
            book.note(shown[step])
            if (step + 1) % EVERY == 0:
                rows.append(book.settle(step + 1))
    assert len(rows) >= 2
    line = [sys.executable, "-c", RANK]
    started = [
        subprocess.Popen([*line, str(rank), str(tmp_path)], cwd=repository, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    expected = [rows, str(caught.value).replace(str(path), str(tmp_path / "run.jsonl"))]
    assert json.loads(said[0]) == expected
    assert json.loads(said[1].replace("nobody/", "")) == expected
    assert (tmp_path / "run.jsonl").read_bytes() == path.read_bytes()
