"""Hook names: parsed once, sorted by depth, unknown ones refused with the nearest."""

import pytest

from microtome.common.errors import ModelError
from microtome.model import HookedModel
from microtome.model.names import AFTER_BLOCKS, BEFORE_BLOCKS, IN_BLOCK, HookName


def test_every_point_survives_a_round_trip() -> None:
    names = [*BEFORE_BLOCKS, *(f"blocks.7.{point}" for point in IN_BLOCK), *AFTER_BLOCKS]
    assert [str(HookName.parse(name)) for name in names] == names


def test_names_sort_along_the_forward_pass() -> None:
    in_order = ["hook_embed", "blocks.2.hook_resid_pre", "blocks.2.mlp.hook_post", "blocks.10.hook_resid_pre"]
    parsed = [HookName.parse(name) for name in reversed([*in_order, "unembed.hook_out"])]
    assert [str(name) for name in sorted(parsed)] == [*in_order, "unembed.hook_out"]


@pytest.mark.parametrize("wrong", ["blocks.3.hook_resid_per", "hook_embd", "blocks.x.hook_resid_pre", "layers.3", ""])
def test_an_unknown_name_is_refused(wrong: str) -> None:
    with pytest.raises(ModelError, match="Unknown hook point"):
        HookName.parse(wrong)


def test_the_refusal_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"blocks\.3\.hook_resid_pre"):
        HookName.parse("blocks.3.hook_resid_per")


@pytest.mark.parametrize("digits", ["1" * 10, "1" * 5000], ids=["ten", "thousands"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.attn.hook_z.{}", "Expected: a head from 0 to 3"),
        ("blocks.{}.hook_resid_pre", "Expected: a layer from 0 to 2"),
        ("blocks.{}.attn.hook_z.0", "Expected: a layer from 0 to 2"),
        ("blocks.1.mlp.experts.{}.hook_pre", "Unknown hook point of tiny-llama"),
    ],
    ids=["head", "layer", "layer-of-head", "expert"],
)
def test_numbers_of_many_digits(name: str, message: str, digits: str, tiny_llama: HookedModel) -> None:
    """`int` refuses more than 4,300 with a ValueError."""
    with pytest.raises(ModelError, match=message):
        tiny_llama.resolve(name.format(digits))
    with pytest.raises(ModelError, match="Unknown hook point"):
        HookName.parse(name.format(digits))
    with pytest.raises(ModelError, match="Unknown hook point"):
        tiny_llama.resolve("blocks.².hook_resid_pre")  # a digit that is no number
