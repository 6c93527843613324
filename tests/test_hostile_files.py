"""Files from a stranger: nothing in them runs, reads or writes elsewhere, or takes all memory; all are named."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from safetensors.torch import save_file

from mae_et.config import ConfigError, FinetuneConfig, load_config, task_of
from mae_et.config.plain import read_bytes, read_json, read_yaml
from mae_et.curriculum.calibration import Calibration
from mae_et.data.archives import read_idx
from mae_et.data.published import read_dogs_list
from mae_et.data.sources import open_source
from mae_et.engine.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from mae_et.engine.run_folder import RunFolder, RunFolderError, write_text_atomic
from mae_et.exchange.backbone import Backbone
from mae_et.exchange.records import read_shape
from mae_et.exchange.weights import WeightsError, open_weights
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.vit import ViTShape, build_vit
from tests.engine.saves import save
from tests.engine.test_checkpoint import Payload, rewrite_manifest
from tests.torture.hostile import DAMAGES, damage_and_open, trial

SHAPE = ViTShape((8, 8), patch_size=4, width=16, depth=1, heads=2, mlp_ratio=2.0)
CONFIG = {
    "model": {"name": "vit_tiny", "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0},
    "data": {"size": 8},
}
BACKBONE = Backbone((8, 8), 3, (0.5,) * 3, (0.2,) * 3, SHAPE)


@pytest.fixture
def sentinel(tmp_path):
    """A path that the payload makes; that it would is tried first."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A small pretraining run."""
    numbers = {name: getattr(SHAPE, name) for name in ("size", "patch_size", "width", "depth", "heads", "mlp_ratio")}
    model = MaskedAutoencoder(**numbers, channels=3, decoder_width=8, decoder_depth=1, decoder_heads=2, target="pixel")
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints", 4, {"model": model.state_dict(), "optimizer": {}}, {"step": 4})
    (run / "config.yaml").write_text(json.dumps(CONFIG))
    (run / "run_id.txt").write_text("abc123\n")
    assert open_weights(run).shape == SHAPE
    return run


@pytest.fixture
def tuned(tmp_path) -> Path:
    """A small run on labels."""
    tensors = {f"net.{name}": tensor for name, tensor in build_vit(SHAPE, classes=2).state_dict().items()}
    run = tmp_path / "tuned"
    save_checkpoint(run / "checkpoints", 4, {"model": tensors}, {"step": 4})
    (run / "backbone.json").write_text(BACKBONE.to_json())
    assert open_weights(run).shape == SHAPE
    return run


# What runs.


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("form", ["pickle", "torch", "legacy", "npy"])
def test_no_file_of_a_checkpoint_is_unpickled(tmp_path, sentinel, pretrained, file, form):
    path = pretrained / "checkpoints" / "step-00000004" / file
    path.unlink()
    write_payload(path, sentinel, form)
    if file != "manifest.json":
        rewrite_manifest(path.parent)
    for opened in (load_checkpoint, open_weights):
        with pytest.raises((CheckpointError, WeightsError), match=file):
            opened(path.parent)
    with pytest.raises(WeightsError, match=file):
        open_weights(path)
    assert not sentinel.exists()


def write_payload(path: Path, sentinel: Path, form: str) -> None:
    payload = Payload(sentinel)
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif form == "npy":
        with path.open("wb") as file:
            np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    elif form == "tar":  # the form of torch 0.1, which unpacks itself
        with tarfile.open(path, "w") as tar:
            for name in ("sys_info", "pickle", "tensors", "storages"):
                raw = pickle.dumps(payload)
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    elif form == "zip in zip":
        inner = io.BytesIO()
        torch.save({"w": payload}, inner)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", inner.getvalue())
            archive.writestr("archive/version", "3\n")
    else:
        nested = {"model": {"w": torch.zeros(2)}, "args": [{"deep": (payload,)}]}
        torch.save(nested, path, _use_new_zipfile_serialization=form == "torch")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".onnx"])
@pytest.mark.parametrize("form", ["pickle", "torch", "legacy", "npy", "tar", "zip in zip"])
def test_no_file_of_weights_is_unpickled(tmp_path, sentinel, suffix, form):
    if suffix == ".onnx":
        pytest.importorskip("onnx")
    path = tmp_path / f"weights{suffix}"
    write_payload(path, sentinel, form)
    with pytest.raises(WeightsError, match=f"cannot use {path}"):
        open_weights(path)
    assert not sentinel.exists()


