"""Steps: which rows go into the next forward pass, and what its end means.

Decode rows come first, prefill chunks fill the rest of the token budget (one contract for both:
start, num_tokens). Up to `depth` steps are in flight; a repeated run has the lane to itself,
because only its end says where its rows stand.
"""

from collections.abc import Collection

from weft.core.actions import Interrupt, Row, Run, StepPlan
from weft.core.errors import REQUEST_FAILED
from weft.core.events import Failed, StepDone
from weft.core.ids import ActionId, ModelName
from weft.core.request import Pooling, Request, TokenLogprobs
from weft.ledger.hazards import Resource
from weft.policy.presets import Preset
from weft.sched import adapters
from weft.sched.book import (
    Answer,
    Book,
    ModelEntry,
    RequestState,
    StepInFlight,
    waiting_view,
)
from weft.sched.moves import Mover
from weft.sched.prefix import PrefixCache

MAX_RUN_FAILS = 3
"""A request whose runs failed this often, the last time alone, fails. From MAX_RUN_FAILS - 1 on
it runs alone, so that it takes nobody with it."""


def _pooled(request: Request, stop: int) -> Pooling | None:
    """What a row that ends before `stop` reports for an embedding."""
    return None if request.embed == "last" and stop < len(request.prompt) else request.embed


