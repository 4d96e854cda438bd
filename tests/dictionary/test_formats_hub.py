"""Dictionaries on the hub, from a cache that is laid out as huggingface_hub lays it out. The live hub is not asked here."""

import shutil
from pathlib import Path

import pytest
from tests.dictionary.stand_in_hub import COMMIT, FIXTURES, put, use_cache

from microtome.common.errors import ArtifactError
from microtome.dictionary import load_cross_layer_transcoder, load_dictionary
from microtome.dictionary.formats import FORMATS, Hints, read_dictionary
from microtome.dictionary.formats.releases import Release, find_release, releases
from microtome.dictionary.formats.saelens_cfg import parse_cfg


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a machine whose hub cannot be reached."""
    use_cache(tmp_path, monkeypatch)
    return tmp_path


def test_an_address(cache: Path) -> None:
    folder = put(cache, "someone/saes", "layers.3", "sparsify/layers.3")
    made = load_dictionary("hf://someone/saes/layers.3")
    assert made.fingerprint == load_dictionary(FIXTURES / "sparsify/layers.3").fingerprint
    assert made.path == folder
    assert load_dictionary(Path("hf://someone/saes/layers.3")).path == folder
    assert load_dictionary(f"hf://someone/saes@{COMMIT}/layers.3/cfg.json").fingerprint == made.fingerprint


def test_a_release_knows_model_and_quirks(cache: Path) -> None:
    put(cache, "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre", "saelens/old")
    reading = read_dictionary("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert reading.dictionary.model_name == "gpt2"
    assert any("24,576 latents" in note for note in reading.notes)
    assert any("mean over d_model" in note for note in reading.notes)
    plain = load_dictionary(FIXTURES / "saelens/old")
    assert reading.dictionary.fingerprint != plain.fingerprint


def test_the_scale_of_a_release_is_used(cache: Path) -> None:
    inside = "gemma_2b_blocks.12.hook_resid_post_16384"
    put(
        cache,
        "jbloom/Gemma-2b-Residual-Stream-SAEs",
        inside,
        "saelens_checkpoint/standard",
        "cfg.json",
        "sae_weights.safetensors",
    )
    made = load_dictionary("gemma-2b-res-jb/blocks.12.hook_resid_post")
    wanted = load_dictionary(FIXTURES / "saelens_checkpoint/standard", norm_scaling_factor=0.21381938399317255)
    assert made.fingerprint == wanted.fingerprint


def test_gemma_scope_by_name(cache: Path) -> None:
    inside = "layer_3/width_16k/average_l0_5"
    put(cache, "google/gemma-scope-2b-pt-res", inside, f"gemma-scope-2b-pt-res/{inside}")
    made = load_dictionary(f"gemma-scope-2b-pt-res/{inside}")
    assert (made.model_name, made.hook_name) == ("google/gemma-2-2b", "blocks.3.hook_resid_post")


def test_a_whole_repository(cache: Path) -> None:
    put(cache, "mntss/clt-gemma-2-2b-2.5M", "", "clt/jump_relu")
    made = load_cross_layer_transcoder("clt-gemma-2-2b-2.5M/.")
    assert made.model_name == "google/gemma-2-2b"
    assert made.fingerprint == load_cross_layer_transcoder(FIXTURES / "clt/jump_relu").fingerprint


def test_releases_whose_dictionaries_are_files(cache: Path) -> None:
    """With and without the file's ending, and the config beside it."""
    name = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_100"
    put(cache, f"Qwen/{name}", "", "qwen_scope/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3")
    with pytest.raises(ArtifactError, match="k 100, d_sae 16"):  # the k of the release, and of weights that are not its
        load_dictionary("qwen-scope-3-1.7b-base-w32k-l100/layer3")
    put(cache, "mwhanna/qwen3-4b-transcoders", "", "circuit_tracer/relu")
    for id_ in ("layer_1", "layer_1.safetensors"):
        made = load_dictionary(f"mwhanna-qwen3-4b-transcoders/{id_}")
        assert (made.model_name, made.hook_name) == ("Qwen/Qwen3-4B", "blocks.1.ln2.hook_normalized")
    assert made.fingerprint == load_dictionary(FIXTURES / "circuit_tracer/relu/layer_1.safetensors").fingerprint
    put(cache, "mwhanna/qwen3-14b-transcoders", "", "circuit_tracer/relu", "layer_0.safetensors")
    made = load_dictionary("mwhanna-qwen3-14b-transcoders/layer_0")  # whose repository has no config.yaml
    assert (made.model_name, made.hook_name) == ("Qwen/Qwen3-14B", "blocks.0.mlp.hook_in")


def test_what_is_not_there(cache: Path) -> None:
    put(cache, "someone/saes", "layers.3", "sparsify/layers.3", "cfg.json")
    for address in ("hf://someone/saes/layers.3", "hf://someone/saes/layers.9", "hf://nobody/nothing/x"):
        with pytest.raises(ArtifactError, match="not on this disk, or not all of it, and the hub cannot be reached"):
            load_dictionary(address)
    for address in ("hf://someone", "hf://", "hf://someone/saes/../../etc"):
        with pytest.raises(ArtifactError, match="No address"):
            load_dictionary(address)
    with pytest.raises(ArtifactError, match="for example gpt2-small-res-jb/blocks.8.hook_resid_pre"):
        load_dictionary("gpt2-small-res-jb")


@pytest.mark.parametrize("name", sorted(releases()))
def test_the_table_of_releases(name: str) -> None:
    release = releases()[name]
    assert isinstance(release, Release)
    assert release.format in FORMATS
    assert release.repo.count("/") == 1
    assert release.example
    assert release.norm_scaling_factors.keys() <= release.ids.keys()


def test_names_that_saelens_has_too_lead_to_the_same_place() -> None:
    """Every dictionary of its table whose release is in ours: repository, folder, and the scale of its activations."""
    pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install 'sae-lens>=6'")
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor, get_pretrained_saes_directory

    both = 0
    for name, theirs in get_pretrained_saes_directory().items():
        for id_, folder in theirs.saes_map.items():
            ours = find_release(f"{name}/{id_}")
            if ours is not None:
                both += 1
                assert (ours.repo, ours.folder) == (theirs.repo_id, folder)
                if ours.format != "temporal":  # its files have the scale
                    assert ours.hinted(Hints()).norm_scaling_factor == get_norm_scaling_factor(name, id_)
    assert both > 8_000


def test_a_release_does_not_hide_a_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache)
    shutil.copytree(FIXTURES / "saelens/topk", "gpt2-small-res-jb/x")
    assert load_dictionary("gpt2-small-res-jb/x").k == 3
    assert parse_cfg(cache, {"d_in": 1, "d_sae": 2}).legacy
