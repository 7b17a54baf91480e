"""Whether intervals, calls and the choice of a layer hold on simulated data whose truth is known: the tables of
docs/statistics.md. Beside each method stands what it replaced: Student's t.

    python bench/statistics_grid.py            # all of it: about ten minutes on one core
    python bench/statistics_grid.py shares     # intervals of the share of a gap, one layer
    python bench/statistics_grid.py layers     # the best of 32 layers, and the held-out share
    python bench/statistics_grid.py heads      # calls among 1,024 heads, and intervals of single ones

Shares. P zero-shot is about 0.05 and P clean 0.9 (``unequal``: anything above zero-shot). A query fails with the
given rate, and then nothing of its gap is closed; of others 98 % are.

Layers. ``together`` is the correlation of a query's effects at neighbouring layers (0: L draws of luck; 0.9: as in a
model). ``bump``: a third of the layers do something, at most 30 % of the gap; ``plateau``: six layers close 98 % on
all queries but those that fail.

Heads. A query's effects are larger or smaller for all heads (a log-normal factor), and each of 25 trials adds
noise of its own. ``skewed``: exponential about a mean
of 0; ``very skewed``: log-normal, likewise; ``rare``: nothing on nine queries of ten.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from relfv.shares import Gap
from relfv.stats import FDR, clustered_mean, false_discovery, sign_flip_p_values

QUERIES = (10, 14, 18, 25)
N_LAYERS = 32
N_HEADS, N_REAL = 1024, 20
N_TRIALS = 25
Prompts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""P zero-shot and clean (prompt,), the share of its gap that each prompt has closed (prompt, layer), and the true
shares (layer,)."""


def main() -> None:
    """Parse, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"shares": shares_table, "layers": layers_table, "heads": heads_table}
    parser.add_argument("tables", nargs="*", choices=[[], *tables], help="default: all")
    parser.add_argument("--runs", type=int, default=200, help="a cell of a table (default: %(default)s)")
    args = parser.parse_args()
    for name in args.tables or tables:
        for line in tables[name](np.random.default_rng(0), args.runs):
            print(line, flush=True)
        print()


# --- shares of a gap ---------------------------------------------------------------------------------------------


def shares_table(rng: np.random.Generator, runs: int) -> Iterator[str]:
    """A row a kind of effect: coverage and mean width, of Student's t and as it is."""
    yield _header("share of the gap", "true", *(f"n = {n}: t covers; now, width" for n in QUERIES))
    for name, of_query in KINDS.items():
        low, high, share = of_query(rng, 400_000)
        truth = float((share * (high - low)).mean() / (high - low).mean())
        cells = [f"{truth:.2f}"]
        for n in QUERIES:
            before, now, width = [], [], []
            for _ in range(runs):
                i = rng.integers(0, len(low), n)
                effect = (share * (high - low))[i]
                found = Gap(low[i], high[i], range(n)).share(effect[:, None], 0)
                if found:
                    ends = by_t(effect, high[i] - low[i])
                    before.append(ends[0] <= truth <= ends[1])
                    now.append(found.low <= truth <= found.high)
                    width.append(found.high - found.low)
            cells.append(f"{np.mean(before):.0%}; **{np.mean(now):.0%}**, {np.mean(width):.2f}")
        yield _row(name, *cells)


def by_t(effect: np.ndarray, gap: np.ndarray) -> tuple[float, float]:
    """The interval of the linearised ratio by Student's t alone."""
    share = effect.mean() / gap.mean()
    error = clustered_mean(((effect - share * gap) / gap.mean())[:, None], range(len(gap)))
    return float(share + error.low[0]), float(share + error.high[0])


def _probabilities(rng: np.random.Generator, n: int, unequal: bool = False) -> tuple[np.ndarray, np.ndarray]:
    low = rng.beta(0.5, 10, n)
    return low, np.maximum(low + 0.02, rng.random(n)) if unequal else np.maximum(low, rng.beta(8, 1, n))


