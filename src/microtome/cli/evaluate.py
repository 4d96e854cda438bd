"""`microtome evaluate`: measure a dictionary on text that it was not trained on."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtome.cli.data import TextOptions
from microtome.cli.options import lines
from microtome.common.errors import ConfigError

METRICS = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Measure a dictionary: L0, FVU, CE and KL with it spliced in, dead and dense latents, the decoder's cosines; and, when
    asked for, sparse probing, absorption, SCR, TPP and disentanglement."""

    dictionary: Annotated[str, tyro.conf.Positional]
    """The folder of the dictionary, or whatever else names one: demo, hf://…, release/id. A folder of one dictionary for
    each of several points (as --per-layer makes them), here or on the hub, is measured as a whole; a glob behind it chooses
    some of them."""
    n_tokens: int = 131_072
    """Tokens for reconstruction figures."""
    function_tokens: int = 16_384
    """Tokens of these for CE and KL (four full forward passes each; of several points one more for all, and three for each)."""
    whole_only: bool = False
    """Of a dictionary that writes several points: no CE and KL with each of these alone replaced."""
    metrics: tuple[str, ...] = ()
    """core, geometry, probing, absorption, scr, tpp, ravel (not said: core and geometry; of a cross-layer transcoder or a set core
    alone). Only core needs a corpus."""
    probe_data: Path | None = None
    """JSONL, CSV or Parquet with the columns text and label, for probing, SCR and TPP (else the built-in tasks)."""
    entity_data: Path | None = None
    """JSONL with entities, their attributes and prompts, for ravel (else four dozen cities)."""
    mask_steps: int | None = None
    """For ravel: steps in which the mask of each attribute is learned (not said: 40; 0: no mask)."""
    mask_sparsity: float | None = None
    """For ravel: the price of a latent in a mask's loss, in nats (not said: 0.01)."""
    out: Path | None = None
    """Where to write the figures as JSON (default: metrics.json in the dictionary's folder, NAME-metrics.json for one that is
    in no folder here)."""


def run(options: Options) -> dict[str, Any]:
    """Evaluate, write the figures, and return them."""
    from microtome.common.artifacts import write_json
    from microtome.common.config import to_dict
    from microtome.dictionary import (
        Dictionary,
        EvaluateConfig,
        TemporalDictionary,
        evaluate,
        load_dictionary_or_set,
    )
    from microtome.dictionary.measures import Measures, check_names, finite

    check_names(options.metrics)
    data = _data(options)
    config = EvaluateConfig(
        n_tokens=options.n_tokens, function_tokens=options.function_tokens, whole_only=options.whole_only
    )
    sae = load_dictionary_or_set(options.dictionary)
    # The decoder rows of a cross-layer transcoder of many layers fill the memory, if each is written out for all of them.
    one_row_each = isinstance(sae, Dictionary | TemporalDictionary)
    metrics = options.metrics or (("core", "geometry") if one_row_each else ("core",))
    model = options.load_model()
    sae = sae.to(model.device)
    figures: dict[str, Any] = {}
    about: dict[str, Any] = {"model_dtype": str(model.dtype)}
    here = place(options.dictionary)
    out = options.out or (here / METRICS if here.is_dir() else here.with_name(f"{here.name}-{METRICS}"))
    out.parent.mkdir(parents=True, exist_ok=True)
    if "core" in metrics:
        dataset = options.load_tokens(model, here)
        evaluation = evaluate(model, sae, dataset, config)
        figures = finite({**to_dict(evaluation), "notes": list(evaluation.notes)})
        about = {"dataset": dataset.config["corpus"], "part": options.part, **about}
    measures = Measures(model, sae, **data)
    for name in metrics:
        figures |= measures.run([name])
        write_json(out, {**figures, **about})  # it stays, whatever becomes of the others
    return {"out": str(out), **figures}


