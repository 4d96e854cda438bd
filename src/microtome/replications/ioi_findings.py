"""All that the IOI replication measures on a model, in order. The report (`ioi_report.py`) only shows it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from microtome.circuits import HeadScores, head_scores
from microtome.circuits.rows import Positions
from microtome.common.config import require
from microtome.model import HookedModel
from microtome.replications import ioi_circuit as circuits
from microtome.replications import ioi_steps as steps
from microtome.replications.ioi_circuit import Completeness, Faithfulness, IOICircuit, Minimality
from microtome.replications.ioi_classes import Find, Looks, Passes, Rules, find_heads
from microtome.replications.ioi_prompts import TEMPLATES, IOIPrompts, Variant, Words, examples
from microtome.replications.ioi_steps import Backup, Baseline, Head, Study, Writing

# The baselines: which prompts, and whether the BOS is the other way round than for all else.
BASELINES: dict[str, tuple[Variant, bool]] = {
    "plain": ("plain", False),
    "extra_io": ("extra_io", False),
    "extra_subject": ("extra_subject", False),
    "other_bos": ("plain", True),
}
SCORES = ("induction", "duplicate_token", "previous_token")


@dataclass(frozen=True, kw_only=True)
class IOIConfig:
    """How much is run, and the thresholds. Raises ConfigError for numbers that cannot be."""

    prompts: int = 1000
    """For the baseline."""
    variants: int = 300
    """For the baselines of the adversarial variants, and with BOS."""
    patched: int = 100
    """For path patching, and for the choice of the circuit."""
    held_out: int = 60
    """For the measures of the circuit: prompts of another seed."""
    reference: int = 180
    """Counterfactuals for the means of each template and order."""
    templates: int = len(TEMPLATES)
    direct: float = 0.02
    """The least effect on the logits by which a head is a find, as a share of F(M)."""
    further: float = 0.01
    """The same for the passes behind the first."""
    look: float = 0.1
    """The least attention by which a class is named."""
    most: int = 6
    """How many heads a pass can find."""
    max_share: float = 0.15
    """How many of all heads the circuit may have."""
    faithful: float = 0.8
    """The share of F(M) that the circuit shall reach."""
    greedy_step: int = 1
    """How many heads are added before the next estimate."""
    random_sets: int = 8
    set_steps: int = 5
    """Steps of the greedy search for an incomplete set; at each, `set_tried` heads are tried."""
    set_tried: int = 4
    prepend_bos: bool = False
    """Without, as in the paper; the report has the baseline with it too, where the tokenizer has one."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "variants", "patched", "held_out", "reference", "templates", "most", "greedy_step"):
            require(getattr(self, name) > 0, f"{name} must be positive", got=getattr(self, name))
        require(0 < self.max_share <= 1, "max_share is a share of all heads", got=self.max_share)

    @property
    def rules(self) -> Rules:
        return Rules(direct=self.direct, further=self.further, look=self.look, most=self.most)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was measured. `chosen` has (heads, F(C)/F(M)) of the circuits of the greedy step on the prompts of the choice;
    `faithfulness` has several circuits by name, on held-out prompts."""

    config: IOIConfig
    model: HookedModel
    words: Words
    study: Study
    held_out: Study
    baselines: Mapping[str, Baseline]
    looks: Looks
    passes: Passes
    copies: tuple[Tensor, Tensor]
    writings: Mapping[Head, Writing]
    scores: HeadScores
    backup: Backup
    backups: Sequence[Head]
    chosen: Sequence[tuple[int, float]]
    circuit: IOICircuit
    faithfulness: Mapping[str, Faithfulness]
    completeness: Sequence[Completeness]
    minimality: Sequence[Minimality]

    @property
    def movers(self) -> list[Head]:
        """The name movers; where no head is one, the heads that stood in for them."""
        return self.passes.receivers["queries"]


def n_steps(config: IOIConfig) -> int:
    """How often `measure` tells what it did."""
    return len(BASELINES) + 4 + 9


def measure(config: IOIConfig, model: HookedModel, told: Callable[[str], None]) -> Findings:
    """Everything, in the paper's order."""
    bos = config.prepend_bos
    words = Words.of(model)

    def study_of(n: int, seed: int) -> Study:
        return Study.of(
            model, words, n, seed=seed, templates=config.templates, n_reference=config.reference, prepend_bos=bos
        )

    baselines = _baselines(model, words, config, told)
    study, held_out = study_of(config.patched, config.seed), study_of(config.held_out, config.seed + 1)
    looks = steps.looks(study)
    told("attention")
    copies = steps.copy_scores(study)
    told("copying")
    passes = find_heads(study, looks, copies, config.rules, told=told)
    movers = passes.receivers["queries"]
    writings = steps.writing(study, list(dict.fromkeys([*movers, *passes.of("negative mover")])), looks)
    told("writing")
    scores = head_scores(
        model, kinds=SCORES, length=min(50, model.config.n_ctx // 2 - 1), with_bos=bos, seed=config.seed
    )
    told("scores on random tokens")
    backup = steps.backup(study, movers)
    backups = _backups(study, passes, backup, config)
    told("without the movers")
    circuit, chosen, prefixes = _grown(study, IOICircuit(passes.classes), config)
    told("the greedy step")
    faithfulness = _faithfulness(held_out, circuit, prefixes)
    told("faithfulness")
    completeness = _completeness(held_out, circuit, config)
    told("completeness")
    minimality = circuits.minimality(held_out, circuit)
    told("minimality")
    return Findings(
        config=config,
        model=model,
        words=words,
        study=study,
        held_out=held_out,
        baselines=baselines,
        looks=looks,
        passes=passes,
        copies=copies,
        writings=writings,
        scores=scores,
        backup=backup,
        backups=backups,
        chosen=chosen,
        circuit=circuit,
        faithfulness=faithfulness,
        completeness=completeness,
        minimality=minimality,
    )


def _baselines(
    model: HookedModel, words: Words, config: IOIConfig, told: Callable[[str], None]
) -> dict[str, steps.Baseline]:
    """The task itself, on prompts of each kind."""
    found = {}
    for name, (variant, other) in BASELINES.items():
        n = config.prompts if name == "plain" else config.variants
        made = examples(words, n, seed=config.seed, templates=config.templates, variant=variant)
        found[name] = steps.baseline(model, IOIPrompts.of(model, made, prepend_bos=config.prepend_bos != other))
        told(f"baseline, {name}")
    return found


def _completeness(held_out: Study, circuit: IOICircuit, config: IOIConfig) -> list[Completeness]:
    """Without each class, without random sets, and without the worst set that is found."""
    sets = {**circuit.classes, **circuits.random_sets(circuit, config.random_sets, seed=config.seed)}
    worst = circuits.greedy_set(held_out, circuit, steps=config.set_steps, tried=config.set_tried, seed=config.seed)
    return [*circuits.completeness(held_out, circuit, sets), *worst]


def _backups(study: Study, passes: Passes, backup: Backup, config: IOIConfig) -> list[Head]:
    """Heads that write more of the answer once the movers are gone; they join the finds."""
    known = {find.head for find in passes.finds if find.through == "logits"}
    found = [h for h in steps.passing(backup.more, config.direct, study.full, sign=1) if h not in known][: config.most]
    low, high = backup.more.interval()
    for head in found:
        values = (float(backup.more.mean[head]), float(low[head]), float(high[head]))
        effect, *ends = (value / study.full for value in values)
        passes.finds.append(Find(head, "backup name mover", "knock-out", effect, min(ends), max(ends)))
    return found


def _grown(
    study: Study, start: IOICircuit, config: IOIConfig
) -> tuple[IOICircuit, list[tuple[int, float]], dict[str, IOICircuit]]:
    """The circuit of the classes, with as many heads added as reach the aim on the prompts of the choice (0.05 more, as
    held-out prompts will have less); with all that may be added where none does."""
    most = int(config.max_share * study.model.config.n_layers * study.model.config.n_heads)
    order = circuits.greedy_order(study, start, max(0, most - len(start.heads)), step=config.greedy_step)
    sizes = range(0, len(order) + 1, config.greedy_step)
    grown = [start.plus(order[:i]) if i else start for i in sizes]
    values = circuits.kept(study, [one.members(study.data) for one in grown]).mean(1) / study.full
    reached = [i for i, value in enumerate(values.tolist()) if value >= config.faithful + 0.05]
    best = grown[reached[0]] if reached else grown[int(values.argmax())]
    chosen = [(len(one.heads), value) for one, value in zip(grown, values.tolist(), strict=True)]
    return best, chosen, {"heads of the classes, at their places": start}


def _faithfulness(study: Study, circuit: IOICircuit, others: Mapping[str, IOICircuit]) -> dict[str, Faithfulness]:
    """On held-out prompts: the circuit, what it was made from, and the two ends, no heads and all."""
    data = study.data
    [start] = others.values()
    every: dict[str, Positions] = {
        steps.name_of((i, j)): None
        for i in range(study.model.config.n_layers)
        for j in range(study.model.config.n_heads)
    }
    sets: dict[str, tuple[circuits.Set, int]] = {
        "the circuit": (circuit.members(data), len(circuit.heads)),
        "its heads at all positions": (circuit.members(data, everywhere=True), len(circuit.heads)),
        **{name: (one.members(data), len(one.heads)) for name, one in others.items()},
        "heads of the classes, at all positions": (start.members(data, everywhere=True), len(start.heads)),
        "no head": ({}, 0),
        "all heads": (every, len(every)),
    }
    values = circuits.kept(study, [members for members, _ in sets.values()])
    full = values[-1]
    return {name: Faithfulness.of(values[i], full, n) for i, (name, (_, n)) in enumerate(sets.items())}
