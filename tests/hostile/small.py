"""A small network, runs of which strangers hand over, and what strangers put into files."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from mae_et.exchange.backbone import Backbone
from mae_et.models.vit import ViTShape
from tests.engine.test_checkpoint import Payload

SHAPE = ViTShape((8, 8), patch_size=4, width=16, depth=1, heads=2, mlp_ratio=2.0)
CONFIG = {
    "model": {"name": "vit_tiny", "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0},
    "data": {"size": 8},
}
BACKBONE = Backbone((8, 8), 3, (0.5,) * 3, (0.2,) * 3, SHAPE)


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
