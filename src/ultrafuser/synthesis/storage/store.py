"""The store: what was asked, what came of it, and the items read from it, in SQLite or PostgreSQL.

All calls block and are made by one thread at a time.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import func, select

from ultrafuser.errors import SynthesisError
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.counts import StageCount, count_stages
from ultrafuser.synthesis.storage.database import Database
from ultrafuser.synthesis.storage.lock import RunLock
from ultrafuser.synthesis.storage.nodes import Nodes
from ultrafuser.synthesis.storage.rounds import Rounds
from ultrafuser.synthesis.storage.schema import SCHEMA_VERSION, meta, metadata
from ultrafuser.synthesis.storage.verdicts import Verdicts
from ultrafuser.synthesis.storage.view import StoreView

_PLANNER = 0x55465332  # any number; who holds this advisory lock in PostgreSQL plans and judges


class Store(Nodes):
    """Opened by `Store.open`; a context manager. Its own methods are those of the queue.

    Attributes:
        rounds: What is planned, open and judged.
        verdicts: What persons said of items.
    """

    def __init__(self, database: Database, lock: RunLock | None = None) -> None:
        super().__init__(database)
        self.rounds = Rounds(database)
        self.verdicts = Verdicts(database)
        self._lock = lock

    @classmethod
    def open(cls, recipe: SynthesisRecipe, *, read_only: bool = False) -> Self:
        """The store of a recipe, made if it is not there. What a killed process was asking waits again.

        Args:
            recipe: Names the run folder and the database.
            read_only: Look at it while another process works on it; nothing may be written.

        Raises:
            ConfigError: The recipe's database is no URL of SQLite or PostgreSQL, or a driver is missing.
            SynthesisError: Another process works on it, it is not there (`read_only`), it was made by another version,
                or it does not answer.
        """
        url = recipe.database or f"sqlite:///{recipe.run_folder / 'nodes.sqlite'}"
        path = Database.path_of(url)
        if read_only and path is not None and not path.exists():
            raise SynthesisError(f"there is no {path}: nothing was made yet; `ultrafuser synthesize` does that")
        lock = None if read_only or path is None else RunLock(Path(f"{path}.lock"))
        if lock is not None:
            lock.acquire()
        try:
            store = cls(Database(url, read_only=read_only), lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        try:
            store._prepare(read_only=read_only)
        except BaseException:
            store.close()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and let the next process in."""
        self.database.close()
        if self._lock is not None:
            self._lock.release()

    def view(self, domain: str) -> StoreView:
        """The items of a domain."""
        return StoreView(self.database, domain)

    def progress(self) -> list[StageCount]:
        """Every stage in numbers."""
        return count_stages(self.database)

    def try_to_lead(self) -> bool:
        """Whether this process is the one that plans and judges; it stays so until it closes the store, or ends."""
        if self.database.is_sqlite:
            return True
        return bool(self.database.rows(select(func.pg_try_advisory_lock(_PLANNER)))[0][0])

    def _prepare(self, *, read_only: bool) -> None:
        if not read_only:
            with self.database.transaction() as connection:
                if not self.database.is_sqlite:  # two that start at once would both make the tables
                    self.database.rows(select(func.pg_advisory_xact_lock(_PLANNER + 1)))
                metadata.create_all(connection)
                values = {"name": "version", "value": SCHEMA_VERSION}
                self.database.write(self.database.insert(meta).on_conflict_do_nothing(), values)
        version = self.database.rows(select(meta.c.value).where(meta.c.name == "version"))[0][0]
        if version != SCHEMA_VERSION:
            raise SynthesisError(
                f"the database {self.database.name} was made by another version (its tables are {version}, these are "
                f"{SCHEMA_VERSION}): take another run folder, or go on with that version"
            )
        if self.database.is_sqlite and not read_only:
            self.release_all()
