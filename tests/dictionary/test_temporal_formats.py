"""Temporal dictionaries on disk: written as SAELens reads them, read from its files and from the release's, and damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from torch import Tensor

from microtome.cli.main import main
from microtome.common.artifacts import read_json
from microtome.common.errors import ArtifactError
from microtome.dictionary import TemporalDictionary, load_any_dictionary, read_dictionary, save_dictionary
from microtome.dictionary.formats import Hints
from microtome.dictionary.formats.releases import find_release

from ..makers import random_temporal  # noqa: TID252 – shared by tests

FIXTURES = Path(__file__).parent / "fixtures"
SAELENS = sorted(folder.name for folder in (FIXTURES / "saelens_temporal").iterdir() if folder.is_dir())
HOOK = "blocks.3.hook_resid_post"
KINDS = {
    "topk": {},
    "relu": {"k": None, "layers": 1},
    "scaled": {"scale": 0.3, "layers": 3},
    "layer_norm": {"input_norm": "layer_norm"},
    "constant_norm": {"input_norm": "constant_norm_rescale"},
}


def made_of(kind: str) -> TemporalDictionary:
    return random_temporal("tiny", HOOK, d_in=8, **KINDS[kind])  # type: ignore[arg-type]


def sequences() -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)) * 2 + 0.3


def opened(folder: Path) -> TemporalDictionary:
    made = load_any_dictionary(folder)
    assert isinstance(made, TemporalDictionary)
    return made


def same(made: TemporalDictionary, other: TemporalDictionary) -> None:
    x = sequences()
    torch.testing.assert_close(made(x), other(x), rtol=1e-5, atol=1e-5)
    codes = [each.encode(each.in_context(x).flatten(0, 1)).to_dense() for each in (made, other)]
    assert (codes[0] > 0).any()
    torch.testing.assert_close(*codes, rtol=1e-5, atol=1e-5)


# ---- writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    made = made_of(kind)
    save_dictionary(made, tmp_path)
    again = opened(tmp_path)
    assert read_dictionary(tmp_path).format == "saelens"
    assert (again.origin, again.scale, again.k, again.input_norm) == (made.origin, made.scale, made.k, made.input_norm)
    same(made, again)


@pytest.mark.parametrize("name", SAELENS)
def test_what_saelens_wrote_is_written_again(name: str, tmp_path: Path) -> None:
    made = opened(FIXTURES / "saelens_temporal" / name)
    save_dictionary(made, tmp_path)
    same(made, opened(tmp_path))
    there, here = (read_json(folder / "cfg.json") for folder in (FIXTURES / "saelens_temporal" / name, tmp_path))
    for key in ("architecture", "d_in", "d_sae", "n_heads", "n_attn_layers", "bottleneck_factor", "kval_topk"):
        assert here[key] == there[key], key


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_opens_what_is_written(kind: str, tmp_path: Path) -> None:
    saelens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install 'sae-lens>=6'")
    made, x = made_of(kind), sequences()
    save_dictionary(made, tmp_path)
    theirs = saelens.saes.sae.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == "temporal"
    codes = made.encode(made.in_context(x).flatten(0, 1)).to_dense().view(2, 6, -1)
    torch.testing.assert_close(theirs.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(x), made(x), atol=1e-5, rtol=1e-5)


def test_the_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(FIXTURES / "temporal/layer_3")
    assert main(["convert", source, str(tmp_path / "out"), "--model-name", "tiny", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["read_as"], said["written_as"], said["architecture"]) == ("temporal", "saelens", "temporal")
    assert (said["model"], said["reads"], said["k"]) == ("tiny", [HOOK], 3)
    assert said["b_dec_from_input"] is True
    assert any("reads whole sequences" in note for note in said["notes"])
    assert any("activations times 0.25" in note for note in said["notes"])
    same(opened(FIXTURES / "temporal/layer_3"), opened(tmp_path / "out"))


def test_the_releases() -> None:
    found = find_release("temporal-sae-llama-3.1-8b/blocks.26.hook_resid_post")
    assert found is not None
    assert (found.repo, found.folder) == ("canrager/temporalSAEs", "llama-3.1-8B/layer_26/temporal")
    assert found.hinted(Hints()).model_name == "meta-llama/Llama-3.1-8B"


# ---- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_heads": 3}, r"d_sae 16, 3 heads, bottleneck_factor 4. Expected: d_sae a multiple"),
        ({"n_heads": 0}, "n_heads 0. Expected: a positive integer"),
        ({"n_heads": 4, "bottleneck_factor": 4}, None),  # four heads of one number: another dictionary, but one
        ({"bottleneck_factor": "64"}, "bottleneck_factor '64'"),
        ({"n_attn_layers": 2}, r"attn_layers.1.k_ctx.weight None. Expected: attn_layers.1.k_ctx.weight \(4, 16\)"),
        (
            {"sae_diff_type": "nullify"},
            "kind that cannot be read. Got: sae_diff_type 'nullify'. Expected: relu or topk",
        ),
        ({"kval_topk": 0}, "kval_topk 0"),
        ({"kval_topk": 17}, "k 17, d_sae 16"),
        ({"tied_weights": "yes"}, "tied_weights 'yes'. Expected: true or false"),
        ({"tied_weights": False}, r"W_enc None. Expected: W_enc \(8, 16\)"),
        (
            {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0},
            "factor 0. Expected: a positive number",
        ),
        ({"normalize_activations": "covariance_whitening"}, "whitened or centred activations"),
        ({"normalize_activations": "expected_average_only_in"}, "norm_scaling_factor"),
        ({"architecture": "topk", "k": 3}, r"W_enc None"),
        ({"d_in": 9}, r"W_dec \(16, 8\). Expected: W_dec \(16, 9\)"),
    ],
)
def test_damaged_configs_of_saelens(values: dict[str, object], message: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "topk"
    shutil.copytree(FIXTURES / "saelens_temporal/topk", folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, **values}))
    if message is None:
        assert opened(folder).layers[0].n_heads == 4
        return
    with pytest.raises(ArtifactError, match=message):
        load_any_dictionary(folder)


def test_a_topk_without_k_is_a_relu_and_other_kinds_have_no_scalar(tmp_path: Path) -> None:
    for name, values in (
        ("topk", {"kval_topk": None}),
        ("plain", {"normalize_activations": "constant_scalar_rescale"}),
    ):
        shutil.copytree(FIXTURES / "saelens_temporal" / name, tmp_path / name)
        cfg = json.loads((tmp_path / name / "cfg.json").read_text())
        (tmp_path / name / "cfg.json").write_text(json.dumps({**cfg, **values}))
    assert opened(tmp_path / "topk").activation.name == "relu"
    assert opened(tmp_path / "plain").scale == 1.0
    shutil.copytree(FIXTURES / "saelens/topk", tmp_path / "other")
    cfg = json.loads((tmp_path / "other/cfg.json").read_text())
    (tmp_path / "other/cfg.json").write_text(json.dumps({**cfg, "normalize_activations": "constant_scalar_rescale"}))
    with pytest.raises(ArtifactError, match="normalize_activations 'constant_scalar_rescale'"):
        load_any_dictionary(tmp_path / "other")


def change(conf: Path, part: str, **values: object) -> None:
    said = yaml.safe_load(conf.read_text())
    said[part] |= values
    conf.write_text(yaml.safe_dump(said))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "conf.yaml").write_text("a: [1, 2"), "conf.yaml is damaged"),
        (lambda f: (f / "conf.yaml").write_bytes(b"\xff\xfe\xff"), "conf.yaml is damaged"),
        (lambda f: (f / "conf.yaml").write_text("- 1\n- 2"), "Got: list. Expected: keys and values"),
        (lambda f: (f / "conf.yaml").write_text("sae: 3"), "sae 3. Expected: a JSON object"),
        (lambda f: (f / "conf.yaml").write_text("when: 2001-99-99"), "conf.yaml is damaged: month"),
        *(
            (lambda f, key=key: change(f / "conf.yaml", "sae", **{key: None}), f"{key} None")
            for key in ("n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights")
        ),
        (lambda f: change(f / "conf.yaml", "sae", scaling_factor=None), "scaling_factor None"),
        (lambda f: change(f / "conf.yaml", "sae", scaling_factor=10**400), "scaling_factor 1000"),
        (lambda f: change(f / "conf.yaml", "sae", exp_factor=1e308), "exp_factor 1e[+]308"),
        (lambda f: (f / "conf.yaml").write_text("!!python/object/apply:os.system ['true']"), "conf.yaml is damaged"),
        *(
            (lambda f, text=text: (f / "conf.yaml").write_text(text), "conf.yaml is damaged")
            for text in ('a: !!int ""', "a: !!bool x", "a: !!timestamp x")
        ),
        (lambda f: change(f / "conf.yaml", "llm", dimin=10**400), "dimin 1000"),
        (lambda f: change(f / "conf.yaml", "llm", dimin=None), "dimin None"),
        (lambda f: change(f / "conf.yaml", "sae", exp_factor="two"), "exp_factor 'two'"),
        (lambda f: change(f / "conf.yaml", "sae", exp_factor=0.01), "exp_factor 0.01"),
        (lambda f: change(f / "conf.yaml", "sae", scaling_factor=float("nan")), "scaling_factor nan"),
        (lambda f: change(f / "conf.yaml", "sae", exp_factor=4), r"W_dec \(16, 8\). Expected: W_dec \(32, 8\)"),
        (lambda f: save_file({"D": torch.zeros(16, 8)}, f / "latest_ckpt.safetensors"), "b_dec None"),
        (lambda f: (f / "latest_ckpt.safetensors").write_bytes(b"0123"), "latest_ckpt.safetensors is damaged"),
    ],
    ids=[
        *("open", "bytes", "list", "number", "date", "heads", "layers", "bottleneck", "kind", "k", "tied", "unscaled"),
        *("large_scale", "large", "code", "whole_tag", "flag_tag", "date_tag", "wide", "width", "factor", "small"),
        *("scale", "misfit", "missing", "cut"),
    ],
)
def test_damaged_releases(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "layer_3"
    shutil.copytree(FIXTURES / "temporal/layer_3", folder)
    spoil(folder)
    with pytest.raises(ArtifactError, match=message):
        load_any_dictionary(folder)


def test_what_a_release_says_of_its_model_and_text() -> None:
    origin = load_any_dictionary(FIXTURES / "temporal/layer_3").origin
    assert (origin.model_name, origin.context, origin.dataset) == ("owner/tiny", 500, "owner/text")
    tied = opened(FIXTURES / "temporal/layer_7")
    torch.testing.assert_close(tied.novel.W_enc, tied.W_dec.T * tied.scale)


def test_a_scale_that_the_caller_knows_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "layer_3"
    shutil.copytree(FIXTURES / "temporal/layer_3", folder)
    change(folder / "conf.yaml", "sae", scaling_factor=None)
    given = load_any_dictionary(folder, norm_scaling_factor=0.25)
    assert isinstance(given, TemporalDictionary)
    same(given, opened(FIXTURES / "temporal/layer_3"))
    scaled = load_any_dictionary(FIXTURES / "saelens_temporal/scaled", norm_scaling_factor=0.3)
    assert isinstance(scaled, TemporalDictionary)
    same(scaled, opened(FIXTURES / "saelens_temporal/scaled"))
    other = load_any_dictionary(FIXTURES / "saelens_temporal/scaled", norm_scaling_factor=3.0)
    assert isinstance(other, TemporalDictionary)
    assert other.scale == 3.0
    # SAELens's own name for a scale that is in no file means the same arithmetic.
    average = tmp_path / "average"
    shutil.copytree(FIXTURES / "saelens_temporal/scaled", average)
    cfg = json.loads((average / "cfg.json").read_text())
    (average / "cfg.json").write_text(json.dumps({**cfg, "normalize_activations": "expected_average_only_in"}))
    (average / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.3}))
    reading = read_dictionary(average)
    assert isinstance(reading.dictionary, TemporalDictionary)
    same(reading.dictionary, opened(FIXTURES / "saelens_temporal/scaled"))
    assert sum("0.3" in note for note in reading.notes) == 1
    assert any("a checkpoint of training" in note for note in reading.notes)


def test_centred_models(tmp_path: Path) -> None:
    """On the stream its codes cannot be folded; elsewhere the word changes nothing. Other settings are told."""
    for hook, refused in ((HOOK, True), ("blocks.3.attn.hook_z", False)):
        folder = tmp_path / hook
        shutil.copytree(FIXTURES / "saelens_temporal/topk", folder)
        cfg = json.loads((folder / "cfg.json").read_text())
        cfg["metadata"] |= {
            "hook_name": hook,
            "model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": True},
        }
        (folder / "cfg.json").write_text(json.dumps(cfg))
        if refused:
            with pytest.raises(ArtifactError, match="centred activations.*Got: center_writing_weights"):
                read_dictionary(folder)
        else:
            assert any("TransformerLens with fold_ln=True" in note for note in read_dictionary(folder).notes)
    with pytest.raises(ArtifactError, match="centred activations"):
        read_dictionary(FIXTURES / "saelens_temporal/topk", hints=Hints(centered=True))


def test_a_release_without_its_layers_name(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "temporal/layer_3", tmp_path / "mine")
    tensors = load_file(tmp_path / "mine/latest_ckpt.safetensors")
    save_file({**tensors, "step": torch.zeros(1)}, tmp_path / "mine/latest_ckpt.safetensors")
    reading = read_dictionary(tmp_path / "mine", hints=Hints(model_name="tiny"))
    assert reading.dictionary.origin.inputs == ("unknown",)
    assert any("tensors that were not used: step" in note for note in reading.notes)
    assert load_any_dictionary(tmp_path / "mine", hook_name=HOOK).origin.inputs == (HOOK,)
