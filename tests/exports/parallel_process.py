"""One of several processes that share a checkpoint by transformers' tensor parallelism: FOLDER ANSWER.pt."""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor

if __name__ == "__main__":
    torch.set_num_threads(1)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 19)[None]).logits
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    key = model.base_model.layers[0].self_attn.k_proj.weight
    rows = (key.to_local() if isinstance(key, DTensor) else key).shape[0]
    if torch.distributed.get_rank() == 0:
        torch.save({"logits": logits, "rows": rows}, sys.argv[2])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
