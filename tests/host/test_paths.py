"""Names from a workflow become paths inside our roots, or one clear message."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest

from lora_weave.lora_core.host import files


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the host's input and output directories for one test."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "input").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("anna", "anna"),
        (" anna ", "anna"),
        ("anna.safetensors", "anna"),
        ("people/anna", "people/anna"),
        ("people\\anna", "people/anna"),
        ("v1.5 of anna", "v1.5 of anna"),
        ("猫/é 👩‍🚀", "猫/é 👩‍🚀"),
        ("console/common", "console/common"),
        ("a" * 200, "a" * 200),
    ],
)
def test_output_names(root: Path, name: str, wanted: str) -> None:
    assert files.output_path(name) == root / "output/loras" / f"{wanted}.safetensors"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("", "an empty part"),
        ("  ", "an empty part"),
        (".safetensors", "an empty part"),
        ("people/", "an empty part"),
        ("people/.safetensors", "an empty part"),
        ("people//anna", "an empty part"),
        ("/etc/anna", "an empty part"),
        ("\\\\server\\share", "an empty part"),
        ("../anna", "'..' that ends with a dot or a space"),
        ("people\\..\\..\\anna", "'..' that ends with a dot or a space"),
        ("./anna", "'.' that ends with a dot or a space"),
        ("anna.", "'anna.' that ends with a dot or a space"),
        ("people /anna", "'people ' that ends with a dot or a space"),
        ("C:\\anna", "':'"),
        ("what?", "'?'"),
        ('"anna"', "'\"'"),
        ("an\nna", r"'\n'"),
        ("anna\t", r"'\t'"),
        ("an\0na", r"'\x00'"),
        ("an\x9fna", r"'\x9f'"),
        ("an\u2028na", r"'\u2028'"),
        ("an\ud800na", r"'\ud800'"),
        ("CON", "'CON' is reserved"),
        ("people/nul.v2", "'nul.v2' is reserved"),
        ("Com1/anna", "'Com1' is reserved"),
        ("lpt³", "'lpt³' is reserved"),
        ("conin$", "'conin$' is reserved"),
        ("a" * 201, "201 bytes"),
        ("猫" * 67, "201 bytes"),
    ],
)
def test_output_names_that_no_system_or_not_every_system_takes(
    root: Path, name: str, found: str
) -> None:
    with pytest.raises(ValueError) as error:
        files.output_path(name)
    text = str(error.value)
    assert text.startswith("output_name is ") and found in text
    assert "expected a file name, with sub-folders at most" in text
    assert "\n" not in text


def test_everything_wrong_with_an_output_name_is_said_at_once(root: Path) -> None:
    with pytest.raises(ValueError, match=r"an empty part.*'CON' is reserved.*'\*'"):
        files.output_path("people//CON/a*")


def test_an_output_folder_that_is_a_link_out(root: Path) -> None:
    (root / "output/loras").mkdir(parents=True)
    (root / "output/loras/away").symlink_to(root, target_is_directory=True)
    with pytest.raises(ValueError, match="leads out of"):
        files.output_path("away/anna")


def test_dataset_folders_in_the_input_folder(root: Path) -> None:
    folder = root / "input/people/anna"
    folder.mkdir(parents=True)
    for name in ("people/anna", "people/../people/anna", str(folder)):
        assert files.find_dataset_folder(name) == folder


def test_dataset_folders_in_another_root_that_is_a_link(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "disk/cats").mkdir(parents=True)
    (root / "mount").symlink_to(root / "disk", target_is_directory=True)
    known = {files.DATASET_ROOTS: ([str(root / "mount")], set())}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    for name in (root / "mount/cats", root / "disk/cats"):
        assert files.find_dataset_folder(str(name)) == root / "disk/cats"


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_dataset_folders_that_are_no_name(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no dataset folder is chosen"):
        files.find_dataset_folder(name)


@pytest.mark.parametrize("name", ["..", "../beside", "../input-2", "{root}/beside", "/"])
def test_dataset_folders_outside_of_the_roots(root: Path, name: str) -> None:
    for folder in ("beside", "input-2"):
        (root / folder).mkdir()
    with pytest.raises(ValueError, match="is outside of the folders that this server may read"):
        files.find_dataset_folder(name.format(root=root))


@pytest.mark.parametrize("name", ["{root}/beside/back", "../beside/back", "x/../../beside/back"])
def test_a_path_that_leaves_the_roots_is_not_even_looked_up(root: Path, name: str) -> None:
    """On Windows looking up `\\\\server\\share` sends the user's credentials to that server."""
    (root / "input/anna").mkdir()
    (root / "beside").mkdir()
    (root / "beside/back").symlink_to(root / "input/anna", target_is_directory=True)
    with pytest.raises(ValueError, match="is outside of the folders"):
        files.find_dataset_folder(name.format(root=root))


def test_a_dataset_folder_that_is_a_link_out(root: Path) -> None:
    (root / "beside").mkdir()
    (root / "input/link").symlink_to(root / "beside", target_is_directory=True)
    with pytest.raises(ValueError, match=f"(?s)is outside.*{files.DATASET_ROOTS}: .*beside"):
        files.find_dataset_folder("link")
