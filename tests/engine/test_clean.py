from __future__ import annotations

from pathlib import Path

import torch

from parity import assert_close, largest
from relfv.engine.clean import run_clean
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.language_model import open_model
from relfv.types import Prompts

PROMPTS = ["Q: dog\nA: puppy\n\nQ: cat\nA:", "Q: cow\nA:", "Q: a much longer one than that\nA:"]
TARGETS = [5, 6, 7]


def test_what_is_kept_of_a_batch_is_what_each_prompt_gives_alone(llama_path: Path) -> None:
    model = open_model(str(llama_path))
    clean = run_clean(model.backbone, Prompts([model.tokens.encode(prompt) for prompt in PROMPTS], TARGETS))
    hidden = []
    for n, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        seen: dict[str, torch.Tensor] = {}
        arch = model.arch
        with (
            model.backbone.running(),
            editing_inputs([(arch.out_projs[1], lambda z, seen=seen: seen.update(z=z[0, -1].clone()))]),
            editing_outputs([(arch.blocks[1], lambda out, seen=seen: seen.update(out=out[0, -1].clone()))]),
        ):
            ids = torch.tensor([model.tokens.encode(prompt)], device=model.backbone.device)
            logits = model.backbone.model(input_ids=ids, use_cache=False).logits[0, -1]
        assert_close(clean.activations[n, 1].flatten(), seen["z"].float().cpu())
        assert_close(clean.scores.logprob[n], logits.log_softmax(-1)[target].cpu(), scale=largest(logits))
        hidden.append(seen["out"].double().cpu())
    assert_close(clean.hidden[1], torch.stack(hidden).mean(0))
