"""All addresses of all endpoints: which of them takes the next request, which rests, which is given up.

Like the limiter it is told the time and never waits itself, so it can be tested without sleeping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol, Self

from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.asking.endpoints.limiter import Bucket, Concurrency, Place
from ultrafuser.synthesis.asking.endpoints.refusal import Refusal
from ultrafuser.synthesis.node import Answer, Request
from ultrafuser.synthesis.recipe import EndpointConfig

REFUSED_IN_A_ROW = 10  # requests refused for themselves, without any answer between: it is not the requests
REFUSED_AT_FIRST = 3  # the same before the first answer
FAILED_IN_A_ROW = 3  # without any answer between: an address rests; an endpoint that did answer before is given up
IDLE_S = 120.0  # an endpoint without a request for so long, and not at rest, was not needed


class Asker(Protocol):
    """What asks one address: a `Client`."""

    async def ask(self, request: Request) -> Answer | Refusal:
        """The answer, or why there is none."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...


@dataclass
class Address:
    """One address and how much it takes."""

    client: Asker
    concurrency: Concurrency
    num_failed: int = 0  # in a row


@dataclass
class Endpoint:
    """All addresses of one model.

    Attributes:
        quiet_since: Since when it is asked and answers nothing; None: it does, or is not asked.
        num_refused: Requests refused for themselves, in a row.
        num_fatal: Requests refused for a reason that concerns all, in a row.
        fatal: Why it is not asked any more.
    """

    name: str
    config: EndpointConfig
    addresses: list[Address]
    requests: Bucket
    tokens: Bucket
    has_answered: bool = False
    answered_at: float = float("-inf")
    ended_at: float = float("-inf")
    quiet_since: float | None = None
    num_refused: int = 0
    num_fatal: int = 0
    last_error: str = ""
    fatal: str | None = None

    @property
    def ceiling(self) -> int:
        """The most requests at once."""
        return sum(address.concurrency.ceiling for address in self.addresses)

    @property
    def num_under_way(self) -> int:
        """Requests that were sent and have not ended."""
        return sum(address.concurrency.num_under_way for address in self.addresses)

    @property
    def limit(self) -> int:
        """Requests that may be under way now."""
        return sum(address.concurrency.limit for address in self.addresses)


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to send one request to one address."""

    endpoint: Endpoint
    address: Address
    place: Place
    tokens: int


@dataclass
class Pool:
    """All endpoints of a recipe.

    Attributes:
        give_up_after_s: Without any answer of an endpoint that is asked.
    """

    endpoints: dict[str, Endpoint]
    give_up_after_s: float
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @classmethod
    def open(
        cls,
        configs: Mapping[str, EndpointConfig],
        give_up_after_s: float,
        client: Callable[[str, EndpointConfig, str], Asker] = Client,
    ) -> Self:
        """A pool of these endpoints.

        Args:
            client: Makes what asks one address; tests give another.

        Raises:
            ConfigError: An address or a key cannot be.
        """
        endpoints = {}
        for name, config in configs.items():
            addresses = [
                Address(client(name, config, url), Concurrency(config.concurrency))
                for url in dict.fromkeys(config.urls)
            ]
            requests, tokens = Bucket(config.requests_per_minute), Bucket(config.tokens_per_minute)
            endpoints[name] = Endpoint(name, config, addresses, requests, tokens)
        return cls(endpoints, give_up_after_s)

    async def __aenter__(self) -> Self:
        for endpoint in self.endpoints.values():
            for address in endpoint.addresses:
                await self._stack.enter_async_context(address.client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def begin(self, name: str, tokens: int, now: float) -> Ticket | float:
        """The right to send a request, at the least loaded address that is free; else how long to wait for one.

        Args:
            tokens: About how many it will take, read and written.

        Returns:
            A number of seconds where there is no free address: infinite until a request ends.
        """
        endpoint = self.endpoints[name]
        self._give_up(endpoint, now)
        if endpoint.fatal is not None:
            return float("inf")
        waits = [
            (a.concurrency.wait_s(now), a.concurrency.num_under_way / a.concurrency.limit) for a in endpoint.addresses
        ]
        best = min(range(len(waits)), key=waits.__getitem__)
        wait_s = max(waits[best][0], endpoint.requests.wait_s(1.0, now), endpoint.tokens.wait_s(float(tokens), now))
        if wait_s > 0:
            # A long rest must not hide that it is time to give up.
            left_s = float("inf") if endpoint.quiet_since is None else endpoint.quiet_since + self.give_up_after_s - now
            return min(wait_s, max(left_s, 0.001))
        endpoint.requests.take(1.0, now)
        endpoint.tokens.take(float(tokens), now)
        address = endpoint.addresses[best]
        return Ticket(endpoint, address, address.concurrency.begin(now), tokens)

    def end(self, ticket: Ticket, result: Answer | Refusal, now: float) -> None:
        """What became of it."""
        endpoint = ticket.endpoint
        endpoint.ended_at = now
        if isinstance(result, Answer):
            endpoint.tokens.take(float(result.prompt_tokens + result.completion_tokens - ticket.tokens), now)
            self._answered(ticket, now)
            return
        if not result.may_cost:
            endpoint.tokens.take(-float(ticket.tokens), now)
        if endpoint.quiet_since is None:
            endpoint.quiet_since = max(ticket.place.began, endpoint.answered_at)
        endpoint.last_error = result.message
        self._refused(ticket, result, now)

    def abandon(self, ticket: Ticket) -> None:
        """It was given up without a result."""
        ticket.address.concurrency.ended(ticket.place)

    def _answered(self, ticket: Ticket, now: float) -> None:
        endpoint, address = ticket.endpoint, ticket.address
        endpoint.has_answered, endpoint.answered_at, endpoint.quiet_since = True, now, None
        endpoint.num_refused = endpoint.num_fatal = address.num_failed = 0
        address.concurrency.answered(ticket.place)

    def _refused(self, ticket: Ticket, refusal: Refusal, now: float) -> None:
        endpoint, address = ticket.endpoint, ticket.address
        place, concurrency = ticket.place, address.concurrency
        if refusal.kind == "request":
            # It understood the request, so it is there and has no load to complain of.
            concurrency.ended(place)
            endpoint.num_refused += not refusal.is_sure
            if endpoint.num_refused >= (REFUSED_IN_A_ROW if endpoint.has_answered else REFUSED_AT_FIRST):
                endpoint.fatal = (
                    f"{refusal.message} - so it said {endpoint.num_refused} times in a row: mend the recipe"
                )
        elif refusal.kind == "fatal":
            # What has answered before may have a bad moment: a few such refusals in a row are none.
            endpoint.num_fatal += 1
            concurrency.refused(place, now, refusal.retry_after_s, for_load=False)
            if not endpoint.has_answered or endpoint.num_fatal >= FAILED_IN_A_ROW:
                endpoint.fatal = refusal.message
        elif refusal.kind == "passing":
            address.num_failed += 1
            if address.num_failed >= FAILED_IN_A_ROW or refusal.retry_after_s is not None:
                concurrency.refused(place, now, refusal.retry_after_s, for_load=False)
            else:
                concurrency.ended(place)
        else:
            concurrency.refused(place, now, refusal.retry_after_s, for_load=refusal.kind != "unreachable")
        self._give_up(endpoint, now)

    def _give_up(self, endpoint: Endpoint, now: float) -> None:
        if endpoint.quiet_since is None:
            return
        rested_until = max(address.concurrency.rests_until for address in endpoint.addresses)
        if endpoint.num_under_way == 0 and now - max(endpoint.ended_at, rested_until) > IDLE_S:
            endpoint.quiet_since = None
        elif (quiet_s := now - endpoint.quiet_since) >= self.give_up_after_s and endpoint.fatal is None:
            endpoint.fatal = (
                f"endpoint {endpoint.name} has answered nothing for {quiet_s:.0f} s (limits.give_up_after_s); it last "
                f"said: {endpoint.last_error}"
            )

    def ends_run(self) -> str | None:
        """Why the run cannot go on, in one line; None: it can."""
        for endpoint in self.endpoints.values():
            if endpoint.fatal is not None:
                return f"{endpoint.fatal}. What is answered is kept; mend this and run the same command"
        return None
