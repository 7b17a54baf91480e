"""The recipe of the demo model: a small Llama that learns relations in context.

No pretrained weights can ship with the package, so it trains its own, from scratch, on the pairs of a relation CSV.
What makes such a model worth looking at is not that it knows the pairs but *how it is forced to use them*:

- The inputs of a domain are shared by several relations (two: three, one, four, ...), so the query alone is ambiguous
  and only the demonstrations, or a function vector, can say which relation is meant.
- Three quarters of the documents are ten pairs of one relation. In the rest the labels are deranged, and the target
  at each answer is the answer under a *random* relation that contains the input. Mislabelled demonstrations therefore
  carry no information about the target, and the model learns to fall back to the ambiguous prior. With ordinary
  language-model targets it would infer the relation from the type of the labels, and corrupted prompts would not be
  corrupted at all.
- A group-lasso penalty on the slices of the attention output projection, one group a head, asks for few heads that
  do the work instead of a little of it in every head. The heads that survive are in the lower layers, and the upper
  layers apply what those heads wrote to the query: hence an injection curve that falls with depth.

``docs/demo_model.md`` says what was measured, what failed, and what the model is no evidence for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoTrainingConfig:
    """Everything that shapes the demo model besides the CSV and the seed."""

    layers: int = 8
    """Transformer blocks."""
    hidden: int = 128
    """Width of the residual stream."""
    heads: int = 16
    """Query heads a layer. Many, so that the top 20 are a small part of all."""
    kv_heads: int = 8
    """Key/value heads a layer; fewer than ``heads``, so that grouped-query attention is exercised."""
    head_dim: int = 16
    """Width of a head in dimensions; deliberately not ``hidden / heads``, as in several released families."""
    intermediate: int = 256
    """Width of the gated MLP."""
    pairs: int = 10
    """Pairs in a document: one more than the demonstrations of an evaluation prompt."""
    shuffled_fraction: float = 0.25
    """Share of documents with deranged labels and random-relation targets."""
    batch: int = 16
    """Documents in a step."""
    steps: int = 4500
    """Optimiser steps."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    final_rate: float = 0.05
    """Learning rate at the last step, as a share of the peak (linear decay)."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Decoupled weight decay on matrices; norms have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decays."""
    clip: float = 1.0
    """Largest gradient norm."""
    head_lasso: float = 1e-3
    """Weight of the sum over heads of the norm of the head's slice of the output projection."""
    initializer_range: float = 0.09
    """Standard deviation of the initial weights: near ``hidden ** -0.5``; the usual 0.02 learns too slowly here."""
    in_pieces: tuple[str, ...] = (
        "caterpillar",
        "libreville",
        "montevideo",
        "phosphorus",
        "tegucigalpa",
        "ulaanbaatar",
    )
    """Words kept out of the vocabulary, so that some inputs and answers have several tokens."""
    log_every: int = 200
    """Steps between two lines of the training log."""
    validation_trials: int = 4
    """Validation trials a relation in each line of the log."""
