"""What is sent, what came back, and the results file."""

from collections.abc import Sequence

import msgspec

from weft.slo.attainment import Outcome


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One request, ready to be sent `arrival_ns` after the replay began."""

    index: int
    arrival_ns: int
    model: str
    prompt: tuple[int, ...] | str
    prompt_tokens: int
    output_tokens: int


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that came with one event."""

    at_ns: int
    tokens: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request's history. Times are ns since the replay began."""

    index: int
    model: str
    arrival_ns: int
    sent_ns: int
    end_ns: int
    prompt_tokens: int
    """As asked for; the server's own count where it sent one."""
    asked_tokens: int
    pieces: tuple[Piece, ...] = ()
    finish: str | None = None
    error: str | None = None
    """Why it failed; None: it did not."""

    @property
    def output_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    def token_ns(self) -> tuple[int, ...]:
        """The time of every token; those of one event share it."""
        return tuple(piece.at_ns for piece in self.pieces for _ in range(piece.tokens))

    def outcome(self) -> Outcome:
        return Outcome(
            arrival_ns=self.arrival_ns,
            token_ns=self.token_ns(),
            failed=self.error is not None,
            expected_tokens=self.asked_tokens,
        )


class Counter(msgspec.Struct, frozen=True, kw_only=True):
    """Switches of one model since its unit began."""

    switches_in: int = 0
    switches_out: int = 0


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the endpoint says of a model; None where it says nothing."""

    name: str
    max_context_tokens: int | None = None
    vocab_size: int | None = None
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table. Times in seconds; None where nothing was measured."""

    model: str
    requests: int
    failures: int
    prompt_tokens: int
    output_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tbt_p50_s: float | None
    tbt_p99_s: float | None
    tokens_per_s: float
    switches_in: int | None
    switches_out: int | None
    ttft_slo_s: float | None
    tbt_slo_s: float | None
    slo_request: float
    """Share of requests whose TTFT and p99 TBT were met."""
    slo_strict: float
    """Share of tokens by their deadline, averaged over requests."""
    slo_strict_token_weighted: float
    slo_qos: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The results file, as JSON."""

    format: str = "weft-replay-1"
    url: str
    workload: str
    """In words: the trace, how much of it, how it was scaled and spread."""
    seed: int
    seconds: float
    """From the beginning to the last event."""
    worst_send_lag_s: float
    """How late the client itself was at worst."""
    interrupted: bool
    total: Summary
    models: tuple[Summary, ...]
    requests: tuple[Record, ...]


def spread_evenly(times_ns: Sequence[int], total: int) -> tuple[Piece, ...]:
    """`total` tokens over events of unknown size, as evenly as whole numbers allow."""
    num = len(times_ns)
    if not num:
        return ()
    shares = [total * (i + 1) // num - total * i // num for i in range(num)]
    return tuple(Piece(at, tokens) for at, tokens in zip(times_ns, shares, strict=True))
