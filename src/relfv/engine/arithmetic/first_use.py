"""What libraries do once in a process, when something of theirs is used first: half a second of it.

cuBLAS sets itself up and PyTorch loads the code of its kernels onto the card; Triton hashes its own library, some 300
MB, to know which of its compiled kernels still hold. Little of that needs the interpreter, so threads go on meanwhile.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.nn.functional as F

from relfv.engine.arithmetic import kernels
from relfv.engine.arithmetic.matmul import product


def first_use(device: torch.device) -> None:
    """Use on a CUDA ``device`` what opening a model will use there."""
    # Whatever fails here fails again where it is needed, and is explained there.
    with suppress(Exception), torch.cuda.device(device), torch.inference_mode():
        x = torch.ones(16, 128, dtype=torch.float32, device=device)
        F.linear(x, x).logsumexp(1)
        F.linear(x.double(), x.double())
        F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True)
        if kernels.usable(x):
            product(kernels.split_differences(x[None], 3, 0), x.bfloat16())
