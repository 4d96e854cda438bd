"""Path patching against the protocol written out with plain hooks: a run for each step, nothing shared, nothing skipped."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tests.model.families import make
from torch import Tensor

from microtome.circuits import metrics
from microtome.circuits.nodes import Node, parse_nodes
from microtome.circuits.paths import path_patching, path_patching_sweep
from microtome.common.errors import InputError
from microtome.model import HookedModel
from microtome.model.hook_point import HookPoint
from microtome.model.prompts import Prompts

PROMPTS, POSITIONS = 3, 6


def pair_of_tokens() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    clean = torch.randint(3, 320, (PROMPTS, POSITIONS), generator=draws)
    corrupt = clean.clone()
    corrupt[:, 2] = torch.randint(3, 320, (PROMPTS,), generator=draws)
    corrupt[1, 1] = 7
    return clean, corrupt


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def plain(
    model: HookedModel,
    clean: Tensor,
    corrupt: Tensor,
    senders: Sequence[Node],
    receivers: Sequence[Node],
    *,
    sent_at: Sequence[int] = tuple(range(POSITIONS)),
    read_at: Sequence[int] = tuple(range(POSITIONS)),
    freeze_mlps: bool = False,
) -> Tensor:
    """The steps of appendix B of the paper, with hooks."""
    written = [
        name for name in model.hook_points if name.endswith(("attn.hook_z", "mlp_out", "blocks.0.hook_resid_pre"))
    ]
    on_clean, on_corrupt = model.activations(clean, written), model.activations(corrupt, written)

    def hold(act: Tensor, hook: HookPoint) -> Tensor:
        new = on_clean[hook.name].clone()
        for node in senders:
            if str(node.written) == hook.name:
                part = (slice(None), list(sent_at)) if node.index is None else (slice(None), list(sent_at), node.index)
                new[part] = on_corrupt[hook.name][part]
        return new

    held = [
        name for name in model.hook_points if name.endswith("attn.hook_z") or (freeze_mlps and name.endswith("mlp_out"))
    ]
    held += [str(node.written) for node in senders if str(node.written) not in held]
    if receivers[0].kind == "logits":
        return difference(model.run_with_hooks(clean, [(held, hold)]))
    stored: dict[str, Tensor] = {}

    def store(act: Tensor, hook: HookPoint) -> None:
        stored[hook.name] = act.clone()

    model.run_with_hooks(clean, [(held, hold), ([str(node.read) for node in receivers], store)])

    def replace(act: Tensor, hook: HookPoint) -> Tensor:
        new = act.clone()
        for node in receivers:
            if str(node.read) == hook.name:
                part = (slice(None), list(read_at)) if node.index is None else (slice(None), list(read_at), node.index)
                new[part] = stored[hook.name][part]
        return new

    return difference(model.run_with_hooks(clean, [([str(node.read) for node in receivers], replace)]))


FAMILIES = ["gpt2", "llama", "gpt_neox", "gptj", "falcon-40b", "bloom", "opt", "gemma2", "gemma3", "mixtral", "olmo2"]
PATHS = [
    (["L0.H1"], ["logits"]),
    (["L0.H1", "L1.H2", "L0.mlp"], ["logits"]),
    (["embed"], ["L1.H0.q", "L1.H3.q"]),
    (["L0.H2", "L0.mlp"], ["L2.H1.q", "L1.KV1.k", "L2.KV0.v"]),
    (["L0.H3"], ["L2.mlp"]),
    (["L0.H0", "L1.H1"], ["L2.resid_pre"]),
]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_paths_are_those_of_the_plain_protocol(kind: str) -> None:
    model, (clean, corrupt) = make(kind), pair_of_tokens()
    metric = metrics.logit_difference(model, 5, 9)
    moved = 0.0
    for senders, receivers in PATHS:
        froms, tos = (parse_nodes(some, model.config) for some in (senders, receivers))
        for frozen in (False, True):
            found = path_patching(
                model, clean, corrupt, senders, receivers, metric=metric, freeze_mlps=frozen, max_rows=4
            )
            wanted = plain(model, clean, corrupt, froms, tos, freeze_mlps=frozen)
            assert torch.allclose(found.values, wanted, atol=1e-4, rtol=1e-4), (senders, receivers, frozen)
            moved = max(moved, float((wanted - difference(model(clean))).abs().max()))
    assert moved > 0.1


def test_positions_of_senders_and_receivers() -> None:
    model, (clean, corrupt) = make("gpt2"), pair_of_tokens()
    metric = metrics.logit_difference(model, 5, 9)
    froms, tos = parse_nodes(["L0.H1", "L0.H2"], model.config), parse_nodes(["L2.H0.q", "L2.KV2.v"], model.config)
    for sent_at, read_at in (((3,), (3, 4, 5)), ((2, 4), (4,)), (tuple(range(6)), (5,)), ((5,), (5,))):
        found = path_patching(
            model, clean, corrupt, froms, tos, metric=metric, sender_positions=sent_at, receiver_positions=read_at
        )
        wanted = plain(model, clean, corrupt, froms, tos, sent_at=sent_at, read_at=read_at)
        assert torch.allclose(found.values, wanted, atol=1e-4), (sent_at, read_at)
    own = torch.tensor([2, 3, 5])
    found = path_patching(model, clean, corrupt, froms, tos, metric=metric, sender_positions=own)
    for i, position in enumerate(own.tolist()):
        wanted = plain(model, clean[i : i + 1], corrupt[i : i + 1], froms, tos, sent_at=(position,))
        assert float(found.values[i]) == pytest.approx(float(wanted), abs=1e-4)


def test_a_metric_of_all_positions_and_padded_prompts() -> None:
    model, (clean, corrupt) = make("llama"), pair_of_tokens()
    froms, tos = parse_nodes("L0.H1", model.config), parse_nodes("logits", model.config)
    found = path_patching(model, clean, corrupt, froms, tos, metric=lambda logits: logits[..., 4].sum(-1))
    held = model.run_with_cache(clean)[1], model.run_with_cache(corrupt)[1]

    def hold(act: Tensor, hook: HookPoint) -> Tensor:
        new = held[0][hook.name].clone()
        if hook.layer() == 0:
            new[:, :, 1] = held[1][hook.name][:, :, 1]
        return new

    wanted = model.run_with_hooks(clean, [("blocks.*.attn.hook_z", hold)])[..., 4].sum(-1)
    assert torch.allclose(found.values, wanted, atol=1e-3)

    mask = torch.ones(clean.shape, dtype=torch.bool)
    mask[0, :1] = False
    metric = metrics.logit_difference(model, 5, 9)
    padded = path_patching(model, Prompts(clean, mask), Prompts(corrupt, mask), "L0.H1", "L2.H0.q", metric=metric)
    alone = path_patching(model, clean[:1, 1:], corrupt[:1, 1:], "L0.H1", "L2.H0.q", metric=metric)
    assert float(padded.values[0]) == pytest.approx(float(alone.values[0]), abs=1e-4)


def test_a_sweep_is_each_head_alone() -> None:
    model, (clean, corrupt) = make("llama"), pair_of_tokens()
    metric = metrics.logit_difference(model, 5, 9)
    for receivers in ("logits", ["L2.H1.q", "L2.KV1.v"]):
        swept = path_patching_sweep(model, clean, corrupt, receivers, metric=metric, max_rows=7)
        assert swept.values.shape == (3, 4, PROMPTS)
        assert swept.clean is not None
        for layer in range(3):
            for head in range(4):
                if receivers != "logits" and layer == 2:
                    assert torch.equal(swept.values[layer, head], swept.clean)
                    continue
                alone = path_patching(model, clean, corrupt, f"L{layer}.H{head}", receivers, metric=metric)
                assert torch.allclose(swept.values[layer, head], alone.values, atol=1e-5)
        assert torch.allclose(swept.clean, difference(model(clean)), atol=1e-5)
        assert swept.corrupt is not None
        assert torch.allclose(swept.corrupt, difference(model(corrupt)), atol=1e-5)
    mlps = path_patching_sweep(model, clean, corrupt, "logits", metric=metric, over="mlp")
    alone = path_patching(model, clean, corrupt, "L1.mlp", "logits", metric=metric)
    assert torch.allclose(mlps.values[1], alone.values, atol=1e-5)


def test_paths_that_are_none() -> None:
    model, (clean, corrupt) = make("gptj"), pair_of_tokens()
    metric = metrics.logit_difference(model, 5, 9)
    for senders, receivers, message in (
        ("L2.H0", "L1.H0.q", "comes after all receivers"),
        ("L1.H0", "L1.mlp", "comes after all receivers"),  # parallel blocks
        ("L0.H0.q", "logits", "cannot send"),
        ("L0.H0", "L1.H0", "cannot receive"),
        ("L0.H0", ["logits", "L1.H0.q"], "cannot be a receiver beside others"),
        ("L0.H0", "L1.resid_mid", "side by side"),
        ("L0.H9", "logits", "There is no L0.H9"),
        ([], "logits", "No node"),
    ):
        with pytest.raises(InputError, match=message):
            path_patching(model, clean, corrupt, senders, receivers, metric=metric)
    patchings = (
        partial(path_patching, model, clean, corrupt, "L0.H0", "logits", metric=metric),
        partial(path_patching_sweep, model, clean, corrupt, "logits", metric=metric),
    )
    through: list[tuple[dict[str, Any], str]] = [
        ({"receiver_positions": 3}, r"last token's logits.*Got: 3 \(prompt 0\).*receiver_positions=-1"),
        ({"receiver_positions": torch.tensor([5, 5, 4])}, r"leave out.*prompt 2"),
        (
            {"sender_positions": [2, 3]},
            r"none in common.*senders at positions \[2, 3\], receivers at the last position \(prompt 0\)",
        ),
    ]
    for patching, (positions, message) in itertools.product(patchings, through):
        with pytest.raises(InputError, match=message):
            patching(**positions)
    with pytest.raises(InputError, match=r"none in common.*senders at positions 2, receivers at positions \(3, 4\)"):
        path_patching(
            model, clean, corrupt, "L0.H0", "L1.H0.q", metric=metric, sender_positions=2, receiver_positions=(3, 4)
        )
    # Row 1 differs from its second token on, the others from the third.
    for positions in ({"sender_positions": [0, 1]}, {"sender_positions": 1, "receiver_positions": 1}):
        with pytest.raises(InputError, match=r"do not yet differ at any position.*senders at positions.*\(prompt 0\)"):
            path_patching(model, clean, corrupt, "L0.H0", "L1.H0.q", metric=metric, **positions)
    one_the_same = torch.cat([corrupt[:2], clean[2:]])
    for patching in patchings:
        with pytest.raises(InputError, match=r"do not yet differ at any position.*prompt 2.*leave out prompts"):
            partial(patching.func, model, clean, one_the_same, *patching.args[3:], **patching.keywords)()
    last = path_patching(model, clean, corrupt, "L0.H0", "logits", metric=metric, receiver_positions=-1)
    assert torch.equal(last.values, path_patching(model, clean, corrupt, "L0.H0", "logits", metric=metric).values)
    with pytest.raises(InputError, match="are the same"):
        path_patching(model, clean, clean, "L0.H0", "logits", metric=metric)
    with pytest.raises(InputError, match="different numbers of tokens"):
        path_patching(model, clean, corrupt[:, 1:], "L0.H0", "logits", metric=metric)
    with pytest.raises(InputError, match="heads or MLPs"):
        path_patching_sweep(model, clean, corrupt, "logits", metric=metric, over="embed")
