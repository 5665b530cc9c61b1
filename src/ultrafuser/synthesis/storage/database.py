"""One connection to SQLite or PostgreSQL: durable transactions, and one clear line for what the machine refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Executable, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, IntegrityError, ProgrammingError
from sqlalchemy.pool import NullPool

from ultrafuser.errors import ConfigError, SynthesisError

_CACHE_KIB = 16_384  # of pages; a constant, so memory does not grow with the database
_LOG_PAGES = 8000  # of the write-ahead log, before it is folded in: indexes of hashes are written all over the file
_BUSY_S = 30.0


class Database:
    """Reads and transactions on one connection, by one thread at a time.

    Args:
        url: An SQLAlchemy URL of SQLite or PostgreSQL.
        read_only: Nothing is ever written; the database must be there.

    Raises:
        ConfigError: The URL is none of these, or its driver is not installed.
        SynthesisError: There is no such database, or it does not answer.
    """

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        parsed = _parse(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.name = parsed.database or "" if self.is_sqlite else parsed.render_as_string(hide_password=True)
        self._in_transaction = False
        # SQLite: the lock to write is taken at once, not in the middle, where one that is refused cannot wait.
        self._begin = "BEGIN IMMEDIATE" if self.is_sqlite and not read_only else "BEGIN"
        if self.is_sqlite and read_only:  # else opening would make an empty file where there is none
            query = {"mode": "ro", "uri": "true"}
            parsed = parsed.set(database=f"file:{quote(str(Path(self.name).absolute()))}", query=query)
        arguments = {"timeout": _BUSY_S, "check_same_thread": False} if self.is_sqlite else {"connect_timeout": 10}
        self._engine = create_engine(parsed, poolclass=NullPool, connect_args=arguments)
        if self.is_sqlite and not read_only:
            event.listen(self._engine, "connect", _set_pragmas)
        with self._clear_errors():
            connection = self._engine.connect()
        # Transactions are begun by hand, so that single reads between them are no transactions that stay open.
        self._connection = connection.execution_options(isolation_level="AUTOCOMMIT")

    @staticmethod
    def path_of(url: str) -> Path | None:
        """The file of an SQLite database; None: it is on a server. Raises ConfigError."""
        parsed = _parse(url)
        return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """All or nothing, and on the disk at the end.

        Raises:
            SynthesisError: The disk is full, the server is gone and the like; nothing of it was written.
        """
        assert not self._in_transaction, "transactions are not nested"
        with self._clear_errors():
            self._connection.exec_driver_sql(self._begin)
            self._in_transaction = True
            try:
                yield self._connection
                self._connection.exec_driver_sql("COMMIT")
            except BaseException:
                self._roll_back()
                raise
            finally:
                self._in_transaction = False

    def rows(self, statement: Executable, values: Any = None) -> Sequence[Any]:
        """All rows of a statement that reads; inside a transaction or outside."""
        with self._clear_errors():
            return self._connection.execute(statement, values).all()

    def write(self, statement: Executable, values: Any = None) -> int:
        """Run a statement that writes, inside a transaction; how many rows it touched."""
        assert self._in_transaction, "writing wants a transaction"
        return int(self._connection.execute(statement, values).rowcount)

    def insert(self, table: Any) -> Any:
        """An insert statement that can say `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def close(self) -> None:
        """End the connection; what was committed stays."""
        self._connection.close()
        self._engine.dispose()

    def _roll_back(self) -> None:
        try:
            self._connection.exec_driver_sql("ROLLBACK")
        except DatabaseError:  # SQLite has rolled back by itself, or the server is gone: the first error tells
            return

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            is_ours = isinstance(error, (IntegrityError, ProgrammingError, DataError))
            if is_ours and "permission denied" not in str(error.orig):
                raise
            raise SynthesisError(self._explain(error)) from error

    def _explain(self, error: DatabaseError) -> str:
        cause = " ".join(str(error.orig).split())
        if "disk is full" in cause or "No space left" in cause:
            remedy = "free space and give the same command again"
        elif "locked" in cause:
            remedy = "another program holds it; end that and give the same command again"
        elif "unable to open" in cause:
            remedy = "there is no such file, or its folder cannot be used"
        elif "not a database" in cause or "malformed" in cause:
            remedy = "the file is damaged; take its copy or another folder"
        else:
            remedy = "mend that and give the same command again"
        return f"the database {self.name}: {cause}: {remedy}; all that was answered and written is kept"


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        # Not shown: it may hold a password.
        raise ConfigError("database: no SQLAlchemy URL; write postgresql+psycopg://user@host/name") from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise ConfigError("database: psycopg is missing: pip install 'ultrafuser[postgresql]'") from None
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigError(f"database: {backend!r} is not supported; take sqlite or postgresql+psycopg")
    if parsed.database in (None, "", ":memory:"):
        raise ConfigError("database: SQLite wants a file, as in sqlite:///runs/mine/nodes.sqlite")
    return parsed


def _set_pragmas(connection: Any, _record: Any) -> None:
    pragmas = ("journal_mode=WAL", "synchronous=FULL", f"cache_size=-{_CACHE_KIB}", f"wal_autocheckpoint={_LOG_PAGES}")
    for pragma in (*pragmas, "temp_store=FILE"):
        connection.execute(f"PRAGMA {pragma}")
