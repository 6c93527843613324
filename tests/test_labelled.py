"""Which images train, which choose, and which test."""

from __future__ import annotations

import pytest

from mae_et.config import ConfigError, FinetuneConfig, LabelledDataConfig, load_config
from mae_et.labelled import choose_splits, open_labelled
from tests.end_to_end.labelled import write_classes


@pytest.mark.parametrize(
    ("source", "splits"),
    [
        ("flowers102", ("val", "test")),
        ("cifar100", (None, "test")),
        ("stanford_dogs", (None, "test")),
        ("imagenet1k", (None, "val")),
        ("imagenet22k", (None, None)),
    ],
)
def test_splits_of_published_sets(source, splits):
    assert choose_splits(LabelledDataConfig(source=source)) == splits


def test_splits_of_folders(tmp_path):
    root = write_classes(tmp_path / "images")
    data = LabelledDataConfig(source="folder", root=str(root))
    assert choose_splits(data) == (None, "test")
    (root / "test").rename(root / "val")
    assert choose_splits(data) == (None, "val")
    write_classes(tmp_path / "more")
    (root / "val").rename(tmp_path / "more" / "val")
    assert choose_splits(LabelledDataConfig(source="folder", root=str(tmp_path / "more"))) == ("val", "test")


def test_test_images_are_never_held_out_or_cut(tmp_path):
    root = str(write_classes(tmp_path / "images"))
    whole = open_labelled(LabelledDataConfig(source="folder", root=root, holdout=0.0), 3)
    assert (len(whole.train), whole.val, len(whole.test or "")) == (36, None, 18)
    cut = open_labelled(LabelledDataConfig(source="folder", root=root, holdout=0.25, shots=2), 3)
    assert (len(cut.train), len(cut.val or ""), len(cut.test or "")) == (6, 9, 18)
    held = {cut.val.describe(i) for i in range(9)} if cut.val else set()
    assert not held & {cut.train.describe(i) for i in range(6)}
    # The run's seed has no say in it.
    again = open_labelled(LabelledDataConfig(source="folder", root=root, holdout=0.25, shots=2), 3)
    assert [again.train.describe(i) for i in range(6)] == [cut.train.describe(i) for i in range(6)]
    assert cut.describe() == "folder train, 0.75 kept, 2 a class: 6 train, 9 val, 18 test images of 3 classes"


def test_grey_and_colour(tmp_path):
    root = str(write_classes(tmp_path / "images"))
    assert open_labelled(LabelledDataConfig(source="folder", root=root), 1).train.image(0).shape[0] == 1


def test_missing_splits_are_named(tmp_path):
    root = str(write_classes(tmp_path / "images"))
    config = load_config(None, [f"data={root}", "data.val_split=val"], FinetuneConfig)
    with pytest.raises(ConfigError, match="has no split 'val'; it has train, test"):
        open_labelled(config.data, 3)