def _failing(rate: float, unequal: bool = False) -> Callable[..., tuple[np.ndarray, ...]]:
    def of_query(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
        share = np.where(rng.random(n) < rate, 0, rng.beta(60, 1.2, n))
        return (*_probabilities(rng, n, unequal), share)

    return of_query


def _like(draw: Callable[[np.random.Generator, int], np.ndarray]) -> Callable[..., tuple[np.ndarray, ...]]:
    return lambda rng, n: (*_probabilities(rng, n), draw(rng, n))


KINDS = {
    "fails on no query": _failing(0),
    "on 1 of 20": _failing(1 / 20),
    "on 1 of 10": _failing(1 / 10),
    "on 1 of 4": _failing(1 / 4),
    "on 1 of 20, unequal gaps": _failing(1 / 20, unequal=True),
    "on 1 of 10, unequal gaps": _failing(1 / 10, unequal=True),
    "graded (beta 3, 1.2)": _like(lambda rng, n: rng.beta(3, 1.2, n)),
    "all or nothing (beta 0.4, 0.4)": _like(lambda rng, n: rng.beta(0.4, 0.4, n)),
    "zero-inflated (half are 0)": _like(lambda rng, n: np.where(rng.random(n) < 0.5, 0, rng.beta(2, 2, n))),
    "skewed, small (beta 0.5, 6)": _like(lambda rng, n: rng.beta(0.5, 6, n)),
    "works on 1 of 10": _failing(9 / 10),
    "works on 1 of 20": _failing(19 / 20),
    "nothing (0 to 0.2 %)": _like(lambda rng, n: 0.002 * rng.random(n)),
    "all, 100 +- 5 %": _like(lambda rng, n: 1 + 0.05 * rng.standard_normal(n)),
    "one in 10 is hurt (-30 %)": _like(lambda rng, n: np.where(rng.random(n) < 0.1, -0.3, rng.beta(20, 1.2, n))),
}
"""Name -> (rng, n) -> P zero-shot, P clean, share closed, (n,) each."""


# --- the best of L layers ----------------------------------------------------------------------------------------


def layers_table(rng: np.random.Generator, runs: int) -> Iterator[str]:
    """A row a kind of effect and number of queries."""
    yield _header(
        "effect", "n", "best layer above 0: t", "now", "its share covered: t", "now",
        "held out above 0: t", "now", "covered: t", "now",
    )  # fmt: skip
    for name, make in LAYER_KINDS.items():
        for n in (10, 14, 25):
            yield _row(name, str(n), *_of_layers([make(rng, n) for _ in range(runs)]))


def _of_layers(samples: list[Prompts]) -> list[str]:
    above: dict[str, list[bool]] = {key: [] for key in ("best t", "best", "out t", "out")}
    covered: dict[str, list[bool]] = {key: [] for key in above}
    for low, high, share, truth in samples:
        gap, effect = high - low, share * (high - low)[:, None]
        best = int(effect.mean(0).argmax())
        of_others = [int(np.delete(effect, i, axis=0).mean(0).argmax()) for i in range(len(effect))]
        measured, queries = Gap(low, high, range(len(low))), range(len(low))
        now, out = measured.share(effect, best), measured.share_with_layer_chosen_by_others(effect, effect)
        assert now
        assert out
        for key, (bottom, top), true in (
            ("best t", by_t(effect[:, best], gap), truth[best]),
            ("best", (now.low, now.high), truth[best]),
            ("out t", by_t(effect[queries, of_others], gap), truth[of_others].mean()),
            ("out", (out.low, out.high), truth[of_others].mean()),
        ):
            above[key].append(bottom > 0)
            covered[key].append(bottom <= true <= top)
    columns = [values[key] for kind in ("best", "out") for values in (above, covered) for key in (f"{kind} t", kind)]
    return [f"{np.mean(column):.0%}" for column in columns]


def _effects_at_layers(
    true_share: np.ndarray, together: float, noise: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.random.Generator, int], Prompts]:
    def make(rng: np.random.Generator, n: int) -> Prompts:
        low, high = np.full(n, 0.1), 0.1 + 0.8 * rng.beta(8, 1, n)
        return low, high, true_share + noise(_walk(rng, n, together)), true_share

    return make


def _walk(rng: np.random.Generator, n: int, together: float) -> np.ndarray:
    """(prompt, layer) of standard normal numbers, neighbours correlated."""
    z = rng.standard_normal((n, N_LAYERS))
    for layer in range(1, N_LAYERS):
        z[:, layer] = together * z[:, layer - 1] + np.sqrt(1 - together**2) * z[:, layer]
    return z


def _exponential(z: np.ndarray) -> np.ndarray:
    """Mean 0, variance 1, a long tail above."""
    return -stats.norm.logsf(z) - 1


def _rare(z: np.ndarray) -> np.ndarray:
    """0 in four of five, else anything between -1 and 1, evenly."""
    return np.where(stats.norm.cdf(z) > 0.8, 10 * stats.norm.cdf(z) - 9, 0)


def _plateau(rate: float, together: float) -> Callable[[np.random.Generator, int], Prompts]:
    rates = np.ones(N_LAYERS)
    rates[8:14] = rate

    def make(rng: np.random.Generator, n: int) -> Prompts:
        low, high = np.full(n, 0.1), 0.1 + 0.8 * rng.beta(8, 1, n)
        works = stats.norm.cdf(_walk(rng, n, together)) >= rates
        return low, high, np.where(works, 0.98, 0), 0.98 * (1 - rates)

    return make


