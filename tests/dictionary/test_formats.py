"""What is written: SAELens v6 for all that it can hold, Microtome's own cfg for the rest; both are read back exactly."""

import json
import re
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file
from tests.makers import topk_dictionary
from torch import Tensor

from microtome.common.errors import ArtifactError, ConfigError
from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    Origin,
    load_cross_layer_transcoder,
    load_dictionaries,
    load_dictionary,
    load_dictionary_set,
    save_dictionary,
)
from microtome.dictionary.activation import AbsTopK, Activation, Gated, GroupMax, GroupTopK, JumpReLU, ReLU, TopK
from microtome.dictionary.formats import load, log_sparsity, read_dictionary
from microtome.dictionary.formats.reading import Reading, Weights, build
from microtome.dictionary.formats.saelens_cfg import ACTIVATIONS
from microtome.dictionary.pursuit import MatchingPursuit

ORIGIN = Origin.at("tiny", "blocks.1.hook_resid_pre", context=24, dataset="abc")
ACROSS = Origin(model_name="tiny", inputs=("blocks.1.ln2.hook_normalized",), outputs=("blocks.1.hook_mlp_out",))
SEVERAL = Origin(model_name="tiny", inputs=("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"), prepend_bos=False)
FIXTURES = Path(__file__).parent / "fixtures"
M = TypeVar("M", bound=torch.nn.Module)


