"""Messages: what, got, expected, what to do; and the nearest valid names."""

import pytest

from microtome.common import errors
from microtome.common.errors import ArtifactError, ConfigError, MicrotomeError, ModelError, nearest, unknown_name


def test_message_has_its_four_parts_in_order() -> None:
    error = MicrotomeError("The store is of another model", got="gpt2", expected="smollm2-135m", fix="Harvest it anew")
    assert str(error) == "The store is of another model. Got: gpt2. Expected: smollm2-135m. Harvest it anew."
    assert (error.what, error.got, error.expected, error.fix) == (
        "The store is of another model",
        "gpt2",
        "smollm2-135m",
        "Harvest it anew",
    )


@pytest.mark.parametrize("end", [".", "!", "?"])
def test_no_second_full_stop(end: str) -> None:
    assert str(MicrotomeError(f"Stop{end}", fix=f"Go{end}")) == f"Stop{end} Go{end}"


def test_what_was_got_may_be_a_sentence() -> None:
    error = MicrotomeError("Could not load it", got="Not in the cached files.", expected="a folder.")
    assert str(error) == "Could not load it. Got: Not in the cached files. Expected: a folder."
    assert error.got == "Not in the cached files."


def test_zero_and_empty_are_things_that_one_can_get() -> None:
    assert str(MicrotomeError("Too few", got=0)) == "Too few. Got: 0."


def test_every_kind_is_a_microtome_error() -> None:
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(kinds) >= 6
    assert all(issubclass(kind, MicrotomeError) for kind in kinds)


def test_nearest_orders_by_likeness() -> None:
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "hook_embed"]
    assert nearest("blocks.0.hook_resid_pro", names)[0] == "blocks.0.hook_resid_pre"
    assert nearest("zzz", names) == []


def test_unknown_name_lists_all_when_few() -> None:
    error = unknown_name("dtype", "fp23", ["fp32", "bf16", "fp16"])
    assert isinstance(error, ConfigError)
    assert str(error).startswith("Unknown dtype 'fp23'. Expected: one of bf16, fp16, fp32. Did you mean 'fp32'")


def test_unknown_name_counts_when_many() -> None:
    error = unknown_name("hook", "hook_33", [f"hook_{i}" for i in range(30)], ModelError)
    assert isinstance(error, ModelError)
    assert "one of 30 names" in str(error)
    assert "Did you mean" in str(error)


def test_no_guess_when_nothing_is_near() -> None:
    assert "Did you mean" not in str(unknown_name("part", "qqqq", ["attn", "mlp"], ArtifactError))
