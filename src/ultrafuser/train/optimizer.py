"""AdamW with a learning rate that is a pure function of the step, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ultrafuser.config.training import StageConfig


def learning_rate_factor(stage: StageConfig, step: int) -> float:
    """Part of the peak rate at a step: linear warm-up, then cosine to the minimum (Appendix B), or constant."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    low = stage.min_learning_rate_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class NamedAdamW:
    """AdamW over named parameters, the gate with a learning rate of its own.

    Args:
        parameters: What is trained, by name.
        stage: Learning rates, betas, weight decay.
    """

    def __init__(self, parameters: Mapping[str, Tensor], stage: StageConfig) -> None:
        self.parameters = dict(parameters)
        self.stage = stage
        gate_rate = stage.gate_learning_rate if stage.gate_learning_rate is not None else stage.learning_rate
        groups = [
            {"params": [p for name, p in parameters.items() if is_gate(name) is gate], "peak": peak}
            for gate, peak in ((True, gate_rate), (False, stage.learning_rate))
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=stage.learning_rate,
            betas=stage.betas,
            weight_decay=stage.weight_decay,
            fused=True,
        )

    def step(self, step: int) -> float:
        """Update the parameters; returns the learning rate used for the specialists (or the gate, alone)."""
        factor = learning_rate_factor(self.stage, step)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(self.adamw.param_groups[-1]["lr"])

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts as `<parameter>/<slot>`."""
        return {
            f"{name}/{slot}": value
            for name, parameter in self.parameters.items()
            for slot, value in self.adamw.state.get(parameter, {}).items()
        }

    def slots(self) -> dict[str, Tensor]:
        """Room for a state as `state` gives it after a step, laid out as the parameters are, all zero."""
        room: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            room |= {f"{name}/{slot}": torch.zeros_like(parameter) for slot in ("exp_avg", "exp_avg_sq")}
            room[f"{name}/step"] = torch.zeros((), device=parameter.device if parameter.is_cuda else "cpu")
        return room

    def load(self, state: Mapping[str, Tensor], *, copy: bool = True) -> None:
        """Take over a state given by `state`; without `copy` the tensors themselves, which are then the optimizer's."""
        for key, value in state.items():
            name, slot = key.rsplit("/", 1)
            parameter = self.parameters[name]
            device = "cpu" if slot == "step" and not parameter.is_cuda else parameter.device
            # A copy: what safetensors reads is backed by the file, which is deleted when newer checkpoints come.
            self.adamw.state[parameter][slot] = value.to(device, copy=copy)


def is_gate(name: str) -> bool:
    """Whether a parameter of a fused model belongs to the gate."""
    return name.startswith("fusion_gate.")
