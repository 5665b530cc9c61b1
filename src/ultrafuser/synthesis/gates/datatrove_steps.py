"""datatrove's parts, as `at_scale` puts them together; importing this needs datatrove.

Its own JSON Lines reader and writer want further libraries, so ours stand in for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from ultrafuser.synthesis.gates.texts import normalised

Steps = list[Any]


def minhash_steps(folder: Path, *, words: int, num_bands: int, rows: int, num_tasks: int) -> list[tuple[Steps, int]]:
    """The four steps, each with the number of its tasks; the last writes all members of clusters to `alike`."""
    # Words are the gate's already, and numbers stay: problems differ by them.
    plain = TextNormConfig(
        lowercase=False,
        norm_whitespace=False,
        remove_punctuation=False,
        norm_unicode_diacritics=False,
        norm_numbers=False,
    )
    config = MinhashConfig(
        n_grams=words,
        num_buckets=num_bands,
        hashes_per_bucket=rows,
        norm_config=plain,
        hash_config=HashConfig(hash_fc="sha1"),  # its call of xxhash fails from xxhash 4.0 on
    )
    signatures, buckets, clusters = (str(folder / name) for name in ("signatures", "buckets", "clusters"))
    read = ReadRows(folder / "texts")
    later = RowWriter(str(folder / "alike" / "later"), compression=None)
    return [
        ([read, MinhashDedupSignature(signatures, config, language=GateWords(words))], num_tasks),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], num_bands),
        ([MinhashDedupCluster(buckets, clusters, config=config, save_cluster_id=True)], 1),
        (
            [
                read,
                MinhashDedupFilter(clusters, exclusion_writer=later, load_cluster_ids=True),
                has_cluster,
                RowWriter(str(folder / "alike" / "first"), compression=None),
            ],
            num_tasks,
        ),
    ]


def locally(steps: Steps, num_tasks: int, logs: Path) -> None:
    """Run steps on this machine, as many tasks at once as it has cores."""
    LocalPipelineExecutor(
        steps, tasks=num_tasks, workers=min(num_tasks, os.cpu_count() or 1), logging_dir=str(logs)
    ).run()


@dataclass(frozen=True)
class ReadRows:
    """The texts of a task: the file of its number."""

    folder: Path

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """One document a line."""
        del data, world_size
        path = self.folder / f"{rank:05d}.jsonl"
        with path.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield Document(text=row["text"], id=row["id"], metadata={"number": row["number"]})


def has_cluster(data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    """Documents that are candidates at all."""
    del rank, world_size
    return (document for document in data if document.metadata.get("minhash_cluster_id", -1) >= 0)


class RowWriter(DiskWriter):  # type: ignore[misc]
    """Writes a line for each document."""

    default_output_filename = "${rank}.jsonl"
    name = "lines"

    def _write(self, document: dict[str, Any], file_handler: Any, _filename: str) -> None:
        file_handler.write(json.dumps(document) + "\n")


class GateWords(WordTokenizer):  # type: ignore[misc]
    """The gate's words; a text of fewer than a sequence is filled up, where datatrove would leave it out."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least = at_least

    def word_tokenize(self, text: str) -> list[str]:
        """Words, as `data.overlap` has them."""
        words = normalised(text).split()
        return words + [""] * (self.at_least - len(words))

    def sent_tokenize(self, text: str) -> list[str]:
        """All is one sentence."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """And one span."""
        return [(0, len(text))]
