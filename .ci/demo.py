"""Exits with an error unless the demo's core runs by the installed fxbt, from a folder that is no checkout of it.

`make test-wheel` gives it to the environment of the wheel: `python -I - examples/embed_sentences.py < .ci/demo.py`.
"""

import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import fxbt

logging.disable_progress_bar()
assert "site-packages" in Path(fxbt.__file__).parts, f"{fxbt.__file__} is no installed fxbt"
assert not Path("fxbt").exists(), f"{Path.cwd()} is a checkout"

demo = runpy.run_path(sys.argv[1])
directory = demo["model_directory"]()
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
fast = fxbt.optimize(model)
for sentences in (demo["SENTENCES"], demo["SENTENCES"][:1], demo["SENTENCES"][1:4]):
    batch = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    demo["embed"](fast, batch)  # the first call captures, and returns the original's own output
    difference = (demo["embed"](fast, batch) - demo["embed"](model, batch)).abs().max().item()
    assert difference < 1e-5, f"{len(sentences)} sentences differ by {difference}"
assert not fast.report.fallbacks, fast.report.fallbacks
assert len(fast.report.graphs) == 1, list(fast.report.graphs)
assert fast.report.hits["encoder_layer"] == model.config.num_hidden_layers, fast.report.hits
print(f"torch {torch.__version__}: the demo's core runs from {Path(fxbt.__file__).parent}, in {Path.cwd()}")
