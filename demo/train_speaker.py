"""Trains `speaker`, the demo's small model that talks: a Llama of 3.7 million weights on the
public-domain text of Shakespeare's plays, written as a checkpoint in Hugging Face layout.

    python3 demo/train_speaker.py --device cuda --minutes 4 --out demo/speaker

Needs torch, tokenizers and rich; nothing of weft. About a minute on a data-centre GPU.

The text is about 430 thousand tokens, so the model would soon know it by heart: dropout, weight
decay and early stopping on the last 5 % of the text (which is never trained on) hold it back. How
long is long enough is tried rather than guessed: a few runs, of which the best is kept.
Two kinds of samples are mixed: plain windows of the text, for completions; and scenes, for chat:
`<|scene|>` first, then whole speeches, each ended by `<|end|>`, so that an answer knows its end.

Shapes: B samples, T positions, H hidden, Q query heads, K KV heads, D head dim, V vocabulary.
"""

import argparse
import gzip
import math
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hf_files import config_json, write_json, write_safetensors
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

DATA = Path(__file__).parent / "data" / "shakespeare.txt.gz"
SCENE, END = "<|scene|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ '<|scene|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'MENENIUS' }}"
    "{% elif message['role'] == 'system' %}{{ 'Messenger' }}"
    "{% else %}{{ 'First Citizen' }}{% endif %}"
    "{{ ':\\n' + message['content'] | trim + '<|end|>\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'MENENIUS:\\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    num_layers: int = 5
    hidden_size: int = 256
    intermediate_size: int = 640
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 1024
    context: int = 512
    rope_theta: float = 10000.0


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, eps=1e-6)


