"""What this node serves, and how that changes while it runs.

A change of a model's files, dtype or context is another model below (`hub.models`): its image is
built beside the old one, then takes its place, and the old one goes when its last request has
ended. Everything else (objectives, weight, pinned, aliases, defaults) changes at once.

An adapter is an entry of its own behind its base's, and belongs to certain weights of it: when the
base has new ones, each of its adapters is served anew on them in the same instant.

Everything runs in the event loop's thread, except reading headers and writing images.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path

import msgspec

from weft.config.pool_config import ModelConfig, PoolConfig, served_entries
from weft.core.errors import WeftError
from weft.core.ids import ModelName
from weft.core.request import SamplingDefaults
from weft.hub.base import ModelCard
from weft.hub.hub import PoolHub
from weft.hub.models import numbered
from weft.memory.host_store import HostStore
from weft.node.changes import ReloadReport, needs_restart
from weft.node.images import (
    BuildStopped,
    Checkpoint,
    FailedModel,
    ServedModel,
    StorePlan,
    build,
    make_served,
    read_all,
)
from weft.transport.messages import BindModel

log = logging.getLogger("weft.node")

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BUILD_THREADS = min(8, os.cpu_count() or 1)

Found = Checkpoint | str
"""What is known of a model's files, or why they cannot be served."""


