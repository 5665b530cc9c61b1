"""Decodes twice with steps captured whole; prints if the answers are the plain engine's, and the captures."""

import torch

from helpers import make_fused, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.generator import EngineGenerator
from ultrafuser.engine.graphs import StepGraphs
from ultrafuser.engine.llama import LlamaStack
from ultrafuser.engine.options import EngineOptions
from ultrafuser.generation import SamplingParams

conversation = [(Message("user", "hi"),)]
params = SamplingParams(max_tokens=12)
engine = Engine(make_fused(), make_tokenizer(), EngineOptions(max_context=256, runner="stacked", drafts=()))
expected = EngineGenerator(engine).generate(conversation, params)[0].token_ids
group = engine.runner.groups[0]
assert isinstance(group.backbone, LlamaStack)
# "eager" runs what was captured as it is; fullgraph=True raises where a step does not come out whole.
group.graphs = StepGraphs(group.backbone, group.cache, compile_with="eager")
answers = [EngineGenerator(engine).generate(conversation, params)[0].token_ids for _ in range(2)]
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print("equal", all(answer == expected for answer in answers), "graphs", graphs, "shapes", len(group.graphs.steps))