def rotate(x_BNTD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split layout of Hugging Face's Llama."""
    low, high = x_BNTD.chunk(2, dim=-1)
    return (x_BNTD * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD).to(x_BNTD.dtype)


class Layer(nn.Module):
    """Attribute names are those of the checkpoint, so the state dict is exported as it is."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        h, q, k = shape.hidden_size, shape.num_q_heads, shape.num_kv_heads
        self.shape, self.dropout = shape, dropout
        self.input_layernorm, self.post_attention_layernorm = Norm(h), Norm(h)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(h, q * shape.head_dim, bias=False),
                "k_proj": nn.Linear(h, k * shape.head_dim, bias=False),
                "v_proj": nn.Linear(h, k * shape.head_dim, bias=False),
                "o_proj": nn.Linear(q * shape.head_dim, h, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(h, shape.intermediate_size, bias=False),
                "up_proj": nn.Linear(h, shape.intermediate_size, bias=False),
                "down_proj": nn.Linear(shape.intermediate_size, h, bias=False),
            }
        )

    def forward(self, x_BTH: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        s, drop = self.shape, self.dropout if self.training else 0.0
        y = self.input_layernorm(x_BTH)
        b, t, _ = y.shape
        q = self.self_attn["q_proj"](y).view(b, t, s.num_q_heads, s.head_dim).transpose(1, 2)
        k = self.self_attn["k_proj"](y).view(b, t, s.num_kv_heads, s.head_dim).transpose(1, 2)
        v = self.self_attn["v_proj"](y).view(b, t, s.num_kv_heads, s.head_dim).transpose(1, 2)
        groups = s.num_q_heads // s.num_kv_heads
        attended = F.scaled_dot_product_attention(
            rotate(q, *rope),
            rotate(k, *rope).repeat_interleave(groups, dim=1),
            v.repeat_interleave(groups, dim=1),
            is_causal=True,
            dropout_p=drop,
        )
        merged = attended.transpose(1, 2).reshape(b, t, -1)
        x_BTH = x_BTH + F.dropout(self.self_attn["o_proj"](merged), drop)
        y = self.post_attention_layernorm(x_BTH)
        y = self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))
        return x_BTH + F.dropout(y, drop)


class Speaker(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([Layer(shape, dropout) for _ in range(shape.num_layers)])
        self.norm = Norm(shape.hidden_size)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * shape.num_layers) if into_stream else 1.0
                nn.init.normal_(weight, std=0.02 * scale)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        angle = torch.outer(torch.arange(shape.context).float(), shape.rope_theta**-half)
        self.register_buffer("cos", torch.cat((angle, angle), dim=-1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angle, angle), dim=-1).sin(), persistent=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V]. The embedding is also the output matrix (tied)."""
        x = F.dropout(self.embed_tokens(ids_BT), self.dropout, self.training)
        t = ids_BT.shape[1]
        for layer in self.layers:
            x = layer(x, (self.cos[:t], self.sin[:t]))
        return F.linear(self.norm(x), self.embed_tokens.weight)


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text can be written in it. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, SCENE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


class Samples:
    """Training samples of `context` inputs and as many targets, drawn with a seed."""

    def __init__(self, text: str, tokenizer: Tokenizer, context: int, seed: int) -> None:
        self.context = context
        self.random = random.Random(seed)
        self.plain = torch.tensor(tokenizer.encode(text).ids)
        blank, end = tokenizer.encode("\n\n").ids, tokenizer.token_to_id(END)
        self.scene_id = tokenizer.token_to_id(SCENE)
        speeches = tokenizer.encode_batch([s for s in re.split(r"\n\n+", text) if s.strip()])
        self.starts, flat = [], []
        for speech in speeches:
            self.starts.append(len(flat))
            flat += [*speech.ids, end, *blank]
        self.scenes = torch.tensor(flat)
        self.starts = [at for at in self.starts if at + context < len(flat)]

    def batch(self, size: int, scene_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for _ in range(size):
            if self.random.random() < scene_share:
                at = self.random.choice(self.starts)
                first = torch.tensor([self.scene_id])
                rows.append(torch.cat((first, self.scenes[at : at + self.context])))
            else:
                at = self.random.randrange(len(self.plain) - self.context)
                rows.append(self.plain[at : at + self.context + 1])
        both = torch.stack(rows)
        return both[:, :-1], both[:, 1:]


def windows(ids: torch.Tensor, context: int, size: int) -> Iterator[torch.Tensor]:
    """Held-out text as batches [<= size, context + 1], every token predicted once."""
    rows = [ids[at : at + context + 1] for at in range(0, len(ids) - context, context)]
    for at in range(0, len(rows), size):
        yield torch.stack(rows[at : at + size])


@torch.no_grad()
def held_out_loss(model: Speaker, ids: torch.Tensor, device: str, autocast: Any) -> float:
    """Mean cross entropy in nats a token."""
    model.eval()
    total, count = 0.0, 0
    for both in windows(ids, model.shape.context, 64):
        both = both.to(device)
        with autocast():
            logits = model(both[:, :-1])
        total += float(
            F.cross_entropy(logits.float().flatten(0, 1), both[:, 1:].flatten(), reduction="sum")
        )
        count += both[:, 1:].numel()
    model.train()
    return total / count


@torch.no_grad()
def write_sample(model: Speaker, tokenizer: Tokenizer, prompt: str, device: str) -> str:
    """Some text at temperature 0.7, top-k 40; slow (no cache), for the card only."""
    model.eval()
    generator = torch.Generator().manual_seed(7)
    ids = tokenizer.encode(prompt).ids
    for _ in range(120):
        logits = model(torch.tensor([ids[-model.shape.context :]], device=device))[0, -1]
        top = logits.float().cpu().topk(40)
        chosen = torch.multinomial((top.values / 0.7).softmax(-1), 1, generator=generator)
        ids.append(int(top.indices[chosen]))
        if ids[-1] == tokenizer.token_to_id(END):
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run: its length, on which the learning rate's decay depends, and dropout."""

    steps: int
    dropout: float

    @classmethod
    def parse(cls, text: str) -> "Trial":
        steps, _, dropout = text.partition(":")
        return cls(steps=int(steps), dropout=float(dropout or 0.2))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    trial: Trial
    step: int = 0
    loss: float = math.inf
    state: dict[str, torch.Tensor] | None = None


def optimizer_of(model: Speaker, args: argparse.Namespace) -> torch.optim.AdamW:
    weights = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": weights, "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))


