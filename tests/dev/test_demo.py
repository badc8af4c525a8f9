"""The demo's own pieces: photographs, pictures, workflow conversion. No server, no network."""

import numpy as np
import pytest
from PIL import Image

from lora_weave.demo import photos, pictures, progress_bar, run, workflow


def test_photographs_with_captions(tmp_path):
    written = photos.write(tmp_path)
    assert len(written) == 12
    for path in written:
        with Image.open(path) as image:
            assert min(image.size) == photos.SHORT_SIDE_PX and image.mode == "RGB"
            assert np.asarray(image).std() > 10
        assert path.with_suffix(".txt").read_text("utf-8").startswith("a photo of ")


def test_photographs_are_written_once(tmp_path):
    """The same files are the same dataset, so a second demo finds its finished run."""
    times = [path.stat().st_mtime_ns for path in photos.write(tmp_path)]
    assert [path.stat().st_mtime_ns for path in photos.write(tmp_path)] == times


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", "zxq、赤い花".encode("cp932")),
        ("a.txt", "\ufeffzxq、赤い花\r\n".encode()),
        ("a.TXT", "zxq、赤い花".encode("utf-16")),
        ("a.caption", "zxq、赤い花\n".encode()),
        ("10_flowers/a.txt", "zxq、赤い花\n".encode()),
    ],
)
def test_the_prompt_is_the_first_caption(tmp_path, name, data):
    """Read as the training reads it; files without text, or that can't be read, are passed over."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    (tmp_path / "10_empty.txt").write_bytes(b"\n")
    (tmp_path / "10_damaged.txt").write_bytes(bytes(range(256)))
    (tmp_path / "b.txt").write_text("zxq, another\n", encoding="utf-8")
    assert run.first_caption(tmp_path) == "zxq、赤い花"


def test_without_captions_the_prompt_is_empty(tmp_path):
    assert run.first_caption(tmp_path) == ""


def test_the_moving_average_is_unbiased():
    assert pictures.smoothed([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    weight, values = 0.5, [1.0, 2.0, 4.0]
    expected = (0.25 * 1 + 0.5 * 2 + 1 * 4) / (0.25 + 0.5 + 1)
    assert pictures.smoothed(values, weight)[-1] == pytest.approx(expected)


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, 1.0], [float("nan"), 2.0, 1.0]])
def test_a_loss_curve_is_drawn_for_any_losses(losses):
    assert pictures.loss_curve(losses).size == (900, 500)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 200.0, [0, 50, 100, 150, 200]),
        (0.0, 7.0, [0, 2, 4, 6]),
        (0.0, 2.0, [0, 0.5, 1, 1.5, 2]),
        (0.836, 1.21, [0.9, 1, 1.1, 1.2]),
        (0.0123, 0.0171, [0.013, 0.014, 0.015, 0.016, 0.017]),
    ],
)
def test_axes_have_round_numbers(low, high, expected):
    assert pictures.ticks(low, high) == expected


def test_steps_are_whole():
    assert pictures.ticks(0, 2, whole=True) == [0, 1, 2]
    assert pictures.ticks(0, 1, whole=True) == [0, 1]


def test_the_grid_shows_every_image():
    before = [Image.new("RGB", (32, 16), (255, 0, 0))] * 3
    after = [Image.new("RGB", (32, 16), (0, 0, 255))] * 3
    pixels = np.asarray(pictures.before_after(before, after, ["a line"]))
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == colour).all(-1).sum() == 3 * 32 * 16


OBJECT_INFO = {
    "Load": {
        "display_name": "Load it",
        "input": {"required": {"name": [["a", "b"]]}, "optional": {"note": ["STRING", {}]}},
    },
    "Work": {
        "display_name": "Work",
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True}],
                "text": ["STRING", {"forceInput": True}],
                "strength": ["FLOAT", {"default": 1.0}],
                "late": ["INT", {"default": 5}],
            }
        },
    },
}
WORKFLOW = {
    "nodes": [
        {"id": 1, "type": "Load", "widgets_values": ["b", "hello"]},
        {
            "id": 2,
            "type": "Work",
            "title": "Mine",
            "inputs": [{"name": "model", "link": 7}, {"name": "strength", "link": None}],
            "widgets_values": [3, "fixed", 0.5],
        },
        {"id": 3, "type": "Note", "widgets_values": ["text"]},
    ],
    "links": [[7, 1, 0, 2, 0, "MODEL"]],
}


def test_a_workflow_becomes_a_graph():
    graph = workflow.to_api(WORKFLOW, OBJECT_INFO)
    assert graph["1"]["inputs"] == {"name": "b", "note": "hello"}
    assert graph["2"]["inputs"] == {"model": ["1", 0], "seed": 3, "strength": 0.5, "late": 5}
    assert set(graph) == {"1", "2"}
    assert workflow.find(graph, "Work", "Mine") == "2"
    with pytest.raises(ValueError, match="0 nodes of type Work 'Other'"):
        workflow.find(graph, "Work", "Other")


def test_a_workflow_of_unknown_nodes_is_refused():
    with pytest.raises(ValueError, match="unknown node Work"):
        workflow.to_api(WORKFLOW, {"Load": OBJECT_INFO["Load"]})


def test_the_bar_writes_lines_where_there_is_no_terminal(capsys):
    bar = progress_bar.Bar({"3": "Train"})
    bar.last_line_at -= bar.SECONDS_BETWEEN_LINES + 1
    bar.see("progress", {"node": "3", "value": 5, "max": 10})
    bar.see("progress", {"node": "3", "value": 6, "max": 10})
    assert capsys.readouterr().out == "Train: 50% \n"


def test_the_bar_fills_up_in_a_terminal(capsys):
    bar = progress_bar.Bar({"3": "Train"})
    bar.terminal = True
    bar.see("executing", {"node": "3"})
    bar.see("text", {"node": "3", "text": "step 5 of 10"})
    bar.see("progress", {"node": "3", "value": 5, "max": 10})
    bar.close()
    shown = capsys.readouterr().out.split("\r")
    assert " 50% step 5 of 10" in shown[-2] and "100%" in shown[-1]
    assert shown[-1].endswith("\n")
