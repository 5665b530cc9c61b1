"""Tiny specialists, data and recipes for the tests of training, and a server that runs training in children.

Run as a script this file is that server: it imports everything once, then forks a child for each request, so a run
that is to be killed starts in milliseconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultrafuser.alignment.encode import Encoder
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.config.training import StageConfig, TrainConfig
from ultrafuser.data.records import Record, content_id
from ultrafuser.model.build import read_templates
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.train.loop import Loop
from ultrafuser.train.observers import Observers
from ultrafuser.train.phase import Phase

DOMAINS = ("text", "code")
TEMPLATES = {"text": "ultralm", "code": "codellama"}
TIMED = {"seconds", "tokens_per_s", "memory_bytes"}  # of a line of metrics: what differs between equal runs


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and three special ones."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


TOKENIZER = make_tokenizer()


def make_specialist(seed: int = 0, *, hidden_size: int = 16, dropout: float = 0.0) -> LlamaForCausalLM:
    """A Llama of two layers; with dropout in its attention it shows whether random numbers are drawn alike."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            attention_dropout=dropout,
            bos_token_id=TOKENIZER.bos_token_id,
            eos_token_id=TOKENIZER.eos_token_id,
            pad_token_id=TOKENIZER.pad_token_id,
            tie_word_embeddings=True,
        )
    )


def make_fused(names: Sequence[str] = DOMAINS, *, dropout: float = 0.0, **options: Any) -> FusedForCausalLM:
    """Specialists of different weights and templates under an untrained gate."""
    specialists = {name: make_specialist(seed, dropout=dropout) for seed, name in enumerate(names)}
    templates = {name: TEMPLATES.get(name, "plain") for name in names}
    return FusedForCausalLM.from_specialists(
        specialists, templates=templates, tokenizer=TOKENIZER, **{"gate_hidden_size": 8, **options}
    )


def make_conversations(domain: str, number: int) -> list[Conversation]:
    """Questions and answers of different lengths, which a domain's name opens."""
    return [
        (Message("user", f"{domain[0]}{i}?" + "." * (i % 3)), Message("assistant", f"{domain} {i}" + "!" * (i % 4)))
        for i in range(number)
    ]


def make_records(domain: str, number: int) -> list[Record]:
    conversations = make_conversations(domain, number)
    return [Record(content_id(c), c, domain, f"{domain}[{i}]") for i, c in enumerate(conversations)]


