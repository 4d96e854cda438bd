"""The sides of `microtome bench model`: how each opens the model, and what it is asked to do.

`open_side` opens one, `works` are its pieces of work by name. Run as a program, in a process of its own, this module
measures one side from the start: seconds to import it, seconds to open the model, bytes held, and the peak of each work.
Therefore nothing heavy is imported above.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMPORTS = {
    "huggingface": ("torch", "transformers", "transformers.models.auto"),
    "microtome": ("microtome.model.load",),
    "transformerlens": ("transformer_lens.model_bridge",),
}
Works = dict[str, Callable[[], Any]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What all sides work on: `tokens` [batch, pos] to read, the first `prompt_tokens` of each row to continue by
    `new_tokens`, one point and all the points that a full cache holds."""

    tokens: list[list[int]]
    prompt_tokens: int
    new_tokens: int
    point: str
    full_cache: Sequence[str]
    device: str

    def tensor(self) -> "Tensor":
        import torch

        return torch.tensor(self.tokens, device=self.device)


def open_side(name: str, model: str, device: str) -> Any:
    """The model from its folder (or hub id) in fp32, as the side's users open it, its tokenizer included."""
    if name == "microtome":
        from microtome.model import load_model

        return load_model(model, dtype="fp32", device=device)
    import torch

    if name == "transformerlens":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(model, dtype=torch.float32, device=device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(model)
    hf: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return hf.to(device).eval()


def works(name: str, model: Any, inputs: Inputs) -> Works:
    """The pieces of work of a side with its open model."""
    return {"huggingface": _huggingface, "microtome": _microtome, "transformerlens": _transformerlens}[name](
        model, inputs
    )


def _huggingface(hf: Any, inputs: Inputs) -> Works:
    from transformers import GenerationConfig

    tokens = inputs.tensor()
    prompt = tokens[:, : inputs.prompt_tokens]
    greedy = GenerationConfig(max_new_tokens=inputs.new_tokens, do_sample=False, pad_token_id=0)
    return {
        "forward": lambda: hf(input_ids=tokens, use_cache=False).logits,
        "generate": lambda: hf.generate(
            input_ids=prompt, attention_mask=prompt.new_ones(prompt.shape), generation_config=greedy
        ),
    }


def _microtome(model: Any, inputs: Inputs) -> Works:
    tokens = inputs.tensor()
    prompt = tokens[:, : inputs.prompt_tokens]
    return {
        "forward": lambda: model(tokens),
        "one_point": lambda: model.run_with_cache(tokens, inputs.point),
        "all_residual": lambda: model.run_with_cache(tokens, "blocks.*.hook_resid_*"),
        "full_cache": lambda: model.run_with_cache(tokens, inputs.full_cache),
        "generate": lambda: model.generate_details(prompt, max_new_tokens=inputs.new_tokens),
    }


def _transformerlens(model: Any, inputs: Inputs) -> Works:
    tokens = inputs.tensor()
    prompt = tokens[:, : inputs.prompt_tokens]
    full = frozenset(inputs.full_cache)
    return {
        "forward": lambda: model(tokens),
        "one_point": lambda: model.run_with_cache(tokens, names_filter=inputs.point),
        "all_residual": lambda: model.run_with_cache(tokens, names_filter=lambda name: "hook_resid_" in name),
        "full_cache": lambda: model.run_with_cache(tokens, names_filter=lambda name: name in full),
        "generate": lambda: model.generate(
            prompt,
            max_new_tokens=inputs.new_tokens,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        ),
    }


def measure(name: str, model: str, inputs: Inputs) -> dict[str, Any]:
    """Seconds to import and to open the side, and bytes: held then, and at the peak of each work."""
    began = time.perf_counter()
    for module in IMPORTS[name]:
        importlib.import_module(module)
    imported = time.perf_counter()
    side = open_side(name, model, inputs.device)
    loaded = time.perf_counter()

    import torch

    from benchmarks.common import resident_bytes

    held, peaks = resident_bytes("VmRSS"), {}
    with torch.no_grad():
        for work, run in works(name, side, inputs).items():
            _forget_peak()
            run()
            peaks[work] = resident_bytes("VmHWM")
    return {
        "import_seconds": imported - began,
        "load_seconds": loaded - imported,
        "loaded_bytes": held,
        "peak_bytes": peaks,
    }


def _forget_peak() -> None:
    """Let the largest memory ever held be counted anew; where the system cannot (it is Linux's), it is of all works so
    far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    answer = measure(asked["name"], asked["model"], Inputs(**asked["inputs"]))
    sys.stdout.write(json.dumps(answer) + "\n")
