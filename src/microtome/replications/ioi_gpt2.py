"""What Wang et al. 2022 say of GPT-2 small, as claims: its 26 heads and their figures. Not applicable elsewhere."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from microtome.replications.ioi_circuit import IOICircuit, Minimality, kept, minimality
from microtome.replications.ioi_findings import Findings
from microtome.replications.ioi_steps import Head, Study, knock_out_mean, name_of
from microtome.replications.known import is_gpt2_small
from microtome.views import Check, Claim, at_least, at_most, between, equal, near

_SOURCE = "Wang et al. 2022 (arXiv 2211.00593)"
GPT2_CIRCUIT = IOICircuit(
    {
        "name mover": ((9, 9), (10, 0), (9, 6)),
        "backup name mover": ((9, 0), (9, 7), (10, 1), (10, 2), (10, 6), (10, 10), (11, 2), (11, 9)),
        "negative mover": ((10, 7), (11, 10)),
        "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
        "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
        "duplicate token": ((0, 1), (0, 10), (3, 0)),
        "previous token": ((2, 2), (4, 11)),
    }
)
_MOVERS, _NEGATIVE, _INHIBITION = (
    GPT2_CIRCUIT.classes[kind] for kind in ("name mover", "negative mover", "S-inhibition")
)


@dataclass(frozen=True)
class _Said:
    """What the paper says of GPT-2 small, and how it is measured, which is done only where it applies."""

    name: str
    statement: str
    check: Check
    measure: Callable[[], float | str]
    note: str = ""

    def claim(self, *, applies: bool) -> Claim:
        return Claim(
            f"gpt2_{self.name}",
            f"GPT-2 small: {self.statement}",
            self.check,
            self.measure() if applies else None,
            not_applicable="" if applies else "needs gpt2's weights, without BOS",
            source=_SOURCE,
            note=self.note,
        )


def gpt2_claims(found: Findings, *, apply: bool | None = None) -> list[Claim]:
    """The paper's claims, measured where the model is GPT-2 small run without BOS (or, with `apply`, on any of 12 × 12 heads)."""
    applies = is_gpt2_small(found.model) and not found.config.prepend_bos if apply is None else apply
    said = [*_of_the_task(found), *_of_paths(found), *_of_heads(found), *_of_the_circuit(found)]
    return [one.claim(applies=applies) for one in said]


def _of_the_task(found: Findings) -> list[_Said]:
    def base(variant: str, measure: str) -> float:
        return found.baselines[variant].summary()[measure][0]

    return [
        _Said("difference", "mean logit difference", near(3.56, 0.25), lambda: base("plain", "difference")),
        _Said("right", "share of prompts with IO > S", near(0.993, 0.01), lambda: base("plain", "right")),
        _Said("probability", "P(IO)", near(0.49, 0.04), lambda: base("plain", "probability")),
        _Said(
            "extra_io",
            "share wrong where the IO is said twice",
            near(0.234, 0.05),
            lambda: 1 - base("extra_io", "right"),
        ),
        _Said(
            "extra_subject",
            "share wrong where S is said once more",
            near(0.004, 0.01),
            lambda: 1 - base("extra_subject", "right"),
        ),
    ]


def _of_paths(found: Findings) -> list[_Said]:
    def strongest(through: str, sign: int, n: int) -> str:
        flat = (found.passes.effects[through].mean * sign).flatten().argsort(descending=True)[:n].tolist()
        return _listed([divmod(i, found.model.config.n_heads) for i in flat])

    return [
        _Said(
            "movers",
            "the three heads that carry most to the logits",
            equal(_listed(_MOVERS)),
            lambda: strongest("logits", -1, 3),
        ),
        _Said(
            "negative",
            "the two heads that take most away",
            equal(_listed(_NEGATIVE)),
            lambda: strongest("logits", 1, 2),
        ),
        _Said(
            "s_inhibition",
            "the four heads that carry most to the movers' queries",
            equal(_listed(_INHIBITION)),
            lambda: strongest("queries", -1, 4),
        ),
    ]


def _of_heads(found: Findings) -> list[_Said]:
    raised, lowered = found.copies
    return [
        _Said(
            "copying",
            "least copy score of the name movers",
            at_least(0.9),
            lambda: min(float(raised[head]) for head in _MOVERS),
        ),
        _Said(
            "anti_copying",
            "least negative copy score of the negative movers",
            at_least(0.9),
            lambda: min(float(lowered[head]) for head in _NEGATIVE),
        ),
        _Said(
            "attention",
            "attention of the name movers from END to IO",
            near(0.59, 0.1),
            lambda: sum(float(found.looks["END", "IO"][head].mean()) for head in _MOVERS) / len(_MOVERS),
        ),
        _Said(
            "inhibition_attention",
            "attention of the S-inhibition heads from END to S2",
            near(0.51, 0.1),
            lambda: sum(float(found.looks["END", "S2"][head].mean()) for head in _INHIBITION) / len(_INHIBITION),
        ),
    ]


def _of_the_circuit(found: Findings) -> list[_Said]:
    study = found.held_out
    return [
        _Said(
            "without_movers",
            "change of the logit difference without its three name movers, as a share",
            between(-0.15, 0.05),
            lambda: knock_out_mean(study, _MOVERS) / study.full - 1,
            note="paper: −5 %",
        ),
        _Said("faithful", "F(C)/F(M) of the paper's 26 heads", near(0.87, 0.1), lambda: _faithful(study)),
        _Said(
            "minimal",
            "how many of the 26 heads matter less than 1 %",
            at_most(2),
            lambda: sum(one.share < 0.01 for one in _minimal(study)),
            note="K is empty or the rest of the class, not the paper's published sets",
        ),
    ]


def _faithful(study: Study) -> float:
    return float(kept(study, [GPT2_CIRCUIT.members(study.data)]).mean()) / study.full


def _minimal(study: Study) -> list[Minimality]:
    return minimality(study, GPT2_CIRCUIT)


def _listed(heads: Iterable[Head]) -> str:
    return ", ".join(name_of(head) for head in sorted(heads))
