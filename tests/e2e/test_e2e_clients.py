"""Clients that people really use, each from an environment of its own (scripts/clients): litellm,
and lm-eval with local tasks, whose figures must be those of transformers on the same checkpoint."""

import gzip
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.pool_process import PoolProcess, running_pool

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".clients" / "bin" / "python"
SCRIPTS = ROOT / "tests" / "clients"
SPEAKER = ROOT / "demo" / "speaker"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="scripts/clients makes their environment"),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    folder = tmp_path_factory.mktemp("clients")
    models = [
        {"name": "speaker", "path": str(SPEAKER), "dtype": "float32"},
        {"name": "other", "path": str(SPEAKER), "dtype": "float64"},
    ]
    with running_pool(folder, models, engine={"device_memory": "64M"}) as running:
        running.wait_ready()
        yield running


def run_client(*command: str, cwd: Path | None = None) -> str:
    """Its stdout; it must not reach out of this machine."""
    home = str(cwd or ROOT / ".clients")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": home,
        "HF_HOME": f"{home}/hf",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [str(PYTHON), *command], cwd=cwd, env=environment, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return done.stdout.decode()


def test_litellm(pool: PoolProcess) -> None:
    out = run_client(str(SCRIPTS / "use_litellm.py"), pool.url, "speaker")
    seen = json.loads(out.splitlines()[-1])
    assert seen["text"] and seen["streamed"] == seen["text"] and seen["usage"] == 12
    assert seen["completion"] and seen["dimensions"] == 256
    assert isinstance(seen["shaped"]["yes"], bool) and seen["error"] == "404"


def lines(count: int) -> list[tuple[str, str]]:
    """(context, what follows) from the plays: two lines, and the next."""
    with gzip.open(ROOT / "demo" / "data" / "shakespeare.txt.gz", "rt") as file:
        speeches = [s for s in file.read().split("\n\n") if s.count("\n") >= 4]
    picked = random.Random(7).sample(speeches, count)
    return [(f"{a}\n{b}\n", c) for a, b, c, *_ in (speech.split("\n") for speech in picked)]


def lm_eval(pool: PoolProcess, folder: Path, task: str) -> tuple[dict[str, Any], list[Any]]:
    """The results and the samples of one task."""
    url = f"{pool.url}/v1/completions"
    model_args = f"model=speaker,base_url={url},num_concurrent=4,tokenizer={SPEAKER}"
    model_args += ",tokenizer_backend=huggingface,tokenized_requests=True,max_length=512"
    command = ["-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model_args]
    command += ["--tasks", task, "--include_path", str(folder), "--output_path", "out"]
    run_client(*command, "--log_samples", "--batch_size", "4", cwd=folder)
    results = json.loads(next(folder.glob("out/**/results_*.json")).read_text())
    samples = next(folder.glob(f"out/**/samples_{task}_*.jsonl")).read_text().splitlines()
    return results["results"][task], [json.loads(line) for line in samples]


def task_folder(tmp_path: Path, task: str, docs: list[dict[str, Any]]) -> Path:
    shutil.copy(SCRIPTS / "tasks" / f"{task}.yaml", tmp_path)
    text = "".join(json.dumps(doc) + "\n" for doc in docs)
    (tmp_path / f"{task}.jsonl").write_text(text)
    return tmp_path


class Oracle:
    """transformers on the same checkpoint in float32."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(SPEAKER)
        self.model = AutoModelForCausalLM.from_pretrained(SPEAKER, dtype=torch.float32)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.inference_mode()
    def loglikelihood(self, context: str, more: str) -> float:
        whole = self.ids(context + more)
        begin = len(self.ids(context.rstrip()))  # lm-eval counts blanks between as what follows
        logprobs = self.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logprobs[i - 1, whole[i]]) for i in range(begin, len(whole)))

    @torch.inference_mode()
    def continues(self, context: str, tokens: int) -> str:
        ids = torch.tensor([self.ids(context)])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
        )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_lm_eval_loglikelihood_is_that_of_transformers(pool: PoolProcess, tmp_path: Path) -> None:
    pairs = lines(24)
    docs = []
    for i, (context, follows) in enumerate(pairs):
        other = pairs[(i + 1) % len(pairs)][1]
        choices = [follows, other] if i % 2 else [other, follows]
        docs.append({"context": context, "choices": choices, "answer": i % 2 ^ 1})
    folder = task_folder(tmp_path, "lines_choice", docs)
    results, samples = lm_eval(pool, folder, "lines_choice")
    oracle, right = Oracle(), 0
    for sample in samples:
        doc = sample["doc"]
        expected = [oracle.loglikelihood(doc["context"], choice) for choice in doc["choices"]]
        got = [float(response[0][0]) for response in sample["resps"]]
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-3)
        right += (expected[1] > expected[0]) == (doc["answer"] == 1)
    assert results["acc,none"] == pytest.approx(right / len(docs))
    assert right / len(docs) > 0.5, "a trained model should tell the right line from a strange one"


def test_lm_eval_generation_is_that_of_transformers(pool: PoolProcess, tmp_path: Path) -> None:
    oracle = Oracle()
    docs = []
    for context, _ in lines(12):
        target = oracle.continues(context, 24).partition("\n\n")[0]
        docs.append({"context": context, "target": target})
    folder = task_folder(tmp_path, "lines_generate", docs)
    results, samples = lm_eval(pool, folder, "lines_generate")
    for sample in samples:
        assert sample["resps"][0][0] == sample["doc"]["target"]
    assert results["exact_match,none"] == 1.0
