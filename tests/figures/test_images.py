from __future__ import annotations

import io
import re
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from relfv.figures import images as figures
from relfv.figures.canvas import Canvas, cut, text_width, wrapped
from relfv.figures.images import Curve, Heatmap, caption
from relfv.settings import FIGURE_FORMATS, Settings
from relfv.ticks import even_ticks, whole_ticks
from relfv.types import HeadId, ScoredHead


def heatmap_png(scored: list[ScoredHead], metric: str, top: list[ScoredHead], title: str) -> bytes:
    return figures.heatmap(Heatmap(scored, top, title), metric).to_bytes()


def curve_of(reference: dict[str, Any] | None, n_layers: int = 4) -> Curve:
    layers = {
        i: {"n_eval": 5, "mean_p_with": 0.1 * i, "mean_p_base": 0.1, "acc_with": 0.5, "acc_base": 0.0}
        for i in range(n_layers)
    }
    return Curve(layers, reference, "Q1", [0.5, 1.3])


def cross_png(names: list[str], layers: dict[str, int], delta_p: np.ndarray) -> bytes:
    return figures.cross(names, [layers.get(name) for name in names], delta_p).to_bytes()


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def scored(strong: HeadId) -> list[ScoredHead]:
    ids = [HeadId(layer, head) for layer in range(4) for head in range(6)]
    return [ScoredHead(i, {"mean_delta_p": 0.5 if i == strong else 0.001}, 25) for i in ids]


def test_a_strong_head_is_seen_where_it_is() -> None:
    low, high = scored(HeadId(0, 0)), scored(HeadId(3, 5))
    reds = []
    for heads in (low, high):
        image = pixels(heatmap_png(heads, "mean_delta_p", [], "Q1"))[:, :, :3]
        image = image[:, : int(image.shape[1] * 0.75)]  # without the colour bar
        red = np.argwhere((image[:, :, 0] > 0.35) & (image[:, :, 1] < 0.15) & (image[:, :, 2] < 0.3))
        reds.append(red.mean(0))
    assert reds[0][0] > reds[1][0]  # layer 0 is at the bottom
    assert reds[0][1] < reds[1][1]  # head 0 is on the left


def test_the_top_heads_are_framed() -> None:
    heads = scored(HeadId(1, 1))
    without = pixels(heatmap_png(heads, "mean_delta_p", [], "Q1"))
    with_frames = pixels(heatmap_png(heads, "mean_delta_p", heads[:5], "Q1"))
    assert (with_frames[:, :, :3].sum(-1) < 0.1).sum() > (without[:, :, :3].sum(-1) < 0.1).sum() + 100


def test_the_same_numbers_give_the_same_bytes() -> None:
    heads = scored(HeadId(1, 1))
    assert heatmap_png(heads, "mean_delta_p", heads[:5], "Q1") == heatmap_png(heads, "mean_delta_p", heads[:5], "Q1")
    reference = {"clean": {"mean_p": 0.9, "acc": 1.0}}
    with_it, without = (figures.injection_curve(curve_of(one)).to_bytes() for one in (reference, None))
    assert with_it == figures.injection_curve(curve_of(reference)).to_bytes()
    assert with_it != without


def reddest(image: np.ndarray) -> np.ndarray:
    """Mean (row, column) of strong red, left of the colour bar."""
    image = image[:, : int(image.shape[1] * 0.75), :3]
    return np.argwhere((image[:, :, 0] > 0.35) & (image[:, :, 1] < 0.15) & (image[:, :, 2] < 0.3)).mean(0)


def test_a_vector_that_works_is_seen_at_its_prompts_and_its_column() -> None:
    q_ids, layers = [f"Q{i}" for i in range(8)], {f"Q{i}": i for i in range(8)}
    places = []
    for target, source in ((1, 6), (6, 1)):
        grid = np.zeros((8, 8))
        grid[target, source] = 0.5
        places.append(reddest(pixels(cross_png(q_ids, layers, grid))))
    assert places[0][0] < places[1][0]  # the first q_id's prompts are at the top
    assert places[0][1] > places[1][1]  # and its vector is on the left


def test_q_ids_without_numbers_yet_and_long_names_are_drawn_all_the_same() -> None:
    names = ["Q1", "_".join(["long"] * 12), "$x$"]
    nothing = np.full((3, 3), np.nan)
    some = nothing.copy()
    some[0] = [0.3, -0.1, 0.0]
    pictures = [pixels(cross_png(names, layers, grid)) for layers, grid in (({}, nothing), ({"Q1": 3}, some))]
    grey = [(np.abs(image[:, :, :3] - 0.8) < 0.01).all(-1).sum() for image in pictures]
    assert 0.5 * grey[0] < grey[1] < 0.8 * grey[0]
    assert cross_png(names, {"Q1": 3}, some) == cross_png(names, {"Q1": 3}, some)


def every_figure(about: str = "") -> list[Canvas]:
    heads = scored(HeadId(1, 1))
    one, curve = Heatmap(heads, heads[:5], "Q1 (a -> b)"), curve_of({"clean": {"mean_p": 0.9, "acc": 1.0}})
    return [
        figures.heatmap(one, "mean_delta_p", about),
        figures.heatmaps([one] * 5, "mean_delta_p", "five", about),
        figures.injection_curve(curve, about),
        figures.injection_curves([curve] * 5, "mean_p", "five", about),
        figures.cross(["Q1", "Q2"], [1, None], np.array([[0.1, 0.2], [np.nan, np.nan]]), about),
    ]


