"""Benches of tiny runs, end to end, and their parts against clocks that are made up."""

from __future__ import annotations

import json
import os
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et import pretraining
from mae_et.__main__ import main
from mae_et.bench import compiling, feeding, matrix, measuring, steps, subject
from mae_et.config import load_config
from mae_et.data.loader import Batch
from mae_et.engine.distributed import Ranks
from tests.end_to_end.labelled import COMMON, TINY_VIT
from tests.end_to_end.tiny import TINY
from tests.engine.ranks import run_ranks

BRIEF = ["--seconds", "0.5", "--no-compile"]
STAGES = "curriculum.stages=[{end: 0.5, bandwidth: 8}, {end: 1, bandwidth: 16}]"
FEW = [*TINY, STAGES, "epochs=4", "optim.batch=32", "optim.accumulation=2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 small PNGs."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(generator.integers(0, 255, (24, 28, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(autouse=True)
def _on_one_core_that_is_busy(monkeypatch):
    """Others run beside the tests: no thread waits for another one, and sizes are tried however long they take."""
    monkeypatch.setattr(measuring, "process_cores", lambda: 1)
    monkeypatch.setattr(steps, "LEAST_SECONDS", 1e9)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("{}\n")
    return path


def test_a_bench_measures_the_step_and_the_data_path(photos, recipe, tmp_path, capsys):
    out = tmp_path / "kept" / "bench.json"
    threads = torch.get_num_threads()
    assert main(["bench", "--config", str(recipe), "--json", str(out), *BRIEF, *FEW, f"data.root={photos}"]) == 0
    assert torch.get_num_threads() == threads
    kept, printed = json.loads(out.read_text()), capsys.readouterr().out
    peak = kept["products"][-1]["flops_per_second"]
    assert peak == max(product["flops_per_second"] for product in kept["products"])
    assert [stage["bandwidth"] for stage in kept["stages"]] == [[8, 8], [16, 16]]
    assert sum(stage["share"] for stage in kept["stages"]) == pytest.approx(1)
    for stage, binding in zip(kept["stages"], kept["bindings"]):
        for micro in stage["micro_batches"]:
            count = micro["accumulation"] or 1
            assert micro["images"] == 32 // count or (micro["accumulation"] is None and micro["images"] in (64, 128))
            assert micro["images_per_second"] == pytest.approx(micro["images"] / micro["seconds"])
            assert micro["flops_per_second"] == pytest.approx(stage["flops_per_image"] * micro["images_per_second"])
            assert micro["of_peak"] == pytest.approx(micro["flops_per_second"] / peak)
            assert 0 < micro["of_peak"] <= 1
        assert stage["image"] == [3, *stage["bandwidth"]]
        rates = stage["micro_batches"][stage["chosen"]]["images_per_second"], stage["data"]["images_per_second"]
        assert binding["what"] == ("step" if rates[1] >= rates[0] else "data")
        assert binding["factor"] == pytest.approx(max(rates) / min(rates))
    assert kept["stages"][0]["flops_per_image"] < kept["stages"][1]["flops_per_image"]
    assert kept["setting"]["accumulation"] == 2
    assert kept["no_compile"] == "--no-compile"
    assert "matrix peak: " in printed
    assert "asks for" in printed


def test_without_data_the_step_alone_is_measured(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "process_cores", lambda: 2)
    out = tmp_path / "bench.json"
    line = ["bench", "--json", str(out), *BRIEF, "--config", str(recipe), *FEW]
    assert main([*line, "data.images=64", f"data.root={tmp_path / 'absent'}"]) == 0
    assert "the data path was not measured: data.images=64 stands for the images" in capsys.readouterr().out
    kept = json.loads(out.read_text())
    assert kept["bindings"] is None
    assert [set(stage["threads"]) for stage in kept["stages"]] == [{"1", "2"}] * 2
    assert torch.get_num_threads() == 1
    # The report is told before a file is refused.
    assert main([*line, "data.images=64", "--json", str(tmp_path)]) == 1
    assert "matrix peak: " in capsys.readouterr().out
    assert main([*line, f"data.root={tmp_path / 'absent'}"]) == 2
    assert "data.images=... measures the peak and the step" in capsys.readouterr().err


def test_without_a_recipe_it_is_the_papers_on_numbers(tmp_path):
    config = subject.read_config(None, [])
    assert (config.model.name, config.data.size, config.data.images) == ("vit_base", 224, 1_281_167)
    assert subject.read_config(None, ["data.root=/photos"]).data.images is None
    with pytest.raises(subject.ConfigError, match="a recipe of probe"):
        subject.read_config("configs/probe/grid.yaml", [])


def test_a_recipe_of_labels(tmp_path, capsys):
    path, out = tmp_path / "labels.yaml", tmp_path / "bench.json"
    path.write_text("task: finetune\n")
    changes = [*COMMON, *TINY_VIT, "data.size=16", "epochs=6", "optim.batch=8", "data.images=64", "model.drop_path=0.2"]
    changes += ["data.downsample=fourier", "curriculum.stages=[{end: 0.5, bandwidth: 8}, {end: 1, bandwidth: 16}]"]
    line = ["bench", "--config", str(path), "--json", str(out), *BRIEF, *changes]
    assert main([*line, "data.classes=3"]) == 0
    kept = json.loads(out.read_text())
    # The device crops: images of the final size travel to it.
    assert [stage["image"] for stage in kept["stages"]] == [[3, 16, 16]] * 2
    assert main(line) == 2
    assert "data.classes" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_the_time_is_a_number_of_seconds(seconds, capsys):
    assert main(["bench", f"--seconds={seconds}"]) == 2
    assert "needs a number of seconds above 0" in capsys.readouterr().err


def test_compiling_has_the_memory_to_itself(recipe, monkeypatch):
    states, alive = [], []
    build = pretraining.build_state

    def watched(*arguments):
        state = build(*arguments)
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(pretraining, "build_state", watched)
    monkeypatch.setattr(measuring, "compare_compiled", lambda *_: (alive.append(states[0]()), ({}, "not here"))[1])
    line = ["bench", "--config", str(recipe), "--seconds", "0.2", *FEW, "data.images=64"]
    assert main(line) == 0
    assert alive == [None]


def test_images_that_do_not_fit_are_told(recipe, tmp_path, capsys, monkeypatch):
    out, before, emptied = tmp_path / "bench.json", steps.micro_step, []

    def small_memory(state, batch, *rest):
        if len(batch.images) > 8:
            raise torch.cuda.OutOfMemoryError("full")
        return before(state, batch, *rest)

    monkeypatch.setattr(steps, "micro_step", small_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    line = ["bench", "--config", str(recipe), "--json", str(out), *BRIEF, *FEW, "data.images=64"]
    assert main(line) == 0
    printed, kept = capsys.readouterr().out, json.loads(out.read_text())
    for stage in kept["stages"]:
        assert [(m["images"], m["seconds"] is None) for m in stage["micro_batches"]] == [(8, False), (16, True)]
    assert kept["advice"]["overrides"] == {"optim.accumulation": "4"}
    assert "the 16 images of accumulation=2 do not fit at B=8, B=16" in printed
    assert "out of memory" in printed
    assert len(emptied) == 2
    monkeypatch.setattr(steps, "SMALLEST", 16)
    assert main(line) == 2
    assert "not even 16 images fit" in capsys.readouterr().err


def bench_in_few_steps(words: list[str]) -> None:
    """Ranks that share cores with others are slow to agree."""
    measuring.process_cores = lambda: 1
    matrix.SQUARES, matrix.VIT, steps.ROUNDS = (64,), (), 1
    raise SystemExit(main(words))


def test_ranks_measure_together(recipe, tmp_path):
    out = tmp_path / "bench.json"
    one_size = "curriculum.stages=[{end: 1, bandwidth: 8}]"
    brief = ["--seconds", "0.2", "--no-compile"]
    line = ["bench", "--config", str(recipe), "--json", str(out), *brief, *FEW, one_size, "data.images=64"]
    run_ranks(2, bench_in_few_steps, line)
    kept = json.loads(out.read_text())
    assert kept["setting"]["processes"] == 2
    assert kept["stages"][0]["batch"] == 32
    micro = kept["stages"][0]["micro_batches"][0]
    assert (micro["images"], micro["accumulation"]) == (8, 2)  # of 16 on each


# Parts.


@pytest.mark.parametrize(
    ("share", "accumulation", "sizes"),
    [
        (64, 1, [(8, 8), (16, 4), (32, 2), (64, 1), (128, None), (256, None)]),
        (48, 3, [(8, 6), (12, 4), (16, 3), (24, 2), (48, 1), (96, None), (192, None)]),
        (4, 1, [(4, 1), (8, None), (16, None)]),
        (64, 32, [(2, 32), (4, 16), (8, 8), (16, 4), (32, 2), (64, 1), (128, None), (256, None)]),
        (250, 1, [(125, 2), (250, 1), (500, None), (1000, None)]),
    ],
)
def test_sizes_to_try(share, accumulation, sizes):
    assert [(size.images, size.accumulation) for size in steps.ladder(share, accumulation)] == sizes


class Clockwork:
    """A geometry whose steps take what is set: `update` once, and `each` for an image."""

    def __init__(self, update: float = 0.0, each: float = 1.0, memory: int = 0):
        self.update, self.each, self.share = update, each, 64
        self.rehearsal = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cpu")))

    def seconds(self, images: int, count: int = 1, accumulation: int = 1) -> float:
        return self.update + accumulation * images * self.each

    def fits(self, images: int) -> bool:
        return True


def test_rates_of_micro_batches():
    size = steps.Candidate(8, 4, together=4, seconds=[0.32, 0.32, 9.0])
    found = steps.micro_batch(size, flops_per_image=10.0, peak=1000.0)
    assert (found.seconds, found.images_per_second) == (pytest.approx(0.08), pytest.approx(100))
    assert (found.flops_per_second, found.of_peak) == (pytest.approx(1000), pytest.approx(1))


def test_an_update_is_shared_by_the_micro_batches_of_a_step(monkeypatch):
    monkeypatch.setattr(steps, "peak_memory", lambda _device: None)
    geometry = Clockwork(0.3, 0.01)
    (found,) = steps.measure_steps([geometry], 1, 1e4)  # pyright: ignore[reportArgumentType]
    seconds = {size.images: steps.micro_batch(size, 1.0, 1.0).seconds for size in found}
    assert seconds == pytest.approx(
        {8: 0.08 + 0.3 / 4, 16: 0.16 + 0.3 / 4, 32: 0.32 + 0.3 / 2, 64: 0.94, 128: 1.58, 256: 2.86}
    )


def test_repeats_tell_how_rough_times_are():
    sizes = [
        steps.Candidate(8, 1, seconds=values) for values in ([1.0, 1.1, 1.2], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [])
    ]
    assert steps.noise(sizes) == pytest.approx(0.2 / 2.2)


def test_turns_end_with_the_time(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))
    assert [list(steps.turns_within(seconds)) for seconds in (0.5, 1.5, 9)] == [[0], [0, 1], list(range(steps.ROUNDS))]


@pytest.mark.parametrize(("seconds", "most"), [(5 * 9, 8), (5 * 17, 16), (5 * 65, 64), (10 * 129, 128), (1e9, 256)])
def test_sizes_that_take_too_long_are_left_out(monkeypatch, seconds, most):
    """Five steps of a size must fit; of those larger than the configured one, into half of the time."""
    monkeypatch.setattr(steps, "LEAST_SECONDS", 0.0)
    found = steps.climb(Clockwork(), 1, seconds)  # pyright: ignore[reportArgumentType]
    assert found[-1].images == most


def test_a_cpu_is_not_run_out_of_memory(monkeypatch):
    monkeypatch.setattr(steps, "peak_memory", lambda _device: 40)
    monkeypatch.setattr(steps, "machine_memory", lambda: 100)
    found = steps.climb(Clockwork(), 1, 1e9)  # pyright: ignore[reportArgumentType]
    assert [size.images for size in found] == [8]


def test_the_peak_is_the_best_product_at_its_median(monkeypatch):
    clock = {2 * 64**3: 1e-3, 2 * 128**3: 2e-3}
    seen = []

    def timed(call, count, device, patience):
        m, n = call().shape
        seen.append((m, count))
        return clock[2 * m * n * n]

    monkeypatch.setattr(matrix, "timed", timed)
    shapes = [(64, 64, 64), (128, 128, 128)]
    turn = matrix.measure_products(shapes, "bf16", torch.device("cpu"), 1.0)
    assert turn == {shape: pytest.approx(2 * shape[0] ** 3 / clock[2 * shape[0] ** 3]) for shape in shapes}
    assert (64, 50) in seen  # samples of 0.05 s
    best = matrix.ranking([turn, {shapes[0]: 1e12}])
    assert [product.shape for product in best] == [shapes[1], shapes[0]]
    assert best[-1].flops_per_second == 1e12
    # The second would take longer than a fifth of its half of the time.
    assert list(matrix.measure_products(shapes, "bf16", torch.device("cpu"), 0.01)) == shapes[:1]


def test_one_image_stands_for_many(photos):
    config = load_config(None, [*FEW, f"data.root={photos}"])
    ranks = Ranks(0, 1, torch.device("cpu"))
    opened = subject.open_subject(config, ranks)
    rehearsal = measuring.Rehearsal(opened.rehearse(ranks, "never"), ranks, 0, 1.0)
    geometry = steps.Geometry(rehearsal, *rehearsal.geometries()[1])
    found = geometry.batch(6)
    assert isinstance(found, Batch)
    assert found.images.shape == (6, 3, 16, 16)
    assert torch.equal(found.images, found.images[:1].expand(6, -1, -1, -1))
    assert found.seeds.tolist() == list(range(6))  # masks differ
    assert geometry.batch(4).images.data_ptr() == found.images.data_ptr()


@pytest.mark.parametrize("repeats", [1, 3])
def test_batches_of_the_data_path_are_small_and_hold_whole_sets_of_views(monkeypatch, photos, repeats):
    class Endless:
        def __init__(self):
            self.asked = []

        def batches(self, first, workers, batch):
            self.asked.append((workers, batch))
            return self

        def __enter__(self):
            return iter(range(10**6))

        def __exit__(self, *_):
            pass

    rehearsal = Endless()
    rehearsal.assembly = SimpleNamespace(repeats=repeats)  # pyright: ignore[reportAttributeAccessIssue]
    counts = []

    def timed(call, count):
        counts.append(count)
        return 0.01

    rehearsal.timed = timed  # pyright: ignore[reportAttributeAccessIssue]
    geometry = SimpleNamespace(rehearsal=rehearsal, first=0, stage=SimpleNamespace(steps=10))
    rate = feeding.delivered(geometry, 2, 1.0)  # pyright: ignore[reportArgumentType]
    chunk = {1: 32, 3: 33}[repeats]
    assert rehearsal.asked == [(2, chunk)]
    assert rate == pytest.approx(chunk / 0.01)
    assert counts == [2, 98]  # volleys of two workers, for a second in all


def test_compiling_is_timed_apart(photos, monkeypatch):
    config = load_config(None, [*FEW, f"data.root={photos}"])
    ranks = Ranks(0, 1, torch.device("cpu"))
    opened, caches = subject.open_subject(config, ranks), []

    def slow_at_first(module, **_):
        def once(*_):
            caches.append(os.environ[compiling.CACHE])
            handle.remove()
            time.sleep(0.5)

        handle = module.register_forward_pre_hook(once)

    monkeypatch.setattr(torch.nn.Module, "compile", slow_at_first)
    monkeypatch.setenv(compiling.CACHE, "mine")
    trials, failure = compiling.compare_compiled(opened, ranks, [0, 1], [8, 8], 0.5)
    assert failure is None
    assert (os.environ[compiling.CACHE], set(caches) & {"mine"}) == ("mine", set())
    # Three blocks, encoder's and decoder's, each slow once, at the first size.
    assert trials[0].compile_seconds > 1.2
    assert trials[1].compile_seconds < 1.0
    assert trials[0].compiled_seconds < 1.0

    def broken(module, **_):
        module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler\nhere")))

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    assert compiling.compare_compiled(opened, ranks, [0, 1], [8, 8], 0.5) == ({}, "compiling failed: no compiler")