def make_phase(
    folder: Path,
    *,
    model: FusedForCausalLM | None = None,
    name: str = "stage1",
    stage: Mapping[str, Any] = {},
    train: Mapping[str, Any] = {},
    seed: int = 7,
    sizes: Mapping[str, int] | None = None,
    max_length: int | None = None,
    observers: Observers = Observers(),
) -> Phase:
    """A phase of a few small steps."""
    model = model if model is not None else make_fused()
    encoder = Encoder(TOKENIZER, read_templates(model.config))
    sources = {domain: make_records(domain, size) for domain, size in (sizes or {"text": 6, "code": 5}).items()}

    def encode(records: Sequence[Record]) -> list[Any]:
        return [encoder.encode(record.messages, id=record.id, domain=record.domain) for record in records]

    encoded = {domain: encode(records) for domain, records in sources.items()}
    return Phase(
        name=name,
        model=model,
        encoder=encoder,
        records=encoded,
        sources=sources,
        validation={domain: records[:2] for domain, records in encoded.items()},
        stage=StageConfig.model_validate({"steps": 4, "learning_rate": 1e-2, "records_per_domain": 2, **stage}),
        train=TrainConfig.model_validate({"checkpoint_every": 2, "validate_every": 2, "device": "cpu", **train}),
        seed=seed,
        folder=folder,
        max_length=max_length,
        observers=observers,
    )


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: Mapping[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are no longer the same to the bit."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def untimed_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file but for what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def write_ingredients(folder: Path) -> Path:
    """Two model folders, a JSONL file per domain and a recipe over them; returns the recipe."""
    for seed, name in enumerate(DOMAINS):
        make_specialist(seed).save_pretrained(folder / f"{name}-base")
        TOKENIZER.save_pretrained(folder / f"{name}-base")
        lines = [json.dumps({"messages": [m.to_dict() for m in c]}) for c in make_conversations(name, 12)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tune = {"steps": 4, "learning_rate": 1e-2, "records_per_domain": 3}
    stage = {"steps": 4, "learning_rate": 1e-2, "records_per_domain": 2, "composed_share": 0.25, "warmup_steps": 1}
    recipe = {
        "name": "tiny",
        "output": str(folder / "run"),
        "seed": 3,
        "specialists": {
            "text": {"model": "text-base", "template": "ultralm", "tune": {**tune, "domains": ["text"]}},
            "code": {"model": "code-base", "template": "codellama"},
        },
        "gate": {"hidden_size": 8},
        "data": {"domains": {d: {"sources": [{"path": f"{d}.jsonl"}]} for d in DOMAINS}, "validation_fraction": 0.2},
        "train": {
            "checkpoint_every": 2,
            "validate_every": 2,
            "validation_records": 2,
            "keep_checkpoints": 1,
            "threads": 1,
            "device": "cpu",
        },
        "stage1": stage,
        "stage2": {**stage, "train_specialists": True, "gate_learning_rate": 2e-2},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


class TrainingServer:
    """Runs jobs in forked children of a process that has everything imported."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent / "src"), str(Path(__file__).parent)]),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, job: str, folder: Path, **arguments: Any) -> tuple[int, str, int]:
        """Run a job of `JOBS`; returns its exit code (negative: the signal), what it said on stderr, events counted."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"job": job, "folder": str(folder), **arguments}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["said"], answer["events"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run_phase(folder: Path, phase: Mapping[str, Any] = {}, **_: Any) -> None:
    """Train a phase that is made in memory; leave its parameters in `final.safetensors`."""
    # With dropout, so that a resumed run must draw the same random numbers, too.
    model = make_fused(dropout=0.2)
    Loop(make_phase(folder, model=model, **phase)).run()
    save_file({name: tensor.contiguous() for name, tensor in parameters(model).items()}, folder / "final.safetensors")


def run_command(folder: Path, overrides: Sequence[str] = (), **_: Any) -> None:
    """`ultrafuser train` as a user calls it."""
    from ultrafuser.cli.main import run

    sys.argv = ["ultrafuser", "train", str(folder / "tiny.yaml"), *(part for o in overrides for part in ("--set", o))]
    run()


def run_interrupted_at_the_end(folder: Path, **arguments: Any) -> None:
    """A phase whose last step is interrupted."""
    step = Loop._step

    def interrupted(self: Loop, number: int) -> dict[str, Any]:
        if number == self.stage.steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    Loop._step = interrupted  # type: ignore[method-assign]
    run_phase(folder, **arguments)


JOBS: dict[str, Callable[..., None]] = {
    "phase": run_phase,
    "command": run_command,
    "interrupted_at_the_end": run_interrupted_at_the_end,
}


def count_events(kill_at: int | None, log: Path) -> None:
    """Give every write and rename of training a running number, before and after it; die at one of them."""
    import shutil

    from ultrafuser import files
    from ultrafuser.model import checkpoint as model_checkpoint
    from ultrafuser.train import checkpoint, loop
    from ultrafuser.train.tracking import metrics

    number = 0

    def event(name: str) -> None:
        nonlocal number
        number += 1
        with log.open("a") as file:
            file.write(name + "\n")
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            event(f"before {name}")
            result = original(*args, **kwargs)
            event(f"after {name}")
            return result

        setattr(owner, name, watched)

    for owner, name in (
        (checkpoint, "save_file"),
        (files, "_flush"),
        (shutil, "rmtree"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (metrics.MetricsFile, "write"),
        (loop.Loop, "_step"),
        (model_checkpoint, "put_in_place"),
    ):
        watch(owner, name)


def damage_writing(after: int) -> None:
    """Every file that grows beyond `after` bytes fails to be written, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (after, after))


def _serve() -> None:
    torch.set_num_threads(1)
    # What a run imports on its way, so that no child has to.
    for module in ("torch.utils.tensorboard", "ultrafuser.cli.main", "ultrafuser.train.pipeline", "torch._dynamo"):
        with suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        said, log = folder / "said", folder / "events"
        log.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _run_child(request, folder, said, log)
        status = _await(child, request)
        code = os.waitstatus_to_exitcode(status)
        events = len(log.read_text().splitlines()) if log.exists() else 0
        print(json.dumps({"code": code, "said": said.read_text(errors="replace"), "events": events}), flush=True)


def _await(child: int, request: Mapping[str, Any]) -> int:
    """Wait for a child; send it the signal asked for once a file holds so many lines."""
    wanted = request.get("signal")
    while wanted is not None:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        path = Path(request["folder"]) / wanted["file"]
        if path.exists() and path.read_text().count("\n") >= wanted["lines"]:
            os.kill(child, wanted["number"])
            wanted = None
        time.sleep(0.001)
    return os.waitpid(child, 0)[1]


def _run_child(request: Mapping[str, Any], folder: Path, said: Path, log: Path) -> None:
    code = 0
    try:
        with said.open("w") as file:
            os.dup2(file.fileno(), 2)
            os.dup2(file.fileno(), 1)
        if "kill_at" in request:
            count_events(request["kill_at"], log)
        if "size_limit" in request:
            damage_writing(request["size_limit"])
        arguments = {key: value for key, value in request.items() if key not in ("job", "folder")}
        JOBS[request["job"]](folder, **arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 99
    finally:
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def training_server() -> Iterator[TrainingServer]:
    server = TrainingServer()
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":
    _serve()
