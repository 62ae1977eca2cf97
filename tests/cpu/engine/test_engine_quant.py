"""Quantized models under the real scheduler, switched and preempted: their images are what is
moved, and every stream equals its plain run."""

from pathlib import Path
from random import Random

from support.engine_kit import Engine, TinyModel, plain_run, unit_for
from support.quant_tiny import FORMS, quant_checkpoint
from support.unit_kit import UnitRun
from weft.core.actions import Load
from weft.core.ids import ModelName, RequestId
from weft.core.model import model_spec
from weft.core.request import Request, Sampling
from weft.models.hf_config import read_eos_ids, read_model_config
from weft.models.image import image_layout


def quant_model(folder: Path, name: str, seed: int) -> TinyModel:
    path, _ = quant_checkpoint(folder / name, FORMS[name], seed=seed)
    arch = read_model_config(path, "float64")
    size = image_layout(arch).num_bytes
    eos_ids = read_eos_ids(path)
    spec = model_spec(name, arch, weight_bytes=size, eos_ids=eos_ids, page_tokens=8)
    return TinyModel(path, arch, spec)


def test_streams_of_switched_quantized_models(tmp_path: Path) -> None:
    names = ("fp8-channel", "awq-32", "gptq")
    models = {name: quant_model(tmp_path, name, i) for i, name in enumerate(names)}
    rng = Random(1)
    requests = [
        Request(
            id=RequestId(i),
            model=ModelName(names[i % 3]),
            prompt=tuple(rng.randrange(6, 128) for _ in range(rng.randint(1, 40))),
            max_tokens=rng.randint(4, 16),
            sampling=Sampling(temperature=rng.choice([0.0, 0.9]), seed=i),
            ignore_eos=True,
        )
        for i in range(12)
    ]
    granule_bytes = unit_for(models).granule_bytes
    largest = max(-(-m.spec.weight_bytes // granule_bytes) for m in models.values())
    tight = unit_for(models, num_granules=largest + 24, depth=2)
    with Engine(models, tight, threads=1) as engine:
        unit = UnitRun(engine)
        for request in requests:
            unit.request(request)
            unit.step()
        while not unit.idle:
            unit.step()
        unit.drain()
    assert not unit.errors
    assert sum(isinstance(action, Load) for action in unit.actions) >= 3
    with Engine(models, unit_for(models)) as engine:
        for request in requests:
            tokens = plain_run(
                engine,
                request.model,
                request.prompt,
                request.max_tokens,
                sampling=request.sampling,
            )
            assert unit.tokens[request.id] == list(tokens)
