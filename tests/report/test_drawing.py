from __future__ import annotations

from typing import Any

from relfv.report.drawing import curve


def test_a_control_that_is_made_at_some_layers_is_one_line_through_them() -> None:
    row = {"acc": 0.5, "mean_p": 0.4, "ci_low": 0.1, "ci_high": 0.3}
    layers = {n: {"mean_p_base": 0.1, "mean_p_with": 0.5, "acc_base": 0.0, "acc_with": 1.0} for n in range(7)}
    controls: dict[str, Any] = {
        "meaning": {"fv": "...", "random_direction": "..."},
        "zero_shot": {"acc": 0.0, "mean_p": 0.1},
        "per_layer": {str(n): {"fv": row} | ({"random_direction": row} if n % 3 == 0 else {}) for n in layers},
    }

    def drawn() -> list[str]:
        panels = curve(layers, None, controls, 2)["panels"]
        return [points for kind, points in panels[0]["lines"] if kind == "random_direction"]

    (line,) = drawn()
    assert line.count(",") == 3
    controls["per_layer"]["3"]["random_direction"] = {**row, "mean_p": None}  # overflows there
    assert [line.count(",") for line in drawn()] == [1, 1]
