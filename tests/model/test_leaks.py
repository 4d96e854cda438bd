"""Whatever happens inside a run, the module is afterwards as it was."""

import pytest
import torch
from tests.model.families import make
from torch import Tensor, nn

from microtome.common.errors import ModelError
from microtome.model import HookedModel, edits

TOKENS = torch.tensor([[0, 17, 45, 80, 301]])
KINDS = pytest.mark.parametrize("kind", ["llama", "gptj", "falcon-40b", "mixtral", "gemma2", "opt"])


def state(module: nn.Module) -> list[tuple[int, int, bool]]:
    """The hooks of each submodule, and whether its forward was replaced."""
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in module.modules()]


class Stop(Exception):  # noqa: N818
    """Raised inside a hook."""


@KINDS
def test_an_exception_inside_a_hook_leaves_nothing_behind(kind: str) -> None:
    model = make(kind)
    before, clean = state(model.hf), model(TOKENS)

    def fail(act: Tensor, hook: object) -> None:
        raise Stop

    for name in model.resolve(lambda name: "blocks.1" in name or "blocks" not in name):
        with pytest.raises(Stop):
            model.run_with_hooks(TOKENS, [(str(name), fail)])
        assert state(model.hf) == before, name
    assert torch.equal(model(TOKENS), clean)


@KINDS
def test_blocks_nest_and_an_inner_one_that_fails_leaves_the_outer_one_at_work(kind: str) -> None:
    model = make(kind)
    before, clean = state(model.hf), model(TOKENS)
    outer = edits.zero("blocks.0.attn.hook_pattern", head=1)
    with model.edited(outer):
        edited = model(TOKENS)
        with (
            pytest.raises(ModelError, match="never reached"),
            model.hooks([("blocks.2.hook_mlp_out", lambda a, h: None)]),
        ):
            model.activations(TOKENS, "blocks.0.hook_resid_pre")
        seen = model.activations(TOKENS, "blocks.0.attn.hook_pattern")["pattern", 0]
        assert (seen[:, 1] == 0).all(), "a capture inside sees what the block outside changed"
        assert torch.equal(model(TOKENS), edited)
    assert not torch.equal(edited, clean)
    assert torch.equal(model(TOKENS), clean)
    assert state(model.hf) == before


def test_a_stopped_run_leaves_nothing_behind(tiny_llama: HookedModel) -> None:
    before = state(tiny_llama.hf)
    for name in tiny_llama.resolve("*"):
        tiny_llama.activations(TOKENS, str(name))
    assert state(tiny_llama.hf) == before


def test_a_captured_tensor_that_is_changed_in_place_later_is_an_error(tiny_llama: HookedModel) -> None:
    """The stream behind block 0 is the very tensor in front of block 1."""

    def in_place(act: Tensor, hook: object) -> None:
        act.zero_()

    with (
        pytest.raises(ModelError, match=r"captured at blocks\.0\.hook_resid_post was changed in place"),
        tiny_llama.hooks([("blocks.1.hook_resid_pre", in_place)]),
    ):
        tiny_llama.run_with_cache(TOKENS, "blocks.0.hook_resid_post")
