"""Files that a person has written anew from what the host knows: `python3 -m devtools.NAME`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import environment, hosts, inprocess
from .paths import HOST, ROOT, SetupError, locked


def command(name: str, wanted: Callable[[], dict[Path, str]]) -> int:
    """Write the files that differ from what `wanted` gives; with `--check`, only name them.

    `wanted` runs with the host's modules in its process. `name` is that of the devtools module.
    Returns the exit status: 1 where a check finds differences, or where there is no host.
    """
    parser = argparse.ArgumentParser(prog=f"python3 -m devtools.{name}")
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")
    only_check = parser.parse_args().check
    comfyui = os.environ.get("LORA_WEAVE_COMFYUI")
    if comfyui is None:  # not in the environment that has a host: make it, and go on there
        try:
            with locked(HOST / "setup.lock"):
                host = hosts.ensure_own(environment.ensure(environment.TO_RUN))
        except SetupError as problem:
            print(f"Error: {problem}", file=sys.stderr)
            return 1
        line = [str(host.python), "-m", f"devtools.{name}", *sys.argv[1:]]
        return subprocess.run(line, cwd=ROOT, env=host.environment(), check=False).returncode
    inprocess.enter(Path(comfyui), "--cpu")
    stale = {path: text for path, text in wanted().items() if _read(path) != text}
    for path, text in stale.items():
        if not only_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{'differs' if only_check else 'written'}: {path.relative_to(ROOT)}")
    print(f"{len(stale)} files were out of date")
    return 1 if stale and only_check else 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
