"""What vLLM answers: reads jobs from a JSON file, runs one `LLM` after another in this process, writes JSON.

    PYTHONPATH=<our installed package> <python of vLLM> studies/vllm_answers.py jobs.json answers.json

Runs in the environment of `scripts/vllm_env.sh`, which cannot hold our other tools; tests and studies call it.
A job: {"name", "model", "args": of LLM, "prompts": lists of ids, "sampling": of SamplingParams, "extra": of each
prompt, what `vllm_xargs` would hold, "alone": one prompt after another instead of all at once, "reload": load the
weights once more in the end and tell the error, "task": "generate", "refuse" (only the configuration is made) or
"lm-eval"}. A model that the job before has loaded with the same "args" stays, with an empty prefix cache.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# One process, no threads bound to cores: on a small or busy machine both cost more than they bring.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEFAULTS = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 128, "gpu_memory_utilization": 0.02}


class Loaded:
    """The model of the last job, while the next one may want it."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.of: tuple[str, dict[str, Any]] | None = None

    def get(self, model: str, args: dict[str, Any]) -> Any:
        """The model in vLLM, as fresh as if it were loaded now."""
        from vllm import LLM

        if self.of == (model, args):
            self.llm.reset_prefix_cache()
        else:
            self.drop()
            self.llm, self.of = LLM(model, **args), (model, args)
        return self.llm

    def drop(self) -> None:
        """Free all that it holds."""
        if self.of is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm = self.of = None
        gc.collect()
        cleanup_dist_env_and_memory()


LOADED = Loaded()


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens, their log-probabilities, and those of prompts where asked for."""
    from vllm import SamplingParams

    started = time.perf_counter()
    args = DEFAULTS | {"distributed_executor_backend": "uni"} | job.get("args", {})
    llm = LOADED.get(job["model"], args)
    ready = time.perf_counter()
    sampling = {"temperature": 0.0, "max_tokens": 16, "logprobs": 0} | job.get("sampling", {})
    extras = job.get("extra") or [None] * len(job["prompts"])
    asked = [
        ({"prompt_token_ids": ids}, SamplingParams(**sampling, extra_args=extra))
        for ids, extra in zip(job["prompts"], extras, strict=True)
    ]
    outputs: list[Any] = []
    for group in [[one] for one in asked] if job.get("alone") else [asked]:
        outputs += llm.generate([prompt for prompt, _ in group], [params for _, params in group], use_tqdm=False)
    done = time.perf_counter()
    answers = [output.outputs[0] for output in outputs]
    found: dict[str, Any] = {
        "tokens": [list(answer.token_ids) for answer in answers],
        "log_probs": [
            [step[token].logprob for step, token in zip(answer.logprobs or (), answer.token_ids, strict=False)]
            for answer in answers
        ],
        "prompt_log_probs": [
            [next(iter(step.values())).logprob if step else None for step in output.prompt_logprobs or ()]
            for output in outputs
        ],
        "cached_tokens": [output.num_cached_tokens for output in outputs],
        "load_s": ready - started,
        "generate_s": done - ready,
    }
    if not args.get("enforce_eager"):
        found["compiled_to"] = llm.apply_model(compiled_to)[0]
    if job.get("reload"):
        found["reloaded"] = llm.apply_model(reload_error)[0]
    return found


def compiled_to(model: Any) -> dict[str, str]:
    """Where the compiled graph of each part of a model is kept for the next start."""
    parts = ((name, getattr(part, "_aot_compilation_path", None)) for name, part in model.named_modules())
    return {name: path for name, path in parts if path}


def reload_error(model: Any) -> str:
    """What a model says to weights that come a second time; nothing where it takes them."""
    from ultrafuser.errors import ModelError

    try:
        model.load_weights(iter(()))
    except ModelError as error:
        return str(error)
    return ""


def refuse(job: dict[str, Any]) -> dict[str, Any]:
    """The error that the configuration meets before anything is loaded; none where the model is servable."""
    from vllm.engine.arg_utils import EngineArgs

    from ultrafuser.errors import UltrafuserError

    try:
        config = EngineArgs(model=job["model"], **DEFAULTS | job.get("args", {})).create_engine_config()
    except UltrafuserError as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {"max_model_len": config.model_config.max_model_len}


def lm_eval(job: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's own vLLM model: log-likelihoods of pairs of texts, and answers."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.vllm_causallms import VLLM

    model = VLLM(pretrained=job["model"], batch_size="auto", **DEFAULTS | job.get("args", {}))

    def instances(kind: str, arguments: list[Any]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=tuple(a), idx=i) for i, a in enumerate(arguments)]

    pairs = model.loglikelihood(instances("loglikelihood", job["pairs"]), disable_tqdm=True)
    settings = {"until": ["never"], "max_gen_toks": 8, "temperature": 0}
    questions = [[text, settings] for text in job["questions"]]
    return {
        "scores": [[float(value), bool(greedy)] for value, greedy in pairs],
        "answers": model.generate_until(instances("generate_until", questions), disable_tqdm=True),
    }


TASKS = {"generate": generate, "refuse": refuse, "lm-eval": lm_eval}


def main(jobs: Path, answers: Path) -> None:
    """Answer every job; what was found so far is on the disk after each."""
    found: dict[str, Any] = {}
    for job in json.loads(jobs.read_text()):
        task = TASKS[job.get("task", "generate")]
        if task is not generate:
            LOADED.drop()
        found[job["name"]] = task(job)
        answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