def _data(options: Options) -> dict[str, Any]:
    """What the metrics work on: texts, entities, and how masks are learned. Raises ConfigError for options of a metric that was
    not asked for, InputError for texts that do not suffice."""
    from microtome.dictionary.entities import read_entities
    from microtome.dictionary.labelled import read_labelled
    from microtome.dictionary.masks import MaskConfig
    from microtome.dictionary.measures import check_texts

    readers = {
        "probe_data": ("probing", "scr", "tpp"),
        **dict.fromkeys(("entity_data", "mask_steps", "mask_sparsity"), ("ravel",)),
    }
    for name, metrics in readers.items():
        if getattr(options, name) is not None and not set(metrics) & set(options.metrics):
            raise ConfigError(
                f"--{name.replace('_', '-')} is read by {' and '.join(metrics)} alone",
                got=f"--metrics {' '.join(options.metrics)}" if options.metrics else "no --metrics",
                fix=f"Leave it out, or say --metrics {metrics[0]}",
            )
    if options.mask_steps == 0 and options.mask_sparsity is not None:
        raise ConfigError("Without steps there is no mask", got="--mask-steps 0 --mask-sparsity", fix="Leave one out")
    said: dict[str, Any] = {"steps": options.mask_steps, "sparsity": options.mask_sparsity}
    mask = None if options.mask_steps == 0 else MaskConfig(**{k: v for k, v in said.items() if v is not None})
    texts = None if options.probe_data is None else read_labelled(options.probe_data)
    if texts is not None:
        check_texts(options.metrics, texts)
    entities = None if options.entity_data is None else read_entities(options.entity_data)
    return {"texts": texts, "entities": entities, "mask": mask}


def place(dictionary: str) -> Path:
    """The dictionary's folder; for one that is in no folder here, its short name. What a glob chooses is not what its folder
    holds, so it has a short name too."""
    from microtome.dictionary.formats.sets import split_glob

    folder, chosen = split_glob(dictionary)
    path = Path(folder)
    if chosen is not None:
        return Path("-".join(filter(None, (path.name, re.sub(r"[^a-zA-Z0-9.]+", "_", chosen).strip("_")))))
    return path if path.is_dir() else Path(path.name)


def show(result: dict[str, Any]) -> str:
    """The figures of `evaluate`, less the histogram and the intervals; then the main figures of each other metric."""
    hidden = ("density_edges", "density_counts", "intervals", "points", "layers", *_SHOWN)
    rows = [lines({key: value for key, value in result.items() if key not in hidden})]
    intervals = result.get("intervals", {})
    rows += [
        f"{name.replace('_', ' ')}: 95 % {low:.4g} to {high:.4g}"
        for name, (low, high) in intervals.items()
        if None not in (low, high)
    ]
    rows += _points(result.get("points", ())) + _layers(result.get("layers", ()))
    for name, shown in _SHOWN.items():
        if name in result:
            rows += ["", name, *shown(result[name])]
    return "\n".join(rows)


