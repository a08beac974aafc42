"""Memory on a small scale; tests/tools/reach.py measures time and memory on models of a real size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import made
from transformers import AutoModelForCausalLM, LlamaConfig

from requant.catalog.reference.models import load_tokenizer

LOAD = """
import re, sys
from pathlib import Path
from requant.catalog.weights import load_checkpoint

def peak():  # of this program: what getrusage gives begins with that of the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load_checkpoint(Path(sys.argv[1]))  # what is imported on the way does not count
before = peak()
model, _ = load_checkpoint(Path(sys.argv[2]))
print(peak() - before, sum(4 * parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_checkpoint_in_16_bits_is_not_held_beside_its_float32_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=20_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    large = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, model in (("small", made("llama", torch.bfloat16)), ("large", large)):
        model.save_pretrained(tmp_path / name)
        load_tokenizer().save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    more, weights = map(int, output.split())
    assert weights > 2e8
    assert 0.8 * weights < more < 1.25 * weights  # 1.5 with the pages of a mapped file
