"""The Triton kernels: interpreted on the CPU, compiled for GPUs that are not there, and, where there is one, run on it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dictionary import kernel_cases
from tests.dictionary.kernel_cases import ARCHITECTURES, CASES, difference, weights
from torch.utils._python_dispatch import TorchDispatchMode

import microtome
from microtome.activations import ArraySource
from microtome.dictionary import BatchTopKConfig, PAnnealConfig, TopKConfig, TrainConfig, kept, train
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.products import Transpose, sampled_products, starts_of, weighted_sums
from microtome.dictionary.stack import DataStatistics, Stack
from microtome.dictionary.trainer import Trainer

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; torch for CUDA brings it, elsewhere: pip install triton (700 MB on the disk)",
)


def answer(what: str, **environment: str) -> Any:
    """What `kernel_cases.py` prints in a process of its own."""
    folders = [str(Path(microtome.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(Path(kernel_cases.__file__)), what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    errors: dict[str, dict[str, float]] = answer("interpreted", TRITON_INTERPRET="1")
    return errors


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_compute_dense_products(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    assert interpreted[name].keys() == {"decode", "at_entries", "scatter"}
    assert max(interpreted[name].values()) < 1e-6


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_by_interpreted_kernels(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    assert interpreted["steps"][name] < 1e-5


@needs_triton
def test_kernels_compile_for_gpus_and_hold_no_atomic_additions(tmp_path: Path) -> None:
    programs = answer("compiled", TRITON_CACHE_DIR=str(tmp_path))
    assert len(programs) == 4
    for counts in programs.values():
        assert counts["stores"] > 0
        assert counts["atomics"] == 0


def test_starts_are_those_of_a_loop() -> None:
    groups = [1, 1, 4, 4, 4, 5]
    expected = [sum(group < first for group in groups) for first in range(8)]
    assert starts_of(torch.tensor(groups, dtype=torch.int32), 7).tolist() == expected
    assert starts_of(torch.zeros(0, dtype=torch.int64), 2).tolist() == [0, 0, 0]


class Waits(TorchDispatchMode):
    """Counts the operations after which Python, on a GPU, waits for a number: values that are read, and sizes that depend on
    values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sized = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        masked = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += func in _WAITING or sized or masked
        return func(*args, **kwargs)


aten = torch.ops.aten
_WAITING = {
    each.default for each in (aten._local_scalar_dense, aten.nonzero, aten.bincount, aten.masked_select, aten.equal)
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("topk", 0), ("batchtopk", 1), ("matryoshka", 1 + 2)],
    ids=["topk", "batchtopk", "matryoshka"],
)
def test_how_often_a_step_waits_for_a_gpu(name: str, expected: int) -> None:
    config = ARCHITECTURES[name]
    rule = make_rule([config])
    rule.products = "sparse"
    stack = Stack([config], rule, 9, 9)
    stack.initialise(DataStatistics(torch.zeros(1, 9), torch.zeros(1, 9), 9.0), [0])
    x, spread = torch.randn(1, 32, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([9.0])
    with Waits() as waits:  # type: ignore[no-untyped-call]
        stack.step(x, x, variance=spread)
        stack.before_update()
        stack.after_update()
    assert waits.count == expected


def test_a_step_in_pieces_reads_p_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the count of latents, which a GPU makes in large steps alone."""
    monkeypatch.setattr(kept, "_FEW", 8)
    config = PAnnealConfig(d_sae=20, p_start_at=0.0)
    rule = make_rule([config])
    rule.products = "dense"
    stack = Stack([config], rule, 9, 9)
    stack.initialise(DataStatistics(torch.zeros(1, 9), torch.zeros(1, 9), 9.0), [0])
    x, spread = torch.randn(1, 32, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([9.0])
    with Waits() as waits:  # type: ignore[no-untyped-call]
        stack.step(x, x, variance=spread, fraction=0.5)
        stack.before_update()
        stack.after_update()
    assert waits.count == 1 + 1
    assert float(stack.rule.get_buffer("p")) == pytest.approx(0.6)


@pytest.mark.gpu
def test_a_step_of_topk_does_not_wait_for_the_gpu(tmp_path: Path) -> None:
    rows = torch.randn(2048, 48, generator=torch.Generator().manual_seed(0))
    settings = TrainConfig(n_tokens=64 * 1024, batch_size=64, device="cuda")
    trainer = Trainer([TopKConfig(d_sae=640, k=4)], ArraySource(rows), tmp_path / "sae", settings)
    batches = trainer.begin()
    for _ in range(11):  # the first and the eleventh look for dead latents
        trainer.train_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer.train_step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu_compute_dense_products(name: str) -> None:
    assert max(CASES[name].errors("cuda").values()) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_on_a_gpu_is_the_cpu_s(name: str) -> None:
    assert difference(weights(ARCHITECTURES[name], "cuda"), weights(ARCHITECTURES[name], "cpu")) < 1e-4


@pytest.mark.gpu
def test_a_gpu_takes_millions_of_entries_and_gives_the_same_bits_again() -> None:
    n, f, d, k = 8192, 24576, 96, 300
    generator = torch.Generator("cuda").manual_seed(0)
    columns = torch.randint(f, (n * k,), device="cuda", generator=generator)
    columns[::k] = 5  # a latent that fires on every row
    starts, rows = torch.arange(0, n * k + 1, k, device="cuda"), torch.arange(n, device="cuda").repeat_interleave(k)
    x, weight, values = (
        torch.randn(*shape, device="cuda", generator=generator) for shape in ((n, d), (f, d), (n * k,))
    )
    transpose = Transpose(columns, rows, f)
    found = transpose.times(values, x)
    assert torch.equal(found, transpose.times(values, x))
    expected = torch.zeros(f, d, dtype=torch.float64, device="cuda")
    expected.index_add_(0, columns, values.double()[:, None] * x.double()[rows])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    sums = torch.zeros(f, dtype=torch.float64, device="cuda").index_add_(0, columns, values.double())
    torch.testing.assert_close(transpose.sums(values).double(), sums, rtol=1e-4, atol=1e-3)
    last = slice((n - 1) * k, None)
    decoded = weighted_sums(columns, starts, values, weight)
    torch.testing.assert_close(decoded[-1], values[last] @ weight[columns[last]], rtol=1e-4, atol=1e-3)
    at_entries = sampled_products(columns, starts, x, weight)
    torch.testing.assert_close(at_entries[last], weight[columns[last]] @ x[-1], rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [TopKConfig(d_sae=640, k=4), BatchTopKConfig(d_sae=640, k=2)], ids=["topk", "batchtopk"]
)
def test_a_whole_training_on_a_gpu_ends_where_the_cpu_s_does(config: TopKConfig, tmp_path: Path) -> None:
    rows = torch.randn(1024, 48, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 49).rsqrt()
    made: list[dict[str, torch.Tensor]] = []
    for device in ("cpu", "cuda", "cuda"):
        settings = TrainConfig(n_tokens=1024, batch_size=128, device=device, select_dtype="fp32", warmup_steps=2)
        [sae] = train(config, ArraySource(rows), out=tmp_path / str(len(made)), config=settings)
        made.append({name: p.detach().cpu() for name, p in sae.named_parameters()})
    assert difference(made[1], made[0]) < 1e-3
    assert all(torch.equal(made[1][name], made[2][name]) for name in made[1])