@pytest.mark.parametrize("kind", FIGURE_FORMATS)
def test_every_figure_has_every_format_with_its_settings_inside_and_no_date(kind: str) -> None:
    about = caption(Settings(model="/a/b/llama-é", dtype="float32"))
    for one, again in zip(every_figure(about), every_figure(about), strict=True):
        data = one.to_bytes(kind)
        assert data == again.to_bytes(kind)
        assert b"exact arithmetic" in data
        assert not re.search(rb"/CreationDate|<dc:date>|tIME", data)
    if kind == "pdf":
        assert b"/FontFile2" in data  # TrueType, embedded
        assert b"/Type3" not in data
    if kind == "svg":
        assert b"<text" not in data  # outlines, which need no font


def test_a_figure_of_more_dots_an_inch_is_the_same_page_with_more_pixels() -> None:
    for one in every_figure():
        low, high = (pixels(one.to_bytes(dpi=dpi)).shape for dpi in (100, 300))
        assert np.allclose(np.array(high[:2]) / np.array(low[:2]), 3, rtol=0.02)


def test_zero_is_in_the_middle_of_the_colours_and_heads_that_were_not_swept_are_grey() -> None:
    heads = [ScoredHead(HeadId(i // 2, i % 2), {"mean_delta_p": p}, 5) for i, p in enumerate((0.2, 0.0, -0.2))]
    image = pixels(heatmap_png(heads, "mean_delta_p", [], "Q1"))[:, :, :3]

    def has(colour: tuple[float, float, float], least: int) -> bool:
        return int((np.abs(image - colour) < 0.02).all(-1).sum()) > least

    for colour in ((0.40, 0.0, 0.12), (0.02, 0.19, 0.38), (0.968, 0.968, 0.968), (0.8, 0.8, 0.8)):
        assert has(colour, 500), colour


@pytest.mark.parametrize(("n_layers", "n_heads"), [(80, 64), (144, 12), (18, 4), (2, 2), (6, 128)])
def test_models_of_any_shape_fit_a_page(n_layers: int, n_heads: int) -> None:
    heads = [ScoredHead(HeadId(i, j), {"mean_delta_p": 0.1}, 25) for i in range(n_layers) for j in range(n_heads)]
    page = figures.heatmap(Heatmap(heads, heads[:2], "Q1"), "mean_delta_p")
    assert 250 < page.width < 600
    assert 60 < page.height < 600


def test_the_numbers_beside_the_colours_do_not_overlap_where_the_map_is_low(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[float, str]] = []
    words = Canvas.words

    def heard(canvas: Canvas, x: float, y: float, text: str, *more: Any, **style: Any) -> None:
        if re.fullmatch(r"[+-][\d.]+|0", text) and x > canvas.width / 2 and not style:
            said.append((y, text))
        words(canvas, x, y, text, *more, **style)

    monkeypatch.setattr(Canvas, "words", heard)
    for n_layers, expected in ((1, ["-1", "0", "+1"]), (8, ["-1", "-0.5", "0", "+0.5", "+1"])):
        said.clear()
        heads = [
            ScoredHead(HeadId(i, j), {"mean_delta_p": 1.3 * j / 11}, 5) for i in range(n_layers) for j in range(12)
        ]
        heatmap_png(heads, "mean_delta_p", [], "Q1")
        assert [text for _, text in said] == expected
        heights = [y for y, _ in said]
        assert min(np.diff(heights)) > 7.5


def test_zero_shot_is_drawn_where_there_is_one_layer() -> None:
    one = figures.injection_curve(curve_of(None, 1))
    dark = (np.abs(pixels(one.to_bytes())[:, :, :3] - 0x4D / 255) < 0.02).all(-1)
    assert dark.sum(1).max() > 0.15 * dark.shape[1]  # dashes from side to side of a panel, not the legend's alone


def test_a_page_of_given_size_has_it() -> None:
    heads = scored(HeadId(1, 1))
    for columns in (1, 2):
        page = figures.heatmaps(
            [Heatmap(heads, [], "Q1")] * 2, "mean_delta_p", "two", columns=columns, width=4.0, height=5.0
        )
        assert (page.width, page.height) == (pytest.approx(4 * 72), pytest.approx(5 * 72))


def test_words_are_measured_cut_and_wrapped_and_what_the_font_lacks_is_marked() -> None:
    assert text_width("mmm", 10) > text_width("iii", 10) > 0
    assert cut("a long name of a relation", 8, 60).endswith("…")
    assert text_width(cut("a long name of a relation", 8, 60), 8) <= 60
    assert wrapped("one two three", 10, 30) == ["one", "two", "three"]
    page = Canvas(100, 30)
    page.words(5, 5, "日本 -> ok\n")
    assert page.to_bytes("svg")


def test_ticks_are_round_and_apart() -> None:
    assert even_ticks(0.27) == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2])
    assert even_ticks(1.0) == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert list(whole_ticks(32, 9.0, apart=17)) == list(range(0, 32, 2))
