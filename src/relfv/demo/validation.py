"""Accuracy and P of a demo model on validation trials."""

from __future__ import annotations

import random

import torch
from transformers import LlamaForCausalLM

from relfv.demo.documents import DocumentSampler, padded


@torch.no_grad()
def validate(model: LlamaForCausalLM, sampler: DocumentSampler, *, seed: int = 0) -> dict[str, float]:
    """Accuracy and P of the answer's first token on clean, shuffled-label and zero-shot prompts.

    Means over ``validation_trials`` trials of every relation: keys ``clean_acc``, ``clean_p``, ``shuffled_acc``, ...
    The trials are the same at every call with one ``seed``, and are not those that a run would draw.
    """
    rng = random.Random(f"demo-validation:{seed}")
    prompts: dict[str, list[list[int]]] = {"clean": [], "shuffled": [], "zeroshot": []}
    targets: list[int] = []
    for q_id in sampler.names:
        for _ in range(sampler.config.validation_trials):
            clean, corrupted = sampler.trial(rng, q_id)
            prompts["clean"].append(sampler.prompt_ids(clean))
            prompts["shuffled"].append(sampler.prompt_ids(corrupted))
            prompts["zeroshot"].append(sampler.prompt_ids(clean[-1:]))
            targets.append(sampler.answer_ids[clean[-1][1]][0])
    measures: dict[str, float] = {}
    training = model.training
    model.eval()
    target = torch.tensor(targets, device=model.device)
    for name, rows in prompts.items():
        last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        hidden = model.model(input_ids=padded(rows, model.device), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(rows), device=model.device), last]).float()
        measures[f"{name}_acc"] = (logits.argmax(-1) == target).float().mean().item()
        measures[f"{name}_p"] = logits.softmax(-1).gather(1, target[:, None]).mean().item()
    model.train(training)
    return measures
