"""`microtome circuit`: find the circuit of a task, or measure one that was found."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from microtome.cli.options import CommandOptions
from microtome.common.device import DTypeName
from microtome.common.errors import ConfigError

if TYPE_CHECKING:
    from microtome.circuits import Circuit, CircuitRunner

Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="STR ...")]
# How a circuit is found where nothing is said. The options themselves have no default, so that a said one is known.
_SEARCH: dict[str, Any] = {
    "edges": 500, "method": "eap-ig", "rule": "none", "steps": 5, "tau": 0.01, "how": "greedy", "by": "size"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Find the edges that a task runs on, keep the best of them as a circuit, and measure its faithfulness: how much of
    logit(answer) − logit(wrong) is left when all other edges carry what the corrupt prompt gives."""

    clean: Texts
    """The clean prompt, or several."""
    corrupt: Texts
    """A corrupt prompt of as many tokens for each clean one."""
    answer: Texts
    """The right next token, one for all prompts or one for each; mind the space in front of it."""
    wrong: Texts
    """The wrong next token, likewise."""
    circuit: Path | None = None
    """Measure this circuit instead of finding one."""
    edges: int | None = None
    """How many edges to keep at most (not said: 500)."""
    method: str | None = None
    """How edges are scored: eap, eap-ig (not said: this) or eap-ig-activations; or acdc, which tries each of the best
    edges."""
    rule: str | None = None
    """none (not said: this), relp, frozen_norms, frozen_patterns, identity_activations or half_gates."""
    steps: int | None = None
    """Points on the line along which gradients are integrated (not said: 5)."""
    tau: float | None = None
    """For acdc: an edge is taken out if KL divergence rises by less (not said: 0.01); the circuit of --edges edges is where
    it begins."""
    how: str | None = None
    """greedy: from the logits backwards (not said: this); top: the best of all."""
    by: str | None = None
    """size: the largest effects (not said: this); negative: those that help first; positive: those that hurt first."""
    replace: str = "counterfactual"
    """What the other edges carry: counterfactual, mean or resample."""
    curve: bool = False
    """Measure circuits of growing size too (CPR and CMD), beside a random one."""
    seed: int | None = None
    """Of the random circuit of --curve, and of --replace resample (not said: 0)."""
    model: str = "smollm2-135m"
    """Built-in name, Hugging Face id, local folder or GGUF file."""
    dtype: DTypeName = "fp32"
    """The dtype the model computes in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    rows: int = 8
    """Prompts run at once: bounds memory."""
    top: int = 10
    """How many of the largest edges to show."""
    out: Path | None = None
    """Save the circuit as this JSON file."""
    figure: Path | None = None
    """Draw the circuit as .svg or .dot."""
    overwrite: bool = False
    """Replace the file --out if it is there."""


def run(options: Options) -> dict[str, Any]:
    """Find or load the circuit, measure it, and write what was asked for."""
    _check(options)
    from microtome.circuits import Circuit, circuit_runner, faithfulness, logit_difference
    from microtome.model import load_model

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    metric = logit_difference(model, list(options.answer), list(options.wrong))
    shared: dict[str, Any] = {"replace": options.replace, "rows": options.rows, "seed": options.seed or 0}
    on = circuit_runner(model, list(options.clean), list(options.corrupt), metric, **shared)
    found, more = (Circuit.load(options.circuit), {}) if options.circuit else _found(options, on)
    result = {
        "model": options.model,
        "circuit": {"n_edges": found.n_edges, "fraction": found.fraction, "nodes": [str(node) for node in found.nodes]},
        "made": dict(found.made),
        "faithfulness": faithfulness(on, found).to_json(),
        "top": [] if found.scores is None else [[str(edge), edge.score] for edge in found.top_edges(options.top)],
        **more,
    }
    if options.out is not None:
        result["out"] = str(found.save(options.out, overwrite=options.overwrite))
    if options.figure is not None:
        result["figure"] = str(found.draw().save(options.figure))
    return result


def _check(options: Options) -> None:
    from microtome.circuits.attribution_config import AttributeConfig

    if options.figure is not None and options.figure.suffix not in (".svg", ".dot"):
        raise ConfigError("A circuit is drawn as SVG or as Graphviz text", got=options.figure, expected=".svg or .dot")
    if options.out is not None and options.out.exists() and not options.overwrite:
        raise ConfigError(f"{options.out} is already there", fix="Choose another name, or say --overwrite")
    if options.edges is not None and options.edges < 1:
        raise ConfigError("A circuit cannot have so many edges", got=options.edges, expected="1 or more")
    if options.seed is not None and not options.curve and options.replace != "resample":
        raise ConfigError(
            "Nothing is drawn, so --seed would change nothing",
            got=f"--seed {options.seed}",
            fix="Leave it out, or say --replace resample or --curve",
        )
    said = [name for name in _SEARCH if getattr(options, name) is not None]
    if options.circuit is not None and options.curve:
        raise ConfigError("A curve is of circuits of growing size, not of one", fix="Leave out --circuit or --curve")
    if options.circuit is not None and said:
        raise ConfigError(
            "With --circuit nothing is searched for: the circuit is measured as it is",
            got=", ".join(f"--{name}" for name in said),
            fix="Leave that out, or leave out --circuit",
        )
    method = options.method or _SEARCH["method"]
    scored = AttributeConfig(
        level="edge", method="eap-ig" if method == "acdc" else method
    )  # raises for one that is not there
    for name, used, by in (("tau", method == "acdc", "acdc"), ("steps", scored.path is not None, "eap-ig")):
        if name in said and not used:
            raise ConfigError(
                f"--{name} is not used by the method {method}",
                got=f"--{name} {getattr(options, name)}",
                fix=f"Leave it out, or say --method {by}",
            )


def _found(options: Options, on: "CircuitRunner") -> tuple["Circuit", dict[str, Any]]:
    """The circuit of the best edges, and the curves if they were asked for."""
    from microtome.circuits import Rules, acdc, attribute, circuit_runner, faithfulness_curve, prune, random_scores

    said = {name: getattr(options, name) for name in _SEARCH if getattr(options, name) is not None}
    search = {**_SEARCH, **said}
    how, by, tau = search["how"], search["by"], search["tau"]
    model, texts = on.model, (list(options.clean), list(options.corrupt))
    scores = attribute(
        model, *texts, on.metric, level="edge", method="eap-ig" if search["method"] == "acdc" else search["method"],
        steps=search["steps"], rules=Rules.named(search["rule"]), batch_size=options.rows,
    )  # fmt: skip
    found = prune(model, scores, search["edges"], how=how, by=by)
    if search["method"] == "acdc":
        by_kl = circuit_runner(model, *texts, replace=options.replace, rows=options.rows, seed=options.seed or 0)
        found = acdc(by_kl, tau=tau, begin=found)
        if not found.n_edges:
            raise ConfigError("No edge is worth its place at this --tau", got=tau, fix="Choose a smaller one")
    if not options.curve:
        return found, {}
    curves = {
        "curve": faithfulness_curve(on, scores, how=how, by=by),
        "random": faithfulness_curve(on, random_scores(on.graph, options.seed or 0), how=how),
    }
    return found, {name: curve.to_json() for name, curve in curves.items()}


def show(result: dict[str, Any]) -> str:
    """Faithfulness, curves, the largest edges."""
    f, circuit = result["faithfulness"], result["circuit"]
    n = f["n_prompts"]
    interval = f" ({f['low']:.3f} to {f['high']:.3f})" if n > 1 else ""
    heads = sum(".H" in node for node in circuit["nodes"])
    rows = [
        f"{circuit['n_edges']:,} edges ({circuit['fraction']:.2%} of the model's), {heads} heads, "
        f"{sum('mlp' in node for node in circuit['nodes'])} MLPs",
        f"faithfulness {f['faithfulness']:.3f}{interval} over {n} prompt{'s' * (n > 1)}: {f['metric']} "
        f"{f['circuit']:.3f}, whole model {f['full']:.3f}, {f['replace']} {f['empty']:.3f}",
    ]
    for name in ("curve", "random"):
        if name in result:
            of = result[name]
            rows.append(f"{name}: CPR {of['cpr']:.3f}, CMD {of['cmd']:.3f}")
            rows += [
                f"  {n:>9,} edges   {value:.3f}" for n, value in zip(of["n_edges"], of["faithfulness"], strict=True)
            ]
    rows += [f"  {edge:<28}{score:>+9.4f}" for edge, score in result["top"]]
    return "\n".join([*rows, *(result[name] for name in ("out", "figure") if name in result)])
