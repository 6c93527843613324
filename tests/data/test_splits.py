from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from mae_et.data.archives import ArraySource
from mae_et.data.loader import InMemory
from mae_et.data.scaled import EncodedSource
from mae_et.data.sources import FileSource, open_source
from mae_et.data.splits import Subset, check_labels, check_same_classes, choose, few_shot, hold_out
from tests.data.trees import contents, write_images


def array_source(labels, classes: int | None = None, name: str = "toys train") -> ArraySource:
    """A source whose image i has the value i."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    count = max(labels) + 1 if classes is None else classes
    return ArraySource(images, labels, name, [f"class{i}" for i in range(count)])


def listed_source(labels, classes) -> FileSource:
    """A source of any length, of which only the labels are of interest."""
    names = [f"c{i}" for i in range(classes)]
    return FileSource("many train", Path("images"), map(str, range(len(labels))), labels, names)


# Subsets


def test_subset_of_files(tmp_path):
    write_images(tmp_path, "a/0.png", "a/1.png", "b/2.png", "c/3.png")
    source = open_source("folder", tmp_path)
    subset = Subset(source, np.array([3, 1]))
    assert contents(subset) == [(3, 2), (1, 0)]
    assert subset.labels.tolist() == [2, 0]
    assert (subset.name, subset.channels, subset.classes) == ("folder train", 3, ("a", "b", "c"))
    assert subset.describe(1) == str(tmp_path / "a" / "1.png")
    assert contents(pickle.loads(pickle.dumps(subset))) == contents(subset)
    assert contents(Subset(subset, np.array([1]), "one")) == [(1, 0)]


def test_chosen_images_keep_the_fast_ways_of_their_source(tmp_path):
    write_images(tmp_path, "a/0.png", "b/1.png")
    files, arrays = open_source("folder", tmp_path), array_source([0, 1, 0, 1])
    few = choose(choose(arrays, np.array([3, 1, 2])), np.array([2, 0]))
    assert isinstance(few, InMemory)
    assert not isinstance(few, EncodedSource)
    assert few.take(np.array([1, 0, 1]))[:, 0, 0, 0].tolist() == [3, 2, 3]
    one = choose(files, np.array([1]))
    assert isinstance(one, EncodedSource)
    assert not isinstance(one, InMemory)
    assert (one.read(0), one.max_pixels) == ((tmp_path / "b" / "1.png").read_bytes(), 100_000_000)
    for part in (*hold_out(arrays, 0.5, 0), few_shot(arrays, 1, 0)):
        assert isinstance(part, InMemory)


@pytest.mark.parametrize("index", [2, -1])
def test_subset_index_out_of_range(index):
    subset = Subset(array_source([0, 0, 0]), np.array([0, 1]))
    for ask in (subset.image, subset.label, subset.describe):
        with pytest.raises(IndexError, match=f"image {index} of 2"):
            ask(index)


def test_a_subset_holds_no_python_object_an_image():
    source = listed_source(np.zeros(1000, np.int32), 1)
    small, large = (len(pickle.dumps(Subset(source, np.arange(n)))) for n in (0, 1000))
    # 8 bytes of index and 4 of label an image.
    assert large - small < 12.2 * 1000


# Held-out shares


def held_counts(labels, share):
    """Images of each class that are kept, and that are held out."""
    classes = max(labels) + 1
    return [np.bincount(part.labels, minlength=classes) for part in hold_out(listed_source(labels, classes), share, 0)]


def test_hold_out_takes_the_share_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 4], [100, 40, 5, 2, 1]))
    kept, held = held_counts(labels, 0.1)
    # 0.1 of 5 is 0.5, rounded up; of 2 it is 0.2, but a class with two gives one; one alone is kept.
    assert held.tolist() == [10, 4, 1, 1, 0]
    assert kept.tolist() == [90, 36, 4, 1, 1]
    kept, held = held_counts(labels, 0.99)
    assert kept.tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("images", [1, 5, 12, 60, 333])
def test_hold_out_parts(images, share, seed):
    labels = np.random.default_rng(images).integers(0, 6, images)
    source = listed_source(labels, 6)
    if max(np.bincount(labels)) == 1:
        with pytest.raises(ValueError, match="one image a class"):
            hold_out(source, share, seed)
        return
    kept, held = hold_out(source, share, seed)
    assert sorted([*kept.indices, *held.indices]) == list(range(len(labels)))
    for part in (kept, held):
        assert (np.diff(part.indices) > 0).all()
        assert part.labels.tolist() == [labels[i] for i in part.indices]
    for number, count in enumerate(np.bincount(labels, minlength=6)):
        mine = int((held.labels == number).sum())
        assert abs(mine - count * share) <= 0.5 + 1e-9 or mine in (1, count - 1)
        if count >= 2:
            assert 1 <= mine <= count - 1
        else:
            assert mine == 0


def test_hold_out_depends_on_the_seed_alone():
    labels = np.random.default_rng(1).integers(0, 10, 500)
    draw = [hold_out(listed_source(labels, 10), 0.2, seed)[1].indices.tolist() for seed in (3, 3, 4)]
    np.random.seed(7)  # noqa: NPY002  the global state must not matter
    assert hold_out(listed_source(labels, 10), 0.2, 3)[1].indices.tolist() == draw[0] == draw[1]
    assert draw[0] != draw[2]
    smaller = hold_out(listed_source(labels, 10), 0.1, 3)[1].indices
    assert set(smaller) < set(draw[0])


def test_hold_out_draws_each_image_equally_often():
    labels = [0] * 10 + [1] * 10
    times = np.zeros(20)
    for seed in range(600):
        times[hold_out(listed_source(labels, 2), 0.3, seed)[1].indices] += 1
    # Binomial(600, 0.3): mean 180, deviation 11.2; 5 deviations for 20 images.
    assert np.abs(times - 180).max() < 56


def test_these_images_are_held_out():
    """What a seed draws is part of every result that names the seed: it must not change with a version."""
    kept, held = hold_out(array_source([0, 1] * 8), 0.25, 0)
    assert held.indices.tolist() == [1, 3, 10, 14]
    assert contents(kept) == [(i, i % 2) for i in range(16) if i not in (1, 3, 10, 14)]
    assert (kept.name, held.name) == ("toys train, 0.75 kept", "toys train, 0.25 held out")
    assert few_shot(array_source([0, 1] * 8), 2, 0).indices.tolist() == [0, 1, 6, 11]


def test_the_two_draws_of_one_seed_differ():
    """Were they the same, few shots of a class would be the held-out images."""
    labels = np.repeat(np.arange(10), 50)
    held = hold_out(listed_source(labels, 10), 0.2, 0)[1].indices
    shots = few_shot(listed_source(labels, 10), 10, 0).indices
    # 100 of 500 twice: 20 in common on average, deviation below 4.
    assert len(set(held) & set(shots)) < 45


@pytest.mark.parametrize("share", [0, 1, -0.1, 10, float("nan")])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=f"held-out share {share} is not between 0 and 1"):
        hold_out(array_source([0, 0]), share, 0)


def test_many_images_take_no_loop():
    labels = np.random.default_rng(0).integers(0, 1000, 1_000_000).astype(np.int32)

    class Labels:
        """What the functions may touch: a call for each image would fail."""

        name, channels, classes = "large train", 3, tuple(map(str, range(1000)))

        def __init__(self) -> None:
            self.labels = labels

        def __len__(self) -> int:
            return len(labels)

    source = Labels()
    check_labels(source)
    kept, held = hold_out(source, 0.05, 0)
    assert len(kept) + len(held) == len(labels)
    assert len(few_shot(source, 10, 0)) == 10_000


# Few shots


@pytest.mark.parametrize("shots", [1, 3, 7])
def test_few_shots(shots):
    labels = np.random.default_rng(2).permutation(np.repeat([0, 1, 2], [7, 20, 40]))
    source = listed_source(labels, 3)
    subset = few_shot(source, shots, 5)
    assert np.bincount(subset.labels).tolist() == [shots] * 3
    assert (np.diff(subset.indices) > 0).all()
    assert subset.name == f"many train, {shots} a class"
    assert subset.indices.tolist() == few_shot(source, shots, 5).indices.tolist()
    if shots > 1:
        assert set(few_shot(source, 1, 5).indices) < set(subset.indices)
    if shots < 7:
        assert subset.indices.tolist() != few_shot(source, shots, 6).indices.tolist()


def test_too_few_images_for_the_shots():
    source = array_source([0, 0, 0, 1, 1, 2], classes=4)
    with pytest.raises(ValueError, match=r"fewer than 2 images of 'class2', 'class3' \(the fewest: 0\); take fewer"):
        few_shot(source, 2, 0)
    with pytest.raises(ValueError, match="'class0', 'class1', 'class2' and 1 more"):
        few_shot(source, 4, 0)
    with pytest.raises(ValueError, match="0 images a class"):
        few_shot(source, 0, 0)


# Checks


def test_good_labels():
    check_labels(array_source([2, 0, 1, 1]))


def test_an_image_without_a_label(tmp_path):
    write_images(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "train.txt").write_text("1.png\tcat\n\n2.png\n3.png\n")
    source = open_source("list", tmp_path)
    with pytest.raises(ValueError, match=r"2\.png \(line 3 of .*train\.txt\) has no label \(2 of the 3 .*label it"):
        check_labels(source)
    for use in (lambda: hold_out(source, 0.5, 0), lambda: few_shot(source, 1, 0)):
        with pytest.raises(ValueError, match=r"2\.png .*has no label"):
            use()


@pytest.mark.parametrize("label", [3, 400, -2])
def test_a_label_out_of_range(label):
    source = array_source([0, 1, label, 2], classes=3)
    with pytest.raises(ValueError, match=rf"toys train #2 has label {label}, out of the range 0 to 2 \(1 of the 4"):
        check_labels(source)


def test_a_class_without_images():
    source = array_source([0, 2, 0], classes=6)
    with pytest.raises(
        ValueError, match="toys train has no images of 'class1', 'class3', 'class4' and 1 more, of its 6"
    ):
        check_labels(source)
    check_labels(source, every_class=False)


def test_a_source_without_labels(tmp_path):
    write_images(tmp_path, "1.png")
    with pytest.raises(ValueError, match="folder train has no labels; put every image into a folder named after"):
        check_labels(open_source("folder", tmp_path))


def test_classes_that_differ():
    def named(name, *classes):
        return ArraySource(np.zeros((1, 1, 1, 1), np.uint8), [0], name, classes)

    train = named("x train", "ant", "bee", "cat")
    check_same_classes(train, named("x val", "ant", "bee", "cat"))
    with pytest.raises(ValueError, match="x train and x val differ: x val lacks 'cat'; x train lacks 'dog'; give both"):
        check_same_classes(train, named("x val", "ant", "bee", "dog"))
    with pytest.raises(ValueError, match="differ: x train lacks 'd', 'e', 'f' and 2 more; give both"):
        check_same_classes(train, named("x val", "ant", "bee", "cat", *"defgh"))
    with pytest.raises(ValueError, match="differ: x val lacks 'ant', 'bee', 'cat'; give both"):
        check_same_classes(train, named("x val"))
    with pytest.raises(ValueError, match="differ: the same names have other numbers"):
        check_same_classes(train, named("x val", "bee", "ant", "cat"))
