"""The commands of `dev.py`."""

from __future__ import annotations

import argparse
import ast
import json
import sys
import time
from pathlib import Path

from . import checks, environment, hosts, page_tools
from .paths import HOST, ROOT, SetupError, locked
from .processes import heed_termination, run_child
from .server import PAGE_MODULE, Server

STEPS_HELP = "training steps; default 200, with --checkpoint automatic; 0 = automatic"
DEMO_MODULES = {"skimage": "scikit-image", "aiohttp": "aiohttp", "PIL": "pillow"}


def count_of(text: str) -> int:
    """A whole number from 0, as an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    heed_termination()
    options, rest = _parser().parse_known_args(arguments)
    if rest and options.command not in ("test", "bench", "serve"):
        _parser().error(f"unknown arguments: {' '.join(rest)}")
    options.rest = [argument for argument in rest if argument != "--"]
    try:
        return options.run(options)
    except SetupError as problem:
        print(f"\nError: {problem}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr, flush=True)
        return 130


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: pytest's own options would be taken for ours.
    where = argparse.ArgumentParser(
        add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    where.add_argument(
        "--comfyui", type=Path, metavar="PATH", help="use this ComfyUI, nothing in it is changed"
    )
    where.add_argument("--python", type=Path, metavar="EXE", help="the Python that runs it")
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description="Set up and run LoRA Weave.",
        parents=[where],
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, parents=[where], allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    add("setup", setup, "make .venv and .host with everything in them")
    demo_parser = add("demo", demo, "train a LoRA in a real ComfyUI and show what it changed")
    demo_parser.add_argument("--steps", type=count_of, metavar="N", help=STEPS_HELP)
    demo_parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="your own base model")
    demo_parser.add_argument("--images", type=Path, metavar="FOLDER", help="your own images")
    serve_parser = add("serve", serve, "start ComfyUI with the pack; other arguments go to ComfyUI")
    serve_parser.add_argument("--port", type=int, default=8188)
    add("test", test, "lint, types and all tests; with pytest arguments only pytest")
    bench_parser = add(
        "bench", bench, "run benchmarks/NAME.py, other arguments go to it; without NAME list them"
    )
    bench_parser.add_argument("name", metavar="NAME", nargs="?")
    return parser


def setup(options: argparse.Namespace) -> int:
    host = prepare(options, environment.TO_TEST)
    prepare_page(host)
    hosts.make_base()
    print(f"Ready: ComfyUI in {host.path}, Python {host.python}")
    return 0


def demo(options: argparse.Namespace) -> int:
    for path in (options.checkpoint, options.images):
        if path is not None and not path.exists():
            raise SetupError(f"{path} does not exist")
    host = prepare(options, environment.TO_RUN, DEMO_MODULES)
    line = [str(host.python), str(ROOT / "demo" / "run.py")]
    for name in ("steps", "checkpoint", "images"):
        value = getattr(options, name)
        if value is not None:
            line += [f"--{name}", str(value.resolve() if isinstance(value, Path) else value)]
    try:
        return run_child(line, host.environment())
    except KeyboardInterrupt:
        return 130  # the demo got it, too, and has said that it stopped


def serve(options: argparse.Namespace) -> int:
    host = prepare(options, environment.TO_RUN, {PAGE_MODULE: "comfyui-frontend-package"})
    base = hosts.make_base()
    arguments = list(options.rest)
    if not host.own:
        arguments += ["--extra-model-paths-config", str(_models_of(host, base))]
    print("Starting ComfyUI ...", flush=True)
    log = HOST / "serve.log"
    with Server(host, base, log=log, port=options.port, arguments=arguments) as server:
        print(f"ComfyUI with LoRA Weave: {server.address}", flush=True)
        print(f"Models, input and output: {base}\nLog: {log}\nEnd with ctrl-C", flush=True)
        assert server.process is not None
        while server.process.poll() is None:
            time.sleep(0.5)
        raise SetupError(f"ComfyUI ended:\n{server.log_tail()}")


def test(options: argparse.Namespace) -> int:
    host = prepare(options, environment.TO_TEST, checks.TEST_MODULES)
    if not options.rest:
        return 0 if checks.run_all(host, prepare_page(host)) else 1
    if any("tests/browser" in argument for argument in options.rest):
        prepare_page(host)
    return checks.run_pytest(host, options.rest)


def bench(options: argparse.Namespace) -> int:
    scripts = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    # what the benchmarks share has no main
    sources = {name: scripts[name].read_text("utf-8") for name in sorted(scripts)}
    names = [name for name, source in sources.items() if "\ndef main(" in source]
    if options.name is None:
        for name in names:
            about = ast.get_docstring(ast.parse(sources[name])) or ""
            print(f"{name:14} {about.partition(chr(10))[0]}")
        return 0
    if options.name not in names:
        raise SetupError(f"There is no benchmark {options.name!r}: choose from {', '.join(names)}")
    host = prepare(options, environment.TO_TEST)
    return run_child(
        [str(host.python), str(scripts[options.name]), *options.rest], host.environment()
    )


def prepare(
    options: argparse.Namespace,
    steps: tuple[environment.Step, ...],
    modules: dict[str, str] | None = None,
) -> hosts.Host:
    """The host to use, set up as far as `steps`. Of a host of the user's nothing is installed:
    there `modules` must be present."""
    path, python = getattr(options, "comfyui", None), getattr(options, "python", None)
    if path is None and python is not None:
        raise SetupError("--python goes with --comfyui: it is the Python that runs that ComfyUI")
    with locked(HOST / "setup.lock"):
        if path is None:
            return hosts.ensure_own(environment.ensure(steps))
        host = hosts.existing(path, python)
        if host.python == environment.python_of(environment.VENV):
            environment.ensure(steps)
    hosts.require(host, modules or {})
    return host


def prepare_page(host: hosts.Host) -> page_tools.PageTools:
    """What the page's tests need; all of it is ours, whichever the host."""
    with locked(HOST / "setup.lock"):
        return page_tools.ensure(host.python)


def _models_of(host: hosts.Host, base: Path) -> Path:
    """A yaml by which the server finds the models of the user's ComfyUI in their places."""
    folders = sorted(path.name for path in (host.path / "models").iterdir() if path.is_dir())
    # JSON is YAML, and quotes every path rightly
    section = {"base_path": str(host.path / "models")} | {name: name for name in folders}
    yaml = base / "extra_model_paths.yaml"
    yaml.write_text(json.dumps({"comfyui": section}, indent=1) + "\n", encoding="utf-8")
    return yaml