def rate_at(done: float, step: int, lr: float) -> float:
    """Warm-up over 50 steps, then a cosine down to 3 %. `done`: share of the run, 0..1."""
    return lr * min(1.0, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: Speaker,
    samples: Samples,
    held_out: torch.Tensor,
    trial: Trial,
    args: argparse.Namespace,
    minutes: float,
) -> Outcome:
    """Up to trial.steps or `minutes`, whichever comes first; the best weights seen win."""
    autocast = lambda: torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")  # noqa: E731
    optimizer = optimizer_of(model, args)
    best, worse, began = Outcome(trial=trial), 0, time.monotonic()
    console = Console()
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=1.0)
        for step in range(trial.steps + 1):
            spent = (time.monotonic() - began) / (60 * minutes)
            done = min(1.0, max(step / trial.steps, spent))
            if step % args.eval_every == 0 or done >= 1.0:
                loss = held_out_loss(model, held_out, args.device, autocast)
                text = (
                    f"{trial.steps} steps, dropout {trial.dropout:g}: step {step} "
                    f"held-out loss {loss:.3f} (best {min(loss, best.loss):.3f})"
                )
                progress.update(bar, completed=done, description=text)
                if not console.is_terminal:
                    console.print(text)
                worse += 1
                if loss < best.loss:
                    state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
                    best, worse = Outcome(trial=trial, step=step, loss=loss, state=state), 0
                if done >= 1.0 or worse >= args.patience:
                    break
            for group in optimizer.param_groups:
                group["lr"] = rate_at(done, step, args.lr)
            inputs, targets = (x.to(args.device) for x in samples.batch(args.batch, args.scenes))
            with autocast():
                logits = model(inputs)
            loss_now = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss_now.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return best


def train_all(
    shape: Shape, text: str, tokenizer: Tokenizer, held_out: torch.Tensor, args: argparse.Namespace
) -> tuple[Speaker, Outcome]:
    """Every trial from the same seed; the model of the best, in evaluation mode."""
    outcomes = []
    for trial in args.trials:
        torch.manual_seed(args.seed)
        model = Speaker(shape, trial.dropout).to(args.device)
        samples = Samples(text, tokenizer, shape.context, args.seed)
        minutes = args.minutes / len(args.trials)
        outcomes.append(train(model, samples, held_out, trial, args, minutes))
    best = min(outcomes, key=lambda outcome: outcome.loss)
    if best.state is None:
        raise SystemExit("no finite held-out loss was seen; nothing written. Try a smaller --lr")
    model = Speaker(shape, 0.0)
    model.load_state_dict(best.state)
    return model.to(args.device).eval(), best


