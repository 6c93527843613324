"""`python -m mae_et pack`: a set of images, made smaller once and put into a few files; see docs/packed.md.

This file loads no torch; what it calls does.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mae_et.config import ConfigError, load_config


def add_command(commands: Any) -> None:
    """Add `pack` to the sub-commands of `python -m mae_et`."""
    command: argparse.ArgumentParser = commands.add_parser(
        "pack",
        help="a set of images made smaller once and put into a few files, to be read with data.source=packed",
        description="Resize images to a short side, encode them as JPEG and write them into ZIP files with an index "
        "and checksums. The same command continues what was interrupted. What is packed is said as for a run: "
        "data.source=..., data.root=...; data.max_bad is the share of images that may be unreadable and are left out.",
    )
    command.add_argument("store", metavar="STORE", help="a folder, or a URL that fsspec can write to (s3://...)")
    command.add_argument("--splits", nargs="+", metavar="SPLIT", help="default: all that the source has")
    command.add_argument("--short-side", type=int, metavar="PX", help="larger images are resized; default: 256")
    command.add_argument("--quality", type=int, help="of JPEG, 1 to 100; default: 90")
    command.add_argument("--subsampling", choices=("4:4:4", "4:2:0"), help="of chroma; default: 4:4:4, none")
    command.add_argument("--keep-bytes", action="store_true", help="resize and encode nothing: files as they are")
    command.add_argument("--shard-images", type=int, default=8192, metavar="N", help="of one shard; default: 8,192")
    command.add_argument("--workers", type=int, metavar="N", help="processes; 0: this one alone; default: one a core")
    command.add_argument("--verify", action="store_true", help="write nothing: check every byte of a finished store")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="what to pack: data.source=, data.root=")
    command.set_defaults(action=_run)


def _run(options: argparse.Namespace) -> int:
    if options.verify:
        from mae_et.packing.verifying import verify

        return verify(options.store, print)
    from mae_et.engine.cores import usable_cores
    from mae_et.packing.packing import pack
    from mae_et.packing.settings import Settings

    encoding = {"short_side": 256, "quality": 90, "subsampling": "4:4:4"}
    given = {name: getattr(options, name) for name in encoding if getattr(options, name) is not None}
    if options.keep_bytes and given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"--keep-bytes resizes and encodes nothing: leave out {named}")
    settings = Settings(**encoding | given, keep_bytes=options.keep_bytes, shard_images=options.shard_images)
    workers = usable_cores() if options.workers is None else options.workers
    if workers < 0:
        raise ConfigError(f"--workers {workers}: needs 0 (this process alone) or more")
    data = load_config(None, options.overrides).data
    try:
        pack(options.store, data, settings, workers, options.splits)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues after the last whole shard", file=sys.stderr)
        return 130
    return 0
