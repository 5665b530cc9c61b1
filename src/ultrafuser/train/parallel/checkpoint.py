"""Checkpoints that several processes write side by side, and that any number of processes goes on from.

torch's distributed checkpoint (DCP) does the work: each process writes the parts it holds to safetensors files, whose
headers say where in the whole tensor a part belongs, and reads whatever makes up its own parts, however many processes
wrote them. DCP's own format would keep that in a pickle. What one process writes alone is read the same way, since a
file without such a header holds whole tensors. Around it is what `train/checkpoint.py` does for one process: a
temporary name, hashes, one rename.

All processes must see one folder, as on a shared file system.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from ultrafuser.errors import CheckpointError
from ultrafuser.train.checkpoint import Checkpoint, hash_files, new_checkpoint, partial_path, refusal, seal, sweep
from ultrafuser.train.parallel.world import World


def write_shards(folder: Path, checkpoint: Checkpoint, *, keep: int, world: World) -> None:
    """Write what this process holds into one checkpoint of all, and delete all but the newest `keep`.

    Raises:
        CheckpointError: A disk refuses, in any process; all raise, and nothing half-written is left.
    """
    partial = partial_path(folder, checkpoint.step)
    try:
        with world.together():
            if world.is_main:
                with new_checkpoint(folder, checkpoint.step):
                    pass
        tensors = {**checkpoint.parameters, **checkpoint.optimizer}
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=writer, process_group=world.control)
        with world.together():
            hashes = hash_files(partial, f"shard-{world.rank + 1:05d}-*")
        hashes = {name: value for part in world.gather(hashes) for name, value in part.items()}
        with world.together():
            if world.is_main:
                sweep(folder, seal(partial, checkpoint, hashes=hashes), keep=keep)
    except (CheckpointException, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise refusal(folder, checkpoint.step, _cause(error)) from error


def load_shards(path: Path, parameters: Mapping[str, Tensor], slots: dict[str, Tensor], world: World) -> None:
    """Fill this process's parts of parameters and optimizer state from a checkpoint, whoever wrote it.

    Args:
        path: The checkpoint; it has passed its hashes.
        parameters: What this process holds, by name; filled in place.
        slots: Room for the optimizer's state; what the checkpoint has nothing for is taken out.
        world: All processes read at once.

    Raises:
        CheckpointError: It lacks a parameter, or a disk refuses.
    """
    reader = HuggingFaceStorageReader(str(path))
    there = set(reader.read_metadata().state_dict_metadata)
    if missing := sorted(set(parameters) - there):
        raise CheckpointError(f"{path} has no {missing[0]} ({len(missing)} parameters are missing)")
    for name in set(slots) - there:
        del slots[name]
    try:
        state_dict_loader.load({**parameters, **slots}, storage_reader=reader, process_group=world.control)
    except CheckpointException as error:
        raise CheckpointError(f"cannot read {path}: {_cause(error)}") from error


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the first of the processes for which something did."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error
