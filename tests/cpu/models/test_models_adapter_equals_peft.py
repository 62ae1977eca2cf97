"""LoRA equals PEFT on the same files: random ranks, targets and patterns, in chunks, and several
adapters with the bare base in one step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.oracle import assert_same_answer, oracle, oracle_logits
from support.plain import PlainModel, make_batch
from support.quant_tiny import FORMS, quant_checkpoint
from support.tiny import tiny_checkpoint
from support.tiny_adapter import ALL_TARGETS, lora_weights, tiny_adapter
from weft.models.hf_config import read_model_config
from weft.models.lora import TorchLora, batch_of, plan_lora

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NEW_TOKENS = 12
FUSED_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def with_peft(base: Any, path: Path, name: str = "default") -> Any:
    """The oracle's model with this adapter."""
    import peft

    return peft.PeftModel.from_pretrained(base, path, adapter_name=name).eval()


def draw_adapter(base: Any, folder: Path, seed: int, targets: tuple[str, ...]) -> None:
    """Let PEFT itself make and save an adapter of random shape, with random weights."""
    import peft

    rng = np.random.default_rng(seed)

    def pick(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    chosen = [t for t in targets if rng.random() < 0.6] or [pick(*targets)]
    rank_pattern = {pick(*chosen): pick(1, 3, 16)} if pick(False, True) else {}
    alpha_pattern = {pick(*chosen): pick(1, 5, 12.5)} if pick(False, True) else {}
    if pick(False, True):
        block = "self_attn" if chosen[0][0] in "qkvo" else "mlp"
        # PEFT sorts the keys when it saves, and reads with other ranks than it wrote if two match.
        for pattern in (rank_pattern, alpha_pattern):
            pattern.pop(chosen[0], None)
        rank_pattern = {f"model.layers.0.{block}.{chosen[0]}": pick(2, 20), **rank_pattern}
        alpha_pattern = {f"^model.layers.1.{block}.{chosen[0]}": 7, **alpha_pattern}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=pick(1, 2, 8, 17),
        lora_alpha=pick(1, 8, 20),
        use_rslora=pick(False, True),
        target_modules=pick(chosen, rf".*\.({'|'.join(chosen)})"),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        init_lora_weights=pick(True, False, "gaussian"),
    )
    model = peft.get_peft_model(base, config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    model.unload()


def check_adapter(folder: Path, seed: int, *, family: str = "llama", dtype: str) -> None:
    rng = np.random.default_rng(seed)
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    path = tiny_checkpoint(
        folder / "base",
        family=family,
        seed=seed,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        hidden=kv_heads * group * 16,
        intermediate=int(rng.choice([64, 77, 100])),
        tokenizer=False,
    )
    theirs = oracle(path, getattr(torch, dtype))
    targets = FUSED_TARGETS if family == "phi3" else ALL_TARGETS
    draw_adapter(theirs, folder / "adapter", seed, targets)
    model = PlainModel(path, dtype=dtype, page_tokens=3)
    model.adapter = lora_weights(folder / "adapter", model.arch)
    adapted = with_peft(theirs, folder / "adapter")
    prompt = [int(t) for t in rng.integers(0, 128, int(rng.integers(2, 60)))]
    for chunk in (None, int(rng.integers(1, 17))):
        ours, logits = model.generate(prompt, NEW_TOKENS, chunk=chunk, seed=seed)
        expected = oracle_logits(adapted, prompt + ours[:-1], len(prompt))
        # transformers has islands of float32 in float64 too
        assert_same_answer(ours, logits, expected, tolerance=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_an_adapter_equals_peft(tmp_path: Path, seed: int) -> None:
    check_adapter(tmp_path, seed, dtype=("float32", "float64")[seed % 2])


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_an_adapter_on_another_class_equals_peft(tmp_path: Path, family: str) -> None:
    check_adapter(tmp_path, 3, family=family, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_an_adapter_equals_peft_at_length(tmp_path: Path, seed: int) -> None:
    family = ("llama", "qwen2", "mistral", "qwen3", "phi3")[seed % 5]
    check_adapter(tmp_path, seed, family=family, dtype=("float32", "float64")[seed % 2])


def test_three_adapters_and_the_base_in_one_step_equal_each_alone(tmp_path: Path) -> None:
    """Prefill chunks and decode rows, mixed, in float64: exactly what each row has by itself."""
    path = tiny_checkpoint(tmp_path / "base", tokenizer=False)
    arch = read_model_config(path, "float64")
    targets = (ALL_TARGETS, ("q_proj", "v_proj"), ("k_proj", "up_proj"))
    adapters = [
        lora_weights(
            tiny_adapter(tmp_path / str(i), arch, seed=i, rank=2 + 7 * i, targets=own), arch
        )
        for i, own in enumerate(targets)
    ]
    owners = [None, adapters[0], adapters[1], adapters[0], None, adapters[2]]
    model = PlainModel(path, dtype="float64")
    rng = np.random.default_rng(0)
    starts, counts = [0, 9, 0, 30, 17, 5], [20, 1, 33, 1, 1, 40]
    prompts = [
        [int(t) for t in rng.integers(0, 128, s + n)] for s, n in zip(starts, counts, strict=True)
    ]
    ids = [int(p) for p in rng.permutation(256)]
    pages = [[ids.pop() for _ in range(-(-len(p) // 4))] for p in prompts]
    for prompt, own, start, owner in zip(prompts, pages, starts, owners, strict=True):
        model.adapter = owner
        if start:
            model.forward(make_batch([(prompt[:start], 0)], [own]))
    rows = [(p[s:], s) for p, s in zip(prompts, starts, strict=True)]
    batch = make_batch(rows, pages)
    lora = batch_of(plan_lora(list(zip(owners, counts, strict=True))), TorchLora())
    assert len(lora.groups) == 3
    model.attention.plan(batch, model.kv)
    together = model.decoder.forward(batch, model.attention, model.kv, lora=lora)
    alone = []
    for i, owner in enumerate(owners):
        model.adapter = owner
        alone.append(model.forward(make_batch([(prompts[i], 0)], [pages[i]]))[0])
        assert float((together[i] - alone[i]).abs().max()) < 1e-11
    model.adapter = None
    for i, owner in enumerate(owners):
        bare = model.forward(make_batch([(prompts[i], 0)], [pages[i]]))[0]
        assert (owner is None) == (float((bare - alone[i]).abs().max()) < 1e-11)


def test_the_canary_dropping_the_adapter_changes_tokens(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "base", tokenizer=False)
    model = PlainModel(path, dtype="float64")
    prompt = list(range(3, 40))
    bare, _ = model.generate(prompt, NEW_TOKENS)
    answers = {tuple(bare)}
    for target in ALL_TARGETS:
        folder = tiny_adapter(tmp_path / target, model.arch, targets=(target,), strength=1.5)
        model.adapter = lora_weights(folder, model.arch)
        answers.add(tuple(model.generate(prompt, NEW_TOKENS)[0]))
    assert len(answers) == 1 + len(ALL_TARGETS), "an adapter on one module alone changes nothing"


def test_low_precision_is_as_good_as_peft(tmp_path: Path) -> None:
    """In bfloat16 our error against float64 is no larger than 1.5 times PEFT's."""
    path = tiny_checkpoint(tmp_path / "base", dtype="bfloat16", tokenizer=False)
    low, exact = PlainModel(path), PlainModel(path, dtype="float64")
    folder = tiny_adapter(tmp_path / "a", low.arch, rank=6, lora_alpha=10, dtype="bfloat16")
    for model in (low, exact):
        model.adapter = lora_weights(folder, model.arch)
    theirs = with_peft(oracle(path, torch.bfloat16), folder).to(torch.bfloat16)
    our_error = their_error = 0.0
    for prompt in np.random.default_rng(0).integers(0, 128, (6, 40)).tolist():
        pages = [list(range(10))]
        logits = [m.forward(make_batch([(prompt, 0)], pages))[0].double() for m in (low, exact)]
        expected = oracle_logits(theirs, prompt, len(prompt))[0].double()
        our_error += float((logits[0] - logits[1]).square().mean())
        their_error += float((expected - logits[1]).square().mean())
    assert our_error <= 1.5**2 * their_error


@pytest.mark.parametrize("name", ["fp8-channel", "awq-32", "gptq"])
def test_an_adapter_on_a_quantized_base_is_the_same_on_its_plain_numbers(
    tmp_path: Path, name: str
) -> None:
    quant, plain = quant_checkpoint(tmp_path, FORMS[name], family="qwen2")
    models = [PlainModel(path, dtype="float64") for path in (quant, plain)]
    bare, _ = models[0].generate(list(range(6, 40)), NEW_TOKENS)
    folder = tiny_adapter(tmp_path / "adapter", models[0].arch, rank=5)
    for model in models:
        model.adapter = lora_weights(folder, model.arch)
    (ours, logits), (theirs, expected) = (
        model.generate(list(range(6, 40)), NEW_TOKENS) for model in models
    )
    assert float((logits - expected).abs().max()) < 1e-9
    assert ours == theirs != bare