class Catalog:
    """The models of one node. `run_builds` writes their images, one after the other."""

    def __init__(
        self, config: PoolConfig, base_dir: Path, plan: StorePlan, host: HostStore, hub: PoolHub
    ) -> None:
        self.config = config
        self._base_dir = base_dir
        self._started = config
        self._places = plan.places
        self._host = host
        self._hub = hub
        self._models: dict[ModelName, ServedModel] = {}
        """Everything that has a place in the store, removed models that still run included."""
        self._current: dict[str, ModelName] = {}
        """By public name: what is served, or has failed."""
        self._coming: dict[str, ModelName] = {}
        """By public name: what will take its place when its image is there."""
        self._created_s: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._built: set[str] = set()
        self._jobs: deque[str] = deque()
        self._job_came = asyncio.Event()
        self._building: str | None = None
        self._to_stop: set[str] = set()
        self._orphans: list[str] = []
        """Images whose users went while they were built, once for each."""
        self._stop_all = threading.Event()
        self._reloading = asyncio.Lock()
        hub.on_gone = self._gone
        for model in plan.models:
            self._numbers[model.config.name] = 1
            self._serve(model)
        for failed in plan.failed:
            self._numbers[failed.config.name] = 1
            self._fail(failed)

    # -- builds ---------------------------------------------------------------------------------

    async def run_builds(self) -> None:
        """Until it is cancelled or `stop_building`."""
        while not self._stop_all.is_set():
            if not self._jobs:
                self._job_came.clear()
                await self._job_came.wait()
                continue
            key = self._jobs.popleft()
            users = self._users(key)
            if users and key not in self._built:
                await self._build(key, users[0])

    def stop_building(self) -> None:
        """End the build at hand soon, for good."""
        self._stop_all.set()
        self._job_came.set()

    async def _build(self, key: str, model: ServedModel) -> None:
        loop = asyncio.get_running_loop()

        def progress(_: int) -> None:
            if self._stop_all.is_set() or key in self._to_stop:
                raise BuildStopped
            loop.call_soon_threadsafe(self._hub.note_progress)

        begin_s = time.monotonic()
        self._building = key
        stopped, reason = False, None
        try:
            reason = await asyncio.to_thread(build, model, self._host, progress, BUILD_THREADS)
        except BuildStopped:
            stopped = True
        finally:
            self._building = None
            self._to_stop.discard(key)
        if self._stop_all.is_set():
            return
        if stopped:
            self._jobs.append(key)  # for who asked for it while it was being stopped
        elif reason is None:
            self._built.add(key)
        self._release_orphans()
        for user in () if stopped else self._users(key):
            if reason is None:
                size_mb, took_s = user.image.num_bytes / 1e6, time.monotonic() - begin_s
                name = user.config.name
                log.info("model=%s image=ready image_mb=%.1f build_s=%.2f", name, size_mb, took_s)
                self._is_built(user)
            else:
                self._cannot_build(user, reason)

    def _users(self, key: str) -> list[ServedModel]:
        return [model for model in self._models.values() if model.image.key == key]

    def _want_built(self, model: ServedModel) -> None:
        key = model.image.key
        if key in self._built:
            self._is_built(model)
        elif key not in self._jobs and key != self._building:
            self._jobs.append(key)
            self._job_came.set()

    def _is_built(self, model: ServedModel) -> None:
        name, below = model.config.name, model.spec.name
        taken_over = self._coming.get(name) == below
        if taken_over:
            del self._coming[name]
            self._put(model)
        self._hub.model_ready(below)
        if taken_over:
            self._apply_adapters(name)

    def _cannot_build(self, model: ServedModel, reason: str) -> None:
        name, below = model.config.name, model.spec.name
        if self._coming.get(name) == below:
            log.error("model=%s stays as it was, the new one failed: %s", name, reason)
            del self._coming[name]
            self._apply_adapters(name)
        else:
            log.error("model=%s state=failed reason=%s", name, reason)
            self._hub.model_failed(below, reason)
        self._forget(below)

    # -- serving --------------------------------------------------------------------------------

    def _serve(self, model: ServedModel) -> None:
        """A model that is new under its name."""
        self._models[model.spec.name] = model
        self._put(model)
        self._want_built(model)

    def _put(self, model: ServedModel) -> None:
        name = model.config.name
        self._created_s[name] = int(time.time())
        self._current[name] = model.spec.name
        # Grammars read it in the worker, when the first one comes.
        image = msgspec.structs.replace(
            model.image, tokenizer=str(model.text_path / "tokenizer.json")
        )
        bind = BindModel(model=model.spec, arch=model.arch, image=image, adapter=model.adapter)
        self._hub.add_model(self._card(model), bind)

    def _fail(self, failed: FailedModel) -> None:
        name = failed.config.name
        self._created_s[name] = int(time.time())
        self._current[name] = numbered(name, self._numbers[name])
        log.error("model=%s state=failed reason=%s", name, failed.reason)
        self._hub.add_failed_model(self._failed_card(failed), self._current[name])

    def _replace(self, model: ServedModel) -> None:
        """Other weights for a name that is served: they take over when their image is there."""
        self._models[model.spec.name] = model
        self._coming[model.config.name] = model.spec.name
        self._want_built(model)

    def _change(self, model: ServedModel) -> None:
        """Other wishes for the same weights."""
        self._models[model.spec.name] = model
        self._hub.change_model(self._card(model), model.spec)

    def _remove(self, name: str) -> None:
        self._drop_coming(name)
        del self._current[name]
        self._hub.remove_model(name)

    def _drop_coming(self, name: str) -> None:
        below = self._coming.pop(name, None)
        if below is not None:
            self._forget(below)

    def _gone(self, below: ModelName) -> None:
        """The hub: nobody uses it any more."""
        if below in self._models:
            log.info("model=%s state=removed", self._models[below].config.name)
            self._forget(below)

    def _forget(self, below: ModelName) -> None:
        """Its place in the store may go to others, but not under the hands of a build."""
        key = self._models.pop(below).image.key
        if key == self._building:
            self._orphans.append(key)
            if not self._users(key):
                self._to_stop.add(key)
        else:
            self._release(key)

    def _release_orphans(self) -> None:
        orphans, self._orphans = self._orphans, []
        for key in orphans:
            self._release(key)

    def _release(self, key: str) -> None:
        free = self._places.give(key)
        if free is None:
            return
        self._built.discard(key)
        if not self._hub.host_pinned:
            self._host.punch(free.offset, free.num_bytes)

    # -- changes --------------------------------------------------------------------------------

    async def apply(self, config: PoolConfig, base_dir: Path) -> ReloadReport:
        """Serve what `config` says. Models whose files cannot be served are reported; those that
        are served already stay as they are."""
        async with self._reloading:
            entries = list(served_entries(config))
            found = await asyncio.to_thread(read_all, entries, base_dir)
            report = ReloadReport(needs_restart=needs_restart(self._started, config))
            self.config, self._base_dir = config, base_dir
            wanted = {entry.name for entry, _ in entries}
            for name in [name for name in self._current if name not in wanted]:
                self._remove(name)
                report.removed.append(name)
            for entry, base in entries:
                if base is None or base.name not in self._coming:
                    self._apply_model(entry, found[entry.name], report, base)
            log.info("reload %s", report.line())
            return report

    async def add(self, model: ModelConfig) -> None:
        """Serve one model more, until the next reload. Raises WeftError."""
        async with self._reloading:
            entries = [(model, None)]
            found = (await asyncio.to_thread(read_all, entries, self._base_dir))[model.name]
            if isinstance(found, str):
                raise WeftError(found)
            report = ReloadReport()
            self._apply_model(model, found, report)
            if report.failed:
                raise WeftError(report.failed[model.name])
            self.config = msgspec.structs.replace(self.config, models=[*self.config.models, model])

    def _apply_adapters(self, name: str) -> None:
        """The base of this name has new weights now, or will not have them after all. Reads
        headers here: nobody may ask for an adapter on a base that has gone."""
        entries = [entry for entry in served_entries(self.config) if name in _names(entry)]
        if len(entries) < 2:
            return
        found = read_all(entries, self._base_dir)
        report = ReloadReport()
        for entry, base in entries[1:]:
            self._apply_model(entry, found[entry.name], report, base)
        log.info("adapters of model=%s %s", name, report.line())

    def _apply_model(
        self,
        model: ModelConfig,
        found: Found,
        report: ReloadReport,
        base: ModelConfig | None = None,
    ) -> None:
        name = model.name
        below_it = None if base is None else self._current[base.name]
        now = self._models.get(self._current[name]) if name in self._current else None
        coming = self._models.get(self._coming[name]) if name in self._coming else None
        if isinstance(found, str):
            report.failed[name] = found
            if now is None:
                self._number(name)
                self._fail(
                    FailedModel(config=model, path=self._base_dir / model.path, reason=found)
                )
            return
        if coming is not None and not _same_weights(coming, model, found, below_it):
            self._drop_coming(name)
            coming = None
        try:
            if coming is not None:
                # Not served yet: what it is told counts from its first request.
                below = coming.spec.name
                self._models[below] = make_served(
                    model, self.config, found, coming.image, below, below_it
                )
                report.changed.append(name)
            elif now is not None and _same_weights(now, model, found, below_it):
                if changed := self._wishes(now, model, found):
                    self._change(changed)
                    report.updated.append(name)
            else:
                new = self._new(model, found, below_it)
                if now is None or now.spec.base != below_it:
                    # Also an adapter whose base has gone: what it could do is over.
                    self._serve(new)
                    (report.added if now is None else report.changed).append(name)
                else:
                    self._replace(new)
                    report.changed.append(name)
        except (WeftError, OSError) as error:
            report.failed[name] = str(error)

    def _wishes(
        self, now: ServedModel, model: ModelConfig, found: Checkpoint
    ) -> ServedModel | None:
        """The same weights as the configuration wants them now; None if nothing is different."""
        changed = make_served(model, self.config, found, now.image, now.spec.name, now.spec.base)
        same_card = self._hub.find(model.name) == self._card(changed)
        return None if same_card and self._hub.spec(model.name) == changed.spec else changed

    def _new(self, model: ModelConfig, found: Checkpoint, base: ModelName | None) -> ServedModel:
        """Raises WeftError when there is no place for its image."""
        image = self._places.take(found.key, found.num_bytes)
        if image is None:
            free = self._places.room_bytes - self._places.used_bytes
            raise WeftError(
                f"{found.path}: {found.num_bytes >> 20} MiB of weights do not fit the "
                f"{free >> 20} MiB that the host store has left for images; remove a model first, "
                "or raise engine.spare_host_memory and restart"
            )
        try:
            below = self._number(model.name)
            return make_served(model, self.config, found, image, below, base)
        except (WeftError, OSError):
            self._release(found.key)
            raise

    def _number(self, name: str) -> ModelName:
        self._numbers[name] = self._numbers.get(name, 0) + 1
        return numbered(name, self._numbers[name])

    # -- cards ----------------------------------------------------------------------------------

    def _card(self, model: ServedModel) -> ModelCard:
        spec, name = model.spec, model.config.name
        return ModelCard(
            name=name,
            path=str(model.text_path),
            created_s=self._created_s[name],
            base=self._name_of(spec.base),
            max_context_tokens=spec.max_context_tokens,
            vocab_size=spec.vocab_size,
            eos_ids=spec.eos_ids,
            ttft_slo_s=spec.ttft_slo_s,
            tbt_slo_s=spec.tbt_slo_s,
            aliases=model.config.aliases,
            pooling=model.config.pooling,
            tool_parser=model.config.tool_parser,
            defaults=_defaults(model.config.defaults, self.config.defaults),
            chat_template=self._template(model.config),
            text_stamp=_stamp(model.text_path, self._template(model.config)),
        )

    def _name_of(self, below: ModelName | None) -> str | None:
        """The public name of a model that is served, or has failed."""
        return next((name for name, known in self._current.items() if known == below), None)

    def _template(self, model: ModelConfig) -> str | None:
        if model.chat_template is None:
            return None
        return os.path.realpath(self._base_dir / model.chat_template)

    def _failed_card(self, model: FailedModel) -> ModelCard:
        return ModelCard(
            name=model.config.name,
            path=str(model.path),
            created_s=self._created_s[model.config.name],
            max_context_tokens=0,
            vocab_size=0,
            eos_ids=(),
            ttft_slo_s=model.config.ttft_slo_s or 0.0,
            tbt_slo_s=model.config.tbt_slo_s or 0.0,
            aliases=model.config.aliases,
            failed=model.reason,
        )


def _names(entry: tuple[ModelConfig, ModelConfig | None]) -> set[str]:
    """Of a model or adapter, and of the model under an adapter."""
    return {model.name for model in entry if model is not None}


def _stamp(folder: Path, template: str | None) -> int:
    """Of the files that make text of tokens and back; files that are not there count nothing."""
    stamp = 0
    for file in (*(folder / name for name in TEXT_FILES), *([template] if template else ())):
        with contextlib.suppress(OSError):
            stamp += os.stat(file).st_mtime_ns
    return stamp


def _same_weights(
    served: ServedModel, model: ModelConfig, found: Checkpoint, base: ModelName | None
) -> bool:
    """The same bytes on the same base, and the same sizes for the ledger."""
    return (
        served.image.key == found.key
        and served.spec.base == base
        and served.path == found.path
        and served.config.max_context_tokens == model.max_context_tokens
    )


def _defaults(own: SamplingDefaults, pool: SamplingDefaults) -> SamplingDefaults:
    """The model's, and the pool's where it says nothing."""
    given = {key: value for key, value in msgspec.structs.asdict(own).items() if value is not None}
    return msgspec.structs.replace(pool, **given)