_NONE = np.zeros(N_LAYERS)
_BUMP = 0.3 * np.exp(-0.5 * ((np.arange(N_LAYERS) - 10) / 4) ** 2)
LAYER_KINDS = {
    **{
        f"none, {name}, together {together}": _effects_at_layers(_NONE, together, noise)
        for name, noise in (
            ("normal", lambda z: 0.2 * z),
            ("skewed up", lambda z: 0.2 * _exponential(z)),
            ("skewed down", lambda z: -0.2 * _exponential(z)),
            ("rare", lambda z: 0.4 * _rare(z)),
        )
        for together in (0.0, 0.9)
    },
    "bump of 30 %, together 0": _effects_at_layers(_BUMP, 0.0, lambda z: 0.2 * z),
    "bump of 30 %, together 0.9": _effects_at_layers(_BUMP, 0.9, lambda z: 0.2 * z),
    **{
        f"plateau, {name} fail, together {together}": _plateau(rate, together)
        for name, rate in (("1 of 20", 0.05), ("1 of 10", 0.1), ("1 of 4", 0.25))
        for together in (0.0, 0.9)
    },
}


# --- calls of heads ----------------------------------------------------------------------------------------------


def heads_table(rng: np.random.Generator, runs: int) -> Iterator[str]:
    """Calls where no head has an effect and where 20 have, then intervals of single heads."""
    yield _header("heads", *(f"n = {n}: t; flips" for n in QUERIES))
    for name, noise in NOISE.items():
        found = [_calls(rng, runs // 5, n, noise, real=False) for n in QUERIES]
        yield _row(f"none real, {name}: runs that call one", *(f"{t[0]:.0%}; **{f[0]:.0%}**" for t, f in found))
    for name, noise in NOISE.items():
        found = [_calls(rng, runs // 5, n, noise, real=True) for n in QUERIES]
        yield _row(f"20 real, noise {name}: of them called", *(f"{t[1]:.0%}; **{f[1]:.0%}**" for t, f in found))
        yield _row("false among the called", *(f"{t[2]:.0%}; {f[2]:.0%}" for t, f in found))
    for name, of_query in SINGLE.items():
        yield _row(
            f"one head, {name}: its t interval covers", *(_covered(rng, 20 * runs, n, of_query) for n in QUERIES)
        )


def _queries(rng: np.random.Generator, n: int) -> np.ndarray:
    """(trial,): n queries, each at least once."""
    return np.r_[np.arange(n), rng.integers(0, n, N_TRIALS - n)]


def _calls(
    rng: np.random.Generator, runs: int, n: int, noise: Callable[..., np.ndarray], *, real: bool
) -> tuple[list[float], list[float]]:
    """By t and by flips: share of runs that call any head, of real heads that are called, of the called that are not
    real."""
    found: tuple[list[list[float]], ...] = ([], [])
    for _ in range(runs):
        queries = _queries(rng, n)
        of_query = noise(rng, (n, N_HEADS))
        if real:
            of_query[:, :N_REAL] += rng.uniform(0.5, 2, N_REAL) * rng.lognormal(0, 1, (n, N_REAL))
        scale = rng.lognormal(0, 0.7, (n, 1))
        values = (scale * of_query)[queries] + 0.3 * scale[queries] * noise(rng, (N_TRIALS, N_HEADS))
        clusters = queries.tolist()
        mean = clustered_mean(values, clusters)
        t = np.divide(np.abs(mean.mean), mean.se, out=np.zeros(N_HEADS), where=mean.se > 0)
        by_t = 2 * stats.t.sf(t, mean.df)
        for p_values, kept in zip((by_t, sign_flip_p_values(values, clusters)), found, strict=True):
            called = false_discovery(p_values) <= FDR
            n_called = max(1, called.sum())
            kept.append([float(called.any()), called[:N_REAL].mean(), called[N_REAL:].sum() / n_called])
    return tuple(np.mean(kept, axis=0).tolist() for kept in found)  # type: ignore[return-value]


def _covered(rng: np.random.Generator, runs: int, n: int, of_query: Callable[..., np.ndarray]) -> str:
    truth = of_query(rng, (1_000_000,)).mean()
    found = clustered_mean(of_query(rng, (n, runs)), range(n))
    return f"{((found.low <= truth) & (truth <= found.high)).mean():.0%}"


NOISE = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy (t of 2)": lambda rng, shape: rng.standard_t(2, shape),
    "skewed": lambda rng, shape: rng.standard_exponential(shape) - 1,
    "very skewed": lambda rng, shape: rng.lognormal(0, 1, shape) - np.exp(0.5),
    "rare": lambda rng, shape: np.where(rng.random(shape) < 0.9, 0, rng.standard_normal(shape)),
}
SINGLE = {
    "normal": lambda rng, shape: rng.normal(1, 1, shape),
    "graded (log-normal)": lambda rng, shape: rng.lognormal(0, 1, shape),
    "zero-inflated (half are 0)": lambda rng, shape: np.where(rng.random(shape) < 0.5, 0, rng.lognormal(0, 0.5, shape)),
    "rests on 1 query in 10": lambda rng, shape: np.where(rng.random(shape) < 0.9, 0, 1 + rng.random(shape)),
}


def _header(*cells: str) -> str:
    return _row(*cells) + "\n" + "|---" * len(cells) + "|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
