"""SAELens's cfg.json, of version 6 and older, as one form: `SaeLensCfg`.

Before version 6 all keys lay side by side, some had other names, and what was left out had other defaults; the
translation follows SAELens's own (`handle_pre_6_0_config`). A version-6 file has its `metadata` apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microtome.common.errors import ArtifactError, ModelError
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.hooks import hub_model
from microtome.dictionary.formats.reading import UNKNOWN
from microtome.dictionary.formats.temporal import TemporalCfg, read_temporal
from microtome.dictionary.formats.values import damaged, flag, is_number, table, text, whole
from microtome.model import HookName

CFG = "cfg.json"
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# What SAELens calls each kind, and the activation that it means; those with a threshold for all latents at once exist
# only while SAELens trains, and in its checkpoints.
ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "abstopk",
    "matching_pursuit": "matching_pursuit",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "temporal": "topk",
}
_LARGEST = 1e30
NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")
SCALAR = "constant_scalar_rescale"  # of temporal dictionaries alone


@dataclass(frozen=True, kw_only=True)
class Pursuit:
    """When a matching pursuit stops; the threshold is in units of the scaled activations."""

    max_iterations: int
    residual_threshold: float
    stop_on_duplicate_support: bool


@dataclass(frozen=True, kw_only=True)
class SaeLensCfg:
    """What a cfg.json says, whatever its age."""

    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    k: int | None
    pursuit: Pursuit | None
    temporal: TemporalCfg | None
    center: bool
    normalize: str
    rescale: bool
    """Whether latents are chosen by pre · ‖W_dec,i‖ (`rescale_acts_by_decoder_norm`)."""
    finetuned: bool
    """Whether a tensor `scaling_factor` multiplies the codes when they are decoded (before version 6)."""
    origin: Origin
    model_kwargs: Mapping[str, Any]
    legacy: bool


def parse_cfg(folder: Path, cfg: Mapping[str, Any]) -> SaeLensCfg:
    """Read a cfg.json. Raises ArtifactError for a kind that cannot be read and for values that cannot be."""
    file, apart = folder / CFG, table(folder / CFG, cfg, "metadata")
    legacy = _is_legacy(cfg, apart)
    flat = _modern(file, cfg) if legacy else dict(cfg)
    metadata = flat if legacy else apart
    architecture = flat.get("architecture")
    _one_of(folder, "architecture", architecture, tuple(ACTIVATIONS))
    normalize = flat.get("normalize_activations") or "none"
    _one_of(folder, "normalize_activations", normalize, (*NORMS, SCALAR) if architecture == "temporal" else NORMS)
    _one_of(folder, "reshape_activations", flat.get("reshape_activations"), ("none", "hook_z", None))
    kind = str(architecture)
    transcoder = kind.endswith("transcoder")
    center = flat.get("apply_b_dec_to_input", True)
    if not isinstance(center, bool):
        raise damaged(file, "apply_b_dec_to_input", center, "true or false")
    if transcoder and center:
        raise damaged(file, "apply_b_dec_to_input", center, "false for a transcoder")
    d_in = whole(file, flat, "d_in")
    return SaeLensCfg(
        architecture=kind,
        d_in=d_in,
        d_sae=whole(file, flat, "d_sae"),
        d_out=whole(file, flat, "d_out") if transcoder else d_in,
        k=whole(file, flat, "k") if kind in ("topk", "abstopk") else None,
        pursuit=read_pursuit(file, flat, d_in) if kind == "matching_pursuit" else None,
        temporal=read_temporal(file, flat) if kind == "temporal" else None,
        center=center,
        normalize=normalize,
        rescale=_rescale(kind, flat),
        finetuned=bool(flat.get("finetuning_scaling_factor")),
        origin=_origin(file, metadata, transcoder=transcoder),
        model_kwargs=table(file, metadata, "model_from_pretrained_kwargs"),
        legacy=legacy,
    )


def read_pursuit(file: Path, cfg: Mapping[str, Any], d_in: int) -> Pursuit:
    """The three keys of a matching pursuit, with SAELens's defaults for those that are not there; no `max_iterations` is d_in
    of them."""
    threshold = cfg.get("residual_threshold", 1e-2)
    if not is_number(threshold) or not -_LARGEST < threshold < _LARGEST:
        raise damaged(file, "residual_threshold", threshold, "a number")
    return Pursuit(
        max_iterations=d_in if cfg.get("max_iterations") is None else whole(file, cfg, "max_iterations"),
        residual_threshold=float(threshold),
        stop_on_duplicate_support=flag(file, cfg, "stop_on_duplicate_support", missing=True),
    )


def _is_legacy(cfg: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """SAELens takes the old path when it finds no version, or one below 6."""
    version = cfg.get("sae_lens_version") or metadata.get("sae_lens_version")
    major = str(version or "0").split(".")[0]
    return not major.isdigit() or int(major) < 6


def _modern(file: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    flat = {RENAMED.get(key, key): value for key, value in cfg.items()}
    flat = {**(flat.pop("metadata", None) or {}), **flat}
    flat.setdefault("architecture", "standard")
    kwargs = table(file, flat, "activation_fn_kwargs")
    if flat.get("activation_fn") == "topk" and kwargs.get("k") is not None:
        flat["architecture"], flat["k"] = "topk", kwargs["k"]
    normalize = flat.get("normalize_activations")
    if isinstance(normalize, bool):
        flat["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    return flat


def _rescale(architecture: str, flat: Mapping[str, Any]) -> bool:
    """Only TopK and its kin choose by the norm; in the checkpoints of those with a threshold it is the default."""
    if architecture == "temporal" or ACTIVATIONS[architecture] not in ("topk", "abstopk", "batchtopk"):
        return False
    return bool(flat.get("rescale_acts_by_decoder_norm", ACTIVATIONS[architecture] == "batchtopk"))


def _origin(file: Path, metadata: Mapping[str, Any], *, transcoder: bool) -> Origin:
    hook = _of_head(file, metadata, "hook_head_index", str(metadata.get("hook_name") or UNKNOWN))
    written = str(metadata.get("hook_name_out") or f"{UNKNOWN} output")
    context = metadata.get("context_size")
    return Origin(
        model_name=hub_model(str(metadata.get("model_name") or UNKNOWN)),
        inputs=(hook,),
        outputs=(_of_head(file, metadata, "hook_head_index_out", written),) if transcoder else (),
        context=context if isinstance(context, int) else None,
        prepend_bos=bool(metadata.get("prepend_bos", True)),
        dataset=text(metadata, "dataset_path"),
    )


def _of_head(file: Path, metadata: Mapping[str, Any], key: str, hook: str) -> str:
    """The point, of the one head that is named under a key: `blocks.3.attn.hook_z.5`."""
    head = metadata.get(key)
    if head is None:
        return hook
    if type(head) is not int or head < 0:
        raise damaged(file, key, head, "the number of a head, or null")
    try:
        return str(HookName.parse(f"{hook}.{head}"))
    except ModelError as error:
        raise damaged(file, key, head, f"null, because {hook} is no point with heads") from error


def split_head(name: str) -> tuple[str, int | None]:
    """A point and, where the name is of one of its heads, which: as SAELens keeps them."""
    try:
        found = HookName.parse(name)
    except ModelError:
        return name, None
    return (name, None) if found.head is None else (str(found.of_all_heads), found.head)


def _one_of(folder: Path, key: str, value: object, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise ArtifactError(
            f"The dictionary at {folder} is of a kind that cannot be read",
            got=f"{key} {value!r}",
            expected=f"one of {', '.join(filter(None, known))}",
        )
