"""Every reader against the library whose format it reads: our codes and reconstructions of the same inputs are theirs.

The folders under `fixtures` and the expectations beside them were made by the libraries themselves
(`scripts/dictionary_fixtures.py`; their versions are in `fixtures/versions.json`).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from microtome.dictionary import ContextDictionary
from microtome.dictionary.formats import log_sparsity, read_dictionary

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = sorted(
    str(file.relative_to(FIXTURES)).removesuffix(".expected.safetensors")
    for file in FIXTURES.rglob("*.expected.safetensors")
)
# SAELens keeps the scale of training in the codes of Llama Scope; here they are in the units of the activations.
THEIR_UNITS = {"llama_scope/Llama3_1-8B-Base-L3R-8x": torch.tensor(8**0.5 / 4.5)}


def test_there_are_fixtures_of_every_library() -> None:
    assert {name.split("/")[0] for name in EXPECTED} == {
        *("saelens", "saelens_checkpoint", "dictionary_learning", "sparsify", "clt", "llama_scope"),
        *("gemma-scope-2b-pt-res", "gemma-scope-2b-pt-transcoders", "gemma-scope-2-270m-pt", "llamascopium"),
        *("circuit_tracer", "qwen_scope", "saelens_temporal", "temporal"),
    }
    assert len(EXPECTED) == 113


@pytest.mark.parametrize("name", EXPECTED)
def test_codes_and_reconstructions_are_the_librarys(name: str) -> None:
    expected = load_file(FIXTURES / f"{name}.expected.safetensors")
    made = read_dictionary(FIXTURES / name).dictionary
    x = expected["x"]
    rows = made.in_context(x).flatten(0, 1) if isinstance(made, ContextDictionary) else x
    dense = made.encode(rows).to_dense().view(*x.shape[:-1], -1)
    assert (dense != 0).any(-1).sum() >= 5  # of 12 rows: the comparison is not of zeros
    torch.testing.assert_close(dense.sign(), expected["codes"].sign())
    torch.testing.assert_close(made(x), expected["out"], rtol=1e-5, atol=1e-5)
    codes = dense * expected.get("units", THEIR_UNITS.get(name, torch.tensor(1.0)))
    torch.testing.assert_close(codes, expected["codes"], rtol=1e-5, atol=1e-5)


def test_the_sparsity_beside_a_saelens_dictionary() -> None:
    sparsity = log_sparsity(FIXTURES / "saelens/old")
    assert sparsity is not None
    torch.testing.assert_close(sparsity, torch.linspace(-6, -1, 16))
    assert log_sparsity(FIXTURES / "saelens/standard") is None
