"""The pipeline: domains side by side, one worker that asks for all of them, one thread that talks to the database."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

from ultrafuser.errors import ConfigError, SynthesisError
from ultrafuser.synthesis.asking.worker import Worker
from ultrafuser.synthesis.asking.writer import Recorded
from ultrafuser.synthesis.basis import check_basis, facts_of
from ultrafuser.synthesis.course import POLL_S, Course, DomainPlan
from ultrafuser.synthesis.domain import load_domain
from ultrafuser.synthesis.gates.build import build_gates
from ultrafuser.synthesis.node import Answer, Node
from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.base import ItemDraft, Stage
from ultrafuser.synthesis.stages.build import build_stages
from ultrafuser.synthesis.storage.counts import StageCount
from ultrafuser.synthesis.storage.nodes import LEASE_S
from ultrafuser.synthesis.storage.rounds import STAGE_ORDER
from ultrafuser.synthesis.storage.store import Store
from ultrafuser.synthesis.summary import Summary

T = TypeVar("T")


class Watch(Protocol):
    """Looks on: a live table, say. All calls are made in the event loop and must not block."""

    def start(self, counts: Sequence[StageCount]) -> None:
        """How far every stage is; called again whenever a round was planned or judged."""
        ...

    def recorded(self, recorded: Recorded) -> None:
        """What one transaction wrote."""
        ...


def run_synthesis(
    recipe: SynthesisRecipe,
    *,
    from_stage: str | None = None,
    retry_failed: bool = False,
    only: Sequence[str] = (),
    watch: Watch | None = None,
) -> Summary:
    """Make a data set, or go on with it, until it is complete, a person is wanted, or a signal stops it.

    SIGINT and SIGTERM end it well: nothing more is asked, what is under way is written. A second one gives that up.

    Args:
        recipe: Of the synthesis.
        from_stage: Items of this stage and all later ones are derived anew; only what was never asked is asked.
        retry_failed: Requests that were given up are made again.
        only: Domains to go on with; none: all.
        watch: Told how it goes.

    Raises:
        ConfigError: A domain, a prompt, a setting or a stage's name is wrong, or the recipe has changed in what planned
            stages depend on.
        SynthesisError: A limit is reached, an endpoint or the database fails, or another process is at work; what was
            answered is kept, and the same command goes on.
    """
    plans = plan_domains(recipe, only)
    with Store.open(recipe) as store:
        prepare(store, plans, from_stage=from_stage, retry_failed=retry_failed)
        return asyncio.run(_run(Pipeline(recipe, store, plans, watch)))


def plan_domains(recipe: SynthesisRecipe, only: Sequence[str] = ()) -> list[DomainPlan]:
    """The domains of a recipe with their stages and gates; nothing is asked and nothing is written.

    Raises:
        ConfigError: A domain, a prompt or a setting is wrong, or `only` names no domain of the recipe.
    """
    if unknown := [name for name in only if name not in recipe.domains]:
        raise ConfigError(f"--only {unknown[0]}: the recipe has no such domain; known: {', '.join(recipe.domains)}")
    plans = []
    for name, config in recipe.domains.items():
        if only and name not in only:
            continue
        domain = load_domain(name, config)
        stages = build_stages(domain, recipe)
        gates = {stage.name: build_gates(stage.name, domain, recipe) for stage in stages}
        plans.append(DomainPlan(name, stages, gates, facts_of(domain, recipe, [stage.name for stage in stages])))
    return plans


def prepare(
    store: Store, plans: Sequence[DomainPlan], *, from_stage: str | None = None, retry_failed: bool = False
) -> None:
    """Forget and retry what is to be, then see that what is planned was planned with this recipe.

    Raises:
        ConfigError: There is no such stage, or the recipe has changed in what planned stages depend on.
        SynthesisError: Something is to be forgotten or retried while another worker plans.
    """
    if (from_stage is not None or retry_failed) and not store.try_to_lead():
        raise SynthesisError(
            "another worker plans on this database: stop all workers, do this with one of them, and start the others"
        )
    if from_stage is not None:
        if (stage := next((name for name in STAGE_ORDER if name == from_stage), None)) is None:
            raise ConfigError(f"--from {from_stage}: there is no such stage; known: {', '.join(STAGE_ORDER)}")
        for plan in plans:
            store.rounds.forget(plan.name, stage)
    for plan in plans:
        check_basis(store.database, plan.name, plan.facts)
        if retry_failed:
            store.rounds.retry_failed(plan.name)
    store.restrict([plan.name for plan in plans])


class DatabaseThread:
    """The one thread that talks to the database (`worker.Run`)."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="database")

    async def __call__(self, function: Callable[[], T]) -> T:
        """What the function gives, or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close(self) -> None:
        """Wait for what is going on."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class Pipeline:
    """One run over a store (`course.Host`).

    Args:
        store: Open, for as long as the run takes.
        plans: What to do.
        watch: Told of everything.
        grace_s: How long requests under way may take after a first `stop`.
    """

    def __init__(
        self,
        recipe: SynthesisRecipe,
        store: Store,
        plans: Sequence[DomainPlan],
        watch: Watch | None = None,
        *,
        grace_s: float = 30.0,
    ) -> None:
        self._store = store
        self._watch = watch
        self._grace_s = grace_s
        self._database = DatabaseThread()
        self._stages: dict[tuple[str, str], Stage] = {
            (plan.name, stage.name): stage for plan in plans for stage in plan.stages
        }
        self._worker = Worker(recipe, store, self._database, self._read, self._on_recorded)
        self._courses = {plan.name: Course(plan, store, self, recipe.review_after) for plan in plans}
        self._changes = asyncio.Event()
        self._lead_task: asyncio.Task[None] | None = None
        self._to_review: list[tuple[str, StageName]] = []
        self._num_answers = 0
        self._was_stopped = False

    async def run(self) -> Summary:
        """Go on until every domain is complete or waits for a person, or until `stop`; call it once.

        Raises:
            SynthesisError: A limit is reached, an endpoint or the database fails; what was answered is kept.
        """
        start = time.monotonic()
        try:
            await self.show()
            await self._work()
            counts = await self.call(self._store.progress)
            spent = await self.call(self._store.spent)
        finally:
            self._database.close()
        seconds = time.monotonic() - start
        return Summary(counts, spent, self._num_answers, seconds, tuple(self._to_review), self._was_stopped)

    def stop(self) -> None:
        """Ask nothing more; what is under way may end, for a while. The second call gives that up, too."""
        if not self._was_stopped:
            asyncio.get_running_loop().call_later(self._grace_s, self._worker.stop)
        self._was_stopped = True
        self._worker.stop()
        if self._lead_task is not None:
            self._lead_task.cancel()

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the database's thread."""
        return await self._database(function)

    def wake(self) -> None:
        """Nodes were planned."""
        self._worker.wake()

    def changes(self) -> asyncio.Event:
        """Set when something is written after this call."""
        return self._changes

    async def show(self) -> None:
        """Tell who looks on how far every stage is."""
        if self._watch is not None:
            self._watch.start(await self.call(self._store.progress))

    async def _work(self) -> None:
        """The worker and those who plan, side by side; whichever fails first ends the others."""
        work = asyncio.create_task(self._worker.work())
        renew = asyncio.create_task(self._renew())
        self._lead_task = lead = asyncio.create_task(self._lead())
        try:
            await asyncio.wait((work, renew, lead), return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed = _first_error(work, renew, lead)
            if failed is None and lead.done() and not lead.cancelled():
                self._worker.close()
            else:
                lead.cancel()
                if not self._was_stopped:
                    self._worker.stop()
            await asyncio.gather(work, lead, return_exceptions=True)
            renew.cancel()
            await asyncio.gather(renew, return_exceptions=True)
        if (error := failed or _first_error(work, lead, renew)) is not None:
            raise error

    async def _lead(self) -> None:
        """Plan and judge, as soon as no other process does."""
        while not await self.call(self._store.try_to_lead):
            await asyncio.sleep(POLL_S)
            self.wake()
        async with asyncio.TaskGroup() as group:
            for name, course in self._courses.items():
                group.create_task(self._follow(name, course))

    async def _follow(self, name: str, course: Course) -> None:
        if (stage := await course.run()) is not None:
            self._to_review.append((name, stage))

    async def _renew(self) -> None:
        """Keep this process's claims, and let go those of processes that are gone."""
        while True:
            await asyncio.sleep(LEASE_S / 4)
            await self.call(self._store.renew)
            self._tell()
            self.wake()

    def _read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        return self._stages[node.domain, node.stage].read(node, answer)

    def _on_recorded(self, recorded: Recorded) -> None:
        self._num_answers += len(recorded.finished)
        self._tell()
        if self._watch is not None:
            self._watch.recorded(recorded)

    def _tell(self) -> None:
        changes, self._changes = self._changes, asyncio.Event()
        changes.set()


async def _run(pipeline: Pipeline) -> Summary:
    with _stopped_by_signals(pipeline.stop):
        return await pipeline.run()


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call a function in the event loop; not where signals are somebody else's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _first_error(*tasks: asyncio.Task[None]) -> BaseException | None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            return error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
    return None
