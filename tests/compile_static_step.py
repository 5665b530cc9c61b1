"""Decodes with a compiled step and a static cache; prints if the answer is the reference's and the number of graphs."""

from typing import Any

import torch
from transformers import StaticCache

from helpers import make_fused, reference_greedy
from ultrafuser.model.cache import FusedCache

model = make_fused(templates=None)
configs = model.config.specialist_configs
cache = FusedCache({name: StaticCache(config=configs[name], max_cache_len=16) for name in model.names})
prompt = list(range(10, 16))
num_graphs = 0


def count(graph: Any, _: Any) -> Any:
    global num_graphs
    num_graphs += 1
    return graph.forward


step = torch.compile(model.forward, fullgraph=True, backend=count)
with torch.no_grad():
    ids = torch.tensor([prompt])
    token = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
    ids = torch.cat([ids, token], dim=1)
    for _ in range(4):
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, past_key_values=cache, attention_mask=torch.ones_like(ids)
        )
        ids = torch.cat([ids, step(**inputs).logits[:, -1:].argmax(dim=-1)], dim=1)

print("equal", ids[0, 6:].tolist() == reference_greedy(model, [prompt] * 3, max_tokens=5), "graphs", num_graphs)