def _points(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The outputs of a dictionary that has several, each alone."""
    if len(found) < 2:
        return []
    rows = ["", "each output alone"]
    for point in found:
        near = f"FVU {_short(point['fvu'], '.4g')}, cosine {_short(point['cosine'])}, norm ratio {_short(point['norm_ratio'])}"
        rows.append(f"  {point['name']}: {near}, {_short(point['variance'], '.1%')} of the variance")
        if loss := point["loss"]:
            recovered = ", ".join(
                f"{what} recovered {_short(loss[f'{key}_recovered'])} against zeros, "
                f"{_short(loss[f'{key}_recovered_mean'])} against the mean"
                for what, key in (("CE", "ce"), ("KL", "kl"))
            )
            rows.append(
                f"    replaced: CE {_short(loss['delta_ce'], '+.4g')} nats, KL {_short(loss['kl_spliced'], '.4g')}; {recovered}"
            )
    return rows


def _layers(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The latents of a cross-layer transcoder, by the input that they read."""
    rows = [
        f"  {layer['name']}: L0 {layer['l0']:.4g}, {layer['n_dead']:,} of {layer['n_latents']:,} dead"
        for layer in found
    ]
    return ["", "latents by what they read", *rows] if rows else []


def _short(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _estimate(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    interval = "" if figure["low"] is None else f" ({figure['low']:.3f} to {figure['high']:.3f})"
    return f"{figure['value']:.3f}{interval}"


def _geometry(found: Mapping[str, Any]) -> list[str]:
    above, chance = found["above"], found["random_above"]
    return [
        f"  nearest neighbour's cosine: mean {found['nearest_mean']:.3f}, of random directions {found['random_mean']:.3f}",
        *(f"  above {t}: {above[t]:.2%} of latents, of random directions {chance[t]:.2%}" for t in above),
    ]


def _probing(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for task in found["tasks"]:
        sparse = "  ".join(f"top {k} {figure['value']:.3f}" for k, figure in task["sparse"].items())
        name = f"{task['task']}: {task['attribute']}"
        whole = f"all {task['all_latents']['value']:.3f}  model {_estimate(task['model'])}  chance {task['chance']:.2f}"
        unknown = task["model"]["low"] is None or task["model"]["low"] <= task["chance"]
        rows.append(f"  {name:<34}{sparse}  {whole}{'; the model does not tell these apart' if unknown else ''}")
    mean = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found["mean"].items())
    return [*rows, f"  mean  {mean}"]


def _absorption(found: Mapping[str, Any]) -> list[str]:
    said = [
        f"  {name.replace('_', ' ')}: {_estimate(found[name])}"
        for name in ("splits", "fraction", "full", "probe_f1", "sparse_f1", "spelling")
    ]
    said.append(f"  chance of the model's spelling: {found['chance']:.3f}; {found['n_words']} words")
    return [*said, *(f"  note: {note}" for note in found["notes"])]


def _scr(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for pair in found:
        name = f"  {pair['task']}: {pair['wanted']} without {pair['spurious']}"
        accuracies = f"biased {pair['biased']:.3f}, clean {pair['clean']:.3f}"
        scores = {} if pair["score"] is None else pair["score"]
        rows.append(f"{name}  {accuracies}{'' if scores else '; no gap to close'}")
        rows += [f"    {count} latents: {_estimate(score)}" for count, score in scores.items()]
    return rows


def _tpp(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for task in found:
        rows.append(f"  {task['task']}  accuracy {task['accuracy']:.3f}")
        rows += [
            f"    {count} latents: {_estimate(score)}  intended {task['intended'][count]:.3f}, "
            f"unintended {task['unintended'][count]:.3f}"
            for count, score in task["score"].items()
        ]
    return rows


def _ravel(found: Mapping[str, Any]) -> list[str]:
    rows = [
        f"  the model on {one['attribute']}: {one['accuracy']:.3f} (chance {one['chance']:.3f})"
        for one in found["answered"]
    ]
    chosen = {f"{n} latents": one for n, one in found["by_count"].items()} | {"learned mask": found["masked"]}
    for name, one in {**chosen, "all latents": found["whole"]}.items():
        if one is None:
            continue
        rows.append(f"  {name}: {_estimate(one['score'])}")
        for attribute, cause in one["cause"].items():
            kept = ", ".join(f"{other} {_estimate(figure)}" for other, figure in one["isolation"][attribute].items())
            n = "" if name != "learned mask" else f" ({one['n_latents'][attribute]:.4g} latents)"
            rows.append(f"    {attribute}{n}: cause {_estimate(cause)}; isolation of {kept}")
    return rows


_SHOWN: dict[str, Callable[[Any], list[str]]] = {
    "geometry": _geometry,
    "probing": _probing,
    "absorption": _absorption,
    "scr": _scr,
    "tpp": _tpp,
    "ravel": _ravel,
}