def export(
    out: Path,
    model: Speaker,
    tokenizer: Tokenizer,
    card: str,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shape, end_id = model.shape, tokenizer.token_to_id(END)
    tensors = {f"model.{k}": v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    write_safetensors(out / "model.safetensors", tensors)
    write_json(
        out / "config.json",
        config_json(
            "LlamaForCausalLM",
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            context=shape.context,
            tied=True,
            end_id=end_id,
            rope_theta=shape.rope_theta,
        ),
    )
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "additional_special_tokens": [SCENE],
            "model_max_length": shape.context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_json(
        out / "generation_config.json",
        {"do_sample": True, "temperature": 0.7, "top_k": 40, "eos_token_id": end_id},
    )
    (out / "README.md").write_text(card, encoding="utf-8")


CARD = """---
license: apache-2.0
language: en
---
# speaker

A language model of {params:,} weights that writes lines of a play. It is the model of weft's demo
that answers in words: small enough for two CPU cores and a git repository, of no other use.

- **Architecture**: LlamaForCausalLM, {shape}; embeddings tied; bfloat16.
- **Data**: {text_bytes:,} bytes of dialogue from William Shakespeare's plays ("tiny Shakespeare",
  see `demo/data/SOURCE.md`), in the public domain. The last 5 % were held out.
- **Tokenizer**: byte-level BPE trained on the same text; {bytes_per_token:.2f} bytes a token.
- **Training**: `{command}` ({device}, torch {torch}): AdamW, batches of {batch}
  samples, weight decay {decay}, early stopping; {trials} runs of different length and dropout in
  {seconds:.0f} s, of which the best on the held-out text was kept: {steps} steps, dropout
  {dropout:g}, best at step {step}. Another machine or torch gives slightly other weights.
- **Held-out loss**: {loss:.3f} nats a token = {bits:.3f} bits a byte.
- **Chat**: messages become speeches (`user` speaks as First Citizen, `assistant` as MENENIUS), each
  ended by `<|end|>`; the template begins with `<|scene|>`. Plain completions need neither.
- **Limits**: it knows nothing, follows no instruction, makes up words, and repeats what a text of
  1600 says about people. Context {context} tokens.
- **Licence**: weights Apache-2.0, like the project; text in the public domain.

Sample (temperature 0.7, top-k 40), prompt `ROMEO:`:

```
{sample}
```
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's small speaking model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "speaker")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--minutes", type=float, default=4.0, help="upper bound of training time")
    parser.add_argument(
        "--trials",
        type=Trial.parse,
        nargs="+",
        default=[Trial.parse(text) for text in ("300:0.15", "600:0.2", "1200:0.3")],
        metavar="STEPS:DROPOUT",
        help="runs to make; they share --minutes",
    )
    parser.add_argument("--batch", type=int, default=64, help="samples of --context tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--scenes", type=float, default=0.35, help="share of chat-like samples")
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--patience", type=int, default=8, help="evaluations without a better one")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main() -> None:
    args = arguments()
    torch.set_float32_matmul_precision("high")
    text = gzip.decompress(DATA.read_bytes()).decode("utf-8")
    cut = text.index("\n\n", int(len(text) * 0.95)) + 2
    shape = Shape(num_layers=args.layers, context=args.context)
    tokenizer = train_tokenizer(text[:cut], shape.vocab_size)
    held_out = torch.tensor(tokenizer.encode(text[cut:]).ids)
    bytes_per_token = len(text[cut:].encode()) / len(held_out)
    began = time.monotonic()
    model, best = train_all(shape, text[:cut], tokenizer, held_out, args)
    seconds = time.monotonic() - began
    params = sum(p.numel() for p in model.parameters())
    sample = write_sample(model, tokenizer, "ROMEO:", args.device)
    card = CARD.format(
        params=params,
        shape=f"{shape.num_layers} layers, hidden {shape.hidden_size}, MLP "
        f"{shape.intermediate_size}, {shape.num_q_heads} query and {shape.num_kv_heads} KV heads "
        f"of {shape.head_dim}, "
        f"vocabulary {shape.vocab_size}",
        text_bytes=len(text.encode()),
        bytes_per_token=bytes_per_token,
        command=f"demo/train_speaker.py --seed {args.seed}",
        device=torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        torch=torch.__version__,
        batch=args.batch,
        decay=args.weight_decay,
        trials=len(args.trials),
        dropout=best.trial.dropout,
        step=best.step,
        steps=best.trial.steps,
        seconds=seconds,
        loss=best.loss,
        bits=best.loss / math.log(2) / bytes_per_token,
        context=shape.context,
        sample=sample.strip(),
    )
    staging = args.out.with_name(args.out.name + ".new")
    export(staging, model, tokenizer, card)
    shutil.copytree(staging, args.out, dirs_exist_ok=True)
    shutil.rmtree(staging)
    print(sample)
    print(f"{params:,} weights, held-out loss {best.loss:.3f}: {best.trial}, step {best.step}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
