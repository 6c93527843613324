"""Files from a stranger that never end, or grow without bounds."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mae_et.config import ConfigError, load_config
from mae_et.config.plain import read_bytes, read_json, read_yaml
from mae_et.data.archives import read_idx
from mae_et.data.published import read_dogs_list
from mae_et.data.sources import open_source
from mae_et.engine.checkpoint import CheckpointError, load_checkpoint
from mae_et.exchange.weights import WeightsError, open_weights
from mae_et.models.vit import build_vit
from tests.engine.saves import save
from tests.engine.test_checkpoint import rewrite_manifest
from tests.hostile.small import SHAPE


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
