"""What a plan may ask of a runner: bounds on rows, positions, ids and pages."""

from weft.core.actions import Row, StepPlan
from weft.core.request import MAX_LOGPROBS, Sampling
from weft.core.unit import UnitSpec
from weft.engine.model import BoundModel


def check_plan(plan: StepPlan, model: BoundModel, unit: UnitSpec) -> None:
    """Refuse a plan that would read or write where it must not. Raises ValueError."""
    rows = plan.rows
    if not 1 <= len(rows) <= unit.max_rows:
        raise ValueError(f"{len(rows)} rows; a step has 1 .. {unit.max_rows}")
    total = sum(row.num_tokens for row in rows)
    if total > unit.max_step_tokens:
        raise ValueError(f"{total} tokens; a step has at most {unit.max_step_tokens}")
    if len({row.slot for row in rows}) != len(rows):
        raise ValueError("two rows of a step share a slot")
    if plan.repeat < 1:
        raise ValueError(f"repeat is {plan.repeat}")
    for row in rows:
        _check_row(row, plan.repeat, model, unit)
        if plan.repeat > 1 and (row.num_tokens != 1 or row.sample is None):
            raise ValueError(f"request {row.request}: only sampling decode rows can be repeated")


def _check_row(row: Row, repeat: int, model: BoundModel, unit: UnitSpec) -> None:
    who, max_pages = f"request {row.request}", model.page_table.shape[1]
    if not 0 <= row.slot < unit.num_slots:
        raise ValueError(f"{who}: slot {row.slot} is outside 0 .. {unit.num_slots - 1}")
    if row.num_tokens < 1 or row.start < 0:
        raise ValueError(f"{who}: {row.num_tokens} tokens from position {row.start}")
    end = row.start + row.num_tokens + repeat - 1
    longest = min(model.spec.max_context_tokens, max_pages * model.spec.page_tokens)
    if end > longest:
        raise ValueError(f"{who}: position {end} is beyond {longest}")
    if row.input is None:
        if row.num_tokens != 1:
            raise ValueError(f"{who}: a row without input ids has one token")
    elif len(row.input) != row.num_tokens:
        raise ValueError(f"{who}: {len(row.input)} input ids for {row.num_tokens} tokens")
    elif not 0 <= min(row.input) <= max(row.input) < model.arch.vocab_size:
        raise ValueError(f"{who}: a token id is outside 0 .. {model.arch.vocab_size - 1}")
    if row.append_pages:
        if row.first_page < 0 or row.first_page + len(row.append_pages) > max_pages:
            raise ValueError(f"{who}: page table entries beyond {max_pages}")
        if not 0 <= min(row.append_pages) <= max(row.append_pages) < model.kv.pages.shape[0]:
            raise ValueError(f"{who}: a page id is outside 0 .. {model.kv.pages.shape[0] - 1}")
    if row.sample is not None:
        _check_sampling(row, row.sample, repeat, model)
    _check_prompt(row, repeat, model)


def _check_prompt(row: Row, repeat: int, model: BoundModel) -> None:
    who, vocab = f"request {row.request}", model.arch.vocab_size
    if repeat > 1 and (row.targets or row.embed is not None):
        raise ValueError(f"{who}: a row that reports of its prompt is not repeated")
    if len(row.targets) > row.num_tokens:
        raise ValueError(f"{who}: {len(row.targets)} targets for {row.num_tokens} tokens")
    if row.targets and not 0 <= min(row.targets) <= max(row.targets) < vocab:
        raise ValueError(f"{who}: a target is outside 0 .. {vocab - 1}")
    if not 0 <= row.target_logprobs <= MAX_LOGPROBS:
        raise ValueError(f"{who}: logprobs of {row.target_logprobs} tokens")


def _check_sampling(row: Row, sampling: Sampling, repeat: int, model: BoundModel) -> None:
    who, vocab = f"request {row.request}", model.arch.vocab_size
    ids = [*row.outputs, *row.prompt_ids, *(token for token, _ in sampling.logit_bias)]
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        raise ValueError(f"{who}: a token id is outside 0 .. {vocab - 1}")
    if sampling.stepwise and (repeat > 1 or len(row.outputs) != row.output_index):
        raise ValueError(f"{who}: a stepwise row knows its outputs and is not repeated")
    if not 0 <= (sampling.logprobs or 0) <= MAX_LOGPROBS:
        raise ValueError(f"{who}: logprobs of {sampling.logprobs} tokens")