class Stepper:
    """Plans Runs for the model that has the turn and applies their results."""

    def __init__(self, book: Book, mover: Mover, preset: Preset, prefixes: PrefixCache) -> None:
        self._book = book
        self._mover = mover
        self._preset = preset
        self._prefixes = prefixes

    # -- planning -------------------------------------------------------------------------------

    def runnable(self, entry: ModelEntry) -> bool:
        state = self._book.memory(entry.spec.name).state
        return entry.leaving is None and state in ("resident", "loading")

    def fill(self, entry: ModelEntry, upcoming: ModelName | None, *, over: bool) -> bool:
        """Plan steps of this model up to the lane's credit. True if any was planned.

        `upcoming` is spared when rows need room, unless nothing could run otherwise. `over`: the
        turn is up, so nobody is sent away for it any more, and nothing is repeated, so that the
        turn can pass at once.
        """
        planned = False
        keep = None if over else {entry.spec.name, upcoming or entry.spec.name}
        while self.runnable(entry) and self._has_credit(entry):
            rows, states, repeat, needy = self._build(entry, keep)
            entry.starving = needy is not None and not over
            if needy is not None and not over:
                self._make_way(entry, needy, states)
            if not rows:
                break
            self._launch(entry, rows, states, repeat)
            planned = True
        return planned

    def _make_way(
        self, entry: ModelEntry, needy: RequestState, planned: list[RequestState]
    ) -> None:
        """A row found no room to grow. Its own model's youngest request makes way; where nothing
        is running at all, the model that was to be next does."""
        if not planned and not self._book.steps:
            missing = needy.planned + 1
            self._mover.extend(entry, needy, missing, {entry.spec.name})
        self._mover.shed(entry, needy, spare=planned)

    def _has_credit(self, entry: ModelEntry) -> bool:
        """Stepwise rows need their last token on the host, so beside one the lane has one step in
        flight, and nothing is repeated: overlap is lost, batches stay whole."""
        steps = self._book.steps.values()
        if len(steps) >= self._book.unit.depth or any(s.run.plan.repeat > 1 for s in steps):
            return False
        return not steps or not self._stepwise(entry)

    def _stepwise(self, entry: ModelEntry) -> bool:
        return any(s.stepwise and s.phase == "running" for s in entry.members.values())

    def _candidates(self, entry: ModelEntry) -> list[RequestState]:
        ready: list[RequestState] = []
        lost = self._book.ledger.lost_pages(entry.spec.name)
        for state in entry.members.values():
            if state.phase != "running" or state.copying:
                continue
            if lost and not lost.isdisjoint(state.pages):
                continue
            if state.request.adapter is not None and not adapters.is_there(self._book, state):
                continue
            if state.dirty:
                self._book.rewind(state)
            if not state.dirty and state.wants_steps:
                ready.append(state)
        suspects = [s for s in ready if s.fails >= MAX_RUN_FAILS - 1]
        return suspects[:1] or ready

    def _build(
        self, entry: ModelEntry, keep: Collection[ModelName] | None
    ) -> tuple[list[Row], list[RequestState], int, RequestState | None]:
        """Rows, their requests, the repeat, and the first request that found no room."""
        unit, page_tokens = self._book.unit, entry.spec.page_tokens
        ready = self._candidates(entry)
        decode: list[RequestState] = []
        prefills: list[RequestState] = []
        for state in ready:
            left = state.length - state.planned
            if left == 1:
                decode.append(state)
            elif left > 1:
                prefills.append(state)
        del decode[unit.max_rows :]
        rows: list[Row] = []
        states: list[RequestState] = []
        repeat = self._repeat(entry, ready, decode) if keep is not None else 1
        budget = unit.max_step_tokens
        needy: RequestState | None = None
        for state in [*decode, *self._in_order(prefills)]:
            if not budget or len(rows) >= unit.max_rows:
                break
            left = state.length - state.planned
            # A prefill row whose own draw is in flight would need an id that is not known here.
            assert left == 1 or not state.draws_in_flight
            num_tokens = min(left, budget)
            end = state.planned + num_tokens + repeat - 1
            room = end <= len(state.pages) * page_tokens
            if room or self._mover.extend(entry, state, end, keep):
                rows.append(self._row(state, num_tokens))
                states.append(state)
                budget -= num_tokens
            else:
                needy = needy or state
        return rows, states, repeat, needy

    def _in_order(self, prefills: list[RequestState]) -> list[RequestState]:
        """Requests with more than one position to compute, in the policy's order."""
        if len(prefills) < 2:
            return prefills
        by_id = {state.id: state for state in prefills}
        waiting = [waiting_view(state) for state in prefills]
        order = self._preset.prefill.order(waiting, self._book.now_ns)
        return [by_id[request] for request in order]

    def _repeat(
        self, entry: ModelEntry, ready: list[RequestState], decode: list[RequestState]
    ) -> int:
        """How many steps the answer could not change without an outside event."""
        if not decode or len(decode) != len(ready) or len(ready) != len(entry.members):
            return 1
        if self._book.unit.max_repeat == 1:
            return 1
        if self._stepwise(entry):
            return 1
        if len(decode) > self._book.unit.max_step_tokens:
            return 1
        k = min(self._book.unit.max_repeat, *(s.draws_left for s in decode))
        while k > 1 and not self._mover.room_to_extend(entry, decode, k):
            k //= 2
        return max(k, 1)

    def _row(self, state: RequestState, num_tokens: int) -> Row:
        request = state.request
        start, stop = state.planned, state.planned + num_tokens
        output_index = len(state.emitted) + state.draws_in_flight
        from_device = num_tokens == 1 and state.last_on_device
        sent = state.pages_sent
        pages = tuple(state.pages[sent:]) if sent < len(state.pages) else ()
        least = max(request.min_tokens - output_index, 0) if request.min_tokens else 0
        assert state.slot is not None
        if from_device and state.plain and stop == state.length:
            # What nearly all rows are; the general answer below is the same.
            return Row(
                request=state.id,
                slot=state.slot,
                start=start,
                num_tokens=1,
                input=None,
                sample=request.sampling,
                output_index=output_index,
                stop_ids=state.stop_ids,
                min_remaining=least,
                first_page=sent,
                append_pages=pages,
                adapter=request.adapter,
            )
        samples = stop == state.length and not state.prefill_only
        stepwise = samples and state.stepwise
        assert not (stepwise and state.draws_in_flight), "a stepwise row with a draw in flight"
        return Row(
            request=state.id,
            slot=state.slot,
            start=start,
            num_tokens=num_tokens,
            input=None if from_device else state.ids(start, stop),
            sample=request.sampling if samples else None,
            output_index=output_index,
            stop_ids=state.stop_ids,
            min_remaining=least,
            first_page=sent,
            append_pages=pages,
            adapter=request.adapter,
            outputs=tuple(state.emitted) if stepwise else (),
            prompt_ids=state.prompt_ids if stepwise else (),
            targets=request.prompt[start + 1 : stop + 1] if state.scores_prompt else (),
            target_logprobs=request.prompt_logprobs or 0,
            embed=_pooled(request, stop),
        )

    def _launch(
        self, entry: ModelEntry, rows: list[Row], states: list[RequestState], repeat: int
    ) -> None:
        book, name = self._book, entry.spec.name
        action = book.new_id()
        used = adapters.names(book, states)
        reads: list[Resource] = [("w", name), *(("w", adapter) for adapter in used)]
        for row in rows:
            if row.append_pages:
                reads += book.pending_maps(name, list(row.append_pages))
        follow = book.memory(name).load_action
        after = book.after(
            action, reads=reads, writes=[("kv", s.id) for s in states], except_for=follow
        )
        plan = StepPlan(model=name, rows=tuple(rows), repeat=repeat)
        run = Run(id=action, after=after, plan=plan, follow=follow)
        for row, state in zip(rows, states, strict=True):
            state.planned += row.num_tokens + repeat - 1
            state.runs_in_flight += 1
            state.pages_sent = len(state.pages)
            if not state.began:
                state.began = True
                entry.begun += 1
                entry.queue_wait_ns += max(book.now_ns - state.request.arrival_ns, 0)
            if row.sample is not None:
                state.draws_in_flight += repeat
                state.last_on_device = True
        for user in (name, *used):
            book.models[user].last_used_ns = book.now_ns
        book.steps[action] = StepInFlight(run, states)
        book.actions.append(run)

    def interrupt(self) -> None:
        """Ask repeated runs in flight to stop early."""
        for step in self._book.steps.values():
            if step.run.plan.repeat > 1 and not step.interrupted:
                step.interrupted = True
                action = self._book.new_id()
                self._book.interrupts.add(action)
                self._book.actions.append(Interrupt(id=action, target=step.run.id))

    # -- results --------------------------------------------------------------------------------

    def done(self, event: StepDone) -> None:
        """Apply the iterations of a report; the last one settles where the rows stand."""
        step = self._book.steps[event.action]
        assert event.iterations == len(event.tokens)
        plan, states = step.run.plan, step.states
        entry = self._book.models[plan.model]
        answers = [Answer([], []) for _ in states]
        if event.errors or event.prompt_logprobs or event.embeddings:
            self._note_prompts(step, event)
        for i, tokens in enumerate(event.tokens):
            logprobs = event.logprobs[i] if event.logprobs else (None,) * len(tokens)
            drawn = zip(states, plan.rows, tokens, logprobs, answers, strict=True)
            for state, row, token, scores, answer in drawn:
                self._apply(entry, state, row, step.seen, token, scores, answer)
            step.seen += 1
        for state, answer in zip(states, answers, strict=True):
            if answer.tokens and state.phase != "finished":
                self._book.emit(state, answer)
        if event.last:
            self._settle(event.action, step)
            for state in states:
                state.fails = 0
                if state.computed >= (state.entered + 1) * entry.spec.page_tokens:
                    self._prefixes.enter(state)

    def _note_prompts(self, step: StepInFlight, event: StepDone) -> None:
        """What the step says of prompts, and rows that cannot go on."""
        for index, (row, state) in enumerate(zip(step.run.plan.rows, step.states, strict=True)):
            if state.phase == "finished":
                continue
            if event.errors and (error := event.errors[index]) is not None:
                self._book.finish(state, "error", error=error)
                continue
            if row.targets and state.scores_prompt:
                state.prompt_logprobs[row.start :] = event.prompt_logprobs[index]
            if row.embed is not None and (part := event.embeddings[index]) is not None:
                state.embedding.append(part)

    def _apply(
        self,
        entry: ModelEntry,
        state: RequestState,
        row: Row,
        iteration: int,
        token: int,
        logprobs: TokenLogprobs | None,
        answer: Answer,
    ) -> None:
        """One row of one iteration. Rows of requests that are over are void."""
        if row.sample is not None:
            state.draws_in_flight -= 1
        if state.phase == "finished":
            return
        before, prompt = state.computed, state.num_prompt
        state.computed = stop = row.start + row.num_tokens + iteration
        account = entry if row.adapter is None else self._book.models[row.adapter]
        if before < prompt:
            account.prompt_tokens += max(min(stop, prompt) - before, 0)
        if state.prefill_only and stop == prompt:
            entry.draws += 1  # its turn was of use
            self._book.finish(state, "stop" if state.request.embed else "length")
        if row.sample is None:
            return
        entry.draws += 1
        output_index = len(state.emitted)
        stops = token in state.stop_ids and output_index >= state.request.min_tokens
        if stops or token < 0:
            self._book.finish(state, "stop", answer=answer)
            return
        state.emitted.append(token)
        answer.tokens.append(token)
        if logprobs is not None:
            answer.logprobs.append(logprobs)
        account.output_tokens += 1
        if output_index + 1 >= state.request.max_tokens:
            self._book.finish(state, "length", answer=answer)

    def _settle(self, action: ActionId, step: StepInFlight) -> None:
        """The run has ended: take back what it did not do."""
        undone = step.run.plan.repeat - step.seen
        for row, state in zip(step.run.plan.rows, step.states, strict=True):
            state.runs_in_flight -= 1
            if row.sample is not None:
                state.draws_in_flight -= undone
            state.planned -= undone
        del self._book.steps[action]

    def failed(self, event: Failed) -> None:
        """None of the iterations not yet reported happened. The rows go back to what is computed;
        a row that keeps failing is run alone, and then fails alone."""
        step = self._book.steps[event.action]
        alone = len(step.states) == 1
        self._settle(event.action, step)
        for state in step.states:
            if state.phase == "finished":
                continue
            state.dirty = True
            if event.cause == "dependency":
                continue
            state.fails = max(state.fails + 1, 0 if event.retryable else MAX_RUN_FAILS - 1)
            if alone and state.fails >= MAX_RUN_FAILS:
                error = f"{REQUEST_FAILED}: the step of this request failed: {event.cause}"
                self._book.finish(state, "error", error=error)
