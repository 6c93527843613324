"""Runs on one axis: groups, costs, what differs, and errors that say what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mae_et.comparison.comparing import compare_runs
from mae_et.comparison.runs import Point
from mae_et.config import ConfigError
from mae_et.engine.run_folder import RunFolder
from tests.comparison.made import checkpoint_of, flops_before, make_run, plan_in

SLOW = {10: 0.2, 20: 0.4, 30: 0.6, 40: 0.8}
FAST = {5: 0.2, 10: 0.4, 15: 0.6, 20: 0.8, 40: 0.85}
PIXEL = "target.kind=pixel"


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "slow", SLOW)


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    """The same network by another mask, so that its images cost less, and each step thrice the time."""
    return make_run(tmp_path_factory.mktemp("runs") / "fast", FAST, "mask_ratio=0.9", seconds=3.0)


@pytest.mark.parametrize(("axis", "unit"), [("images", "images"), ("hours", "hours"), ("compute", "MFLOPs")])
def test_speedup_on_every_axis(slow, fast, axis, unit):
    # Both reach 0.8, the baseline's at its end, at steps 40 and 20.
    ratio = {"images": 2.0, "hours": 2 / 3, "compute": flops_before(slow, 40) / flops_before(fast, 20)}[axis]
    comparison = compare_runs([slow, fast], axis)
    assert (comparison.axis, comparison.unit, comparison.score) == (axis, unit, "eval/probe")
    assert (comparison.baseline, [run.status for run in comparison.runs]) == ("slow", ["complete"] * 2)
    first, second = comparison.reached
    assert (first.score, first.speedup.ratio, first.speedup.low) == (0.8, 1, None)
    assert second.speedup.ratio == pytest.approx(ratio, rel=1e-9)  # hours go through text, to all digits
    again = compare_runs([slow, fast], axis, baseline="fast", reach=0.5)
    assert (again.baseline, again.reached[0].score) == ("fast", 0.5)
    assert again.reached[0].speedup.ratio == pytest.approx(1 / ratio, rel=1e-9)


def test_costs_are_the_plans(slow):
    comparison = compare_runs([slow], reach=0.5)
    run, plan = comparison.runs[0], plan_in(slow)
    flops = [flops_before(slow, step) / 1e6 for step in (10, 20, 25, 30, 40)]
    assert comparison.reached[0].costs == (pytest.approx(flops[2]),)
    assert [point.cost for point in run.scores["eval/probe"]] == pytest.approx([*flops[:2], *flops[3:]])
    assert run.total == pytest.approx(flops[4])
    assert dict(run.spent) == pytest.approx(
        {"compute": plan.total_flops, "hours": 40 / 3600, "images": 320, "fraction": 1}
    )
    assert run.curves["train/loss"][0] == (pytest.approx(flops_before(slow, 1) / 1e6), 1)
    assert (run.stages, run.parent, run.seed, run.pictures) == ((), None, 3, {})


def test_seeds_are_one_group_with_their_interval(tmp_path):
    steps = {"base": (40, 36, 38), "mine": (20, 26)}
    paths = []
    for name, reached in steps.items():
        change = [PIXEL] if name == "mine" else []
        for seed, step in enumerate(reached):
            paths.append(make_run(tmp_path / f"{name}-seed{seed}", {step: 0.8}, f"seed={seed}", *change))
    comparison = compare_runs(paths, "images", baseline="base-seed2")
    assert [run.group for run in comparison.runs] == ["base"] * 3 + ["mine"] * 2
    assert comparison.differences == (("target.kind", ("hog",) * 3 + ("pixel",) * 2),)
    found = comparison.reached[1]
    assert (found.group, found.costs, found.speedup.of) == ("mine", (160, 208), (3, 2))
    interval = stats.ttest_ind(*(np.log(side) for side in steps.values()), equal_var=False).confidence_interval(0.95)
    assert found.speedup.low == pytest.approx(math.exp(interval.low), rel=1e-8)
    assert found.speedup.high == pytest.approx(math.exp(interval.high), rel=1e-8)


def test_the_score_to_reach_is_one_that_all_of_the_baseline_reach(tmp_path):
    paths = [make_run(tmp_path / f"r{s}", {20: 0.5, 40: 0.8 + s / 100}, f"seed={s}") for s in (1, 0)]
    comparison = compare_runs(paths)
    assert comparison.reached[0].score == 0.8
    assert comparison.reached[0].speedup.seeds == (2, 2)


def test_groups_keep_their_names_apart(tmp_path):
    runs = [("a-s0", "seed=0", PIXEL), ("a-s1", "seed=1", PIXEL), ("b0", "seed=0"), ("b1", "seed=1"), ("a", "epochs=4")]
    comparison = compare_runs([make_run(tmp_path / name, {20: 0.5}, *changes) for name, *changes in runs])
    assert [run.group for run in comparison.runs] == ["a-s0", "a-s0", "b", "b", "a"]  # "a" is a run's


def test_two_folders_of_a_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / folder / "run", {5: 0.5}, f"seed={folder}") for folder in ("1", "2")]
    assert [run.name for run in compare_runs(paths).runs] == [str(path) for path in paths]


def test_stages_on_the_axis(tmp_path):
    path = make_run(tmp_path / "staged", {40: 0.5}, "curriculum=efficienttrain_pp")
    plan = plan_in(path)
    (tmp_path / "staged/pictures/stage-2-B12.png").touch()
    (tmp_path / "staged/pictures/stage-1-B6.png").touch()
    run = compare_runs([path], "images").runs[0]
    ends = [plan.images_before(step) for step in (*plan.boundaries[1:], plan.total_steps)]
    assert len(ends) == 3
    assert [(stage.begin, stage.end) for stage in run.stages] == list(zip([0, *ends], ends))
    assert [stage.label for stage in run.stages] == [str(stage.bandwidth[0]) for stage in plan.stages]
    assert [(name, file.name) for name, file in run.pictures.items()] == [
        ("stage 1, B=6", "stage-1-B6.png"),
        ("stage 2, B=12", "stage-2-B12.png"),
    ]


@pytest.mark.parametrize(
    ("state", "status"),
    [("running", "running"), ("failed", "failed"), ("stopped", "interrupted"), (None, "interrupted")],
)
def test_unfinished_runs_compare_as_far_as_they_are(slow, tmp_path, state, status):
    half = make_run(tmp_path / "half", SLOW, PIXEL, until=20, state=state)
    with RunFolder(half):  # held, as by a run that goes on
        comparison = compare_runs([slow, half], "images")
    assert comparison.runs[1].status == status
    assert comparison.runs[1].total == 160
    assert comparison.reached[1].costs == (None,)
    assert f"half is {status} at 50% of its plan, and compared as far as it is." in comparison.notes


def test_a_run_that_was_killed_does_not_go_on(tmp_path):
    killed = make_run(tmp_path / "killed", SLOW, until=20, state="running")
    assert compare_runs([killed]).runs[0].status == "interrupted"  # there is no lock at all
    with RunFolder(killed):
        pass
    assert (killed / ".lock").exists()
    assert compare_runs([killed]).runs[0].status == "interrupted"


def test_runs_that_begin_above_the_score_leave_bounds_or_nothing(slow, tmp_path):
    high = make_run(tmp_path / "high", {20: 0.9, 40: 0.95}, PIXEL)
    comparison = compare_runs([slow, high], "images")
    found = comparison.reached[1].speedup
    assert (found.ratio, found.low, found.bound) == (2.0, None, "at least")
    assert any(note.startswith("Above 80.00 % when first scored") for note in comparison.notes)
    assert compare_runs([high, slow], "images", reach=0.8).reached[1].speedup.bound == "at most"
    both = compare_runs([slow, high], "images", reach=0.1)
    assert (both.reached[1].speedup.ratio, both.reached[1].costs) == (None, (160,))
    alone = make_run(tmp_path / "alone", {40: 0.9}, "epochs=4", until=20)  # never scored
    (alone / "evaluation.json").write_text(
        json.dumps({"scores": {"pretrained": {"probe": 0.9}}, "checkpoint_step": 20})
    )
    # A score of its own at its end is where it reaches it.
    assert compare_runs([alone, high], "images").reached[1].speedup.bound == ""


def test_a_race_whose_time_is_up_is_complete(tmp_path):
    assert compare_runs([make_run(tmp_path / "race", SLOW, until=20, state="time is up")]).runs[0].status == "complete"


def test_what_was_scored_afterwards_is_one_point(slow, tmp_path):
    late = make_run(tmp_path / "late", {}, PIXEL)
    scores = {"pretrained": {"probe": 0.9, "knn20": 0.7}, "untrained": {"probe": 0.3}}
    (late / "evaluation.json").write_text(json.dumps({"scores": scores, "checkpoint_step": 40}))
    run = compare_runs([slow, late], "images").runs[1]
    assert run.scores["eval/probe"] == [Point(320, 0.9)]
    (slow / "evaluation.json").write_text(json.dumps({"scores": scores, "checkpoint_step": 40}))
    assert compare_runs([slow], "images").runs[0].scores["eval/probe"][-1] == Point(320, 0.8)  # it was scored there
    (slow / "evaluation.json").unlink()


def test_reports_of_labelled_and_annotated_runs(tmp_path):
    path = make_run(tmp_path / "tuned", {20: 0.5}, score="val/top1")
    boxes = {"ap": 0.25, "small": None, "per_class": [{"ap": 0.1}]}
    report = {"step": 40, "size": [16, 16], "val": {"top1": 0.6, "images": 9}, "test": {"boxes": boxes, "masks": None}}
    (path / "report.json").write_text(json.dumps(report))
    comparison = compare_runs([path], "images")
    assert (comparison.score, comparison.runs[0].task) == ("val/top1", "finetune")
    assert comparison.runs[0].scores["val/top1"] == [Point(160, 0.5), Point(320, 0.6)]
    assert comparison.runs[0].scores.keys() == {"-train/loss", "val/top1", "test/ap"}


def test_losses_are_a_last_resort_and_said_to_be(tmp_path):
    paths = [make_run(tmp_path / "a", {}), make_run(tmp_path / "b", {}, PIXEL)]
    comparison = compare_runs(paths, "images")
    assert comparison.score == "-train/loss"
    assert comparison.runs[0].scores["-train/loss"][1] == Point(16, -0.5)
    assert any("target" in note for note in comparison.notes)
    assert compare_runs(paths, score="train/loss").score == "-train/loss"


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path):
    path = make_run(tmp_path / "a", SLOW)
    file = path / "metrics.jsonl"
    file.write_text(file.read_text().replace('"train/loss": 0.5', '"train/loss": "NaN"'))
    assert [cost for cost, _ in compare_runs([path], "images").runs[0].curves["train/loss"]][:3] == [8, 24, 32]


def test_one_seed_twice_is_said(tmp_path):
    comparison = compare_runs([make_run(tmp_path / name, SLOW) for name in ("a1", "a2")])
    assert "a1 and a2 have the same seed: as two of a group they say too much." in comparison.notes


@pytest.fixture
def tuned(tmp_path):
    """Pretraining, and fine-tuning from its checkpoint at step 20."""
    first = make_run(tmp_path / "first", {})
    return first, make_run(tmp_path / "tuned", SLOW, score="val/top1", parent=checkpoint_of(first, 20, seed=7))


def test_pretraining_adds_what_the_checkpoint_cost(tuned):
    first, second = tuned
    alone = compare_runs([second], "images").runs[0]
    assert (alone.total, alone.settings["checkpoint"], alone.settings["checkpoint.seed"]) == (320, "a run", 7)
    for given in ([second], [first, second]):  # found where it was, or among those given, and not compared itself
        comparison = compare_runs(given, "images", with_pretraining=True)
        (run,) = comparison.runs
        assert (run.name, run.total, run.scores["val/top1"][0].cost) == ("tuned", 480, 240)
        assert run.spent["fraction"] == 1
        assert run.spent["compute"] == flops_before(second, 40) + flops_before(first, 20)
        assert run.curves["train/loss"][0][0] == 168


def test_pretraining_of_pretraining(tuned, tmp_path):
    third = make_run(tmp_path / "third", SLOW, score="val/top1", parent=checkpoint_of(tuned[1], 40, task="finetune"))
    assert compare_runs([third], "images", with_pretraining=True).runs[0].total == 320 + 320 + 160


def test_a_moved_parent_is_found_among_the_runs(tuned, tmp_path):
    moved = tuned[0].rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="no such run is there any more: give its folder among the runs"):
        compare_runs([tuned[1]], with_pretraining=True)
    assert compare_runs([moved, tuned[1]], "images", with_pretraining=True).runs[0].total == 480


def test_runs_of_other_pretraining_are_other_groups(tmp_path):
    paths = []
    for kind in ("hog", "pixel"):
        for seed in (0, 1):
            first = make_run(tmp_path / f"{kind}-{seed}", {})
            origin = checkpoint_of(first, 40, seed=seed, run=str(first), target={"kind": kind})
            paths.append(make_run(tmp_path / f"tuned-{kind}-{seed}", SLOW, score="val/top1", parent=origin))
    scratch = make_run(tmp_path / "scratch", SLOW, score="val/top1")
    comparison = compare_runs([*paths, scratch], "images", with_pretraining=True)
    assert [run.group for run in comparison.runs] == ["tuned-hog"] * 2 + ["tuned-pixel"] * 2 + ["scratch"]
    assert comparison.differences == (
        ("checkpoint", ("a run",) * 4 + ("null",)),
        ("checkpoint.target.kind", ("hog", "hog", "pixel", "pixel", "-")),
    )
    assert [run.total for run in comparison.runs] == [640] * 4 + [320]
    assert not any("same seed" in note for note in comparison.notes)  # that of pretraining differs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "eval/prob"}, r"--score eval/prob: these runs share .*eval/probe; did you mean 'eval/probe'"),
        ({"baseline": "other"}, "--baseline other: there is no such run or group; there are slow, fast"),
        ({"score": "train/loss", "reach": 0.5}, "--reach 0.5: losses are compared negated; say --reach=-0.5"),
        ({"reach": 85.0}, "--reach 85: eval/probe is between 0 and 1; say 0.85 for 85 %"),
        ({"axis": "fraction", "with_pretraining": True}, "--with-pretraining: fractions of two runs do not add up"),
    ],
)
def test_options_that_cannot_be(slow, fast, options, message):
    with pytest.raises(ConfigError, match=message):
        compare_runs([slow, fast], **options)


def test_runs_that_share_no_score_are_listed(slow, tmp_path):
    tuned = make_run(tmp_path / "tuned", SLOW, score="val/top1")
    unscored = make_run(tmp_path / "unscored", {}, until=3, state="failed")
    with pytest.raises(
        ConfigError, match=r"share no score:\n  slow \(pretrain, complete\): -train/loss, eval/probe\n  tuned"
    ):
        compare_runs([slow, tuned])
    with pytest.raises(ConfigError, match=r"unscored \(pretrain, failed\): -train/loss\nCompare runs"):
        compare_runs([slow, unscored])
    with pytest.raises(ConfigError, match=r"--score eval/probe: there are runs without it:\n  tuned.*\nLeave them out"):
        compare_runs([slow, tuned], score="eval/probe")


def test_folders_that_hold_no_run(slow, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: there is no .*config\.yaml"):
        compare_runs([slow, tmp_path])
    with pytest.raises(ConfigError, match="is given twice"):
        compare_runs([slow, slow / "." / "pictures" / ".."])
    bare = make_run(tmp_path / "bare", {}, until=0)
    (bare / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="bare has logged nothing yet: leave it out"):
        compare_runs([slow, bare])
    (bare / "plan.json").unlink()
    with pytest.raises(ConfigError, match=r"bare holds no run: there is no .*plan\.json"):
        compare_runs([bare])
    (bare / "config.yaml").write_text("task: search\nrun: x\nseed: 0\n")
    with pytest.raises(ConfigError, match="bare holds a run of search, and these compare: pretrain, "):
        compare_runs([bare])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"step": 0, "parent/kind": "run", "parent/config": "[]"}\n'),
        ("metrics.jsonl", '{"step": 0, "parent/kind": "run", "parent/step": "x"}\n'),
        ("status.json", "{"),
        ("evaluation.json", '{"scores": {}}'),
        ("evaluation.json", "[]"),
        ("report.json", '{"step": null}'),
        ("plan.json", "{}"),
        ("config.yaml", "seed: 0"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text):
    path = make_run(tmp_path / "run", SLOW)
    (path / file).write_text(text)
    with pytest.raises(ConfigError, match=file):
        compare_runs([path])


def test_plans_without_flops_have_other_axes(slow, tmp_path):
    path = make_run(tmp_path / "unknown", SLOW, PIXEL)
    plan = json.loads((path / "plan.json").read_text())
    for stage in plan["stages"]:
        stage["flops_per_image"] = None
    (path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=r"unknown: the plan knows no FLOPs: use --axis hours, images or fraction"):
        compare_runs([slow, path])
    assert compare_runs([slow, path], "images").reached[1].speedup.ratio == 1


def test_a_baseline_is_known_by_its_folder_as_shells_complete_it(slow, fast):
    assert compare_runs([slow, fast], baseline=f"{fast}/").baseline == "fast"


def test_seeds_that_share_their_pretraining_are_said(tuned, tmp_path):
    first, one = tuned
    other = make_run(tmp_path / "tuned2", SLOW, "seed=4", score="val/top1", parent=checkpoint_of(first, 20, seed=7))
    notes = compare_runs([one, other]).notes
    assert "Runs of tuned began with one network: how they vary says nothing of its own seed." in notes


def test_numbers_beyond_floats_and_texts_are_left_out(tmp_path):
    path = make_run(tmp_path / "run", SLOW)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10**400, "eval/probe": True, "x": "y", "compute/flops": None}) + "\n")
    assert [point.score for point in compare_runs([path]).runs[0].scores["eval/probe"]] == list(SLOW.values())
