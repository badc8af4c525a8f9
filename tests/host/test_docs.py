"""What users read is complete in both languages, and says what the nodes are now."""

from __future__ import annotations

import dataclasses
import re
import shutil

import folder_paths
import pytest

from lora_weave.devtools import locales
from lora_weave.devtools.paths import ROOT
from lora_weave.lora_core.training.config import NOT_IDENTITY, TrainOptions

NODES = {locales.node_id(node): node for node in locales.pack_nodes()}
LOCALES = tuple(locales.WORDS)
READMES = {"en": "README.md", "ja": "README.ja.md"}
PAGES = ["README.md", "README.ja.md", "CONTRIBUTING.md", "docs/architecture.md"]
NOT_IN_MESSAGES = set("{}@|")  # the page's vue-i18n reads these as its own syntax


def texts(locale: str) -> dict[str, dict]:
    return locales.read(ROOT, locale)


def sentences(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in sentences(part)]
    return [str(value)]


def test_generated_texts_are_up_to_date():
    wanted = locales.wanted(list(NODES.values()))
    stale = [
        path.relative_to(ROOT).as_posix()
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], f"run `{locales.COMMAND}`"


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("name", NODES)
def test_node_is_described(name: str, locale: str):
    schema, found = NODES[name].define_schema(), texts(locale)[name]
    assert found["display_name"].strip() and found["description"].strip()
    assert list(found["inputs"]) == [socket.id for socket in schema.inputs]
    assert list(found["outputs"]) == [str(place) for place in range(len(schema.outputs))]
    silent = [
        f"{kind} {key}: no {part}"
        for kind in ("inputs", "outputs")
        for key, entry in found[kind].items()
        for part in ("name", "tooltip")
        if not entry.get(part, "").strip()
    ]
    assert silent == []


@pytest.mark.parametrize("locale", LOCALES)
def test_texts_belong_to_nodes_and_can_be_shown(locale: str):
    found = texts(locale)
    assert list(found) == list(NODES)
    assert [text for text in sentences(found) if NOT_IN_MESSAGES & set(text)] == []


def test_japanese_is_japanese():
    kana = re.compile("[ぁ-んァ-ヶ一-龠]")
    tooltips = [
        entry["tooltip"]
        for node in texts("ja").values()
        for kind in ("inputs", "outputs")
        for entry in node[kind].values()
    ]
    assert [text for text in tooltips if not kana.search(text)] == []


def test_categories_have_japanese_names(host_translations: dict[str, dict]):
    categories = {node.define_schema().category for node in NODES.values()}
    parts = {part for category in categories for part in category.split("/")[1:]}
    assert set(host_translations["ja"]["nodeCategories"]) == parts


@pytest.mark.parametrize("locale", LOCALES)
def test_the_host_serves_the_texts(host_translations: dict[str, dict], locale: str):
    served = host_translations[locale]["nodeDefs"]
    assert {name: served[name] for name in NODES} == texts(locale)


@pytest.fixture(scope="module")
def host_translations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the host answers under /i18n with the pack's `locales` in a custom node folder."""
    from app.custom_node_manager import CustomNodeManager

    folder = tmp_path_factory.mktemp("custom_nodes")
    shutil.copytree(ROOT / "locales", folder / "lora-weave" / "locales")
    paths = folder_paths.folder_names_and_paths["custom_nodes"][0]
    paths.append(str(folder))
    try:
        return CustomNodeManager().build_translations()
    finally:
        paths.remove(str(folder))


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("name", NODES)
def test_help_page_has_the_nodes_title(name: str, locale: str):
    first, *_ = locales.page_file(ROOT, name, locale).read_text(encoding="utf-8").splitlines()
    assert first == f"# {texts(locale)[name]['display_name']}"


@pytest.mark.parametrize("locale", LOCALES)
def test_help_pages_name_the_options_that_keep_a_run(locale: str):
    options = {field.name for field in dataclasses.fields(TrainOptions)}
    page = locales.page_file(ROOT, "LoRAWeaveTrainOptions", locale).read_text(encoding="utf-8")
    last = page.strip().split("\n\n")[-1]
    assert set(re.findall(r"`(\w+)`", last)) == NOT_IDENTITY & options


def test_help_pages_are_those_of_the_nodes():
    pages = {path.name for path in (ROOT / "web" / "docs").iterdir()}
    assert pages == set(NODES)


@pytest.mark.parametrize("locale", LOCALES)
def test_pages_name_only_nodes_that_exist(locale: str):
    """In help pages and READMEs bold names are the nodes' own, as the page shows them."""
    known = {node["display_name"] for node in texts(locale).values()}
    pages = [locales.page_file(ROOT, name, locale) for name in NODES] + [ROOT / READMES[locale]]
    bold = re.compile(r"\*\*([^*]*\(Weave\)|Training [^*]*|学習[^*]*)\*\*")
    named = {name for page in pages for name in bold.findall(page.read_text(encoding="utf-8"))}
    assert named - known == set()


@pytest.mark.parametrize("locale", LOCALES)
def test_readme_lists_the_nodes(locale: str):
    readme = (ROOT / READMES[locale]).read_text(encoding="utf-8")
    assert set(re.findall(r"LoRAWeave[A-Z]\w*", readme)) == set(NODES)
    links = re.findall(r"\[([^\]]+)\]\(web/docs/(\w+)/(\w+)\.md\)", readme)
    shown = {name: node["display_name"] for name, node in texts(locale).items()}
    assert {(label, name, page) for label, name, page in links} == {
        (shown[name], name, locale) for name in NODES
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_architecture_names_every_module():
    """The page names modules by path in backticks; what is only planned has no path there."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:lora_core|nodes|devtools)/[\w/]+\.py)`", text)
    there = [
        path.relative_to(ROOT).as_posix()
        for folder in ("lora_core", "nodes", "devtools")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(set(named)) == sorted(there)
