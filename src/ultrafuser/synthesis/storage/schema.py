"""The tables of a synthesis, the same in SQLite and PostgreSQL.

`node` is a memory of requests and raw answers and only grows; `item`, `band` and `round` are derived from it and can be
forgotten from a stage on. `verdict` is what persons said of items, `spent` what answers took, `meta` everything single.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text, text

SCHEMA_VERSION = "1"

metadata = MetaData()

node = Table(
    "node",
    metadata,
    Column("key", String(32), primary_key=True),
    Column("domain", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("round", Integer, nullable=False),
    Column("parent", String(32)),
    Column("slot", Integer, nullable=False),
    Column("detail", Text, nullable=False),  # JSON
    Column("request", Text, nullable=False),  # JSON
    Column("endpoint", Text, nullable=False),
    # A node that was forgotten is not planned: its answer is kept, but holds no items and is not asked for.
    Column("planned", Boolean, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("not_before", Float, nullable=False, default=0.0),
    Column("error", Text),
    Column("answer", Text),
    Column("finish_reason", Text),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("cost", Float),
    Column("model", Text),
    Column("is_estimated", Boolean),
    Column("seconds", Float),
    Column("owner", Text),  # who is asking
    Column("lease_until", Float),  # by the server's clock; after that, another may ask
    Column("created", Float, nullable=False),
    Column("finished", Float),
)
Index("node_to_ask", node.c.state, node.c.planned, node.c.endpoint, node.c.key)
Index("node_of_round", node.c.domain, node.c.stage, node.c.round, node.c.planned, node.c.state)

item = Table(
    "item",
    metadata,
    Column("key", String(32), primary_key=True),
    Column("node", String(32), nullable=False),
    Column("parent", String(32)),
    Column("domain", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("round", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("detail", Text, nullable=False),  # JSON
    Column("state", Text, nullable=False),
    Column("gate", Text),
    Column("reason", Text),
    Column("replaced_by", String(32)),
)
Index("item_in_order", item.c.domain, item.c.stage, item.c.state, item.c.round, item.c.key)
Index("item_of_parent", item.c.parent, item.c.stage, item.c.state)
Index("item_replaced", item.c.replaced_by, sqlite_where=text("replaced_by IS NOT NULL"),
      postgresql_where=text("replaced_by IS NOT NULL"))  # fmt: skip

# A round is planned when all its nodes are in the table, judged when its gates have seen every item.
round_ = Table(
    "round",
    metadata,
    Column("domain", Text, primary_key=True),
    Column("stage", Text, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("num_nodes", Integer, nullable=False),
    Column("is_judged", Boolean, nullable=False),
)

# Of the recipe and the prompts, what a stage was planned with.
basis = Table(
    "basis",
    metadata,
    Column("domain", Text, primary_key=True),
    Column("stage", Text, primary_key=True),
    Column("facts", Text, nullable=False),  # JSON: name to value
)

verdict = Table(
    "verdict",
    metadata,
    Column("item", String(32), primary_key=True),
    Column("is_accepted", Boolean, nullable=False),
    Column("note", Text, nullable=False),
    Column("given", Float, nullable=False),
)

# A person has looked at this stage's sample.
review = Table(
    "review",
    metadata,
    Column("domain", Text, primary_key=True),
    Column("stage", Text, primary_key=True),
    Column("given", Float, nullable=False),
)

# `scope` and `band` are hashes of 64 bits; the item is kept.
band = Table(
    "band",
    metadata,
    Column("scope", BigInteger, primary_key=True, autoincrement=False),
    Column("band", BigInteger, primary_key=True, autoincrement=False),
    Column("item", String(32), primary_key=True),
    sqlite_with_rowid=False,
)

# One row for each process and stage, so that several processes never wait for each other here.
spent = Table(
    "spent",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("domain", Text, primary_key=True),
    Column("stage", Text, primary_key=True),
    Column("num_answers", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cost", Float, nullable=False),
)

meta = Table("meta", metadata, Column("name", Text, primary_key=True), Column("value", Text, nullable=False))
