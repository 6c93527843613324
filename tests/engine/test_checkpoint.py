"""Checkpoints: bit-exact round trips, which are kept, and what damage and malice do."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mae_et.engine.checkpoint import (
    CheckpointError,
    SaveError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tests.engine.saves import assert_loads, assert_same_bits, content, names, save

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def flip_bit(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def shapes_and_layouts() -> dict[str, Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "zero_d": torch.tensor(3.25),
        "empty": torch.zeros(0, 5),
        "transposed": base.t(),
        "strided": base[:, ::2],
        "shared": base,
        "shared_again": base,
        "shared_tail": base.reshape(-1)[20:],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "channels_last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.tensor([1e-45, -0.0, 3.4e38])),
        'name with "quotes", ½ and\nnewline': torch.ones(1),
    }


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
    ids=str,
)
def test_every_bit_pattern_of_every_dtype_comes_back(tmp_path, dtype):
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))
    values = raw % 2 == 0 if dtype == torch.bool else raw.view(dtype)
    # In the optimizer group, because random bits of a float are sometimes NaN.
    tensors = {"optimizer": {"values": values, "zero_d": values[7].clone(), "odd": values[:3]}}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}))
    assert_same_bits(loaded.tensors["optimizer"], tensors["optimizer"])


def test_every_shape_and_layout_comes_back(tmp_path):
    tensors = {"model": shapes_and_layouts(), "empty_group": {}}
    before = {name: tensor.detach().clone() for name, tensor in tensors["model"].items()}
    path = save_checkpoint(tmp_path, 123456789, tensors, {})
    loaded = load_checkpoint(path)
    assert path == loaded.path == tmp_path / "step-123456789"
    assert loaded.step == 123456789
    assert loaded.tensors.keys() == tensors.keys()
    assert_same_bits(loaded.tensors["model"], before)
    assert loaded.tensors["empty_group"] == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_come_back_on_the_cpu(tmp_path):
    tensors = {"model": {name: tensor.cuda() for name, tensor in shapes_and_layouts().items()}}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}))
    assert_same_bits(loaded.tensors["model"], {name: tensor.cpu() for name, tensor in tensors["model"].items()})


def test_the_files_are_what_the_safetensors_library_reads(tmp_path):
    # Our writer against their reader: nothing of ours is needed to open a checkpoint.
    tensors = {"model": {**shapes_and_layouts(), "half": torch.ones(3).half(), "flag": torch.tensor(True)}}
    file = save_checkpoint(tmp_path, 1, tensors, {}) / "model.safetensors"
    assert_same_bits(safetensors.torch.load_file(file), tensors["model"])
    with safetensors.safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8:start])
    for name, tensor in tensors["model"].items():  # aligned in the file, for readers that map it
        assert (start + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_state_comes_back_equal(tmp_path):
    state = {"u": 0.1 + 0.2, "none": None, "big": 2**80, "list": [1, [True, "µ\n"]], "empty": {}, "tiny": 5e-324}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, {}, state))
    assert loaded.state == state
    assert [type(loaded.state[key]) for key in state] == [type(value) for value in state.values()]


def test_loaded_tensors_do_not_depend_on_the_files(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 1))
    file = loaded.path / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)  # in place: a mapping of the file would see it
    assert_same_bits(loaded.tensors["model"], content(1)[0]["model"])
    loaded.tensors["model"]["norm.bias"].zero_()
    assert set(file.read_bytes()) == {0xFF}


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}], ids=str)
def test_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, state)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (({"../model": {}}, {}, 3), "'../model'"),
        (({"model": {"w": torch.zeros(1, dtype=torch.complex64)}}, {}, 3), "'w' is torch.complex64"),
        (({}, {}, 0), "keep=0"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        save_checkpoint(tmp_path, 1, *arguments)
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_weights_are_never_saved(tmp_path, value, dtype):
    save(tmp_path, 1)
    tensors, state = content(2)
    tensors["model"]["head.weight"] = torch.zeros(5, 5, dtype=dtype)
    tensors["model"]["head.weight"][3, 4] = value
    with pytest.raises(CheckpointError, match=r"1 of the model's 3 tensors .*'head\.weight'"):
        save_checkpoint(tmp_path, 2, tensors, state)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_k_are_kept(tmp_path, keep):
    for step in range(10, 70, 10):
        assert save(tmp_path, step, keep) == tmp_path / f"step-{step:08d}"
        assert names(tmp_path) == [f"step-{s:08d}" for s in range(10, step + 1, 10)][-keep:]
        assert_loads(tmp_path, step)


def test_the_one_just_saved_is_kept_beside_broken_later_ones(tmp_path):
    # After a fall-back from a broken step 30 to step 20, the run saves at 25.
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-00000030" / "state.json").unlink()
    save(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["step-00000025", "step-00000030"]
    warned: list[str] = []
    assert_loads(tmp_path, 25, warn=warned.append)
    assert len(warned) == 1
    save(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["step-00000030"]


def test_a_step_can_be_saved_again(tmp_path):
    for seed in (5, 6, 7):
        save(tmp_path, 5, seed=seed)
        assert_loads(tmp_path, 5, seed)
        assert names(tmp_path) == ["step-00000005"]


def test_a_replaced_checkpoint_serves_only_while_its_successor_does_not(tmp_path):
    replaced = f"step-00000007.replaced-{os.getppid()}"
    save(tmp_path, 7, seed=1).rename(tmp_path / replaced)
    assert_loads(tmp_path, 7, seed=1)
    successor = save(tmp_path, 7, seed=2)
    assert names(tmp_path) == ["step-00000007", replaced]
    assert_loads(tmp_path, 7, seed=2)
    (successor / "state.json").unlink()
    assert_loads(tmp_path, 7, seed=1, warn=lambda _: None)


def test_nothing_and_unfinished_saves_are_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 1).rename(tmp_path / "step-00000001.tmp-1")
    (tmp_path / "step-00000002.trash-1").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert latest_checkpoint(tmp_path) is None


def test_a_folder_that_cannot_be_listed_is_not_a_restart_from_zero(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        latest_checkpoint(tmp_path / "checkpoints")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncation_is_detected(tmp_path, file, fraction):
    save(tmp_path, 1)
    broken = save(tmp_path, 2) / file
    size = broken.stat().st_size
    os.truncate(broken, int(size * fraction))
    assert int(size * fraction) < size
    with pytest.raises(CheckpointError, match=f"{broken}: (truncated|altered)"):
        load_checkpoint(broken.parent)
    warned: list[str] = []
    assert_loads(tmp_path, 1, warn=warned.append)
    assert len(warned) == 1
    assert str(broken) in warned[0]


def test_every_bit_flip_is_detected(tmp_path):
    rng = random.Random(0)
    path = save(tmp_path, 1)
    for trial in range(60):  # 15 in each file
        file = path / FILES[trial % 4]
        bit = rng.randrange(8 * file.stat().st_size)
        flip_bit(file, bit)
        with pytest.raises(CheckpointError, match=str(file)):
            load_checkpoint(path)
        flip_bit(file, bit)
        load_checkpoint(path)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(tmp_path, file):
    save(tmp_path, 1)
    broken = save(tmp_path, 2) / file
    broken.unlink()
    with pytest.raises(CheckpointError, match=f"{broken}: missing"):
        load_checkpoint(broken.parent)
    warned: list[str] = []
    assert_loads(tmp_path, 1, warn=warned.append)
    assert str(broken) in warned[0]


def test_an_unreadable_or_longer_file_is_named(tmp_path):
    path = save(tmp_path, 1)
    with (path / "state.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=r"state\.json: too long"):
        load_checkpoint(path)
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        load_checkpoint(path)


def test_a_path_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"step-00000009.manifest\.json: missing"):
        load_checkpoint(tmp_path / "step-00000009")


def test_fallback_goes_past_several_and_reports_each(tmp_path, capsys):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=4)
    flip_bit(tmp_path / "step-00000002" / "state.json", 5)
    os.truncate(tmp_path / "step-00000003" / "model.safetensors", 10)
    shutil.rmtree(tmp_path / "step-00000004")
    (tmp_path / "step-00000004").write_text("a file")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, step in zip(lines, (4, 3, 2)):
        assert line.startswith(f"warning: checkpoint step-0000000{step} ")


def test_none_valid_is_an_error_and_never_a_restart(tmp_path):
    for step in (1, 2):
        flip_bit(save(tmp_path, step) / "model.safetensors", 100)
    warned: list[str] = []
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*step-00000002"):
        latest_checkpoint(tmp_path, warned.append)
    assert len(warned) == 2
    assert len(names(tmp_path)) == 2


def file_entry(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Writes a manifest that fits the files as they are, as an attacker could."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["checksum"]
    manifest["files"] = {name: file_entry(path / name) for name in manifest["files"]}
    manifest |= changes
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**manifest, "checksum": checksum}, indent=1, sort_keys=True)
    (path / "manifest.json").write_text(text + "\n")


def test_an_unknown_format_version_is_refused(tmp_path):
    path = save(tmp_path, 1)
    rewrite_manifest(path)
    load_checkpoint(path)
    rewrite_manifest(path, format_version=2, package_version="9.9")
    with pytest.raises(CheckpointError, match=r"unknown format version 2.*9\.9"):
        load_checkpoint(path)
    rewrite_manifest(path, format_version=1, format="something")
    with pytest.raises(CheckpointError, match="not the manifest"):
        load_checkpoint(path)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fitting_manifest", [False, True])
def test_a_pickle_is_refused_and_not_executed(tmp_path, file, fitting_manifest):
    sentinel = tmp_path / "executed"
    payload = pickle.dumps(Payload(sentinel))
    pickle.loads(payload)
    assert sentinel.exists()  # the payload works
    sentinel.unlink()
    path = save(tmp_path / "checkpoints", 1)
    (path / file).write_bytes(payload)
    if fitting_manifest and file != "manifest.json":
        rewrite_manifest(path)
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="none of the 1"):
        latest_checkpoint(path.parent, lambda _: None)
    assert not sentinel.exists()


def test_a_file_of_torch_save_is_refused_and_not_executed(tmp_path):
    sentinel = tmp_path / "executed"
    path = save(tmp_path / "checkpoints", 1)
    torch.save({"weights": torch.ones(3), "nested": [Payload(sentinel)]}, path / "optimizer.safetensors")
    rewrite_manifest(path)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        load_checkpoint(path)
    assert not sentinel.exists()


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    shutil.copy(path / "model.safetensors", tmp_path / "secret.safetensors")
    name = "../../secret.safetensors"
    rewrite_manifest(path, files={name: file_entry(path / name)})
    with pytest.raises(CheckpointError, match=r"manifest\.json: names .*secret\.safetensors"):
        load_checkpoint(path)


def test_what_does_not_read_back_is_a_failed_save(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, block, real=os.write: real(descriptor, bytes(len(block))))
        with pytest.raises(SaveError, match=r"could not save step 2 .*manifest\.json: truncated or damaged"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert_loads(tmp_path, 1)