def test_a_torchscript_program_is_not_loaded(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated what the attacker uses
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(WeightsError, match=r"program\.pt"):
        open_weights(tmp_path / "program.pt")


@pytest.mark.parametrize("name", ["train_list.mat", "setid.mat"])
@pytest.mark.parametrize("form", ["pickle", "npy", "torch"])
def test_no_list_of_a_data_set_is_unpickled(tmp_path, sentinel, name, form):
    write_payload(tmp_path / name, sentinel, form)
    source = "stanford_dogs" if name == "train_list.mat" else "flowers102"
    (tmp_path / "Images").mkdir()
    (tmp_path / "test_list.mat").touch()
    with pytest.raises(ValueError, match=name):
        open_source(source, tmp_path, download=False)
    assert not sentinel.exists()


TAGS = ["!!python/object/apply:os.system ['touch {}']", "!!python/object/new:pathlib.Path.touch ['{}']"]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_of_yaml_do_not_run(tmp_path, sentinel, pretrained, tag):
    path = pretrained / "config.yaml"
    path.write_text("run: " + tag.format(sentinel))
    for opened in (load_config, task_of):
        with pytest.raises(ConfigError, match=f"{path} cannot be read as YAML"):
            opened(path)
    with pytest.raises(WeightsError, match=f"{path} cannot be read as YAML"):
        open_weights(pretrained)
    assert not sentinel.exists()


# What is read elsewhere.


@pytest.mark.parametrize(
    "text",
    ["run: ${oc.env:A_SECRET}", "tracking: {tags: ['${oc.env:A_SECRET}']}", "data: {root: '${seed}'}", "${seed}: 1"],
)
def test_no_value_of_the_environment_gets_into_a_configuration(tmp_path, monkeypatch, pretrained, text):
    monkeypatch.setenv("A_SECRET", "hunter2")
    path = pretrained / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: .*write the value itself") as refused:
        load_config(path)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(WeightsError, match=r"config\.yaml: .*write the value itself"):
        open_weights(pretrained)
    with pytest.raises(ConfigError, match="write the value itself"):
        load_config(None, ["run=${oc.env:A_SECRET}"])


def test_arguments_of_timm_name_no_files(tmp_path, tuned):
    weights = tmp_path / "secret.pth"
    torch.save({}, weights)
    for arguments in (
        {"checkpoint_path": str(weights)},
        {"pretrained_cfg": {"file": str(weights)}},
        {"cache_dir": "/"},
    ):
        backbone = replace(BACKBONE, shape=None, model="timm/resnet18", arguments=arguments)
        with pytest.raises(ConfigError, match=f"'{next(iter(arguments))}', with which timm would read"):
            backbone.build(2)
        (tuned / "backbone.json").write_text(backbone.to_json())
        with pytest.raises(WeightsError, match=r"backbone\.json: does not describe a backbone"):
            open_weights(tuned)


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:{}", "hf_hub:a/b", "resnet18.hf-hub:a/b"])
def test_names_of_timm_are_no_addresses(tmp_path, name):
    name = name.format(tmp_path)
    with pytest.raises(WeightsError, match=r"no such model|could not be had"):
        open_weights(f"timm/{name}")
    with pytest.raises(ConfigError, match="timm has no"):
        replace(BACKBONE, shape=None, model=f"timm/{name}").build(2)


@pytest.mark.parametrize("file", ["config.yaml", "run_id.txt", "backbone.json"])
def test_records_that_are_links_are_not_passed_on(tmp_path, pretrained, tuned, file):
    run = tuned if file == "backbone.json" else pretrained
    secret = tmp_path / "token"
    (run / file).rename(secret)
    (run / file).symlink_to(secret)
    with pytest.raises(WeightsError, match=rf"{file} is a link"):
        open_weights(run)


def test_a_run_id_is_an_id(pretrained):
    (pretrained / "run_id.txt").write_text("machine api.wandb.ai login user password 0123")
    with pytest.raises(WeightsError, match=r"run_id\.txt: holds no run's id") as refused:
        open_weights(pretrained)
    assert "password" not in str(refused.value)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link"])
def test_onnx_reads_no_data_elsewhere(tmp_path, location):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(4 * 16 * 3 * 4 * 4))
    (tmp_path / "model" / "link").symlink_to(tmp_path / "secret")
    tensor = onnx.TensorProto(
        name="patch_embed.proj.weight", data_type=1, dims=[16, 3, 4, 4], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    (tmp_path / "model" / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(WeightsError, match="it is truncated or not an ONNX file"):
        open_weights(tmp_path / "model" / "net.onnx")


def test_a_graph_without_its_convolution(tmp_path):
    onnx = pytest.importorskip("onnx")
    kernel = onnx.numpy_helper.from_array(np.zeros((16, 3, 4, 4), np.float32), "patch_embed.proj.weight")
    for nodes in ([], [onnx.helper.make_node("Identity", [], ["x"])]):
        graph = onnx.helper.make_graph(nodes, "g", [], [], [kernel])
        (tmp_path / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
        with pytest.raises(WeightsError, match="no vision transformer is in it"):
            open_weights(tmp_path / "net.onnx")


@pytest.mark.parametrize("image", ["../../secret", "/etc/secret", "a/../../secret"])
def test_lists_name_no_images_elsewhere(tmp_path, image):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "classes.txt").write_text(f"{image.partition('/')[0] or 'x'}\na\n\n..\n")
    (tmp_path / "meta" / "train.txt").write_text(f"{image}\n")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"train\.txt.*(lies outside|class '' is none)"):
        open_source("food101", tmp_path, download=False)
    cells = np.empty((1, 1), dtype=object)
    cells[0, 0] = "../secret.jpg"
    scipy.io.savemat(tmp_path / "train_list.mat", {"file_list": cells, "labels": [[1]]})
    with pytest.raises(ValueError, match="lies outside"):
        read_dogs_list(tmp_path / "train_list.mat")


# What is written elsewhere.

WRITTEN = ["metrics.jsonl", "metrics.jsonl.tmp", "run_id.txt", "status.json", "bad_images.jsonl", ".lock"]


@pytest.mark.parametrize("name", [*WRITTEN, "pictures/reconstruction.png", "studies/spectrum.csv"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_run_writes_through_no_link(tmp_path, name, exists):
    victim, link = tmp_path / "victim", tmp_path / "run" / name
    if exists:
        victim.write_text("precious")
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    with pytest.raises(RunFolderError, match=f"{link} is a link to a file"):
        RunFolder(tmp_path / "run").acquire()
    assert victim.exists() == exists
    assert not exists or victim.read_text() == "precious"


def test_a_lock_that_becomes_a_link(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "victim").write_text("precious")
    folder.lock_path.symlink_to(tmp_path / "victim")
    with pytest.raises(RunFolderError, match=r"\.lock"):
        folder.acquire()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_pipe_in_a_run_folder(tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl is a pipe or a device"):
        RunFolder(tmp_path / "run")


def test_folders_may_be_links_to_another_disk(tmp_path):
    for name in ("checkpoints", "pictures"):
        (tmp_path / "big" / name).mkdir(parents=True)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "big" / name)
    (tmp_path / "run" / "wandb").mkdir()
    (tmp_path / "run" / "wandb" / "debug.log").symlink_to(tmp_path / "log")  # as W&B makes it
    with RunFolder(tmp_path / "run") as folder:
        save(folder.checkpoints, 1)
        assert (tmp_path / "big" / "checkpoints" / "step-00000001" / "manifest.json").exists()


def test_a_folder_that_is_only_read_is_not_touched(tmp_path):
    folder = RunFolder(tmp_path / "absent", writes=False)
    assert folder.checkpoints == tmp_path / "absent" / "checkpoints"
    assert not (tmp_path / "absent").exists()


def test_texts_take_the_place_of_links(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "victim")
    write_text_atomic(tmp_path / "config.yaml", "ours")
    assert not (tmp_path / "config.yaml").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_save_empties_no_linked_folder(tmp_path):
    """Links under the names of leftovers and of old checkpoints."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-00000001", f"step-00000002.trash-{os.getpid()}", f"step-00000003.tmp-{os.getpid()}"):
        (folder / name).symlink_to(victim)
    for step in (3, 4, 5):
        save(folder, step, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    assert (victim / "precious").exists()


# What never ends, or grows without bounds.


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_checkpoint_of_pipes_and_devices_is_refused_at_once(tmp_path, file, kind):
    path = save(tmp_path, 1) / file
    path.write_bytes(b"")
    if file != "manifest.json":
        rewrite_manifest(path.parent)  # it says 0 bytes, which is what a device has
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("brackets", ["[]", "{}"])
@pytest.mark.parametrize("depth", [200, 100_000])
def test_deep_nesting(tmp_path, brackets, depth):
    path = tmp_path / "deep.yaml"
    opening = brackets[0] if brackets == "[]" else '{"a":'
    path.write_text('{"a":' + opening * depth + "1" + brackets[1] * depth + "}")
    with pytest.raises(ConfigError, match=rf"{path} cannot be read as YAML: .*(100 deep|depth|nest)"):
        load_config(path)
    if depth > 1000:
        with pytest.raises(ValueError, match=rf"{path} is truncated or damaged \(it is nested too deeply"):
            read_json(path)


def test_aliases_do_not_unfold(tmp_path):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"laughs\.yaml cannot be read as YAML: line 2 has an alias"):
        load_config(tmp_path / "laughs.yaml")


def test_large_texts_are_not_read(tmp_path):
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(1 << 40)  # no disk is taken
    for reader in (read_yaml, read_json):
        with pytest.raises(ValueError, match=r"more than [0-9,]+ bytes"):
            reader(tmp_path / "large.yaml")
    with pytest.raises(ValueError, match="pipe or a device"):
        read_bytes(Path("/dev/zero"), 10)


def test_a_header_of_safetensors_that_claims_too_much(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for size in (len(header), 1 << 62):
        raw = struct.pack("<Q", size) + header
        (tmp_path / "w.safetensors").write_bytes(raw)
        with pytest.raises(WeightsError, match="truncated or not a safetensors file"):
            open_weights(tmp_path / "w.safetensors")
        path = save(tmp_path / "checkpoints", 1)
        (path / "model.safetensors").write_bytes(raw)
        rewrite_manifest(path)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: its content"):
            load_checkpoint(path)


def test_tensors_of_nothing(tmp_path):
    tensors = build_vit(SHAPE).state_dict()
    for name, shape in (("patch_embed.proj.weight", (1 << 40, 0, 4, 4)), ("patch_embed.proj.weight", (0, 3, 4, 4))):
        save_file({**tensors, name: torch.zeros(shape)}, tmp_path / "w.safetensors")
        assert open_weights(tmp_path / "w.safetensors").shape is None


def test_a_few_bytes_that_stand_for_many(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**13)}, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 5000
    with pytest.raises(WeightsError, match=r"'w' is not a plain array of numbers \(\[10000000000000\] of 4 bytes\)"):
        open_weights(tmp_path / "w.pth")


def test_a_packed_file_of_torch(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.pth")
    plain = zipfile.ZipFile(tmp_path / "plain.pth")
    packed = zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED)
    with plain, packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    assert set(open_weights(tmp_path / "plain.pth").tensors) == {"w"}
    with pytest.raises(WeightsError, match="it is packed"):
        open_weights(tmp_path / "packed.pth")


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(kind: int, name: bytes, content: bytes, count: int = 1) -> bytes:
    parts = (element(6, struct.pack("<II", kind, 0)), element(5, struct.pack("<ii", count, 1)), element(1, name))
    return element(14, b"".join(parts) + content)


@pytest.mark.parametrize(("depth", "count", "message"), [(3000, 1, "nested"), (1, 1 << 30, "an array of 1073741824")])
def test_cells_of_matlab(tmp_path, depth, count, message):
    cell = matrix(6, b"", element(9, struct.pack("<d", 1.0)))
    for level in range(depth):
        cell = matrix(1, b"file_list" if level == depth - 1 else b"", cell, count)
    path = tmp_path / "train_list.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49) + cell)
    with pytest.raises(ValueError, match=rf"{path} is missing or damaged \(.*{message}"):
        read_dogs_list(path)


def test_an_archive_that_unfolds_to_too_much(tmp_path):
    with tarfile.open(tmp_path / "nabirds.tar.gz", "w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo("nabirds/images.txt")
        info.size = 80 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(ValueError, match=r"nabirds\.tar\.gz cannot be unpacked \(.*unfolds to more than"):
        open_source("nabirds", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["nabirds.tar.gz"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_archive_holds_files_and_folders_alone(tmp_path, kind):
    with tarfile.open(tmp_path / "nabirds.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("nabirds/inside")
        info.type, info.linkname = kind, "images.txt"
        tar.addfile(info)
    with pytest.raises(ValueError, match="nabirds/inside is neither a file nor a folder"):
        open_source("nabirds", tmp_path)


@pytest.mark.parametrize("shape", [(1 << 31, 1 << 31, 4), (0xFFFFFFFF,) * 200, ()])
def test_an_idx_file_that_claims_too_much(tmp_path, shape):
    raw = bytes((0, 0, 8, len(shape) or 9)) + struct.pack(f">{len(shape)}I", *shape)
    (tmp_path / "x.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(ValueError, match=r"x\.gz (should hold|is no IDX)"):
        read_idx(tmp_path / "x.gz")


BOMBS = """
import gzip, resource, sys
from pathlib import Path
from mae_et.data.archives import read_idx
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
try:
    read_idx(Path(sys.argv[1]))
except ValueError as error:
    sys.exit("unfolds to more than" not in str(error))
sys.exit(2)
"""


def test_a_gzip_bomb_ends_within_memory(tmp_path):
    zeros = gzip.compress(bytes(1 << 26), compresslevel=1)
    (tmp_path / "bomb.gz").write_bytes(zeros * 200)  # members in a row: 13 GB
    code = subprocess.run([sys.executable, "-c", BOMBS, tmp_path / "bomb.gz"], check=False, timeout=120).returncode
    assert code == 0


# What is damaged by hand.

JUNK = ["", "null", "5", '"text"', "[]", "{}", "[[1]]", '{"a": NaN}', "{", "\x00\xff", '{"shape": 3, "size": "x"}']


@pytest.mark.parametrize("text", JUNK)
def test_json_damaged_by_hand_is_named(tmp_path, pretrained, tuned, text):
    (tuned / "backbone.json").write_text(text)
    with pytest.raises(WeightsError, match=r"backbone\.json: does not describe a backbone"):
        open_weights(tuned)
    with pytest.raises(ValueError, match=r"."):
        Backbone.from_json(text)
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.from_json(text)
    checkpoint = tuned / "checkpoints" / "step-00000004"
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("text", ["", "null", "5", "text", "[1]", "a: [", "model: 5", "model: [1]", "seed: x"])
def test_yaml_damaged_by_hand_is_named(pretrained, text):
    path = pretrained / "config.yaml"
    path.write_text(text)
    with pytest.raises(WeightsError, match=r"config\.yaml"):
        open_weights(pretrained)
    if text in ("", "null"):
        return  # no key is a configuration, of defaults
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("model", key, value) for key in ("width", "depth", "heads") for value in (-1, "16", 2.5, [1], 10**9)),
        *(("model", "patch_size", value) for value in (0, "4", True)),
        *(("model", "mlp_ratio", value) for value in (-2.0, "x", 1e300)),
        *(("data", key, value) for key in ("mean", "std") for value in ("abc", ["a"], [0.1, -1e999], 3)),
        *(("data", "size", value) for value in (0, "8", [8, 8, 8], 10**9, {})),
        *(("model", "name", value) for value in (None, [], {}, 4)),
    ],
)
def test_numbers_damaged_by_hand_are_named(pretrained, section, key, value):
    config = {**CONFIG, section: {**CONFIG[section], key: value}}
    (pretrained / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"config\.yaml|shape that the run states|cannot be read"):
        open_weights(pretrained)


@pytest.mark.parametrize("change", [{"depth": "1"}, {"heads": 3}, {"patch_size": 0}, {"extra": 1}, {"locality": 1}])
def test_a_shape_damaged_by_hand_is_refused(change):
    assert read_shape(asdict(SHAPE)) == SHAPE
    with pytest.raises(ValueError, match=next(iter(change))):
        read_shape({**asdict(SHAPE), **change})


@pytest.mark.parametrize(
    "change",
    [{"channels": "3"}, {"channels": 1}, {"std": [0, 1, 1]}, {"size": 0}, {"model": 5}, {"shape": None}, {"more": 1}],
)
def test_a_backbone_damaged_by_hand_is_refused(change):
    assert Backbone.from_json(BACKBONE.to_json()) == BACKBONE
    with pytest.raises(ValueError, match=r"."):
        Backbone.from_json(json.dumps({**json.loads(BACKBONE.to_json()), **change}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "its step is -1"),
        ({"step": "1"}, "its step is '1'"),
        ({"step": True}, "its step is True"),
        ({"step": 2}, "is of step"),
        ({"files": []}, "lists no files"),
        ({"files": {}}, r"does not list state\.json"),
        ({"files": {"state.json": 3}}, "does not give the size"),
        ({"files": {"state.json": {"bytes": -1, "sha256": ""}}}, "does not give the size"),
    ],
)
def test_a_manifest_that_fits_itself_and_nothing_else(tmp_path, changes, message):
    path = save(tmp_path, 1)
    rewrite_manifest(path, **changes)
    with pytest.raises(CheckpointError, match=rf"(manifest|state)\.json: {message}"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"step": 2}', '{"step": "1"}', '{"step": true}', '{"x": NaN}'])
def test_a_state_that_fits_its_hash_and_nothing_else(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "state.json").write_text(text)
    rewrite_manifest(path)
    with pytest.raises(CheckpointError, match=r"state\.json: "):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="none of the 1"):
        latest_checkpoint(tmp_path, lambda _line: None)


def test_a_checkpoint_under_another_steps_name(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000099")
    with pytest.raises(CheckpointError, match="is of step 10, not of the step that the folder is named by"):
        load_checkpoint(tmp_path / "step-00000099")
    (tmp_path / "step-00000099").rename(tmp_path / "a copy")
    assert load_checkpoint(tmp_path / "a copy").step == 10


def calibration(**changes: Any) -> dict[str, Any]:
    timing = {
        **{"bandwidth": [8, 8], "visible": 4, "batch": 8, "filtered": False, "seconds": 0.1, "spread": 0.0},
        **{"step_seconds": 0.1, "data_seconds": 0.0, "memory": None, "image": [3, 8, 8]},
        **{"flops_per_image": None, "blocks": 3},
    }
    whole = {"title": "t", "device": "d", "processes": 1, "threads": 1, "workers": 0, "precision": "fp32"}
    inner = {key: value for key, value in changes.items() if key in timing}
    outer = {key: value for key, value in changes.items() if key not in timing}
    return {"timings": [{**timing, **inner}], **whole, "torch": "2", "date": "today", **outer}


@pytest.mark.parametrize(
    "changes",
    [
        *({"seconds": value} for value in (0, -1, "1", None, [])),
        *({"bandwidth": value} for value in ([8], 8, ["a", "b"], [8, -8])),
        *({"processes": "1"}, {"timings": []}, {"timings": [3]}, {"timings": 3}, {"filtered": 0}, {"memory": "much"}),
        *({"image": [3, 8]}, {"flops_per_image": -1}, {"title": 4}, {"unknown": 1}, {"batch": 8.5}),
    ],
    ids=str,
)
def test_a_calibration_damaged_by_hand_is_refused(tmp_path, changes):
    Calibration.from_json(json.dumps(calibration()))
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.from_json(json.dumps(calibration(**changes)))


@pytest.mark.parametrize("text", ["curriculum: null", "curriculum: [1]", "5: 1", "stages: 5"])
def test_a_curriculum_damaged_by_hand_is_refused(tmp_path, text):
    path = tmp_path / "found.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"curriculum"):
        load_config(None, [f"curriculum={path}"])


@pytest.mark.parametrize("text", ["curriculum: {growth: 5}", "model: {arguments: 4}", "data: [1]", "optim: x"])
def test_sections_damaged_by_hand_are_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(f"task: finetune\n{text}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path, schema=FinetuneConfig)


# Damage at random; `make torture` tries more.


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("count", [1, 3])
def test_damaged_checkpoints_are_never_loaded(tmp_path, damage: Callable, count):
    damage_and_open(tmp_path / "checkpoints", damage, count, random.Random(count))


@pytest.mark.parametrize("seed", range(8))
def test_trials_of_damage(tmp_path, seed):
    trial(tmp_path / "checkpoints", seed)


def test_a_trial_notices_what_loads_though_it_is_damaged(tmp_path):
    def no_damage(_checkpoint: Path, _draw: random.Random) -> None:
        pass

    with pytest.raises(AssertionError, match="was loaded"):
        damage_and_open(tmp_path, no_damage, 1, random.Random(0))