def shaken(made: M, seed: int = 0) -> M:
    """The same module with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return made.requires_grad_(False)


def made_of(name: str, **more: object) -> Dictionary:
    """One of each kind, by the architecture that it is written with."""
    number, other = torch.ones(20), torch.ones(20)
    plain: dict[str, object] = {"center": False}
    skip = {**plain, "skip": True, "d_out": 6, "origin": ACROSS}
    kinds: dict[str, tuple[Activation, dict[str, object]]] = {
        "standard": (ReLU(), {}),
        "topk": (TopK(3), {}),
        "abstopk": (AbsTopK(3), {}),
        "matching_pursuit": (MatchingPursuit(5, 0.5, stop_on_duplicate_support=False), {}),
        "jumprelu": (JumpReLU(number), plain),
        "gated": (Gated(number, other), {}),
        "transcoder": (ReLU(), {**plain, "d_out": 6, "origin": ACROSS}),
        "jumprelu_transcoder": (JumpReLU(number), {**plain, "d_out": 6, "origin": ACROSS}),
        "skip_transcoder": (ReLU(), skip),
        "jumprelu_skip_transcoder": (JumpReLU(number), skip),
        "microtome_groupmax": (GroupMax(4), {}),
        "microtome_matching_pursuit": (MatchingPursuit(5, 0.5), {"center": False}),
        "microtome_matching_pursuit_crosscoder": (MatchingPursuit(4), {**plain, "origin": SEVERAL}),
        "microtome_abstopk_transcoder": (AbsTopK(3), {**plain, "d_out": 6, "origin": ACROSS}),
        "microtome_grouptopk_crosscoder": (GroupTopK(8, 4), {**plain, "origin": SEVERAL}),
        "microtome_topk_transcoder": (TopK(3), {**plain, "d_out": 6, "origin": ACROSS}),
        "microtome_gated_skip_transcoder": (Gated(number, other), skip),
        "microtome_topk_crosscoder": (TopK(3), {**plain, "origin": SEVERAL}),
        "microtome_standard_crosscoder": (ReLU(), {"origin": SEVERAL}),
    }
    activation, options = kinds[name]
    made = shaken(Dictionary(8, 20, activation, **{"origin": ORIGIN, **options, **more}))  # type: ignore[arg-type]
    if name == "matching_pursuit":  # SAELens's has rows that are its encoder too, and no bias there
        made.encoder.copy_(made.W_dec)
        made.b_enc.zero_()
    return made


KINDS = [
    *("abstopk", "matching_pursuit", "microtome_matching_pursuit", "microtome_matching_pursuit_crosscoder"),
    "microtome_abstopk_transcoder",
    *("standard", "topk", "jumprelu", "gated", "transcoder", "jumprelu_transcoder", "skip_transcoder"),
    *("jumprelu_skip_transcoder", "microtome_groupmax", "microtome_topk_transcoder", "microtome_gated_skip_transcoder"),
    *("microtome_topk_crosscoder", "microtome_standard_crosscoder"),
    "microtome_grouptopk_crosscoder",
]


def x_of(d: int = 8) -> Tensor:
    return torch.randn(10, d, generator=torch.Generator().manual_seed(1))


def assert_same(ours: Dictionary | CrossLayerTranscoder, theirs: Dictionary | CrossLayerTranscoder) -> None:
    """Equal to the last bit: origin, weights, codes, reconstructions."""
    assert (ours.origin, ours.architecture, ours.k) == (theirs.origin, theirs.architecture, theirs.k)
    assert ours.fingerprint == theirs.fingerprint
    x = x_of(ours.d_in)
    assert torch.equal(ours.encode(x).to_dense(), theirs.encode(x).to_dense())
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    made = made_of(name)
    folder = tmp_path / "not" / "there"
    save_dictionary(made, str(folder))
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == name
    assert read_dictionary(folder).format == ("microtome" if name.startswith("microtome") else "saelens")
    assert read_dictionary(folder).notes == ()
    assert_same(load_dictionary(folder), made)


def test_tied_weights_are_written_apart(tmp_path: Path) -> None:
    made = made_of("standard")
    made.W_dec = made.encoder
    save_dictionary(made, tmp_path)
    again = load_dictionary(tmp_path)
    assert torch.equal(again.W_dec, again.encoder)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_an_input_norm_survives_a_round_trip(norm: str, tmp_path: Path) -> None:
    made = made_of("topk", input_norm=norm)
    save_dictionary(made, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_activations"] == norm
    assert_same(load_dictionary(tmp_path), made)


@pytest.mark.parametrize("activations", [ReLU(), JumpReLU(torch.ones(15)), TopK(4), [TopK(1), TopK(2), ReLU()]])
def test_a_cross_layer_transcoder_survives_a_round_trip(
    activations: Activation | list[Activation], tmp_path: Path
) -> None:
    points = tuple(f"blocks.{i}.hook_resid_mid" for i in range(3))
    origin = Origin(model_name="tiny", inputs=points, outputs=tuple(f"blocks.{i}.hook_mlp_out" for i in range(3)))
    made = shaken(CrossLayerTranscoder(4, 5, activations, origin=origin))
    save_dictionary(made, tmp_path)
    assert_same(load_cross_layer_transcoder(tmp_path), made)
    with pytest.raises(ArtifactError, match="load_cross_layer_transcoder"):
        load_dictionary(tmp_path)


def test_the_files_mean_what_saelens_says_they_mean(tmp_path: Path) -> None:
    """Its TopK encoder, written out from the tensors: subtract b_dec, encode, keep k, rectify; decode, add b_dec."""
    save_dictionary(topk_dictionary(8, 20, 3, origin=ORIGIN, center=torch.arange(8.0)), tmp_path)
    t = load_file(tmp_path / "sae_weights.safetensors")
    assert t.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["apply_b_dec_to_input"] is True
    x = x_of()
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    kept = pre.topk(cfg["k"], dim=-1)
    f = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
    torch.testing.assert_close(load_dictionary(tmp_path)(x), f @ t["W_dec"] + t["b_dec"])


def test_files_with_keys_that_nobody_knows_are_read(tmp_path: Path) -> None:
    save_dictionary(made_of("topk"), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"]["something_new"] = 1
    cfg["something_else"] = None
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert load_dictionary(tmp_path).hook_name == ORIGIN.inputs[0]


@pytest.mark.parametrize("name", ["standard", "jumprelu", "gated", "jumprelu_skip_transcoder"])
def test_decoder_norms_folded_on_export(name: str, tmp_path: Path) -> None:
    """Same output, same latents, decoder rows of norm one, codes times the norms; a row of zeros stays one."""
    made = made_of(name)
    with torch.no_grad():
        made.W_dec[7] = 0
    before, norms, x = made.fingerprint, made.W_dec.norm(dim=1), x_of()
    save_dictionary(made, tmp_path, fold_decoder_norms=True, log_sparsity=torch.arange(20.0))
    again = load_dictionary(tmp_path)
    assert made.fingerprint == before
    torch.testing.assert_close(again.W_dec.norm(dim=1), (norms > 0).float())
    torch.testing.assert_close(again(x), made(x))
    factor = norms.where(norms > 0, torch.tensor(1.0))
    torch.testing.assert_close(again.encode(x).to_dense(), made.encode(x).to_dense() * factor)
    assert torch.equal(torch.as_tensor(log_sparsity(tmp_path)), torch.arange(20.0))


def test_decoder_norms_are_not_folded_where_that_changes_the_codes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which latents are the largest"):
        save_dictionary(made_of("topk"), tmp_path, fold_decoder_norms=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_small_dtypes(dtype: str, tmp_path: Path) -> None:
    """Written as they are, read into the dtype that is asked for."""
    small = load_dictionary(FIXTURES / "saelens/jumprelu", dtype=dtype)
    save_dictionary(small, tmp_path)
    stored = load_file(tmp_path / "sae_weights.safetensors")["W_dec"]
    assert stored.dtype == small.W_dec.dtype != torch.float32
    assert torch.equal(load_dictionary(tmp_path).W_dec, small.W_dec.float())
    assert load_dictionary(tmp_path, dtype=dtype).fingerprint == small.fingerprint


def test_a_folder_of_folders(tmp_path: Path) -> None:
    for i in (0, 2, 10):
        (tmp_path / f"layer_{i}").mkdir()
        save_dictionary(shaken(made_of("transcoder"), i), tmp_path / f"layer_{i}")
    (tmp_path / "notes").mkdir()
    assert [made.path.name for made in load_dictionaries(tmp_path)] == ["layer_0", "layer_2", "layer_10"]
    with pytest.raises(ArtifactError, match="There are no dictionaries"):
        load_dictionaries(tmp_path / "notes")
    with pytest.raises(ArtifactError, match="no dictionary at.*Open them together with load_dictionary_set"):
        load_dictionary(tmp_path)
    with pytest.raises(ArtifactError) as raised:
        load_dictionary(tmp_path / "notes")
    assert raised.value.fix is None


def test_a_set_reads_each_of_its_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(name: str | Path, *rest: object) -> Reading:
        read.append(Path(name).name)
        return read_dictionary(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(load, "read_dictionary", counted)
    for i in (2, 10, 0):
        (tmp_path / f"{i}").mkdir()
        save_dictionary(
            shaken(made_of("topk", origin=Origin.at("tiny", f"blocks.{i}.hook_mlp_out")), i), tmp_path / f"{i}"
        )
    made = load_dictionary_set(tmp_path, dtype="bf16")
    assert read == ["0", "2", "10"]
    assert {each.W_dec.dtype for each in made.dictionaries} == {torch.bfloat16}


def test_weights_of_two_sizes_at_one_point() -> None:
    """A transcoder of which the caller named what it reads alone."""
    weights = Weights(W_enc=torch.ones(8, 20), W_dec=torch.ones(20, 6))
    with pytest.raises(ArtifactError, match="8 inputs, 6 outputs.*Of a transcoder give hook_name_out as well"):
        build(Path("there"), ORIGIN, ReLU(), weights, center=False)
    assert build(Path("there"), ACROSS, ReLU(), weights, center=False).d_out == 6


def test_hints_say_where_it_belongs(tmp_path: Path) -> None:
    save_dictionary(made_of("standard", origin=Origin.at("unknown", "unknown")), tmp_path)
    made = load_dictionary(tmp_path, hook_name="blocks.5.hook_mlp_out", model_name="gpt2")
    assert (made.hook_name, made.model_name, made.is_transcoder) == ("blocks.5.hook_mlp_out", "gpt2", False)
    across = load_dictionary(tmp_path, hook_name="blocks.5.hook_resid_mid", hook_name_out="blocks.5.hook_mlp_out")
    assert across.is_transcoder
    save_dictionary(made_of("microtome_topk_crosscoder"), tmp_path)
    with pytest.raises(ConfigError, match="one point"):
        load_dictionary(tmp_path, hook_name="blocks.5.hook_mlp_out")


@pytest.mark.parametrize(
    ("said", "hub"),
    [
        ("gpt2-small", "gpt2"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gemma-2-2b", "google/gemma-2-2b"),
    ],
)
def test_short_names_of_models_are_those_of_the_hub(said: str, hub: str, tmp_path: Path) -> None:
    save_dictionary(made_of("standard", origin=Origin.at(said, "blocks.1.hook_resid_pre")), tmp_path)
    assert load_dictionary(tmp_path).model_name == hub
    save_dictionary(load_dictionary(tmp_path), tmp_path)
    assert load_dictionary(tmp_path).model_name == hub


@pytest.mark.parametrize("name", [kind for kind in KINDS if not kind.startswith("microtome")])
def test_saelens_opens_what_is_written(name: str, tmp_path: Path) -> None:
    """Its own loader, its own activations and outputs."""
    saelens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install 'sae-lens>=6'")
    made, x = made_of(name), x_of()
    save_dictionary(made, tmp_path)
    theirs = saelens.saes.sae.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == name
    assert theirs.cfg.metadata.hook_name == made.hook_name
    torch.testing.assert_close(theirs.encode(x), made.encode(x).to_dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(x), made(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", ["standard", "topk", "abstopk", "matching_pursuit", "jumprelu", "gated"])
def test_saelens_opens_input_norms(name: str, norm: str, tmp_path: Path) -> None:
    saelens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install 'sae-lens>=6'")
    made, x = made_of(name, input_norm=norm), x_of() * 3 + 1
    save_dictionary(made, tmp_path)
    theirs = saelens.saes.sae.SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(theirs.encode(x), made.encode(x).to_dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(x), made(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [kind for kind in KINDS if not kind.startswith("microtome")])
def test_saelens_opens_small_dtypes(name: str, tmp_path: Path) -> None:
    """The cfg names the dtype of the file; computed in float32, both make the same of the rounded weights."""
    saelens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install 'sae-lens>=6'")
    save_dictionary(made_of(name).to(torch.bfloat16), tmp_path)
    assert str(saelens.saes.sae.SAE.load_from_disk(tmp_path).dtype) == "torch.bfloat16"
    theirs, ours, x = saelens.saes.sae.SAE.load_from_disk(tmp_path, dtype="float32"), load_dictionary(tmp_path), x_of()
    torch.testing.assert_close(theirs.encode(x), ours.encode(x).to_dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-5, rtol=1e-5)


def test_every_architecture_of_saelens_is_read() -> None:
    """By name, from its registry: one that comes with a later version fails here."""
    saelens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install 'sae-lens>=6'")
    registry = saelens.registry
    names = {*registry.SAE_CLASS_REGISTRY, *registry.SAE_TRAINING_CLASS_REGISTRY}
    assert names == ACTIVATIONS.keys()


@pytest.mark.parametrize("point", ["hook_q", "hook_k", "hook_v", "hook_z"])
def test_one_head_survives_a_round_trip(point: str, tmp_path: Path) -> None:
    """As the point and `hook_head_index` in SAELens's metadata, as one name here."""
    made = made_of("topk", origin=Origin.at("tiny", f"blocks.1.attn.{point}.3"))
    save_dictionary(made, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["metadata"]["hook_name"], cfg["metadata"]["hook_head_index"]) == (f"blocks.1.attn.{point}", 3)
    assert cfg["reshape_activations"] == "none"
    assert_same(load_dictionary(tmp_path), made)
    legacy = {
        "hook_point": f"blocks.1.attn.{point}",
        "hook_point_head_index": 0,
        "d_in": 8,
        "d_sae": 20,
        "model_name": "m",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(legacy))
    assert load_dictionary(tmp_path).hook_name == f"blocks.1.attn.{point}.0"


