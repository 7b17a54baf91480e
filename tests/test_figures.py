from __future__ import annotations

import io

import matplotlib.image
import numpy as np

from relfv.figures import cross_png, heatmap_png, injection_curve_png
from relfv.types import HeadId, ScoredHead


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
    layers = {
        i: {"n_eval": 5, "mean_p_with": 0.1 * i, "mean_p_base": 0.1, "acc_with": 0.5, "acc_base": 0.0} for i in range(4)
    }
    reference = {"clean": {"mean_p": 0.9, "acc": 1.0}}
    assert injection_curve_png(layers, reference, "Q1") == injection_curve_png(layers, reference, "Q1")
    assert injection_curve_png(layers, reference, "Q1") != injection_curve_png(layers, None, "Q1")


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
