"""The gates of a stage, in their order: cheap ones first, and those that compare with other items last."""

from __future__ import annotations

from collections.abc import Iterator

from ultrafuser.synthesis.domain import Domain
from ultrafuser.synthesis.gates.agreement import AgreementGate
from ultrafuser.synthesis.gates.base import Gate
from ultrafuser.synthesis.gates.code import CodeGate
from ultrafuser.synthesis.gates.duplicates import DuplicatesGate, NearDuplicatesGate
from ultrafuser.synthesis.gates.evolution import EvolutionGate
from ultrafuser.synthesis.gates.form import LengthGate, RefusalsGate, TruncatedGate
from ultrafuser.synthesis.gates.language import LanguageGate
from ultrafuser.synthesis.gates.overlap import OverlapGate, benchmark_index
from ultrafuser.synthesis.gates.settings import StageGates
from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe


def build_gates(stage: StageName, domain: Domain, recipe: SynthesisRecipe) -> list[Gate]:
    """The gates that a domain's settings put behind a stage.

    Raises:
        ConfigError: A library is not installed, or does not know the domain's language.
        DataError: A test set is missing from the recipe's folder, or damaged.
    """
    return list(_gates(domain.settings.gates.get(stage, StageGates()), domain.settings.language, recipe))


def _gates(gates: StageGates, language: str, recipe: SynthesisRecipe) -> Iterator[Gate]:
    if gates.length is not None:
        yield LengthGate(gates.length)
    if gates.truncated is not None:
        yield TruncatedGate(gates.truncated)
    if gates.refusals is not None:
        yield RefusalsGate(gates.refusals)
    if gates.language is not None:
        yield LanguageGate(language, gates.language)
    if gates.code is not None:
        yield CodeGate()
    if gates.evolution is not None:
        yield EvolutionGate(gates.evolution)
    if gates.duplicates is not None:
        yield DuplicatesGate(gates.duplicates)
    if gates.near_duplicates is not None:
        yield NearDuplicatesGate(gates.near_duplicates)
    if gates.overlap is not None and recipe.benchmarks is not None:
        names = gates.overlap.benchmarks
        yield OverlapGate(benchmark_index(recipe.benchmarks, names, answers=gates.overlap.answers))
    if gates.agreement is not None:
        yield AgreementGate()
