"""Does measuring cost what it should? `python tests/tools/reach.py [--threads N] [PART ...]`, by default all parts.

overhead  processor time of a perplexity over that of the bare loop of its forward passes: at most 5 % more
memory    peak of loading a bfloat16 checkpoint whose float32 weights take N bytes, and of its perplexity in windows
          of 2,048 tokens: at most 1.3 N + 1 GB, with 32,000, 131,072 and 262,144 tokens in the vocabulary
gptq      GPTQ of a model built like Gemma 3 270M on 32 x 512 tokens: at most 10 minutes and 6 GB

Weights and tokens are drawn at random: neither changes what this costs. Each figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("overhead", "memory", "gptq")
WINDOW = 2048
GB = 1e9


def llama(vocabulary: int, hidden: int, layers: int, tied: bool):
    """A Llama of these sizes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=WINDOW,
        tie_word_embeddings=tied,
    )  # fmt: skip


def gemma():
    """The sizes of google/gemma-3-270m."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, max_position_embeddings=32_768, tie_word_embeddings=True,
    )  # fmt: skip


MODELS = {
    "32k": lambda: llama(32_000, 1024, 14, tied=False),
    "128k": lambda: llama(131_072, 1024, 10, tied=True),
    "256k": lambda: llama(262_144, 768, 8, tied=True),
    "gemma": gemma,
}


def save(name: str, folder: Path) -> None:
    """A checkpoint as published ones are: bfloat16, in safetensors, with a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from requant.catalog.reference.models import load_tokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


def windows(n: int, vocabulary: int):
    """n windows of random tokens, as the GPTQ protocol of WikiText-2 cuts them."""
    import torch

    from requant.catalog.corpus import Checks, Window, Windows

    ids = torch.randint(0, vocabulary, (n, WINDOW), generator=torch.Generator().manual_seed(0))
    return Windows("gptq-wikitext2-2048/1", tuple(Window(each, 1) for each in ids), Checks())


def overhead(_folder: Path) -> dict[str, float]:
    """Processor seconds of both, in turns."""
    import torch
    from transformers import AutoModelForCausalLM

    from requant.catalog.evaluate import evaluate

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama(32_000, 512, 8, tied=True)).eval().requires_grad_(False)
    cut = windows(4, 32_000)
    seconds = {"loop": 0.0, "harness": 0.0}
    for _ in range(3):
        began = time.process_time()
        with torch.inference_mode():
            for start in range(0, len(cut.windows), 2):
                model(torch.stack([window.ids for window in cut.windows[start : start + 2]]), use_cache=False)
        seconds["loop"] += time.process_time() - began
        began = time.process_time()
        evaluate(model, None, cut.protocol, windows=cut)
        seconds["harness"] += time.process_time() - began
    return seconds


def memory(folder: Path) -> dict[str, float]:
    """Bytes of the float32 weights, and the peak after loading and after two windows."""
    from requant.catalog.evaluate import evaluate
    from requant.catalog.weights import load_checkpoint

    found = {"start": peak()}
    model, tokenizer = load_checkpoint(folder)
    found |= {"weights": sum(4 * p.numel() for p in model.parameters()), "loaded": peak()}
    cut = windows(2, model.config.vocab_size)
    evaluate(model, tokenizer, cut.protocol, windows=cut)
    return found | {"peak": peak()}


def gptq(folder: Path) -> dict[str, float]:
    """Seconds and peak bytes of quantizing, the loading of the checkpoint included in the peak."""
    from requant.catalog.weights import load_checkpoint
    from requant.reference_impls import gptq

    model, _ = load_checkpoint(folder)
    calib = [window.ids for window in windows(8, model.config.vocab_size).windows]
    import torch

    began, used = time.perf_counter(), time.process_time()
    gptq.quantize(model, torch.stack(calib).view(32, 512), gptq.Config())
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used, "peak": peak()}


def peak() -> float:
    """The most bytes this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def alone(part: str, name: str, folder: Path, threads: int) -> dict[str, float]:
    """What a part returns in a new process."""
    command = [sys.executable, __file__, "--threads", str(threads), "--alone", part, name, str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def line(text: str, good: bool) -> bool:
    sys.stdout.write(f"{'ok  ' if good else 'MISS'} {text}\n")
    sys.stdout.flush()
    return good


def report(parts: list[str], threads: int) -> bool:
    """Measure and print. Returns: whether every figure is within its bound."""
    good = True
    if "overhead" in parts:
        found = alone("overhead", "-", Path(), 1)
        more = found["harness"] / found["loop"] - 1
        good &= line(
            f"overhead: {100 * more:+.1f} % processor time over the bare loop (at most 5)", more <= 0.05
        )
    for name in MODELS if "memory" in parts or "gptq" in parts else ():
        if (name == "gemma") != ("gptq" in parts) and ("memory" not in parts or name == "gemma"):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            alone("save", name, folder, threads)
            if name == "gemma":
                found = alone("gptq", name, folder, threads)
                spent = f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} s of {threads} threads"
                text = f"gptq: {spent} (at most 600), "
                within = found["seconds"] <= 600 and found["peak"] <= 6 * GB
                good &= line(f"{text}peak {found['peak'] / GB:.2f} GB (at most 6)", within)
                continue
            found = alone("memory", name, folder, threads)
            bound = 1.3 * found["weights"] + GB
            start, weights, loaded, most = (found[key] / GB for key in ("start", "weights", "loaded", "peak"))
            text = f"memory, vocabulary {name}: weights {weights:.2f} GB, start {start:.2f}, loaded {loaded:.2f}, "
            good &= line(f"{text}peak {most:.2f} (at most {bound / GB:.2f})", found["peak"] <= bound)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if given.alone is None:
        sys.exit(0 if report(given.parts or list(PARTS), given.threads) else 1)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    part, name, folder = given.alone
    if part == "save":
        save(name, Path(folder))
        found = {}
    else:
        found = globals()[part](Path(folder))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
