"""Sizes of the published schedules at any final size, and exact token counts."""

from __future__ import annotations

import pytest

from mae_et.curriculum import Curriculum
from mae_et.curriculum.stage import as_size, format_size, visible_tokens
from mae_et.curriculum.table import plan_table, quantity


@pytest.mark.parametrize(
    ("preset", "final", "patch", "sizes"),
    [
        ("efficienttrain_pp", 224, 16, [96, 160, 224]),
        ("efficienttrain_pp", 224, 14, [98, 154, 224]),
        ("efficienttrain_pp", 384, 16, [96, 240, 384]),
        ("efficienttrain_pp", 256, 16, [96, 176, 256]),
        ("efficienttrain_pp", 28, 2, [12, 20, 28]),
        ("efficienttrain_pp", 32, 2, [14, 22, 32]),
        ("efficienttrain_pp", 64, 4, [28, 44, 64]),
        ("efficienttrain_pp", 56, 4, [24, 40, 56]),
        ("efficienttrain_pp", 96, 16, [48, 64, 96]),
        ("efficienttrain", 224, 16, [160, 192, 224]),
        ("efficienttrain", 384, 16, [160, 272, 384]),
        ("efficienttrain_pp_deit", 224, 16, [96, 160, 192, 224]),
        ("baseline", 224, 16, [224]),
        ("baseline", 28, 4, [28]),
    ],
)
def test_sizes_follow_the_final_size(preset, final, patch, sizes):
    stages = Curriculum.preset(preset, final, patch).stages
    assert [stage.bandwidth for stage in stages] == [(size, size) for size in sizes]


def test_rectangles_keep_their_aspect():
    stages = Curriculum.preset("efficienttrain_pp", (224, 448), 16).stages
    assert [stage.bandwidth for stage in stages] == [(96, 192), (160, 320), (224, 448)]


def test_small_grids_are_vit_bases_own():
    plan = Curriculum.preset("efficienttrain_pp", 28, 2).plan(
        epochs=2, images=60_000, batch=256, patch_size=2, mask_ratio=0.75
    )
    assert [(s.grid, s.visible, s.masked) for s in plan.stages] == [
        ((6, 6), 9, 27),
        ((10, 10), 25, 75),
        ((14, 14), 49, 147),
    ]


def test_unknown_presets_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"unknown curriculum 'efficient'; known: baseline, efficienttrain,"):
        Curriculum.preset("efficient")
    with pytest.raises(ValueError, match="final size 225 px is not a multiple of the patch size 16 px"):
        Curriculum.preset("baseline", 225)


@pytest.mark.parametrize("tokens", [36, 100, 196, 197, 7])
@pytest.mark.parametrize("percent", range(0, 100, 5))
def test_visible_tokens_are_exact(tokens, percent):
    expected = tokens * (100 - percent) // 100
    if expected == 0:
        with pytest.raises(ValueError, match="lower the ratio"):
            visible_tokens(tokens, percent / 100)
    else:
        assert visible_tokens(tokens, percent / 100) == expected


def test_a_ratio_that_floating_point_gets_wrong():
    assert int(100 * (1 - 0.8)) == 19
    assert visible_tokens(100, 0.8) == 20


@pytest.mark.parametrize("value", [0, -1, (1,), (2, 0), "224", 1.5, (1, 2, 3)])
def test_sizes_must_be_one_or_two_positive_numbers(value):
    with pytest.raises((ValueError, TypeError)):
        as_size(value)


def test_sizes_read_well():
    assert format_size(as_size(96)) == "96"
    assert format_size(as_size((96, 192))) == "96x192"
    assert [quantity(x) for x in (None, 5.0, 1234.0, 10.8e9, 29.5e18)] == ["-", "5", "1.23 k", "10.8 G", "29.5 E"]


def test_the_table_shows_every_stage_and_the_totals():
    plan = Curriculum.preset("efficienttrain_pp").plan(epochs=400, images=1_281_167, batch=4096, mask_ratio=0.75)
    table = plan_table(plan)
    for text in ("135,893", "97,843", "49,920", "283,656 steps", "400.0 equivalent epochs at B=224", "435.6"):
        assert text in table


@pytest.mark.parametrize(
    ("final", "patch", "sizes"),
    [(224, 32, [160, 160, 224]), (384, 32, [160, 256, 384]), (28, 4, [20, 20, 28]), (96, 32, [64, 64, 96])],
)
def test_a_floor_raises_the_first_stages(final, patch, sizes):
    """ConvNeXt begins at 160 of 224 px (EfficientTrain++, appendix A.1, and the released scripts)."""
    stages = Curriculum.preset("efficienttrain_pp", final, patch, floor=160).stages
    assert [stage.bandwidth for stage in stages] == [(size, size) for size in sizes]
    assert [stage.end for stage in stages] == [0.2, 0.6, 1.0]
