"""Files of torch.save from anywhere, read without executing what a pickle may ask for."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read_torch(path: Path) -> dict[str, Any]:
    """What a file of torch.save holds: tensors and plain containers; MAE's hold the command line's Namespace as well.

    Raises:
        ValueError: it is damaged, holds no dictionary, or holds anything else: nothing of it is executed then.
    """
    _refuse_packed(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # Said of pickles that torch.save did not write, and of sparse tensors: both are refused below.
            said = "Detected pickle protocol|Validating sparse tensor|'torch.load' received a zip file that looks like"
            warnings.filterwarnings("ignore", said, UserWarning)
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise ValueError("it is truncated or not a file of torch.save") from error
        raise ValueError(
            f"refused, because it asks to run or build {found[1]}: unpickling that can execute anything. Only tensors, "
            "plain containers and argparse.Namespace are read; save its state_dict alone, best as safetensors"
        ) from error
    except (EOFError, RuntimeError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        # What torch's reader raises depends on the byte at which a file ends.
        first = (str(error).splitlines() or ["it ends too early"])[0]
        raise ValueError(f"it is truncated or not a file of torch.save ({first})") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a state dict")
    return dict(loaded)


def _refuse_packed(path: Path) -> None:
    """Raise ValueError for what torch would unpack to more than the file holds; torch.save packs nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise ValueError(f"it is truncated or not a file of torch.save ({error})") from error
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("it is packed, as torch.save's files are not: it may unfold to anything; save it anew")