def test_saelens_opens_a_dictionary_of_one_head(tmp_path: Path) -> None:
    saelens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install 'sae-lens>=6'")
    made, x = made_of("topk", origin=Origin.at("tiny", "blocks.1.attn.hook_z.3")), x_of()
    save_dictionary(made, tmp_path)
    theirs = saelens.saes.sae.SAE.load_from_disk(tmp_path)
    assert (theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_head_index) == ("blocks.1.attn.hook_z", 3)
    torch.testing.assert_close(theirs(x), made(x), atol=1e-5, rtol=1e-5)
    theirs.save_model(tmp_path / "theirs")
    assert_same(load_dictionary(tmp_path / "theirs"), made)


def test_saelens_opens_heads_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    saelens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install 'sae-lens>=6'")
    made, x = made_of("standard", origin=Origin.at("tiny", "blocks.1.attn.hook_z")), x_of()
    save_dictionary(made, tmp_path)
    theirs = saelens.saes.sae.SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(theirs(x.view(10, 2, 4)).flatten(1), made(x), atol=1e-5, rtol=1e-5)
    save_dictionary(made_of("microtome_groupmax"), tmp_path)
    with pytest.raises(Exception, match=re.escape("microtome_groupmax")):
        saelens.saes.sae.SAE.load_from_disk(tmp_path)
